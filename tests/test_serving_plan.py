"""The vLLM plug-in's arithmetic and its selection, without vLLM."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptinfer import AdaptInfer, Schedule, ScheduleError, Stage, UnsupportedError
from adaptinfer.pruners import PrunerError, Random
from adaptinfer.pruners.views import StageView
from adaptinfer.serving.settings import pruner_from, to_json
from adaptinfer.serving.vllm_plugin.counts import Counts
from adaptinfer.serving.vllm_plugin.plan import Planner, Row, plan_step
from adaptinfer.serving.vllm_plugin.step import Heads, ScoringClock, Step

THREE = Schedule((Stage(0, 5), Stage(2, 2)), 4)
CPU = torch.device("cpu")


def planner(schedule: Schedule = THREE) -> Planner:
    return Planner(AdaptInfer(schedule=schedule), schedule.num_layers)


# Prompts


def test_a_prompt_by_hand():
    prompt = planner().prompt(20, [(12, 15), (3, 10)])
    assert (prompt.spans, prompt.vision, prompt.first, prompt.text) == (((3, 10), (12, 15)), 10, 3, (15, 20))
    assert prompt.given == (10, 5, 5, 2)
    assert [prompt.dropped(layer) for layer in range(4)] == [0, 5, 5, 8]
    assert prompt.prunes


def test_nothing_guides_nothing_is_dropped():
    for prompt in (planner().prompt(10, []), planner().prompt(10, [(0, 2), (4, 10)]), planner().prompt(10, [(4, 4)])):
        assert not prompt.prunes
        assert set(prompt.given) == {prompt.vision}


def test_a_picture_smaller_than_the_budget_is_kept():
    small = Planner(AdaptInfer(budget=64), 4)
    assert not small.prompt(60, [(0, 50)]).prunes
    assert small.prompt(300, [(0, 200)]).prunes


def test_a_budget_out_of_reach_is_refused_by_name():
    with pytest.raises(ScheduleError, match="budget: a true average of"):
        Planner(AdaptInfer(budget=0.01), 4).prompt(200, [(0, 100)])
    with pytest.raises(ScheduleError, match="num_layers: the schedule is for 4 layers"):
        Planner(AdaptInfer(schedule=THREE), 5)


# Rows and segments


def test_segments_by_hand():
    """A prompt, a token of an answer to such a prompt, and text, in one step."""
    prompt = planner().prompt(20, [(3, 13)])
    text = planner().prompt(6, [])
    first, second, third = plan_step([Row(prompt, 0, 22), Row(prompt, 30, 1), Row(text, 2, 4)], 4)
    assert (first.layers, first.given, first.missing, first.stage) == ((0, 1), (22, 1, 4), (0, 0, 0), {0: 5})
    assert (second.layers, second.given, second.missing, second.stage) == ((1, 3), (17, 1, 4), (5, 5, 0), {0: 2})
    assert (third.layers, third.given, third.missing, third.stage) == ((3, 4), (14, 1, 4), (8, 8, 0), {})


def test_a_step_without_pictures_is_one_segment():
    text = planner().prompt(6, [])
    assert len(plan_step([Row(text, 0, 6), Row(text, 9, 1)], 4)) == 1


@pytest.mark.parametrize(("computed", "new"), [(0, 12), (3, 17), (3, 1), (12, 20), (0, 19)])
def test_a_prompt_in_parts_is_refused(computed, new):
    prompt = planner().prompt(20, [(3, 13)])
    with pytest.raises(UnsupportedError, match="must be computed in one step"):
        Row(prompt, computed, new)
    Row(planner().prompt(20, [(3, 20)]), computed, new)  # kept whole, so in any parts


@st.composite
def rows(draw):
    """Rows of a step, some of prompts that prune, in any phase."""
    plan = planner(Schedule((Stage(1, 0.5), Stage(3, 0.4), Stage(4, 0.0)), 6))
    made = []
    for _ in range(draw(st.integers(1, 5))):
        before, vision, after = (draw(st.integers(0, 6)) for _ in range(3))
        length = max(1, before + vision + after)
        prompt = plan.prompt(length, [(before, before + vision)])
        if draw(st.booleans()):
            made.append(Row(prompt, length + draw(st.integers(0, 9)), draw(st.integers(1, 3))))
        else:
            made.append(Row(prompt, 0, length + draw(st.integers(0, 4))))
    return made


@given(rows())
def test_segments_cover_every_layer_and_agree_with_each_row(made):
    segments = plan_step(made, 6)
    assert [layer for segment in segments for layer in range(*segment.layers)] == list(range(6))
    for segment, after in zip(segments, [*segments[1:], None], strict=True):
        for layer in range(*segment.layers):
            assert segment.given == tuple(row.given(layer) for row in made)
            assert segment.missing == tuple(row.missing(layer) for row in made)
        for number, row in enumerate(made):
            # The cache of a layer holds what it was given: now, and in the steps before.
            held = row.computed + row.new - segment.missing[number]
            assert held >= segment.given[number] >= 0
            drops = after is not None and after.given[number] < segment.given[number]
            assert (number in segment.stage) == drops
            if drops:
                assert segment.stage[number] == row.prompt.given[segment.layers[1]]


# Steps


def causal(columns: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return rows[:, None, :, None] >= columns


@given(rows(), st.integers(0, 2**31))
def test_a_step_keeps_in_each_row_what_the_row_would_keep_alone(made, seed):
    """Slow oracle: each row by itself, its tokens as a list, scores by the pruner on a view of its own."""
    generator = torch.Generator().manual_seed(seed)
    segments = plan_step(made, 6)
    pruner, heads = AdaptInfer(budget=0.5), Heads(0.5, None, 4, lambda tensor: tensor)
    step = Step(made, segments, CPU, ScoringClock(CPU))
    alive = [list(range(row.new)) for row in made]
    starts = [sum(row.new for row in made[:number]) for number in range(len(made))]
    for segment in segments:
        if not segment.stage:
            continue
        layer = segment.layers[1] - 1
        full = torch.randn(4, sum(row.new for row in made), 8, generator=generator)
        tokens = [start + place for start, row in zip(starts, alive, strict=True) for place in row]
        query, key = full[:, tokens], full[:2, tokens] * 2
        hidden = torch.randn(len(tokens), 6, generator=generator)
        step.choose(layer, query, key, hidden, heads, pruner)
        survivors = step.go_on()
        assert step.tokens is not None and survivors is not None
        for number, keep in segment.stage.items():
            row, own = made[number], torch.tensor(alive[number])
            (first, stop), (text, end) = row.prompt.spans[0], row.prompt.text
            vision = torch.nonzero((own >= first) & (own < stop))[:, 0]
            places = [starts[number] + place for place in alive[number]]
            view = StageView(
                layer, full[None, :, places], full[None, :2, places] * 2,
                functools.partial(causal, torch.arange(len(places))), 0.5, None,
                torch.nonzero((own >= text) & (own < end))[:, 0][None], None, vision[None], None,
                (len(vision),), None, False, lambda tensor: tensor, 4, hidden[None],
            )  # fmt: skip
            best = pruner.score(view)[0].argsort(descending=True, stable=True)[:keep]
            gone = set(own[vision].tolist()) - set(own[vision[best]].tolist())
            alive[number] = [place for place in alive[number] if place not in gone]
        wanted = [start + place for start, row in zip(starts, alive, strict=True) for place in row]
        assert step.tokens.tolist() == wanted
        assert torch.equal(query[:, survivors], full[:, wanted])
    hidden = torch.randn(1, sum(map(len, alive)), 3, generator=generator)
    whole = step.restore(hidden, sum(row.new for row in made) + 2)
    if step.tokens is not None:
        assert torch.equal(whole[:, step.tokens], hidden)
        assert whole.count_nonzero() == hidden.count_nonzero()


def test_counts_by_hand():
    counts, plan = Counts(), planner()
    counts.add(plan.prompt(20, [(3, 13)]))
    counts.add(plan.prompt(20, [(3, 20)]))
    counts.add(plan.prompt(20, []))
    counts.scoring_seconds += 0.5
    taken = counts.take()
    assert Counts.read({**taken, "an adapter": 3}) == {
        "prefills": 1, "tokens_in": 27, "token_layers": 10 + 5 + 5 + 2 + 4 * 17, "kept/0": 5, "kept/2": 2,
        "scoring_us": 500_000,
    }  # fmt: skip
    assert counts.take() == {}


# Settings


def test_settings_of_every_form(tmp_path):
    wanted = Random(schedule=THREE, seed=3)
    wanted.save_pretrained(tmp_path)
    THREE.save(tmp_path / "schedule.json")
    schedule = json.loads(THREE.to_json())
    forms = [
        str(tmp_path),
        str(tmp_path / "adaptinfer_config.json"),
        {"method": "random", "schedule": schedule, "seed": 3},
        json.dumps({"method": "random", "schedule": schedule, "seed": 3}),
        {"method": "random", "schedule": str(tmp_path / "schedule.json"), "seed": 3},
        to_json(wanted),
    ]
    assert all(pruner_from(form, "here") == wanted for form in forms)
    assert pruner_from('{"budget": 64}', "here") == AdaptInfer(budget=64)
    assert pruner_from({"preset": "llava-1.5-7b/64"}, "here").schedule == AdaptInfer.paper(64).schedule


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no/such/folder", "here: 'no/such/folder' is neither a folder"),
        ("{", "here: not valid JSON"),
        (7, "here: must be a folder, a file or a JSON object"),
        ("[7]", r"here: must be a folder, a file or a JSON object, not \[7\]"),
        ({"method": "magic", "budget": 1}, "here: method: there is no method 'magic'"),
        ({"budget": 1, "speed": 2}, "here: speed: no setting of adaptinfer"),
        ({}, "give exactly one of budget"),
        ({"preset": "llava-1.5-7b/64", "schedule": {}}, "here: give a preset or a schedule"),
        ({"preset": "nobody"}, "there is no preset 'nobody'"),
    ],
)
def test_settings_that_make_no_sense(value, message):
    with pytest.raises((PrunerError, ScheduleError), match=message.replace("{", "\\{")):
        pruner_from(value, "here")


def test_a_setting_names_a_method_outside_the_package(tmp_path, monkeypatch):
    """A server and the processes that vLLM starts find it by its address, without an edit here."""
    (tmp_path / "elsewhere.py").write_text(
        "from dataclasses import dataclass\nfrom adaptinfer.pruners import FastV\n\n"
        "@dataclass(frozen=True)\nclass Mine(FastV):\n    name = 'mine'\n    strength: float = 1.0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    pruner = pruner_from('{"method": "elsewhere:Mine", "budget": 0.25, "strength": 2.0}', "ADAPTINFER_CONFIG")
    assert (type(pruner).__name__, pruner.budget, vars(pruner)["strength"]) == ("Mine", 0.25, 2.0)
    assert pruner_from(to_json(pruner), "additional_config") == pruner
    with pytest.raises(PrunerError, match="ADAPTINFER_CONFIG: .*elsewhere:Other"):
        pruner_from('{"method": "elsewhere:Other", "budget": 0.25}', "ADAPTINFER_CONFIG")
