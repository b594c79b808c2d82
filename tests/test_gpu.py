"""What only a CUDA device can show: nothing in a pruned forward waits for it; graphs. ``pytest -m gpu``."""

from __future__ import annotations

import threading
import warnings

import pytest
import tiny
import torch
from oracle import Oracle

import adaptinfer
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


# -- CUDA graphs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def captured():
    """Whatever cannot be captured is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="adaptinfer.compile")
        yield


GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "eos_token_id": None}


def on_device(family, prompts):
    return {key: value.to("cuda") for key, value in tiny.batch(family, prompts).items()}


def allocated():
    """Bytes of tensors, without the work space that cuBLAS keeps for every stream."""
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


def logits_of(model, inputs):
    out = model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
    return torch.stack(out.logits), out.sequences


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", ["adaptinfer", "fastv", "dart", "pyramiddrop", "sparsevlm", "random"])
def test_graphs_answer_as_uncompiled(captured, family, attention, method):
    """Prompts of one bucket, of several, alone and uneven; each twice, so that graphs of other prompts lie between."""
    batches = [
        on_device(family, [tiny.simple(family, before=5, after=9, seed=1)]),
        on_device(family, [tiny.simple(family, before=3, after=10, seed=2)]),
        on_device(family, [tiny.simple(family, after=30, seed=3)]),
        on_device(family, [tiny.simple(family, seed=4), tiny.simple(family, after=4, seed=5, images=2)]),
    ]
    model = tiny.FAMILIES[family](attention).to("cuda")
    with attach(model, adaptinfer.pruners.METHODS[method](schedule=STAGES)) as handle:
        expected = []
        for inputs in batches:
            expected.append((*logits_of(model, inputs), handle.report.kept))
        compiled = adaptinfer.compile(model)
        for _ in range(2):
            for inputs, (logits, tokens, kept) in zip(batches, expected, strict=True):
                found, made = logits_of(model, inputs)
                assert torch.equal(made, tokens)
                torch.testing.assert_close(found, logits, atol=1e-4, rtol=0)
                for one, other in zip(kept, handle.report.kept, strict=True):
                    assert all(map(torch.equal, one, other))
        assert len(compiled) >= 4


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_replayed_decoder_does_not_synchronise(captured, family):
    """From the copies in to the copies out, prompt and answer."""
    inputs = on_device(family, [tiny.simple(family, seed=1), tiny.simple(family, seed=2, images=2)])
    model = tiny.FAMILIES[family]().to("cuda")
    decoder = model.get_decoder()
    with attach(model, AdaptInfer(schedule=STAGES)):
        adaptinfer.compile(model)
        expected = model.generate(**inputs, **GREEDY)  # captures
        hooks = [
            decoder.register_forward_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode("error")),
            decoder.register_forward_hook(lambda *_: torch.cuda.set_sync_debug_mode("default")),
        ]
        try:
            assert torch.equal(model.generate(**inputs, **GREEDY), expected)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            for hook in hooks:
                hook.remove()


def test_graphs_in_half_precision_and_their_memory(captured):
    """As many graphs as prompts of one bucket need; dropped, they leave no more allocated than there was."""
    model = tiny.llava().to("cuda", torch.bfloat16)
    with attach(model, AdaptInfer(schedule=STAGES)):
        prompts = [on_device("llava", [tiny.simple("llava", after=after, seed=after)]) for after in (9, 20, 40)]
        for inputs in prompts:
            model.generate(**inputs, **GREEDY)
        before = allocated()
        compiled = adaptinfer.compile(model, max_graphs=2)
        for _ in range(3):
            for inputs in prompts:
                model.generate(**inputs, **GREEDY)
                assert len(compiled) <= 2
        compiled.remove()
        assert allocated() - before < 2**20


def test_threads_with_streams_of_their_own(captured):
    model = tiny.llava().to("cuda")
    batches = [on_device("llava", [tiny.simple("llava", seed=seed)]) for seed in range(8)]
    with attach(model, AdaptInfer(schedule=STAGES)):
        expected = [model.generate(**inputs, **GREEDY) for inputs in batches]
        adaptinfer.compile(model)
        model.generate(**batches[0], **GREEDY)
        torch.cuda.synchronize()
        wrong = []

        def run(numbers):
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(5):
                    for number in numbers:
                        if not torch.equal(model.generate(**batches[number], **GREEDY), expected[number]):
                            wrong.append(number)

        threads = [threading.Thread(target=run, args=(range(start, 8, 2),)) for start in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
