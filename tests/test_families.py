"""Every family against the oracle: family × attention × form of the batch × schedule, prefill and cached decoding.

``make test`` runs a cell or two per family, ``make test-full`` all of them (marker ``full``).
"""

from __future__ import annotations

import pytest
import torch
import zoo
from oracle import Oracle, keeps_of
from tiny import LAYERS

from adaptinfer import AdaptInfer, Schedule, Stage, UnsupportedError, attach
from adaptinfer.engine.families import family_of

STEPS = 5
GREEDY = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, "eos_token_id": None}
GREEDY |= {"suppress_tokens": list(zoo.PLACEHOLDERS), "return_dict_in_generate": True, "output_logits": True}

REFUSED = {"granite4_vision": "adds vision features between its layers"}
FAMILIES = [name for name in zoo.SETUPS if name not in REFUSED]
DEPTH = {"qwen3_5": 8, "qwen3_5_moe": 8}  # others: LAYERS
# Layers in which a stage may sit (never in the last): those with keys of their own. Others: all.
SCORING = {"qwen3_5": (3,), "qwen3_5_moe": (3,), "lfm2_vl": (2,), "gemma4": (0, 1, 2, 3)}
NO_SDPA = {"paligemma2": "Gemma 2 has no sdpa in transformers, because of its soft-capping"}

# What each stage keeps of the tokens that enter it. Stages stand in the first, middle or last layers that may prune.
SHARES = {"early": (0.5, 0.4), "middle": (0.8, 0.6, 0.3), "late": (0.2,), "nothing": (0.0,)}


def stages_of(family: str, schedule: str) -> tuple[tuple[int, float], ...]:
    layers, shares = SCORING.get(family, tuple(range(LAYERS - 1))), SHARES[schedule]
    chosen = {"early": layers[:2], "middle": layers[1:4], "late": layers[-1:], "nothing": layers[1:2]}[schedule]
    return tuple(zip(chosen, shares, strict=False))


def schedule_of(family: str, schedule: str) -> Schedule:
    stages = tuple(Stage(layer, share) for layer, share in stages_of(family, schedule))
    return Schedule(stages, DEPTH.get(family, LAYERS))


def size(family: str, number: int) -> dict:
    sizes = zoo.SETUPS[family].sizes
    return sizes[number % len(sizes)]


FORMS = {
    "single": lambda f: [zoo.simple(f)],
    "left": lambda f: [
        zoo.simple(f, after=5, seed=1, **size(f, 1)),
        zoo.simple(f, after=13, seed=2, **size(f, 2)),
        zoo.simple(f, seed=3),
    ],
    "two_images": lambda f: [
        zoo.simple(f, images=2, **size(f, 1)),
        zoo.simple(f, images=2, before=0, between=2, after=4, seed=4),
    ],
    "mixed": lambda f: [
        zoo.simple(f, images=2, seed=5),
        zoo.simple(f, after=20, seed=6, **size(f, 1)),
        zoo.words(zoo.Prompt(), 30, 7),
    ],
    "video": lambda f: [zoo.simple(f, video=True, images=2), zoo.simple(f, video=True, after=5, seed=1)],
}
FORMS["right"] = FORMS["left"]


def cells(forms: tuple[str, ...], attentions=("sdpa", "eager"), schedules=tuple(SHARES), usual=()):
    """Parameters (family, attention, form, schedule); all but the ``usual`` ones are marked ``full``."""
    parameters = []
    for family in FAMILIES:
        for attention in attentions:
            if attention == "sdpa" and family in NO_SDPA:
                continue
            for form in forms:
                if form == "video" and zoo.SETUPS[family].add_video is None:
                    continue
                for schedule in schedules:
                    if not stages_of(family, schedule):  # too few layers may prune
                        continue
                    kind = "sdpa" if family in NO_SDPA else attention  # stands in for it in the usual cells
                    marks = () if (kind, form, schedule) in usual else (pytest.mark.full,)
                    name = "-".join((family, attention, form, schedule))
                    parameters.append(pytest.param(family, attention, form, schedule, id=name, marks=marks))
    return pytest.mark.parametrize(("family", "attention", "form", "schedule"), parameters)


@pytest.fixture(scope="session")
def made():
    return {}


@pytest.fixture
def zoo_models(made):
    """Tiny models by (family, attention backend); fails a test that leaves something attached to one."""
    used = []

    def model(family: str, attention: str = "sdpa"):
        if (family, attention) not in made:
            made[family, attention] = zoo.SETUPS[family].build(attention)
        used.append(made[family, attention])
        if hasattr(used[-1].base_model, "rope_deltas"):  # older transformers reuse those of the last prompt
            used[-1].base_model.rope_deltas = None
        return used[-1]

    yield model
    for model in used:
        assert "_adaptinfer_handle" not in model.__dict__


def inputs_of(family: str, prompts, form: str = "left"):
    return zoo.batch(family, prompts, "right" if form == "right" else "left")


def numbered(model, inputs):
    """Inputs of a plain forward with the positions that generate would give them."""
    if hasattr(model.base_model, "get_rope_index"):
        return inputs
    return {**inputs, "position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)}


def generated(model, inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens [B, STEPS] and their logits [B, STEPS, vocabulary]."""
    out = model.generate(**inputs, **GREEDY)
    return out.sequences[:, -STEPS:], torch.stack(out.logits, dim=1)


def assert_close(family: str, logits: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(logits, expected, atol=max(1e-5, zoo.SETUPS[family].tolerance), rtol=0)


def assert_kept(report, kept: list[list[list[int]]], schedule: Schedule) -> None:
    """The report names exactly the positions that the oracle kept."""
    found = {
        record.layer: [row.tolist() for row in rows] for record, rows in zip(report.stages, report.kept, strict=True)
    }
    for s, stage in enumerate(schedule.stages):
        if stage.layer in found:
            assert found.pop(stage.layer) == kept[s]
        else:
            assert s and kept[s] == kept[s - 1], "a stage without a record dropped nothing"
    assert not found


# One prompt without padding has no mask at all under sdpa, so it is a way of its own.
@cells(
    ("single", "left", "two_images", "mixed", "video", "right"),
    usual=[("sdpa", "left", "early"), ("sdpa", "single", "middle")],
)
def test_prefill_is_the_masked_run(zoo_models, family, attention, form, schedule):
    prompts, schedule = FORMS[form](family), schedule_of(family, schedule)
    inputs = inputs_of(family, prompts, form)
    oracle = Oracle(zoo_models(family, "eager"), keeps_of(schedule, prompts, zoo.PLACEHOLDERS), zoo.PLACEHOLDERS)
    kept, expected = oracle.settle(inputs), oracle.logits(inputs)
    model = zoo_models(family, attention)
    # Where no padding stands in front, a call without position_ids counts the same.
    asked = inputs if form in ("single", "right") else numbered(model, inputs)
    with attach(model, AdaptInfer(schedule=schedule)) as handle, torch.no_grad():
        logits = model(**asked).logits
    assert_kept(handle.report, kept, schedule)
    real = inputs["attention_mask"].bool()
    alive = oracle.alive[max(oracle.alive)] & real
    assert logits.shape == expected.shape
    assert_close(family, logits[alive], expected[alive])
    assert (~alive & real).any()


@cells(("single", "left", "two_images", "mixed", "video"), usual=[("sdpa", "left", "early")])
def test_cached_decoding_is_recomputation(zoo_models, family, attention, form, schedule):
    prompts, schedule = FORMS[form](family), schedule_of(family, schedule)
    inputs = inputs_of(family, prompts)
    oracle = Oracle(zoo_models(family, "eager"), keeps_of(schedule, prompts, zoo.PLACEHOLDERS), zoo.PLACEHOLDERS)
    kept = oracle.settle(inputs)
    expected, expected_logits = oracle.generate(inputs, STEPS)
    model = zoo_models(family, attention)
    with attach(model, AdaptInfer(schedule=schedule)) as handle:
        tokens, logits = generated(model, inputs)
    assert_kept(handle.report, kept, schedule)
    assert_close(family, logits, expected_logits)
    assert torch.equal(tokens, expected)


@cells(("left", "right"), schedules=("early",), usual=[("sdpa", "left", "early")])
def test_logits_of_the_last_tokens_alone(zoo_models, family, attention, form, schedule):
    """Also where dropped tokens stand among these, and where a model itself goes on with fewer tokens (Gemma 4)."""
    prompts, schedule, last = FORMS[form](family), schedule_of(family, schedule), 25
    inputs = numbered(zoo_models(family, "eager"), inputs_of(family, prompts, form))
    with torch.no_grad(), attach(zoo_models(family, attention), AdaptInfer(schedule=schedule)):
        whole = zoo_models(family, attention)(**inputs).logits
        logits = zoo_models(family, attention)(**inputs, logits_to_keep=last).logits
    real = inputs["attention_mask"].bool()[:, -last:]
    assert logits.shape == whole[:, -last:].shape
    assert_close(family, logits[real], whole[:, -last:][real])


@cells(("left", "two_images", "mixed", "video"), schedules=("early", "late"))
def test_a_batch_is_its_samples(zoo_models, family, attention, form, schedule):
    prompts, model = FORMS[form](family), zoo_models(family, attention)
    with attach(model, AdaptInfer(schedule=schedule_of(family, schedule))) as handle:
        tokens, logits = generated(model, inputs_of(family, prompts))
        together, longest = handle.report, max(map(len, prompts))
        for row, prompt in enumerate(prompts):
            alone, its_logits = generated(model, inputs_of(family, [prompt]))
            assert_close(family, logits[[row]], its_logits)
            assert torch.equal(tokens[[row]], alone)
            if not any(token in zoo.PLACEHOLDERS for token in prompt):
                continue
            padding = longest - len(prompt)
            its = {record.layer: kept[0] for record, kept in zip(handle.report.stages, handle.report.kept, strict=True)}
            for record, kept in zip(together.stages, together.kept, strict=True):
                if record.layer in its:
                    assert torch.equal(kept[row] - padding, its[record.layer])


@cells(("left", "mixed", "video"), schedules=("early",))
def test_keeping_all_is_vanilla_bit_for_bit(zoo_models, family, attention, form, schedule):
    model, inputs = zoo_models(family, attention), inputs_of(family, FORMS[form](family))
    stages = tuple(Stage(layer, 1.0) for layer, _ in stages_of(family, schedule))

    def run():
        with torch.no_grad():
            return [model(**inputs).logits, *generated(model, inputs)]

    before = run()
    with attach(model, AdaptInfer(schedule=Schedule(stages, DEPTH.get(family, LAYERS)))) as handle:
        attached = run()
        assert handle.report.stages == ()
    with attach(model, AdaptInfer(schedule=schedule_of(family, schedule))) as handle:
        assert not torch.equal(run()[0], before[0])
    for results in (attached, run()):
        assert all(map(torch.equal, results, before))


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_may_prune(zoo_models, family):
    scoring = family_of(zoo_models(family, "eager")).scoring
    last = DEPTH.get(family, LAYERS) - 1
    assert tuple(layer for layer in scoring if layer < last) == SCORING.get(family, tuple(range(last)))


@pytest.mark.parametrize("family", REFUSED)
def test_refused(zoo_models, family):
    with pytest.raises(UnsupportedError, match=REFUSED[family]):
        attach(zoo_models(family), AdaptInfer(budget=0.5))
