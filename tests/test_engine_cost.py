"""What a pruned prefill must not cost: reading the device, L x L buffers, masks that causality makes needless."""

from __future__ import annotations

import weakref

import pytest
import tiny
import torch
import zoo
from torch.utils._python_dispatch import TorchDispatchMode

from adaptinfer import AdaptInfer, Schedule, Stage, attach
from adaptinfer.engine import attention as attention_module
from adaptinfer.engine import entry
from adaptinfer.engine.layout import PromptLayout
from adaptinfer.pruners import Random

STAGES = Schedule((Stage(1, 0.4), Stage(3, 0.3)), tiny.LAYERS)


def layout_of(prompts, side, device):
    """What `read_layout` finds, worked out on the host."""
    inputs = tiny.batch("llava", prompts, side)
    vision = inputs["input_ids"] == tiny.IMAGE
    real = inputs["attention_mask"].bool()
    text = real & (torch.arange(vision.shape[1]) > torch.where(vision, torch.arange(vision.shape[1]), -1).amax(1, True))
    counts = [tuple(mask.sum(1).tolist()) for mask in (vision, text, real)]
    vision_counts, text_counts, real_counts = counts
    unguided = (0,) * len(prompts)
    return PromptLayout(
        vision.to(device),
        text.to(device),
        real.to(device),
        vision_counts,
        unguided,
        text_counts,
        real_counts,
        tail=vision.shape[1],
        right_padded=False,
    )


@pytest.mark.parametrize(
    "pruner",
    [
        AdaptInfer(schedule=STAGES),
        AdaptInfer(schedule=STAGES, prior_weight=0.5),
        AdaptInfer(schedule=STAGES, positions="compact"),
        Random(schedule=STAGES),
    ],
    ids=lambda p: f"{p.name}-{p.positions}",
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("uneven", [False, True])
def test_no_layer_reads_the_device(monkeypatch, attention, uneven, pruner):
    """On the meta device there is nothing to read: `.item()`, `nonzero` or a boolean index anywhere would raise."""
    prompts = [tiny.simple("llava", seed=1), tiny.simple("llava", seed=2)]
    if uneven:
        prompts = [tiny.simple("llava", seed=1, images=2), tiny.simple("llava", seed=2, after=30)]
    layout = layout_of(prompts, "left", "meta")
    monkeypatch.setattr(entry, "read_layout", lambda *_: layout)
    model = tiny.llava(attention).to("meta")
    ids = torch.zeros(layout.vision.shape, dtype=torch.long, device="meta")
    with attach(model, pruner) as handle, torch.no_grad():
        # No attention_mask: transformers itself would read it on the host to see whether it can be left out.
        out = model(input_ids=ids, use_cache=True)
        assert out.logits.shape[:2] == ids.shape
        assert len(handle.report.stages) == 2
        step = model(input_ids=ids[:, :1], past_key_values=out.past_key_values)
        assert step.logits.shape[1] == 1


class Largest(TorchDispatchMode):
    """Remember the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and not tensor._is_view() and "expand" not in str(func):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_no_buffer_grows_with_the_square_of_the_prompt(models):
    """Scores need text rows only, and a causal prompt needs no mask: nothing of L x L is ever made."""
    model = models("llava")
    prompt = tiny.simple("llava", images=40, between=1)
    length = len(prompt)
    assert length > 1900
    inputs = tiny.batch("llava", [prompt])
    vanilla, pruned = Largest(), Largest()
    with torch.no_grad(), vanilla:
        model(**inputs)
    with attach(model, AdaptInfer(schedule=Schedule((Stage(1, 0.2), Stage(3, 0.2)), tiny.LAYERS))) as handle:
        with torch.no_grad(), pruned:
            model(**inputs)
        kept = handle.report.stages[0].tokens
    # The mask of the survivors' rows in the pruning layer, kept x L booleans, is the largest thing that pruning adds.
    assert pruned.numel <= max(vanilla.numel, kept * length)
    if vanilla.numel < length * length / 3:  # torch 2.8 attends with grouped heads by way of the whole matrix
        assert pruned.numel < length * length / 3


def test_a_plainly_causal_prompt_stays_so(models):
    """Behind a stage the layers keep SDPA's causal fast path: no mask is made for an unpadded prompt."""
    model = models("llava")
    masks = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda m, a, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
        for layer in model.get_decoder().layers
    ]
    inputs = tiny.batch("llava", [tiny.simple("llava"), tiny.simple("llava", seed=1)])
    try:
        with attach(model, AdaptInfer(schedule=STAGES)):
            model.generate(**inputs, max_new_tokens=3)
    finally:
        for hook in hooks:
            hook.remove()
    assert masks and all(mask is None for mask in masks)


def test_masks_and_embeddings_are_made_once_per_stage(models, monkeypatch):
    model = models("llava", "eager")
    seen = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda m, a, kwargs: seen.append((id(kwargs["attention_mask"]), id(kwargs["position_embeddings"]))),
            with_kwargs=True,
        )
        for layer in model.get_decoder().layers
    ]
    inputs = tiny.batch("llava", [tiny.simple("llava", after=5), tiny.simple("llava")])
    try:
        with attach(model, AdaptInfer(schedule=STAGES)), torch.no_grad():
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    assert [seen[0], seen[2], seen[4]] == [seen[1], seen[3], seen[5]]
    assert len(set(seen)) == 3


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_scores_are_float32_in_a_half_precision_model(family):
    """Silent bug 11: the softmax and the sums are taken in float32 whatever the model computes in."""
    model = tiny.FAMILIES[family]().to(torch.bfloat16)
    inputs = tiny.batch(family, [tiny.simple(family), tiny.simple(family, after=12)])
    with attach(model, AdaptInfer(schedule=STAGES)) as handle:
        out = model.generate(**inputs, max_new_tokens=3)
    assert out.shape[1] > inputs["input_ids"].shape[1]
    for stage in handle.report.stages:
        assert stage.scores.dtype == torch.float32 and torch.isfinite(stage.scores).all()


class Peak(TorchDispatchMode):
    """Bytes of all tensors alive at once that operations made inside of it, at their highest."""

    def __init__(self):
        super().__init__()
        self.alive, self.highest, self.seen = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return out

    def count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self.alive += size
        self.highest = max(self.highest, self.alive)
        weakref.finalize(storage, self.gone, key, size)

    def gone(self, key, size):
        self.seen.discard(key)
        self.alive -= size


@pytest.mark.full
@pytest.mark.parametrize("shares", [(0.3, 0.2), (0.05, 0.5)])
def test_sixteen_thousand_vision_tokens_take_no_more_memory_than_vanilla(shares):
    """Nothing of L x L, no copy of what is there already."""
    model = zoo.SETUPS["qwen2_5_vl"].build("sdpa")
    prompt = zoo.simple("qwen2_5_vl", video=True, grid=(64, 32, 32), after=40)
    assert zoo.vision_tokens("qwen2_5_vl", prompt) == 16_384
    inputs = zoo.batch("qwen2_5_vl", [prompt])
    del inputs["pixel_values_videos"], inputs["video_grid_thw"]  # the vision tower is the same in both
    positions = torch.arange(len(prompt))[None]
    vanilla, pruned = Peak(), Peak()
    with torch.no_grad(), vanilla:
        model.base_model(**inputs, position_ids=positions, use_cache=True)
    schedule = Schedule((Stage(1, shares[0]), Stage(3, shares[1])), tiny.LAYERS)
    with attach(model, AdaptInfer(schedule=schedule)) as handle, torch.no_grad(), pruned:
        model.base_model(**inputs, position_ids=positions, use_cache=True)
    assert len(handle.report.stages) == 2
    assert pruned.highest <= vanilla.highest, (pruned.highest / 2**20, vanilla.highest / 2**20)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_survivors_attend_a_few_rows_at_a_time(models, monkeypatch, attention):
    """The same outputs however few."""
    model = models("llava", attention)
    inputs = tiny.batch("llava", [tiny.simple("llava"), tiny.simple("llava", after=12)])
    with attach(model, AdaptInfer(schedule=Schedule((Stage(1, 0.2), Stage(3, 0.2)), tiny.LAYERS))), torch.no_grad():
        whole = model(**inputs).logits
        monkeypatch.setattr(attention_module, "LARGEST_MASK", 700)
        torch.testing.assert_close(model(**inputs).logits, whole, atol=1e-6, rtol=0)
