"""What every method inside the language model must do, whatever its score: run over all of `METHODS`."""

from __future__ import annotations

import dataclasses

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Oracle
from test_engine_cost import layout_of

from adaptinfer import Schedule, ScheduleError, Stage, attach, from_pretrained
from adaptinfer.engine import entry
from adaptinfer.pruners import METHODS, SparseVLM
from adaptinfer.pruners.before import Selector, TwoPart

STAGES = Schedule((Stage(1, 20), Stage(3, 6)), tiny.LAYERS)
SHARES = Schedule((Stage(1, 0.4), Stage(3, 0.3)), tiny.LAYERS)
# Methods that select before the language model have tests of their own.
INSIDE = {name: method for name, method in METHODS.items() if not issubclass(method, (Selector, TwoPart))}
# SparseVLM merges dropped tokens into survivors, which no mask can undo; without that it is the masked run.
MASKED = {name: SparseVLM(schedule=SHARES, recycled=0) if name == "sparsevlm" else None for name in INSIDE}
each_method = pytest.mark.parametrize("method", INSIDE.values(), ids=INSIDE)
each_family = pytest.mark.parametrize("family", tiny.FAMILIES)


def prompts(family):
    return [
        tiny.simple(family, after=5, seed=1),
        tiny.simple(family, after=13, seed=2, images=2),
        tiny.simple(family, seed=3),
    ]


def positioned(model, inputs):
    """Inputs with the positions that `generate` gives them: padding takes none."""
    if hasattr(model.base_model, "get_rope_index"):
        return inputs
    return {**inputs, "position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)}


@torch.no_grad()
def run(model, inputs, pruner):
    with attach(model, pruner) as handle:
        return model(**positioned(model, inputs)).logits, handle.report


@each_method
def test_it_says_what_it_is(method):
    assert dataclasses.is_dataclass(method) and method.__dataclass_params__.frozen
    assert METHODS[method.name] is method and method.reference
    assert method.__doc__ and method.select is not None


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
    spans = [stage.layer for stage in report.stages]
    longest = max(after - layer for layer, after in zip(spans, [*spans[1:], tiny.LAYERS - 1], strict=True))
    assert report.true_average[0] == pytest.approx(wanted, abs=max(0.5 * longest / tiny.LAYERS, 0.01 * wanted) + 1e-9)
    held = [vision] * tiny.LAYERS
    for stage in report.stages:
        held[stage.layer + 1 :] = [int(stage.kept_mask.sum())] * (tiny.LAYERS - stage.layer - 1)
    assert tuple(held) == report.tokens_per_layer[0], "the report says what really happened"


@each_method
@settings(max_examples=20)
@given(budget=st.integers(60, 570), layers=st.sampled_from([12, 16, 32]), tokens=st.sampled_from([64, 576]))
def test_plans_any_true_average(method, budget, layers, tokens):
    average = budget * tokens / 576
    schedule = method(budget=average if average >= 1 else average / tokens).plan(layers, tokens)
    spans = [stage.layer for stage in schedule.stages] or [0]
    longest = max(after - layer for layer, after in zip(spans, [*spans[1:], layers - 1], strict=True))
    error = abs(schedule.true_average(tokens) - average)
    assert error <= max(0.01 * average, longest / layers) + 1e-9


@each_method
def test_published_schedules(method):
    for name, schedule in method.published.items():
        model, label = name.split("/")
        pruner = method.paper(label, model)
        assert pruner.schedule is schedule and pruner.positions == method.published_positions
        assert pruner.plan(32, 576) is schedule
    if method.name != "adaptinfer":  # whose schedules are in PRESETS
        with pytest.raises(Exception, match="no published schedule 'llava-1.5-7b/63'"):
            method.paper(63)


@each_method
@each_family
def test_alone_and_in_a_batch(models, method, family):
    """Padding on the left, prompts of different length, different numbers of images: a share first, then a count."""
    model, samples = models(family), prompts(family)
    longest, pruner = max(map(len, samples)), method(schedule=Schedule((Stage(1, 0.4), Stage(3, 6)), tiny.LAYERS))
    _, together = run(model, tiny.batch(family, samples), pruner)
    for b, prompt in enumerate(samples):
        _, alone = run(model, tiny.batch(family, [prompt]), pruner)
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
    inputs = positioned(models(family), tiny.batch(family, prompts(family)))
    with torch.no_grad():
        vanilla = models(family)(**inputs).logits
    pruned, report = run(models(family), inputs, method(schedule=Schedule((Stage(1, 1.0),), tiny.LAYERS)))
    assert torch.equal(pruned, vanilla) and report.stages == ()


@each_method
def test_a_sample_that_keeps_all_beside_one_that_does_not(models, method):
    """Its own answer is vanilla's, whatever fills its rows: here words, for there is no padding."""
    model = models("llava")
    samples = [tiny.simple("llava", before=40, after=30, seed=1), tiny.simple("llava", images=2, after=12)]
    inputs = positioned(model, tiny.batch("llava", samples))  # 49 and 98 vision tokens
    with torch.no_grad():
        vanilla = model(**inputs).logits
    pruned, report = run(model, inputs, method(schedule=Schedule((Stage(1, 49),), tiny.LAYERS)))
    assert [len(row) for row in report.kept[0]] == [49, 49]
    real = inputs["attention_mask"][0].bool()
    torch.testing.assert_close(pruned[0, real], vanilla[0, real], atol=1e-5, rtol=0)


@each_method
@each_family
@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_pruned_is_the_masked_run(models, method, family, positions):
    """Prefill and cached decoding of a ragged, padded batch, against full runs without a cache."""
    if (family, positions) == ("qwen2_5_vl", "compact"):
        return  # refused, by a test of its own
    model, eager = models(family), models(family, "eager")
    pruner = dataclasses.replace(MASKED[method.name] or method(schedule=SHARES), positions=positions)
    inputs = tiny.batch(family, prompts(family))
    logits, report = run(model, inputs, pruner)

    oracle = Oracle(eager, {}, (tiny.IMAGE,), positions)
    vision, alive = inputs["input_ids"] == tiny.IMAGE, torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    for stage, kept in zip(report.stages, report.kept, strict=True):
        alive = alive & ~vision
        for b, row in enumerate(kept):
            alive[b, row] = True
        oracle.alive[stage.layer] = alive
    real = inputs["attention_mask"].bool() & alive
    torch.testing.assert_close(logits[real], oracle.logits(inputs)[real], atol=1e-5, rtol=0)

    tokens, _ = oracle.generate(inputs, 3)
    with attach(model, pruner):
        out = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, eos_token_id=None, suppress_tokens=[tiny.IMAGE, tiny.VIDEO]
        )
    placeholders = {tiny.IMAGE, tiny.VIDEO}
    if not placeholders & set(tokens.flatten().tolist()):
        assert torch.equal(out[:, inputs["input_ids"].shape[1] :], tokens)


@each_method
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("uneven", [False, True])
def test_no_layer_reads_the_device(monkeypatch, method, attention, uneven):
    """On the meta device there is nothing to read: `.item()`, `nonzero` or a boolean index anywhere would raise."""
    samples = prompts("llava")[:2] if uneven else [tiny.simple("llava", seed=1), tiny.simple("llava", seed=2)]
    layout = layout_of(samples, "left", "meta")
    monkeypatch.setattr(entry, "read_layout", lambda *_: layout)
    model = tiny.llava(attention).to("meta")
    ids = torch.zeros(layout.vision.shape, dtype=torch.long, device="meta")
    with attach(model, method(schedule=SHARES)) as handle, torch.no_grad():
        out = model(input_ids=ids, use_cache=True)
        assert out.logits.shape[:2] == ids.shape
        assert len(handle.report.stages) == 2


@each_method
def test_a_few_rows_and_heads_at_a_time(models, monkeypatch, method):
    """Attention that would be large is taken in parts: the same choice."""
    from adaptinfer.pruners import views

    inputs = tiny.batch("llava", prompts("llava"))
    _, whole = run(models("llava"), inputs, method(schedule=STAGES))
    monkeypatch.setattr(views, "_LARGEST", 3 * 4 * 130 * 7)
    _, parts = run(models("llava"), inputs, method(schedule=STAGES))
    for one, other in zip(whole.kept, parts.kept, strict=True):
        assert [row.tolist() for row in one] == [row.tolist() for row in other]


@each_method
def test_half_precision_scores_are_float32_and_finite(method):
    model = tiny.llava().to(torch.bfloat16)
    inputs = tiny.batch("llava", prompts("llava"))
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    _, report = run(model, inputs, method(schedule=STAGES))
    for stage in report.stages:
        assert stage.scores.dtype == torch.float32
        assert torch.isfinite(stage.scores[stage.entered_mask]).all()


@each_method
def test_saved_and_loaded(tmp_path, method):
    pruner = method(budget=0.25)
    pruner.save_pretrained(tmp_path)
    assert from_pretrained(tmp_path) == pruner


@each_method
def test_a_stage_where_it_cannot_sit(models, method):
    with pytest.raises(ScheduleError, match=r"stages\[0\].layer: must be at most 4"):
        method(schedule=Schedule((Stage(5, 3),), tiny.LAYERS))
