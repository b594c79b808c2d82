"""Every request gets the tokens that our engine gives it on transformers, whatever else is in the batch."""

from __future__ import annotations

import pytest
import torch
import vision
from conftest import engine, inputs, parameters, picture, request, served, words

from adaptinfer import AdaptInfer, Schedule, Stage
from adaptinfer.pruners import METHODS, FastV, Random

THREE = Schedule((Stage(1, 30), Stage(2, 12), Stage(4, 3)), 6, vision_tokens=49)
SERVED = ("adaptinfer", "random", "stride", "fastv", "fitprune", "textguided")  # all others are refused
SIZES = ((28, 28), (56, 28), (28, 56), (84, 28), (20, 60), (50, 50))


def mixed(count: int, first: int = 0, **more) -> list:
    """Requests with no picture, one, two and three."""
    return [request(seed, images=(0, 1, 1, 2, 3)[seed % 5], **more) for seed in range(first, first + count)]


@pytest.mark.parametrize(
    ("model", "pruner"),
    [
        ("llava", AdaptInfer(schedule=THREE)),
        ("llava", AdaptInfer(schedule=THREE, positions="compact", prior_weight=0.5)),
        ("llava", AdaptInfer(budget=0.4)),
        ("llava", FastV(schedule=Schedule((Stage(2, 12),), 6, vision_tokens=49))),
        ("llava", Random(schedule=Schedule((Stage(0, 9), Stage(4, 0)), 6, vision_tokens=49))),
        ("llava_next", AdaptInfer(budget=0.4)),
    ],
    ids=[
        "three stages",
        "compact positions",
        "a share of each prompt",
        "FastV",
        "random, none left",
        "pictures of many sizes",
    ],
)
def test_mixed_requests_at_once(folder, reference, model, pruner):
    requests = mixed(80, sizes=SIZES if model == "llava_next" else SIZES[:1])
    wanted = reference(model).tokens(pruner, requests)
    with engine(folder(model), pruner, max_model_len=1024) as llm:
        assert served(llm, requests) == wanted
    assert wanted != reference(model).tokens(None, requests)


@pytest.mark.parametrize("method", [name for name in SERVED if name != "adaptinfer"])
def test_each_method_that_is_served(folder, reference, method):
    pruner = METHODS[method](budget=0.4)
    requests = mixed(20)
    wanted = reference("llava").tokens(pruner, requests)
    with engine(folder("llava"), pruner) as llm:
        assert served(llm, requests) == wanted
    assert wanted != reference("llava").tokens(None, requests)


@pytest.mark.skipif(not vision.HAS_TORCHVISION, reason="Qwen's processor needs torchvision")
@pytest.mark.parametrize("images", [0, 1, 2])
def test_multimodal_positions(folder, reference, images):
    pruner = AdaptInfer(budget=0.4)
    requests = [request(seed, images=images, sizes=((32, 32), (64, 24), (24, 64), (48, 48))) for seed in range(16)]
    for each in requests:
        each.text = each.text.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
    wanted = reference("qwen2_5_vl").tokens(pruner, requests)
    with engine(folder("qwen2_5_vl"), pruner) as llm:
        assert served(llm, requests) == wanted


@pytest.mark.parametrize("pruner", [None, AdaptInfer(schedule=Schedule((), 6)), AdaptInfer(budget=4096)], ids=repr)
def test_keeping_all_is_the_model_as_it_is(folder, reference, pruner):
    requests = mixed(20)
    wanted = reference("llava").tokens(None, requests)
    with engine(folder("llava"), pruner) as llm:
        assert served(llm, requests) == wanted
        pruning = getattr(llm.llm_engine.model_executor.driver_worker.model_runner.get_model(), "pruning", None)
        assert (pruning is None) == (pruner is None)


def test_a_picture_without_a_question_is_kept_whole(folder, reference):
    pruner = AdaptInfer(schedule=THREE)
    requests = mixed(6)
    for each in requests[1::2]:
        each.text, each.images = f"{words(5, 3)} <image>\n {words(4, 1)} <image>", [picture(1), picture(2)]
    wanted = reference("llava").tokens(pruner, requests)
    with engine(folder("llava"), pruner) as llm:
        assert served(llm, requests) == wanted
        assert served(llm, requests) == wanted  # the prefix cache now knows all of them


@pytest.mark.skipif(
    not (torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()),
    reason="vLLM quantises keys and values on CPUs with AVX-512 or AMX only",
)
def test_quantised_keys_and_values(folder):
    """Scores read the keys before they are quantised; the rest is vLLM's own, so keeping all is the measure."""
    requests = mixed(20)
    answers = {}
    for name, pruner in {
        "plain": None,
        "all": AdaptInfer(schedule=Schedule((), 6)),
        "some": AdaptInfer(schedule=THREE),
    }.items():
        with engine(folder("llava"), pruner, kv_cache_dtype="fp8") as llm:
            answers[name] = served(llm, requests)
            assert served(llm, requests[::-1])[::-1] == answers[name]
    assert answers["all"] == answers["plain"] != answers["some"]


def test_sampling_with_a_seed_does_not_depend_on_the_batch(folder):
    requests = mixed(12)
    with engine(folder("llava"), AdaptInfer(schedule=THREE)) as llm:
        settings = parameters(requests)
        for number, each in enumerate(settings):
            each.temperature, each.seed, each.max_tokens = 1.0, number, 12
        together = [o.outputs[0].token_ids for o in llm.generate(inputs(requests), settings, use_tqdm=False)]
        alone = [
            llm.generate(one, setting, use_tqdm=False)[0].outputs[0].token_ids
            for one, setting in zip(inputs(requests), settings, strict=True)
        ]
        assert together == alone
