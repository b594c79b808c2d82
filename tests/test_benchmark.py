"""`adaptinfer bench`: its arithmetic, its shapes, its prompts, what it refuses, and a run as a user makes it."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import stand_in
import torch
from graph_stand_in import StandIn
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from adaptinfer import AdaptInfer, Schedule, Stage, attach, preset
from adaptinfer.bench import measure, plot, shapes, subject
from adaptinfer.bench.environment import environment
from adaptinfer.bench.memory import PeakMemory, free_bytes
from adaptinfer.bench.prompts import picture_by_processor, picture_for, prompt
from adaptinfer.bench.results import published_figures
from adaptinfer.bench.roofline import Rates, prefill_bound_ms
from adaptinfer.bench.shapes import SHAPES
from adaptinfer.bench.subject import Subject
from adaptinfer.bench.timing import Clock, bound_share, order_of_round, paired_ratios, summarise
from adaptinfer.bench.variants import Variant, variants
from adaptinfer.cli.app import app
from adaptinfer.engine.graphs.compiled import Compiled
from adaptinfer.engine.handle import handle_of
from adaptinfer.errors import InputError
from adaptinfer.pruners import METHODS
from adaptinfer.schedule import ModelShape

VISION, LAYERS = 64, 12  # of the shape `tiny`
FAST = ["--shape", "tiny", "--device", "cpu", "--rounds", "3", "--warmup", "0"]


def _invoke(*arguments: str):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


# ---------------------------------------------------------------------------------------------------- arithmetic


def test_a_summary_is_median_quartiles_and_extremes():
    found = summarise([4.0, 1.0, 3.0, 2.0, 10.0])
    assert (found.least, found.lower_quartile, found.median, found.upper_quartile, found.most) == (1, 2, 3, 4, 10)
    assert summarise([1.0, 2.0, 3.0, 4.0]).lower_quartile == 1.75  # between the two nearest
    alone = summarise([7.0])
    assert {alone.least, alone.lower_quartile, alone.median, alone.upper_quartile, alone.most} == {7.0}


def test_ratios_are_taken_within_a_round():
    # A machine that gets five times slower in the second round changes no ratio.
    assert paired_ratios([10.0, 50.0], [5.0, 25.0]) == [2.0, 2.0]
    with pytest.raises(ValueError):
        paired_ratios([1.0], [1.0, 2.0])


def test_share_of_the_bound():
    assert bound_share(2.0, vanilla_flops=400.0, flops=100.0) == 0.5
    assert bound_share(1.0, vanilla_flops=100.0, flops=100.0) == 1.0


def test_who_goes_first_alternates():
    assert order_of_round("abc", 0) == list("abc") and order_of_round("abc", 1) == list("cba")


def test_the_roofline_takes_the_slower_of_work_and_weights():
    shape = ModelShape(2, 8, 2, 2, 4, 16)
    prompts = SimpleNamespace(vision_tokens=10, text_tokens=2, batch=3)
    schedule = Schedule((Stage(0, 4),), 2, 10)
    weights = 8 * 4 * (2 + 2 * 2) + 8 * (2 * 4 + 3 * 16)
    slow_reading = Rates(flops_per_s=1e30, bytes_per_s=1000.0)
    assert prefill_bound_ms(slow_reading, schedule, shape, prompts, True, 2) == pytest.approx(2 * weights * 2)
    slow_work = Rates(flops_per_s=1000.0, bytes_per_s=1e30)
    early = 3 * (shape.layer_flops(12, 6) + shape.layer_flops(6))
    late = 3 * (shape.layer_flops(12) + shape.layer_flops(6))
    assert prefill_bound_ms(slow_work, schedule, shape, prompts, True, 2) == pytest.approx(early)
    assert prefill_bound_ms(slow_work, schedule, shape, prompts, False, 2) == pytest.approx(late)
    assert early == 3 * schedule.prefill_flops(shape, 2)


# ---------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if shape.parameters])
def test_a_shape_has_the_published_size(name):
    model = shapes.outline(SHAPES[name].config(), "bfloat16", "sdpa")
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == pytest.approx(SHAPES[name].parameters, rel=0.01)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_presets_fit_the_shapes_they_are_named_after():
    for name in ("llava-1.5-7b", "llava-1.5-13b"):
        config = SHAPES[name].config()
        preset(f"{name}/64").check(config.text_config.num_hidden_layers)
        assert picture_for(config).vision_tokens == preset(f"{name}/64").vision_tokens
    assert picture_for(SHAPES["llava-next-7b"].config()).vision_tokens == 2880 + 48
    for name in ("qwen2.5-vl-7b", "qwen2.5-vl-narrow"):
        assert picture_for(SHAPES[name].config(), 3584).vision_tokens == 16384


def _shrunken(name: str):
    """A shape's config, every size of it small."""
    config = SHAPES[name].config()
    text, tower = config.text_config, config.vision_config
    wide = name.startswith("qwen")  # its rotary sections want 128 values a head
    text.num_hidden_layers, text.hidden_size, text.intermediate_size = 3, 256 if wide else 64, 48
    text.num_attention_heads, text.num_key_value_heads, text.vocab_size = 2 if wide else 4, 2, 1000
    text.head_dim = 128 if wide else 16
    config.image_token_id = 900
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:3]
    tower.hidden_size, tower.intermediate_size = 64, 48
    if wide:
        tower.depth, tower.num_heads, tower.fullatt_block_indexes, tower.out_hidden_size = 2, 4, [1], 256
        config.vision_start_token_id, config.vision_end_token_id, config.video_token_id = 901, 902, 903
    else:
        tower.num_hidden_layers, tower.num_attention_heads, tower.image_size, tower.projection_dim = 2, 4, 56, 64
    if hasattr(config, "image_grid_pinpoints"):
        config.image_grid_pinpoints = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
    return config


@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-next-7b", "qwen2.5-vl-7b", "qwen2.5-vl-narrow"])
def test_a_filled_model_is_as_transformers_builds_it_and_reads_its_picture(name):
    config = _shrunken(name)
    usual = AutoModelForImageTextToText.from_config(copy.deepcopy(config), dtype=torch.float32)
    model = shapes.fill(shapes.outline(config, "float32", "sdpa"), "cpu")
    ours, theirs = dict(model.named_buffers()), dict(usual.named_buffers())
    assert ours.keys() == theirs.keys() and ours
    for buffer, value in theirs.items():
        assert torch.equal(ours[buffer], value) and ours[buffer].dtype == value.dtype, buffer
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())

    picture = picture_for(config, 112 if name.startswith("qwen") else None)
    made = prompt(picture, config.text_config.vocab_size, 5, 9, 2, "cpu", "float32")
    with torch.inference_mode(), attach(model, AdaptInfer(budget=0.6)) as handle:
        logits = model(**made.inputs, logits_to_keep=1).logits
    assert torch.isfinite(logits).all() and logits.std() > 0.1
    assert handle.report.vision_tokens == (made.vision_tokens,) * 2
    assert handle.report.text_tokens == (made.text_tokens,) * 2
    assert made.text_tokens == 14 and made.inputs["input_ids"].shape == (2, 14 + made.vision_tokens)


def test_the_same_seed_makes_the_same_model():
    first, second, other = (shapes.build("tiny", "float32", "cpu", seed=seed) for seed in (1, 1, 2))
    picture = picture_for(first.config)
    inputs = prompt(picture, 100, 5, 9, 2, "cpu", "float32").inputs
    with torch.inference_mode():
        logits = [model(**inputs).logits for model in (first, second, other)]
        pictured = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}
        assert not torch.equal(first(**pictured).logits[:, -1], logits[0][:, -1])  # the tower is read
    assert torch.isfinite(logits[0]).all() and logits[0].std() > 0.1
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])
    assert not first.training


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_finite(dtype):
    model = shapes.build("tiny", dtype, "cpu")
    inputs = prompt(picture_for(model.config), 100, 5, 9, 1, "cpu", dtype).inputs
    with torch.inference_mode():
        assert torch.isfinite(model(**inputs).logits).all()
    assert model.get_decoder().rotary_emb.inv_freq.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------- prompts, variants


def test_a_checkpoint_is_given_its_own_processors_picture():
    embedded = Subject(None, "embedded", "auto", "cpu", "sdpa")
    picture = embedded.picture(None)
    assert picture.vision_tokens == 256 and embedded.dtype == "float32"
    made = prompt(picture, embedded.config.text_config.vocab_size, 7, 11, 3, "cpu", "float32")
    assert made.inputs["input_ids"].shape == (3, 7 + 256 + 11) and made.text_tokens == 18
    placeholder = made.inputs["input_ids"] == embedded.config.image_token_id
    assert placeholder.sum(dim=1).tolist() == [256] * 3
    assert placeholder[:, 7].all() and placeholder[:, 262].all()
    assert len(made.inputs["pixel_values"]) == 3
    assert picture_by_processor(embedded._checkpoint, 64).vision_tokens == 256


def test_variants_stand_in_a_known_order():
    found = variants(["adaptinfer", "random"], [24, 16], ["llava-1.5-7b/64"], "both", 64, 32)
    assert [variant.name for variant in found] == [
        "vanilla", "keep all", "adaptinfer 24", "adaptinfer 24, late", "adaptinfer 16", "adaptinfer 16, late",
        "random 24", "random 24, late", "random 16", "random 16, late", "llava-1.5-7b/64", "llava-1.5-7b/64, late",
    ]  # fmt: skip
    assert found[-1].pruner.positions == "compact" and not found[-1].early_drop
    usual = variants(["adaptinfer"], [], [], "on", 576, 32)
    assert [variant.name for variant in usual[2:]] == ["adaptinfer 192", "adaptinfer 128", "adaptinfer 64"]
    assert len(variants(["adaptinfer"], [], ["llava-1.5-7b/64"], "on", 576, 32)) == 3  # a preset alone
    beside = variants(["adaptinfer", "divprune"], [24], [], "on", 64, 32, compiled=True)
    assert [variant.name for variant in beside] == [
        "vanilla", "keep all", "keep all, compiled", "adaptinfer 24", "adaptinfer 24, compiled", "divprune 24",
    ]  # fmt: skip
    assert [variant.compiled for variant in beside] == [False, False, True, False, True, False]
    (claim,) = published_figures(found)
    assert claim["change"] == -0.613 and published_figures(usual) == []


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--shape", "llava-2b"], "shape: there is no shape 'llava-2b'; there are llava-1.5-7b"),
        (["--shape", "tiny", "--model", "embedded"], "give only one"),
        (["--method", "magic"], "there is no method 'magic'; there are adaptinfer"),
        (["--preset", "llava-9/1"], "there is no preset 'llava-9/1'"),
        (["--preset", "llava-1.5-7b/64"], "the schedule is for 32 layers, the model has 12"),
        (["--budget", "65"], "more than the 64 vision tokens there are (variant 'adaptinfer 65')"),
        (["--budget", "1.5"], "out of reach"),
        (["--budget", "-3"], "must be a positive number of tokens"),
        (["--device", "cuda:77"], "device 'cuda:77': cannot be used here"),
        (["--device", "abacus"], "device 'abacus': only cpu, cuda and cuda:N"),
        (["--attention", "flashy"], "llava with attention 'flashy': cannot be made here"),
        (["--image-size", "300"], "--image-size: this model sees every picture at its own 32 pixels"),
        (["--shape", "qwen2.5-vl-7b", "--image-size", "300"], "must be a multiple of 28"),
        (["--shape", "qwen2.5-vl-7b", "--text-before", "0"], "at least 1 and 1 tokens are needed"),
        (["--json", "/no/such/folder/out.json"], "there is no folder '/no/such/folder'"),
        (["--plot", "plot.bmp"], "must end in one of .png, .pdf, .svg"),
        (["--compile"], "--compile: CUDA graphs need a GPU, and the device is cpu"),
        (["--rounds", "0"], "'--rounds'"),
        (["--seed", str(10**23)], "'--seed'"),
        (["--json", "one.png", "--plot", "./one.png"], "both name 'one.png'; give two files"),
        (["--dtype", "int8"], "'--dtype'"),
        (["--model", "/no/such/checkpoint"], "no such folder"),
    ],
)
def test_mistakes_are_refused_in_one_line_before_any_work(arguments, message, monkeypatch):
    def never(*_, **__):
        raise AssertionError("weights were made")

    monkeypatch.setattr(subject, "fill", never)
    shape = [] if {"--shape", "--model"} & {*arguments} else ["--shape", "tiny"]
    result = _invoke(*shape, "--device", "cpu", *arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == "" and len(result.stderr.strip().splitlines()) == 1
    assert result.stderr.startswith("error:") and message in result.stderr


def test_usual_budgets_are_those_that_the_depth_allows():
    names = [variant.name for variant in variants(["adaptinfer"], [], [], "on", 1296, 8)]
    assert names == ["vanilla", "keep all", "adaptinfer 432", "adaptinfer 288"]  # layer 0 alone makes 162


def test_a_schedules_file_cannot_take_the_name_of_the_baseline():
    schedule = Schedule((Stage(1, 0.5),), 4)
    with pytest.raises(InputError, match="'vanilla' would be the name of two variants"):
        variants(["adaptinfer"], [24], [], "on", 64, 4, [("vanilla", schedule)])
    assert len(variants(["adaptinfer"], [24, 24], [], "on", 64, 4, [("s.json", schedule)] * 2)) == 4


@pytest.mark.parametrize(
    ("method", "parts"),
    [("divprune", {"select_before"}), ("vscan", {"select_before", "select"}), ("adaptinfer", {"select"})],
)
def test_the_scorer_is_all_that_a_method_does(method, parts, monkeypatch):
    """A method that chooses before the model was shown as free of charge."""
    model = shapes.build("tiny", "float32", "cpu")
    made = prompt(picture_for(model.config), 100, 5, 9, 1, "cpu", "float32")
    pruner, calls = METHODS[method](budget=24), []

    def slow(name):
        own = getattr(type(pruner), name)

        def slowly(*args):
            calls.append(name)
            time.sleep(0.02)
            return own(*args)

        return slowly

    for name in parts:
        monkeypatch.setattr(type(pruner), name, slow(name))
    figures = measure.Bench(model, made, "cpu").scorer(Variant(method, pruner))
    assert set(calls) == parts and figures["scorer_ms"] >= 20 * len(calls)


def test_too_little_memory_is_refused(monkeypatch):
    monkeypatch.setattr(subject, "free_bytes", lambda device: 20_000_000_000)
    big = Subject("llava-1.5-7b", None, "float32", "cpu", "sdpa")
    with pytest.raises(ValueError, match=r"float32 \(28.3 GB\) and the KV cache of batch 4 \(2.8 GB\) do not fit"):
        big.check_memory(576, 92, 4)
    Subject("llava-1.5-7b", None, "bfloat16", "cpu", "sdpa").check_memory(576, 92, 1)
    with pytest.raises(ValueError, match="KV cache of batch 64"):
        Subject("llava-1.5-7b", None, "bfloat16", "cpu", "sdpa").check_memory(576, 92, 64)


def test_the_command_line_does_not_wait_for_torch():
    code = "import sys, adaptinfer.cli.app; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---------------------------------------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    arguments = [
        *FAST, "--method", "adaptinfer", "--method", "random", "--budget", "24", "--budget", "0.25", "--early-drop",
        "both", "--batch", "2", "--batch", "1", "--new-tokens", "1", "--new-tokens", "3", "--text-before", "5",
        "--text-after", "9", "--json", folder / "out.json", "--plot", folder / "out.png",
    ]  # fmt: skip
    result = _invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result, json.loads((folder / "out.json").read_text()), folder, arguments


def test_the_document_says_how_it_was_made(run):
    _, document, _, arguments = run
    assert document["format"] == "adaptinfer.bench" and document["version"] == 1
    assert document["command"] == " ".join(["adaptinfer", "bench", *map(str, arguments)])
    assert {"date", "commit", "uncommitted_changes", "cpu", "gpu", "cores", "torch_threads", "torch"} <= set(
        document["environment"]
    )
    setup = document["setup"]
    assert (setup["model"], setup["dtype"], setup["attention"], setup["device"]) == ("tiny", "float32", "sdpa", "cpu")
    assert setup["rounds"] == 3 and setup["new_tokens"] == [1, 3] and setup["parameters"] > 0
    assert [batch["batch"] for batch in document["batches"]] == [1, 2]


def test_every_variant_has_every_raw_value(run):
    for batch in run[1]["batches"]:
        for entry in batch["variants"]:
            timed = {"ttft_ms", "decoder_prefill_ms", "generate_ms/1", "generate_ms/3", "decode_ms_per_token/3"}
            assert timed <= set(entry["raw"]) and timed == set(entry["speed_up"]) - {"scorer_ms"}
            for figure, values in entry["raw"].items():
                assert len(values) == 3 and all(value >= 0 for value in values), figure
            assert ("scorer_ms" in entry["raw"]) == bool(entry["schedule"]["stages"])
            for ttft, prefill in zip(entry["raw"]["ttft_ms"], entry["raw"]["decoder_prefill_ms"], strict=True):
                assert 0 < prefill < ttft
            for first, third, step in zip(
                *(entry["raw"][name] for name in ("generate_ms/1", "generate_ms/3", "decode_ms_per_token/3")),
                strict=True,
            ):
                assert third == pytest.approx(first + 2 * step)


def test_figures_follow_from_the_raw_values(run):
    for batch in run[1]["batches"]:
        vanilla = batch["variants"][0]["raw"]["decoder_prefill_ms"]
        for entry in batch["variants"]:
            own = entry["raw"]["decoder_prefill_ms"]
            speed_up = sorted(v / o for v, o in zip(vanilla, own, strict=True))[1]
            assert entry["speed_up"]["decoder_prefill_ms"]["median"] == pytest.approx(speed_up)
            assert entry["summary"]["decoder_prefill_ms"]["median"] == sorted(own)[1]
            assert entry["share_of_flops_bound"] == pytest.approx(speed_up / entry["flops_bound"])
            assert entry["flops_bound"] == pytest.approx(batch["vanilla_flops"] / entry["prefill_flops"])
            assert entry["share_of_roofline"] == pytest.approx(entry["roofline_ms"] / sorted(own)[1])
            if entry["scorer_share_of_vanilla_prefill"] is not None:
                share = sorted(entry["raw"]["scorer_ms"])[1] / sorted(vanilla)[1]
                assert entry["scorer_share_of_vanilla_prefill"] == pytest.approx(share)


def test_budgets_are_true_averages_and_the_cache_is_weighed(run):
    shape = ModelShape.from_config(SHAPES["tiny"].config())
    for batch in run[1]["batches"]:
        entries = {entry["name"]: entry for entry in batch["variants"]}
        for name in ("vanilla", "keep all"):
            assert entries[name]["true_average"] == VISION and entries[name]["flops_bound"] == 1
            assert not entries[name]["schedule"]["stages"]
        for method in ("adaptinfer", "random"):
            assert entries[f"{method} 24"]["true_average"] == pytest.approx(24, abs=0.25)
            assert entries[f"{method} 0.25"]["true_average"] == pytest.approx(16, abs=0.25)
            early, late = entries[f"{method} 24"], entries[f"{method} 24, late"]
            assert early["kv_bytes"] == late["kv_bytes"] and early["prefill_flops"] < late["prefill_flops"]
        for entry in entries.values():
            schedule = Schedule.from_json(json.dumps(entry["schedule"]))
            assert entry["true_average"] == sum(entry["tokens_per_layer"]) / LAYERS
            assert entry["kv_bytes"] == schedule.kv_bytes(shape, 14, VISION, bytes_per_value=4, batch=batch["batch"])
            flops = schedule.prefill_flops(shape, 14, VISION, early_drop=entry["early_drop"] is not False)
            assert entry["prefill_flops"] == batch["batch"] * flops
        averages, shares = zip(*batch["flops_bound_curve"], strict=True)
        assert averages[-1] == VISION and shares[-1] == 1 and list(averages) == sorted(averages)


def test_tables_and_plot_are_there(run):
    result, _, folder, _ = run
    for text in ("adaptinfer 0.25, late", "TTFT", "decoder prefill", "3 new tokens", "KV cache", "scorer", "out.json"):
        assert text in result.stdout
    assert max(map(len, result.stdout.split("Medians,")[0].splitlines())) <= 100
    assert (folder / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_does_not_cost_the_figures():
    result = _invoke(*FAST, "--rounds", "1", "--budget", "24", "--new-tokens", "0", "--json", "/dev/full")
    assert result.exit_code == 2 and "adaptinfer 24" in result.stdout
    assert "cannot be written (No space left on device)" in result.stderr


def test_a_published_claim_stands_by_itself(tmp_path, capsys, run):
    from adaptinfer.cli.bench_tables import print_results

    document = {**run[1], "published": published_figures([Variant("x", None, True, "llava-1.5-7b/64")])}
    print_results(document)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "arXiv" in line]
    assert line.startswith("Published, not measured here:") and "-61.3%" in line and "2.58x" in line
    plot.draw(document, tmp_path / "out.svg")
    assert (tmp_path / "out.svg").stat().st_size > 10_000


def test_a_checkpoint_runs(tmp_path):
    result = _invoke(
        "--model", stand_in.folder(), "--device", "cpu", "--budget", "0.3", "--rounds", "1", "--warmup", "0",
        "--new-tokens", "0", "--attention", "eager", "--json", tmp_path / "out.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["setup"]["attention"] == "eager" and document["setup"]["new_tokens"] == []
    assert not any("generate" in figure for figure in document["batches"][0]["variants"][0]["raw"])


def test_memory_is_measured_where_it_can_be():
    memory = PeakMemory("cpu")
    if not memory.available:
        pytest.skip("no high-water mark to reset")
    memory.start()
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    del block
    peak, above = memory.read()
    assert 60e6 < above < peak
    memory.start()
    assert memory.read()[1] < 20e6  # forgotten
    assert free_bytes("cpu") > 0


def test_the_commit_is_recorded_in_a_repository():
    found = environment()
    if (Path(__file__).parents[1] / ".git").exists():
        assert len(found["commit"]) == 40 and found["uncommitted_changes"] in (True, False)
    assert found["cores"] >= found["usable_cores"] >= 1 and found["cpu"]


# ---------------------------------------------------------------------------------------------------- GPUs


class _Event:
    """Stands in for a CUDA event; it must be waited for before it is read."""

    waiting: list[_Event] = []  # noqa: RUF012

    def __init__(self, enable_timing):
        assert enable_timing
        self.ready = False

    def record(self, stream):
        self.time = time.perf_counter()
        self.waiting.append(self)

    def elapsed_time(self, other):
        assert self.ready and other.ready, "read before the GPU was waited for"
        return 1000 * (other.time - self.time)


def test_on_a_gpu_nothing_waits_inside_of_what_is_timed(monkeypatch):
    """The way over CUDA events, with stand-ins for torch's."""
    waits = []

    def synchronise(device):
        waits.append(time.perf_counter())
        while _Event.waiting:
            _Event.waiting.pop().ready = True

    stand_ins = {"synchronize": synchronise, "Event": _Event, "current_stream": lambda device: None}
    stand_ins |= {"reset_peak_memory_stats": lambda device: None, "memory_allocated": lambda device: 5}
    stand_ins |= {"max_memory_allocated": lambda device: 12}
    for name, function in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, function)
    model = shapes.build("tiny", "float32", "cpu")
    made = prompt(picture_for(model.config), 100, 5, 9, 1, "cpu", "float32")
    bench = measure.Bench(model, made, "cuda:0")
    pruned = Variant("adaptinfer 24", AdaptInfer(budget=24))
    spans = []
    elapsed = Clock.device_ms

    def noted(start, end):
        spans.append((start.host_s, end.host_s))
        return elapsed(start, end)

    monkeypatch.setattr(Clock, "device_ms", staticmethod(noted))
    figures = bench.run(pruned, [1, 3]) | bench.scorer(pruned)
    facts = bench.facts(pruned)
    assert {"ttft_cuda_ms", "decoder_prefill_wall_ms", "generate_ms/3", "scorer_ms"} <= set(figures)
    assert all(value > 0 for value in figures.values())
    assert figures["decoder_prefill_ms"] < figures["ttft_cuda_ms"] <= figures["ttft_ms"]
    assert (facts["peak_memory_bytes"], facts["peak_above_idle_bytes"]) == (12, 7)
    assert spans and not any(start < wait < end for start, end in spans[:2] for wait in waits)


def test_a_compiled_variant_is_measured_in_its_graphs(monkeypatch):
    """A tape stands in for CUDA graphs. What cannot be captured is no figure of a compiled variant."""
    made = []

    def compile(model):
        made.append(StandIn())
        Compiled(handle_of(model), made[-1], torch.device("cpu"), 16, 16)

    monkeypatch.setattr(measure, "compile", compile)
    model = shapes.build("tiny", "float32", "cpu")
    bench = measure.Bench(model, prompt(picture_for(model.config), 100, 5, 9, 1, "cpu", "float32"), "cpu")
    pruned = Variant("adaptinfer 24, compiled", AdaptInfer(budget=24), compiled=True)
    figures, facts = bench.run(pruned, [3]), bench.facts(pruned)
    assert all(value > 0 for value in figures.values()) and figures["decoder_prefill_ms"] < figures["ttft_ms"]
    assert facts["kv_bytes"] == bench.facts(Variant("adaptinfer 24", AdaptInfer(budget=24)))["kv_bytes"]
    assert [[tape.replays for tape in graphs.tapes] for graphs in made] == [[3, 4], [2]]
    with pytest.raises(InputError, match="variant 'adaptinfer 24, compiled': .*no CUDA device"):
        monkeypatch.undo()
        bench.run(pruned, [])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_on_a_gpu(tmp_path, dtype):
    arguments = ["--shape", "tiny", "--device", "cuda", "--dtype", dtype, "--rounds", "3", "--budget", "24"]
    result = _invoke(
        *arguments, "--compile", "--new-tokens", "4", "--json", tmp_path / "out.json", "--plot", tmp_path / "out.png"
    )
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["environment"]["gpu"]
    for entry in document["batches"][0]["variants"]:
        raw = {figure: min(values) for figure, values in entry["raw"].items()}
        assert 0 < raw["decoder_prefill_ms"] < raw["ttft_cuda_ms"] and raw["decoder_prefill_wall_ms"] > 0
        assert (
            entry["peak_above_idle_bytes"] > entry["kv_bytes"]
            and raw["generate_ms/4"] > raw["decode_ms_per_token/4"] > 0
        )
