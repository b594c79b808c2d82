"""The search for our best configuration: what it tries, that budgets are met, halving, and going on after a stop."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import stand_in
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptinfer import AdaptInfer, AdaptInferPlus, ScheduleError, from_pretrained
from adaptinfer.evaluation.world import WorldTask
from adaptinfer.pruners import Composed, TextGuided

sys.path.insert(0, str(Path(__file__).parents[1] / "research"))

import same_stages
import search
import search_space
import search_tables
from search_space import AXES, PLAIN, candidates, canonical, pruner_of, reference, single_changes, told


def test_candidates_are_single_changes_and_then_random_ones():
    singles, found = single_changes(), candidates(25, seed=3)
    assert found[: len(singles)] == singles and len(found) == len(singles) + 25
    assert found == candidates(25, seed=3) != candidates(25, seed=4)
    assert candidates(5, seed=3) == found[: len(singles) + 5], "more candidates are more of the same"
    assert all(setting == canonical(setting) != PLAIN for setting in found)
    assert len({json.dumps(setting) for setting in found}) == len(found)
    for axis, values in AXES.items():
        assert {setting[axis] for setting in singles} == set(values)


def test_candidates_around_a_setting():
    """Every value of every axis once, one step away; the start itself; combinations of its values and others."""
    start = canonical(PLAIN | {"words": "max", "before": "coverage", "room": 1.5, "shape": "one late"})
    singles, found = single_changes(start), candidates(25, seed=3, start=start)
    assert found[: len(singles) + 1] == [*singles, start]
    assert len({json.dumps(setting) for setting in found}) == len(found) == len(singles) + 26
    for axis, values in AXES.items():
        moved = [setting for setting in singles if search_tables._moved(start, setting) == axis]
        assert sorted(map(str, (setting[axis] for setting in moved))) == sorted(
            str(value) for value in values if value != start[axis]
        )
    alike = sum(setting[axis] == start[axis] for setting in found[-25:] for axis in AXES)
    assert alike > 25 * len(AXES) / 2, "half of the time the start's, and by chance more often"


def test_settings_in_words():
    assert told(PLAIN) == "adaptinfer"
    changed = PLAIN | {"words": "union", "rotary": False, "before": "divprune", "room": 1.5}
    assert told(changed) == "words union, no rotary, after divprune x1.5"


@settings(max_examples=150, deadline=None)
@given(
    setting=st.fixed_dictionaries({axis: st.sampled_from(values) for axis, values in AXES.items()}),
    budget=st.sampled_from([0.33, 0.22, 0.11, 0.06, 64, 20]),
    model=st.sampled_from([(12, 64), (16, 576), (32, 576)]),
)
def test_every_setting_meets_its_budget_or_says_that_it_cannot(setting, budget, model):
    layers, tokens = model
    average = budget * tokens if budget < 1 else budget
    try:
        pruner = pruner_of(setting, budget, layers, tokens)
    except ScheduleError as error:
        assert "budget" in str(error)
        return
    plan = pruner.plan(layers, tokens)
    at = [stage.layer for stage in plan.stages] or [0]
    longest = max(after - layer for layer, after in zip(at, [*at[1:], layers - 1], strict=True))
    assert plan.true_average(tokens) == pytest.approx(average, abs=max(0.01 * average, longest / layers) + 1e-9)
    inside = pruner.inside if isinstance(pruner, Composed) else pruner
    assert isinstance(inside, TextGuided) and inside.words == setting["words"]
    assert isinstance(pruner, Composed) == bool(setting["before"])


def test_the_plain_setting_is_adaptinfer():
    for budget in (0.33, 0.22, 0.11):
        ours, published = pruner_of(PLAIN, budget, 32, 576), AdaptInfer(budget=budget)
        assert ours.plan(32, 576).stages == published.plan(32, 576).stages
    assert reference(0.11, 12, 64, None)[0] == "adaptinfer"
    name, pruner = reference(0.06, 12, 64, None)  # layer 0 alone is given 64 of 46 token-layers
    assert name == "divprune >> adaptinfer" and pruner.plan(12, 64).true_average(64) <= 0.06 * 64


@pytest.mark.parametrize("budget", [0.33, 0.22, 0.11, 0.06])
@pytest.mark.parametrize("model", [(12, 256), (32, 576)])
def test_ours_is_what_the_package_ships(budget, model):
    searched, shipped = pruner_of(search_space.OURS, budget, *model), AdaptInferPlus(budget=budget)
    assert searched.plan(*model) == shipped.plan(*model)
    assert isinstance(searched, Composed)
    before, inside = shipped.parts
    assert type(searched.before) is type(before) and isinstance(searched.inside, TextGuided)
    assert dataclasses.replace(searched.inside, schedule=None, budget=1) == inside
    assert search.starting_points(Path("adaptinfer+"), [budget]) == {budget: search_space.OURS}


def test_best_is_the_most_accurate_and_then_the_nearest_to_vanilla():
    answers = {"a": [(1, 0.3), (0, 0.3)], "b": [(1, 0.1), (0, 0.2)], "c": [(1, 0.9), (1, 0.9)], "d": [(0, 0), (0, 0)]}
    records = [
        {"condition": name, "batch": batch, "score": score, "kl": kl}
        for name, given in answers.items()
        for batch, (score, kl) in enumerate(given)
    ]
    records += [{"condition": "d", "batch": 2, "score": 1, "kl": 0}] * 5 + [
        {"condition": "e", "batch": 0, "refused": ""}
    ]
    found = search.Search(None, SimpleNamespace(records=lambda: records), {}, {}, {}, {})  # pyright: ignore
    assert found.best(["a", "b", "c", "d", "e"], 2, 3) == ["c", "b", "a"]
    assert found.best(["d", "a"], 3, 1) == ["d"], "5/7 against 1/2"


@pytest.fixture
def few_axes(monkeypatch):
    few = {axis: values[:1] for axis, values in AXES.items()} | {"words": ("soft", "union"), "heads": (1.0, 0.5)}
    few["before"] = (None, "coverage")
    for module in (search_space, search_tables, search):
        monkeypatch.setattr(module, "AXES", few)


def test_a_search_is_halved_and_goes_on_after_a_stop(monkeypatch, tmp_path, capsys, few_axes):
    """Stopped in the second rung, run again, and once more when it is over."""
    out = tmp_path / "run"
    command = ["search.py", "--candidates", "2", "--samples", "4", "8", "12", "--batch", "4", "--finalists", "1"]
    command += [
        "--model",
        stand_in.folder(),
        "--budgets",
        "0.22",
        "0.06",
        "-o",
        str(out),
        "--json",
        str(tmp_path / "r.json"),
        "--device",
        "cpu",
    ]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(WorldTask, "max_new_tokens", 2)  # random weights do not know when an answer is over
    whole = search.run

    def stopped(plan, journal, todo, done):
        if todo[0].batch:
            whole(plan, journal, todo[:1], done)
            raise KeyboardInterrupt
        return whole(plan, journal, todo, done)

    monkeypatch.setattr(search, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        search.main()
    before = (out / "answers.jsonl").read_bytes()
    monkeypatch.setattr(search, "run", whole)
    search.main()
    after = (out / "answers.jsonl").read_bytes()
    assert after.startswith(before) and len(after) > len(before)
    first = capsys.readouterr().out
    search.main()
    assert (out / "answers.jsonl").read_bytes() == after and capsys.readouterr().out == first

    results = json.loads((tmp_path / "r.json").read_text())
    records = [json.loads(line) for line in after.decode().splitlines()[1:]]
    seen = {name: {r["batch"] for r in records if r["condition"] == name} for r in records for name in [r["condition"]]}
    for budget in ("0.22", "0.06"):
        tried = {name: batches for name, batches in seen.items() if name.startswith("c") and name.endswith(budget)}
        (winner,) = results["finalists"][budget]
        assert tried[winner["name"]] == {0, 1, 2}
        rungs = sorted(map(len, tried.values()), reverse=True)
        second = math.ceil(len(tried) / 3)
        assert rungs == [3] + [2] * (second - 1) + [1] * (len(tried) - second)
        assert from_pretrained(out / f"best-{budget}").plan(12, 256).true_average(256) <= float(budget) * 256 * 1.01
    assert results["last_rung"]["answers"] == 4, "only what no earlier rung has seen"
    assert "cannot meet it" in first and "AdaptInfer with one thing changed" in first
    assert f"eval --task world --samples 2000 --budget 0.22 --pruner {out}/best-0.22" in first

    around = [str(tmp_path / "around") if part == str(out) else part for part in command]
    monkeypatch.setattr(sys, "argv", [*around, "--around", str(tmp_path / "r.json")])
    search.main()
    first = capsys.readouterr().out
    assert "The start with one thing changed" in first
    told_starts = next(line for line in first.splitlines() if line.startswith("│ the start "))
    for budget in ("0.22", "0.06"):
        setting = results["finalists"][budget][0]["setting"]
        assert told(setting)[:12] in told_starts
        at_start = json.loads((tmp_path / "r.json").read_text())["first_rung"]
        (mine,) = (each for name, each in at_start.items() if name.endswith(budget) and each["setting"] == setting)
        assert mine["value"] == 0.0 == mine["low"] == mine["high"], "the start less itself"


def test_a_wrong_file_to_go_on_from_is_refused(monkeypatch, tmp_path, capsys):
    best = {"setting": PLAIN}
    wrong = {
        "missing": (None, "No such file"),
        "no-json": ("{", "not figures of a search"),
        "another": (json.dumps({"finalists": {"0.5": [best]}}), "at 0.33"),
        "unknown": (json.dumps({"finalists": {"0.33": [{"setting": PLAIN | {"words": "loudest"}}]}}), "loudest"),
    }
    for name, (content, said) in wrong.items():
        if content is not None:
            (tmp_path / name).write_text(content)
        monkeypatch.setattr(sys, "argv", ["search.py", "--budgets", "0.33", "--around", str(tmp_path / name)])
        with pytest.raises(SystemExit):
            search.main()
        assert said in capsys.readouterr().err


def test_test_scenes_are_not_searched_on(monkeypatch, capsys):
    for task in ("world", "world-hard:test"):
        monkeypatch.setattr(sys, "argv", ["search.py", "--task", task])
        with pytest.raises(SystemExit):
            search.main()
        assert "can confirm nothing; take" in capsys.readouterr().err


@pytest.mark.parametrize("budget", [0.33, 0.11])
@pytest.mark.parametrize("way", same_stages.WAYS)
def test_all_scores_have_the_same_stages(budget, way):
    with pytest.raises(ScheduleError, match="0.9: so many vision tokens that nothing is selected before"):
        same_stages.arranged(AdaptInfer(budget=1), same_stages.AFTER, 0.9, 12, 256)
    plans = {name: same_stages.arranged(score, way, budget, 12, 256) for name, score in same_stages.scores().items()}
    assert len({pruner.plan(12, 256).stages for pruner in plans.values()}) == 1
    assert plans["fastv"].plan(12, 256).true_average(256) == pytest.approx(budget * 256, rel=0.03)
    if way == same_stages.ONE_CUT:
        assert [stage.layer for stage in plans["fastv"].plan(12, 256).stages] == [0]
        assert type(plans["fastv"]).__name__ == "FastV"
    else:
        assert plans["adaptinfer+"].plan(12, 256) == AdaptInferPlus(budget=budget).plan(12, 256)


def test_scores_at_the_same_stages(monkeypatch, tmp_path, capsys):
    """Refused where layer 0 exceeds the budget; the same table again when all is answered."""
    command = ["same_stages.py", "--model", stand_in.folder(), "--samples", "4", "--batch", "4", "--device", "cpu"]
    command += ["--budgets", "0.22", "0.06", "-o", str(tmp_path / "run"), "--json", str(tmp_path / "r.json")]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(WorldTask, "max_new_tokens", 2)
    few = {
        name: score for name, score in same_stages.scores().items() if name in ("adaptinfer+", "adaptinfer", "fastv")
    }
    monkeypatch.setattr(same_stages, "scores", lambda: few)
    same_stages.main()
    first, answers = capsys.readouterr().out, (tmp_path / "run" / "answers.jsonl").read_bytes()
    same_stages.main()
    assert capsys.readouterr().out == first and (tmp_path / "run" / "answers.jsonl").read_bytes() == answers
    rows = {row["name"] for row in json.loads((tmp_path / "r.json").read_text())["entry"]["conditions"]}
    after = {f"{name} {budget} after CDPruner" for name in few for budget in (0.22, 0.06)}
    assert rows == {"vanilla", *after, *(f"{name} 0.22 one cut" for name in few)}
    assert all(name in first for name in few)
