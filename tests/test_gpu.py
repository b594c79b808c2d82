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
