"""What every method must do, whatever its score: run over all of `METHODS`."""

from __future__ import annotations

import dataclasses

import pytest
import tiny
import torch

from adaptinfer import METHODS, Schedule, Stage, attach, from_pretrained

STAGES = Schedule((Stage(1, 20), Stage(3, 6)), tiny.LAYERS)
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
each_family = pytest.mark.parametrize("family", tiny.FAMILIES)


def prompts(family):
    return [
        tiny.simple(family, after=5, seed=1),
        tiny.simple(family, after=13, seed=2, images=2),
        tiny.simple(family, seed=3),
    ]


@torch.no_grad()
def run(model, inputs, pruner):
    with attach(model, pruner) as handle:
        return model(**inputs).logits, handle.report


@each_method
def test_it_says_what_it_is(method):
    assert dataclasses.is_dataclass(method) and method.__dataclass_params__.frozen
    assert METHODS[method.name] is method and method.reference
    assert method.__doc__ and method.score is not None


@each_method
@each_family
def test_keeps_exactly_the_budget_in_order(models, method, family):
    inputs = tiny.batch(family, prompts(family))
    _, report = run(models(family), inputs, method(schedule=STAGES))
    for stage, keep in zip(report.kept, (20, 6), strict=True):
        for row, ids in zip(stage, inputs["input_ids"], strict=True):
            assert len(row) == keep
            assert (ids[row] == tiny.IMAGE).all()
            assert (row.diff() > 0).all()
    for first, second in zip(*report.kept, strict=True):
        assert set(second.tolist()) <= set(first.tolist())


@each_method
@each_family
@pytest.mark.parametrize("budget", [0.5, 0.3, 25])
def test_meets_a_true_average(models, method, family, budget):
    inputs = tiny.batch(family, prompts(family)[:1])
    _, report = run(models(family), inputs, method(budget=budget))
    (vision,) = report.vision_tokens
    wanted = budget * vision if budget < 1 else budget
    assert report.true_average[0] == pytest.approx(wanted, abs=0.5 * 4 / tiny.LAYERS)
    held = [vision] * tiny.LAYERS
    for stage in report.stages:
        held[stage.layer + 1 :] = [int(stage.kept_mask.sum())] * (tiny.LAYERS - stage.layer - 1)
    assert tuple(held) == report.tokens_per_layer[0], "the report says what really happened"


@each_method
@each_family
def test_alone_and_in_a_batch(models, method, family):
    model, samples = models(family), prompts(family)
    _, together = run(model, tiny.batch(family, samples), method(schedule=STAGES))
    longest = max(map(len, samples))
    for b, prompt in enumerate(samples):
        _, alone = run(model, tiny.batch(family, [prompt]), method(schedule=STAGES))
        for s in range(2):
            assert (together.kept[s][b] - (longest - len(prompt))).tolist() == alone.kept[s][0].tolist()


@each_method
@each_family
def test_deterministic(models, method, family):
    inputs = tiny.batch(family, prompts(family))
    first, one = run(models(family), inputs, method(schedule=STAGES))
    torch.rand(7)  # global random state is not used
    second, other = run(models(family), inputs, method(schedule=STAGES))
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for x, y in zip(one.kept, other.kept, strict=True) for a, b in zip(x, y, strict=True))


@each_method
@each_family
def test_keeping_all_is_vanilla(models, method, family):
    inputs = tiny.batch(family, prompts(family))
    with torch.no_grad():
        vanilla = models(family)(**inputs).logits
    pruned, report = run(models(family), inputs, method(schedule=Schedule((Stage(1, 1.0),), tiny.LAYERS)))
    assert torch.equal(pruned, vanilla) and report.stages == ()


@each_method
def test_saved_and_loaded(tmp_path, method):
    pruner = method(budget=0.25)
    pruner.save_pretrained(tmp_path)
    assert from_pretrained(tmp_path) == pruner
