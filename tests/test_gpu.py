"""What only a CUDA device can show: nothing in a pruned forward waits for it. Run with ``pytest -m gpu``."""

from __future__ import annotations

import pytest
import tiny
import torch
from oracle import Oracle

from adaptinfer import AdaptInfer, Schedule, Stage, attach

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
STAGES = Schedule((Stage(1, 0.4), Stage(3, 0.3)), tiny.LAYERS)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("uneven", [False, True])
def test_no_layer_synchronises(family, uneven):
    model = tiny.FAMILIES[family]().to("cuda")
    prompts = [tiny.simple(family, seed=1), tiny.simple(family, seed=2, images=2 if uneven else 1)]
    inputs = {key: value.to("cuda") for key, value in tiny.batch(family, prompts).items()}
    decoder = model.get_decoder()
    hooks = [
        decoder.layers[0].register_forward_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode("error")),
        decoder.norm.register_forward_hook(lambda *_: torch.cuda.set_sync_debug_mode("default")),
    ]
    try:
        with attach(model, AdaptInfer(schedule=STAGES)) as handle:
            model.generate(**inputs, max_new_tokens=3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        for hook in hooks:
            hook.remove()
    assert len(handle.report.stages) == 2


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_device_chooses_what_the_oracle_chooses(family):
    prompts = [tiny.simple(family, after=5, seed=1), tiny.simple(family, after=13, seed=2)]
    inputs = tiny.batch(family, prompts)
    schedule = Schedule((Stage(1, 20), Stage(3, 6)), tiny.LAYERS)
    oracle = Oracle(tiny.FAMILIES[family]("eager"), {1: [20, 20], 3: [6, 6]}, (tiny.IMAGE, tiny.VIDEO))
    kept = oracle.settle(inputs)
    tokens, _ = oracle.generate(inputs, 4)
    model = tiny.FAMILIES[family]().to("cuda")
    with attach(model, AdaptInfer(schedule=schedule)) as handle:
        out = model.generate(
            **{key: value.to("cuda") for key, value in inputs.items()},
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            eos_token_id=None,
        )
    assert [[row.tolist() for row in stage] for stage in handle.report.kept] == kept
    assert torch.equal(out[:, -4:].cpu(), tokens)


WAYS = {
    "static": {"cache_implementation": "static", "disable_compile": True},
    "compiled": {"cache_implementation": "static"},  # transformers compiles decoding with CUDA graphs by itself
    "offloaded": {"cache_implementation": "offloaded"},
    "offloaded_static": {"cache_implementation": "offloaded_static"},
    "fp8": {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_ways_of_decoding_on_the_device(family, way):
    """Streams, CUDA graphs and pinned copies exist only there; twice, for a graph that is used again."""
    prompts = [tiny.simple(family, seed=1), tiny.simple(family, seed=2, images=2)]
    inputs = {key: value.to("cuda") for key, value in tiny.batch(family, prompts).items()}
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    model = tiny.FAMILIES[family]().to("cuda")
    with attach(model, AdaptInfer(schedule=STAGES)):
        plain = model.generate(**inputs, **options)
        for _ in range(2):
            assert torch.equal(model.generate(**inputs, **options, **WAYS[way]), plain)


@pytest.mark.parametrize("backend", ["flash_attention_2", "flex_attention"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_backends_with_real_kernels(family, backend):
    """FlashAttention computes in half precision, so the choice is compared, and the answer is only looked at."""
    if backend == "flash_attention_2":
        pytest.importorskip("flash_attn")
    prompts = [tiny.simple(family, after=5, seed=1), tiny.simple(family, after=13, seed=2)]
    inputs = {key: value.to("cuda") for key, value in tiny.batch(family, prompts).items()}
    kept = {}
    for attention in ("sdpa", backend):
        model = tiny.FAMILIES[family](attention).to("cuda", torch.bfloat16)
        with attach(model, AdaptInfer(schedule=Schedule((Stage(1, 20),), tiny.LAYERS))) as handle, torch.no_grad():
            assert torch.isfinite(model(**inputs).logits).all()
            kept[attention] = [set(row.tolist()) for row in handle.report.kept[0]]
    for one, other in zip(kept["sdpa"], kept[backend], strict=True):
        assert len(one & other) >= 18
