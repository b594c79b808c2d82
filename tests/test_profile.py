"""Where a prefill's time goes: parts add up, watching changes nothing, the floor does the least work and no less."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from adaptinfer import AdaptInfer, Schedule, Stage, attach
from adaptinfer.bench import shapes
from adaptinfer.bench.measure import Bench
from adaptinfer.bench.prompts import picture_for, prompt
from adaptinfer.bench.roofline import layer_tokens
from adaptinfer.bench.timing import Clock, Mark
from adaptinfer.engine import attention
from adaptinfer.engine.hooks import STAGE_WORK
from adaptinfer.errors import InputError

sys.path.insert(0, str(Path(__file__).parents[1] / "research"))
import performance_tables
import profile_prefill
import steps
from floor import Floor
from watch import IN_LAYERS, OUTSIDE, PARTS, SCORING, STAGES, Watch

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "results" / "performance.md").read_text(encoding="utf-8")
TEXT = 14


@pytest.fixture(scope="module")
def bench():
    model = shapes.build("tiny", "float32", "cpu")
    return Bench(model, prompt(picture_for(model.config), 100, 5, 9, 1, "cpu", "float32"), "cpu")


class Shapes:
    """Rows that each layer's modules are given, in the order in which they are called."""

    def __init__(self, model) -> None:
        self.rows: list[tuple[int, str, int]] = []
        self._hooks = []
        for number, layer in enumerate(model.get_decoder().layers):
            attention = layer.self_attn
            watched = {"q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj}
            watched |= {"o": attention.o_proj.forward, "mlp": layer.mlp.forward}
            for name, module in watched.items():
                if name in ("o", "mlp"):  # inside of the engine's hooks
                    owner = attention.o_proj if name == "o" else layer.mlp
                    owner.forward = self._spy(number, name, module)
                    self._hooks.append(lambda owner=owner: vars(owner).pop("forward"))
                else:
                    hook = module.register_forward_pre_hook(self._noted(number, name))
                    self._hooks.append(hook.remove)

    def _noted(self, number, name):
        return lambda module, args: self.rows.append((number, name, args[0].shape[1]))

    def _spy(self, number, name, forward):
        def spy(hidden):
            self.rows.append((number, name, hidden.shape[1]))
            return forward(hidden)

        return spy

    def __enter__(self):
        return self.rows

    def __exit__(self, *_):
        for undo in self._hooks:
            undo()


# ---------------------------------------------------------------------------------------------------- the floor


@pytest.mark.parametrize("early_drop", [True, False])
@pytest.mark.parametrize("budget", [48, 21, 14, 7])
def test_the_floor_works_on_the_tokens_of_a_pruned_run(bench, budget, early_drop):
    """In every matrix of every layer, counted where they are multiplied; and as many as the report says."""
    model = bench.model
    with Shapes(model) as pruned, attach(model, AdaptInfer(budget=budget), early_drop=early_drop) as handle:
        bench.first_token()
    report = handle.report
    tokens = layer_tokens(report.schedules[0], 64, TEXT, early_drop)
    assert [entered - TEXT for entered, _ in tokens] == [*report.tokens_per_layer[0]]
    assert report.stages and sum(a != b for a, b in tokens) == (len(report.stages) if early_drop else 0)
    run = Floor(model, 1).prepared(tokens)
    with Shapes(model) as least:
        run()
    assert least == pruned


@pytest.mark.parametrize("kept", [40, 39, 20, 2])
def test_a_layer_of_the_floor_that_drops_is_the_layer(bench, kept):
    """Attending all rows (40 of 78 and more) and the survivors alone: what the last rows come to."""
    model = bench.model
    layers = model.get_decoder().layers
    tokens = [(78, 78)] * 3 + [(78, kept)] + [(kept, kept)] * (len(layers) - 4)
    floor = Floor(model, 1)
    found = floor.prepared(tokens)()

    late = [(78, 78)] * 4 + [(kept, kept)] * (len(layers) - 4)  # the same, without early drop
    torch.testing.assert_close(found, floor.prepared(late)(), atol=1e-5, rtol=1e-5)
    assert found.shape == (1, kept, 64) and torch.isfinite(found).all()


@torch.inference_mode()
def test_the_floor_of_all_tokens_is_the_decoder(bench):
    decoder = bench.model.get_decoder()
    found = Floor(bench.model, 2).prepared([(30, 30)] * len(decoder.layers))()
    hidden = torch.randn(2, 30, 64, generator=torch.Generator().manual_seed(0))
    cache = DynamicCache(config=bench.model.config.get_text_config())
    expected = decoder(inputs_embeds=hidden, past_key_values=cache, use_cache=True).last_hidden_state
    torch.testing.assert_close(decoder.norm(found), expected, atol=1e-5, rtol=1e-5)


def test_the_floor_of_other_layers_is_refused():
    layers = torch.nn.ModuleList([torch.nn.Module()])
    layers[0].self_attn = torch.nn.Linear(2, 2)
    layers[0].self_attn.config, layers[0].self_attn.layer_idx = None, 0
    decoder = SimpleNamespace(layers=layers)
    config = SimpleNamespace(get_text_config=lambda: None)
    with pytest.raises(InputError, match="of the Llama kind only"):
        Floor(SimpleNamespace(get_decoder=lambda: decoder, config=config), 1)


# ---------------------------------------------------------------------------------------------------- the watch


class Ticks(Clock):
    """A clock that stands still unless told."""

    now = 0.0

    def __init__(self) -> None:
        super().__init__("cpu")

    def mark(self) -> Mark:
        return Mark(self.now / 1000)


def test_every_moment_belongs_to_the_innermost_part():
    clock = Ticks()
    watch = Watch(clock)

    def wait(ms, *inner):
        def work():
            clock.now += ms
            for function in inner:
                function()
            clock.now += 1

        return work

    scoring = watch.timed(wait(4), SCORING)
    stage = watch.timed(wait(10, scoring, scoring), STAGES)
    mlp = watch.timed(wait(100, stage), "MLP")  # closed: what runs inside is its own
    found = watch.parts(wait(1000, stage, mlp))
    assert found == pytest.approx({OUTSIDE: 1001, STAGES: 11, SCORING: 10, "MLP": 100 + 11 + 10 + 1})
    assert sum(found.values()) == pytest.approx(clock.now)
    stage()  # nothing is watched
    assert watch.parts(wait(1)) == pytest.approx({OUTSIDE: 2})


def test_a_failure_leaves_the_watch_usable():
    clock = Ticks()
    watch = Watch(clock)

    def fail():
        clock.now += 3
        raise ValueError

    with pytest.raises(ValueError):
        watch.parts(watch.timed(fail, SCORING))
    assert watch.parts(lambda: None) == {OUTSIDE: 0}


def test_watching_changes_no_answer_and_leaves_nothing(bench):
    model = bench.model
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]
    functions = [getattr(owner, name) for owner, name in STAGE_WORK]
    pruner = AdaptInfer(budget=14)
    with attach(model, pruner):
        expected = bench.first_token()[0].logits
    seen = Watch(bench.clock)
    found = []
    with seen.on(model), attach(model, seen.scoring(pruner)) as handle:
        parts = seen.parts(lambda: found.append(bench.first_token()))
    assert torch.equal(found[0][0].logits, expected)
    assert [*parts] == [*PARTS] and min(parts.values()) > 0
    assert len(handle.report.stages) >= 2
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own
    assert [getattr(owner, name) for owner, name in STAGE_WORK] == functions
    assert not any("forward" in vars(module) for module in model.modules())
    with attach(model, pruner):
        assert torch.equal(bench.first_token()[0].logits, expected)


def test_the_parts_of_vanilla_are_its_own(bench):
    seen = Watch(bench.clock)
    with seen.on(bench.model):
        parts = seen.parts(bench.first_token)
    assert {*PARTS} - {*parts} == {SCORING, STAGES}


def test_every_call_is_counted_in_its_part(bench):
    """Two stages of 12 layers: marks are counted by part, so that one that slips into another is found."""
    model, seen = bench.model, Watch(bench.clock)
    schedule = Schedule((Stage(2, 20), Stage(5, 6)), 12)
    with seen.on(model), attach(model, seen.scoring(AdaptInfer(schedule=schedule))):
        seen.parts(bench.first_token)
    opened, open_now = [], []
    for part, _ in seen.marks:  # a mark either opens a part or returns to the one around it
        if len(open_now) > 1 and open_now[-2] == part:
            open_now.pop()
        else:
            open_now.append(part)
            opened.append(part)
    counts = {part: opened.count(part) for part in PARTS}
    assert counts["q, k, v"] == 36 and counts["rotary embedding"] == counts["attention"] == 12
    assert counts["MLP"] == counts["output projection"] == 12 and counts["norms"] == 24
    assert counts[SCORING] == 2 and counts["vision tower"] == counts["head"] == counts["projector"] == 1
    # Each layer's entry and attention function; in each of two stages, before and after o_proj and MLP.
    assert counts[STAGES] == 2 * 12 + 2 * 4


def test_only_sdpa_is_watched():
    model = shapes.build("tiny", "float32", "cpu", attention="eager")
    with pytest.raises(InputError, match="only 'sdpa'"), Watch(Clock("cpu")).on(model):
        pass


# ---------------------------------------------------------------------------------------------------- the scripts


def _run(script, monkeypatch, tmp_path, *arguments):
    path = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["script", "--shape", "tiny", "--warmup", "0", "--json", str(path), *arguments])
    script.main()
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_profile_as_a_user_makes_it(monkeypatch, tmp_path, capsys):
    arguments = ["--rounds", "3", "--budgets", "21", "--early-drop", "both", "--batch", "2"]
    content = _run(profile_prefill, monkeypatch, tmp_path, *arguments)
    printed = capsys.readouterr().out
    assert [entry["name"] for entry in content["variants"]] == ["vanilla", "adaptinfer 21", "adaptinfer 21, late"]
    assert content["environment"]["torch"] and content["setup"]["text_tokens"] == 92
    for entry in content["variants"]:
        raw = entry["raw"]
        assert {len(values) for values in raw.values()} == {3}
        floors = sorted(
            sum(parts.values()) / whole
            for parts, whole in zip(raw["floor_parts"], raw["decoder_prefill_ms"], strict=True)
        )
        assert entry["summary"]["share_of_floor"]["median"] == pytest.approx(floors[1])
        assert {*entry["floor_parts"]} == {*IN_LAYERS} - {SCORING, STAGES} | {"decoder, around its layers"}
        assert entry["name"] in printed
    early, late = (entry["tokens"] for entry in content["variants"][1:])
    assert [a for a, _ in early] == [a for a, _ in late] and early != late
    lines = performance_tables.profile_lines(content)
    assert len({line.count("|") for line in lines}) == 1 and any("share of the floor" in line for line in lines)


def test_steps_as_a_user_takes_them_back(monkeypatch, tmp_path):
    content = _run(steps, monkeypatch, tmp_path, "--rounds", "2", "--budget", "14")
    ways = {way["name"]: way for way in content["ways"]}
    assert [name[:2] for name in ways] == ["as", "3:", "4:", "5:", "8:"]
    for way in ways.values():
        raw, base = way["raw"]["decoder_prefill_ms"], ways[way["against"]]["raw"]["decoder_prefill_ms"]
        ratios = [a / b for a, b in zip(raw, base, strict=True)]
        assert way["ratio"]["decoder_prefill_ms"]["median"] == pytest.approx(sum(ratios) / 2)
        assert all(a < b for a, b in zip(raw, way["raw"]["first_token_ms"], strict=True))
    assert len({line.count("|") for line in performance_tables.steps_lines(content)}) == 1


def test_memory_of_the_survivors_masks(monkeypatch, tmp_path):
    content = _run(steps, monkeypatch, tmp_path, "--memory", "--budget", "14")
    assert [way["name"][:2] for way in content["peaks"]] == ["pr", "7:", "va"]
    assert content["peaks"][0]["kv_bytes"] == content["peaks"][1]["kv_bytes"] < content["peaks"][2]["kv_bytes"]
    assert attention.LARGEST_MASK == 2**20
    if "peak_above_idle_bytes" in content["peaks"][0]:
        assert len(performance_tables.memory_lines(content)) == 5


def test_what_is_taken_back_changes_no_answer(bench, monkeypatch):
    """The same first token and logits whether layers share their inputs or not; the switch is on while it lasts."""
    padded = next(way for way in steps.ways(bench) if way.name.startswith("4"))
    made = []
    remembered = steps.LayerInputs.remembered

    def counted(self, key, make, *operands):
        def counting():
            made.append(key[0])
            return make()

        return remembered(self, key, counting, *operands)

    monkeypatch.setattr(steps.LayerInputs, "remembered", counted)
    with attach(bench.model, AdaptInfer(budget=14)), torch.inference_mode():
        expected = bench.model(**padded.prompt.inputs).logits
        once = len(made)
        with steps.replaced(steps.LayerInputs, "remembered", lambda self, key, make, *_: made.append(key[0]) or make()):
            found = bench.model(**padded.prompt.inputs).logits
    assert torch.equal(found, expected)
    assert len(made) - once > 2 * once


# ---------------------------------------------------------------------------------------------------- the page


def test_the_pages_figures_are_those_of_the_committed_runs():
    for path, lines in performance_tables.committed():
        assert "\n".join(lines) in PAGE, f"docs/results/performance.md does not hold the table of {path.name}"
        assert f"`{path.name}`" in PAGE


def test_every_committed_result_that_the_page_names_is_there():
    (table,) = re.findall(r"\| step \|.*?\n\n", PAGE, flags=re.DOTALL)
    rows = table.strip().splitlines()[2:]
    assert len(rows) == 10
    for row in rows:
        result = row.rstrip(" |").rpartition("|")[2].strip()
        names = re.findall(r"`(\w[\w.-]*\.json)`", result)
        assert names or result == "none" or result.startswith("the same file"), result
        for name in names:
            assert (ROOT / "research" / "results" / name).is_file(), name


def test_a_table_is_asked_for_by_its_files_name(tmp_path):
    content = {"peaks": [{"name": "vanilla", "peak_above_idle_bytes": 2_000_000, "kv_bytes": 1_000_000}]}
    (tmp_path / "memory_narrow.json").write_text(json.dumps(content))
    ((path, lines),) = performance_tables.committed(tmp_path)
    assert path.name == "memory_narrow.json" and lines[-1] == "| vanilla | 2 | 1 |"
