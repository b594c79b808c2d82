"""A pruned run is the full run with the dropped tokens masked: prompts, batches, decoding, turns, positions."""

from __future__ import annotations

import pytest
import tiny
import torch
from oracle import Oracle, grown
from transformers import DynamicCache

from adaptinfer import AdaptInfer, Schedule, Stage, attach

TOLERANCE = 1e-5
PLACEHOLDERS = (tiny.IMAGE, tiny.VIDEO)

SCHEDULES = {
    "early": ((0, 12), (1, 5)),
    "three": ((1, 30), (2, 9), (4, 2)),
    "late": ((4, 7),),
    "to nothing": ((2, 10), (3, 0)),
    "barely": ((1, 45), (3, 40)),
}

PROMPTS = {
    "single": lambda f: [tiny.simple(f)],
    "padded": lambda f: [tiny.simple(f, after=5, seed=1), tiny.simple(f, after=13, seed=2), tiny.simple(f, seed=3)],
    "two images": lambda f: [tiny.simple(f, images=2), tiny.simple(f, images=2, before=0, between=2, after=3, seed=4)],
    "uneven": lambda f: [
        tiny.simple(f, images=2, seed=5),
        tiny.simple(f, after=20, seed=6),
        tiny.words(tiny.Prompt(), 30, 7),
    ],
    "same length, uneven": lambda f: [
        tiny.simple(f, seed=5, after=9),
        tiny.words(tiny.Prompt(), len(tiny.simple(f, seed=5, after=9)), 8),
    ],
}


def literal(stages):
    return Schedule(tuple(Stage(layer, keep) for layer, keep in stages), tiny.LAYERS)


def keeps_of(schedule, prompts):
    counts = [sum(token in PLACEHOLDERS for token in prompt) for prompt in prompts]
    rows = [schedule.keeps(count) for count in counts]
    return {stage.layer: [row[s] for row in rows] for s, stage in enumerate(schedule.stages)}


def check_positions(report, kept, schedule):
    """The report names exactly the positions that the oracle kept."""
    found = {stage.layer: rows for stage, rows in zip(report.stages, report.kept, strict=True)}
    for s, stage in enumerate(schedule.stages):
        if stage.layer in found:
            assert [row.tolist() for row in found[stage.layer]] == kept[s]
        else:
            assert s and kept[s] == kept[s - 1], "a stage without a record dropped nothing"
    assert set(found) <= {stage.layer for stage in schedule.stages}


@pytest.mark.parametrize("stages", SCHEDULES, ids=lambda name: name.replace(" ", "-"))
@pytest.mark.parametrize("prompts", PROMPTS, ids=lambda name: name.replace(" ", "-"))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_prefill_is_the_masked_run(models, family, attention, prompts, stages, side):
    prompts, schedule = PROMPTS[prompts](family), literal(SCHEDULES[stages])
    if any(0 < sum(t in PLACEHOLDERS for t in p) < schedule.stages[0].keep for p in prompts):
        pytest.fail("a schedule of this test keeps more than a prompt has")
    if any(not prompt.images for prompt in prompts):
        # A text-only row keeps its zero vision tokens: say so with shares, which are defined for any count.
        schedule = Schedule(
            tuple(Stage(layer, keep / 48) for layer, keep in [(s.layer, s.keep) for s in schedule.stages][:1]),
            tiny.LAYERS,
        )
    inputs = tiny.batch(family, prompts, side)
    oracle = Oracle(models(family, "eager"), keeps_of(schedule, prompts), PLACEHOLDERS)
    kept = oracle.settle(inputs)
    expected = oracle.logits(inputs)
    extra = {}
    if family == "llava":
        extra["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with attach(models(family, attention), AdaptInfer(schedule=schedule)) as handle, torch.no_grad():
        logits = models(family, attention)(**inputs, **extra).logits
    check_positions(handle.report, kept, schedule)
    alive = oracle.alive[max(oracle.alive)] & inputs["attention_mask"].bool()
    assert logits.shape == expected.shape
    torch.testing.assert_close(logits[alive], expected[alive], atol=TOLERANCE, rtol=0)
    assert not logits[~alive & (inputs["attention_mask"] == 1)].any(), "rows of dropped tokens are zeros"


@pytest.mark.parametrize("positions", ["keep", "compact"])
@pytest.mark.parametrize("prompts", ["single", "padded", "two images", "uneven", "same length, uneven"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_cached_decoding_is_recomputation(models, family, attention, prompts, positions):
    if positions == "compact" and family != "llava":
        return  # refused; see test_refusals
    prompts = PROMPTS[prompts](family)
    schedule = Schedule((Stage(1, 0.5), Stage(3, 0.3)), tiny.LAYERS)
    inputs = tiny.batch(family, prompts)
    oracle = Oracle(models(family, "eager"), keeps_of(schedule, prompts), PLACEHOLDERS, positions)
    kept = oracle.settle(inputs)
    tokens, logits = oracle.generate(inputs, steps=5)
    model = models(family, attention)
    with attach(model, AdaptInfer(schedule=schedule, positions=positions)) as handle:
        out = model.generate(
            **inputs,
            max_new_tokens=5,
            min_new_tokens=5,
            do_sample=False,
            eos_token_id=None,
            suppress_tokens=list(PLACEHOLDERS),
            return_dict_in_generate=True,
            output_logits=True,
        )
    check_positions(handle.report, kept, schedule)
    torch.testing.assert_close(torch.stack(out.logits, dim=1), logits, atol=TOLERANCE, rtol=0)
    assert torch.equal(out.sequences[:, -5:], tokens)


@pytest.mark.parametrize("positions", ["keep", "compact"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_second_turn_on_one_cache(models, family, attention, positions):
    """A later turn of text sees what the first turn kept, and never uses the first turn's indices for itself."""
    if positions == "compact" and family != "llava":
        return
    prompts = [tiny.simple(family, seed=11)]
    schedule = literal(((1, 20), (3, 6)))
    inputs = tiny.batch(family, prompts)
    oracle = Oracle(models(family, "eager"), keeps_of(schedule, prompts), PLACEHOLDERS, positions)
    oracle.settle(inputs)
    question = torch.tensor([[5, 17, 33, 41, 8]])
    model = models(family, attention)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    options["suppress_tokens"] = list(PLACEHOLDERS)
    first, _ = oracle.generate(inputs, 3)
    turn = grown(grown(inputs, first), question)
    tokens, logits = oracle.generate(turn, 3)
    with attach(model, AdaptInfer(schedule=schedule, positions=positions)) as handle:
        cache = DynamicCache(config=model.config.get_text_config())
        out = model.generate(**inputs, **options, past_key_values=cache)
        assert torch.equal(out[:, -3:], first)
        report = handle.report
        text_only = {key: turn[key] for key in ("input_ids", "attention_mask", "mm_token_type_ids") if key in turn}
        out = model.generate(
            **text_only, **options, past_key_values=cache, return_dict_in_generate=True, output_logits=True
        )
        assert handle.report is report, "a turn without an image is no prefill of vision tokens"
    torch.testing.assert_close(torch.stack(out.logits, dim=1), logits, atol=TOLERANCE, rtol=0)
    assert torch.equal(out.sequences[:, -3:], tokens)
