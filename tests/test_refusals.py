"""What is refused: one clear error, before any work, that says what to do instead."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
import zoo
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    CLIPVisionModel,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.cache_utils import DynamicLayer

import adaptinfer
from adaptinfer import AdaptInfer, PrunerError, Schedule, ScheduleError, Stage, UnsupportedError, attach
from adaptinfer.pruners import Random

STAGES = Schedule((Stage(1, 20), Stage(3, 6)), tiny.LAYERS)


@pytest.fixture
def attached(models):
    model = models("llava")
    with attach(model, AdaptInfer(schedule=STAGES)):
        yield model


@pytest.fixture
def inputs():
    return tiny.batch("llava", [tiny.simple("llava")])


def refuses(model, message, call):
    """The call is refused before the first decoder layer, and the model still works afterwards."""
    layers_run = []
    hook = model.get_decoder().layers[0].register_forward_pre_hook(lambda *_: layers_run.append(1))
    try:
        with pytest.raises(UnsupportedError, match=message):
            call()
        assert not layers_run, "work was done before the refusal"
    finally:
        hook.remove()
    inputs = tiny.batch("llava", [tiny.simple("llava")])
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[0] == 1


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("chunked prefill", {"prefill_chunk_size": 16}),
        ("cache_implementation='paged'", {"cache_implementation": "paged"}),
        ("assistant_early_exit", {"assistant_early_exit": 2}),
        ("output_attentions", {"output_attentions": True, "return_dict_in_generate": True}),
        ("output_hidden_states", {"output_hidden_states": True, "return_dict_in_generate": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_ways_of_generating(attached, inputs, message, options):
    refuses(attached, message, lambda: attached.generate(**inputs, max_new_tokens=3, **options))
    config = attached.generation_config.__class__(max_new_tokens=3, pad_token_id=0, **options)
    refuses(attached, message, lambda: attached.generate(**inputs, generation_config=config))


def test_a_foreign_cache_layer(attached, inputs):
    class OddLayer(DynamicLayer):
        """Stores who knows what."""

    cache = DynamicCache()
    cache.layers.append(OddLayer())
    refuses(attached, "a cache with OddLayers", lambda: attached.generate(**inputs, max_new_tokens=3, cache=cache))
    refuses(attached, "a cache with OddLayers", lambda: attached(**inputs, cache=cache))


def test_embeddings_without_ids(attached, inputs):
    embeddings = attached.get_input_embeddings()(inputs["input_ids"])
    refuses(attached, "inputs_embeds without input_ids", lambda: attached(inputs_embeds=embeddings))
    refuses(
        attached,
        "inputs_embeds without input_ids",
        lambda: attached.generate(inputs_embeds=embeddings, max_new_tokens=2),
    )


def test_labels(attached, inputs):
    refuses(attached, "labels", lambda: attached(**inputs, labels=inputs["input_ids"]))


def test_attention_outputs_of_a_plain_forward(attached, inputs):
    refuses(attached, "output_attentions", lambda: attached(**inputs, output_attentions=True))
    refuses(attached, "output_hidden_states", lambda: attached(**inputs, output_hidden_states=True))


def test_training_mode(attached, inputs):
    attached.train()
    try:
        with pytest.raises(UnsupportedError, match=r"model\.eval\(\)"):
            attached(**inputs)
    finally:
        attached.eval()


def test_a_mask_of_four_dimensions(attached, inputs):
    length = inputs["input_ids"].shape[1]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    refuses(attached, "two-dimensional attention_mask", lambda: attached(**{**inputs, "attention_mask": mask}))


def test_what_is_refused_runs_without_the_pruner(attached, inputs):
    with adaptinfer.disabled(attached):
        assert attached(**inputs, output_hidden_states=True).hidden_states is not None
        assert attached.generate(**inputs, max_new_tokens=2, use_cache=False).shape[0] == 1


def test_generating_from_prompts_padded_on_the_right(attached):
    """A plain forward is fine: its padding rows are nobody's."""
    prompts = [tiny.simple("llava", after=5), tiny.simple("llava", after=9)]
    inputs = tiny.batch("llava", prompts, "right")
    refuses(attached, "pad on the left", lambda: attached.generate(**inputs, max_new_tokens=2))
    assert attached(**inputs).logits.shape[1] == len(prompts[1])


def test_continuous_batching(attached):
    with pytest.raises(UnsupportedError, match="generate_batch: continuous batching"):
        attached.generate_batch([[5, 6, 7]])


def test_a_pruned_cache_outlives_the_pruner(models, inputs):
    model = models("llava")
    with attach(model, AdaptInfer(schedule=STAGES)):
        out = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
    later = torch.cat([out.sequences, torch.tensor([[5, 6, 7]])], dim=1)
    with pytest.raises(UnsupportedError, match="the pruner that knows how to read it has been detached"):
        model.generate(input_ids=later, past_key_values=out.past_key_values, max_new_tokens=2)


def test_sparse_attention_and_other_caches_are_refused_when_attaching():
    """MiniMax-M3's indexer counts key columns by the tokens it was given."""
    text = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "head_dim": 16, "rotary_dim": 16, "vocab_size": 128, "num_local_experts": 4}
    text |= {"num_experts_per_tok": 2, "dense_intermediate_size": 64, "shared_intermediate_size": 32}
    text |= {"index_n_heads": 2, "index_head_dim": 16, "index_block_size": 8, "index_topk_blocks": 3}
    text |= {"mlp_layer_types": ["dense"] * 4, "layer_types": ["full_attention"] * 2 + ["minimax_m3_sparse"] * 2}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision |= {"image_size": 28, "patch_size": 4}
    if "minimax_m3_vl" not in CONFIG_MAPPING:
        pytest.skip("this transformers has no MiniMax-M3-VL")
    config = CONFIG_MAPPING["minimax_m3_vl"](text_config=text, vision_config=vision, image_token_index=tiny.IMAGE)
    model = AutoModelForImageTextToText.from_config(config)
    with pytest.raises(UnsupportedError, match="minimax_m3_vl keeps its keys in .*Layers, of which the engine"):
        attach(model, AdaptInfer(budget=0.5))


@pytest.mark.parametrize(("name", "reason"), [("mllama", "cross-attention"), ("llama4", "counts positions")])
def test_models_whose_reason_is_known(name, reason):
    with pytest.raises(UnsupportedError, match=f"{name}: .*{reason}"):
        attach(zoo.BUILD_ONLY[name]("sdpa"), AdaptInfer(budget=0.5))


def test_attaching_twice(attached):
    with pytest.raises(adaptinfer.AdaptInferError, match="attached to this model already"):
        attach(attached, AdaptInfer(budget=20))


def test_attaching_to_a_part_of_an_attached_model(attached):
    with pytest.raises(adaptinfer.AdaptInferError, match="a part of this model already"):
        attach(attached.base_model, AdaptInfer(budget=20))


def test_copying_an_attached_model(attached):
    """A copy would call the original's generate."""
    with pytest.raises(adaptinfer.AdaptInferError, match="cannot be copied or pickled; detach first"):
        copy.deepcopy(attached)


def test_a_cache_of_another_age(attached, inputs):
    keys = torch.zeros(1, 2, 4, 16)
    refuses(
        attached, "pruning needs a cache whose layers", lambda: attached(**inputs, past_key_values=((keys, keys),) * 6)
    )


def test_models_that_are_not_supported(models):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    text = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32))
    with pytest.raises(UnsupportedError, match="llama is not a vision-language model"):
        attach(text, AdaptInfer(budget=20))
    with pytest.raises(UnsupportedError, match="Linear is not a transformers model"):
        attach(torch.nn.Linear(2, 2), AdaptInfer(budget=20))
    vision = CLIPVisionModel(models("llava").config.vision_config)
    with pytest.raises(UnsupportedError, match=r"clip_vision_model is not a vision-language model|CLIPVisionModel"):
        attach(vision, AdaptInfer(budget=20))


def test_attention_backends_that_are_not_supported(models):
    model = models("llava")
    text = model.config.get_text_config()
    before = text._attn_implementation
    try:
        text._attn_implementation_internal = "paged|sdpa"
        with pytest.raises(UnsupportedError, match=r"'paged\|sdpa' is not supported; load the model with"):
            attach(model, AdaptInfer(budget=20))
    finally:
        text._attn_implementation_internal = before


def test_compact_positions_of_multimodal_rotary(models):
    with pytest.raises(UnsupportedError, match="use positions='keep'"):
        attach(models("qwen2_5_vl"), AdaptInfer(schedule=STAGES, positions="compact"))


def test_a_schedule_for_another_depth(models):
    with pytest.raises(ScheduleError, match="num_layers: the schedule is for 32 layers, the model has 6"):
        attach(models("llava"), AdaptInfer.paper(64))


@pytest.mark.parametrize(
    ("pruner", "message"),
    [
        (AdaptInfer(budget=50), "more than the 49 vision tokens"),
        (AdaptInfer(budget=3), "out of reach"),
        (AdaptInfer(schedule=Schedule((Stage(1, 60),), tiny.LAYERS)), r"stages\[0\]\.keep"),
    ],
)
def test_budgets_that_cannot_be_met(models, inputs, pruner, message):
    model = models("llava")
    with attach(model, pruner), pytest.raises(ScheduleError, match=message):
        model.generate(**inputs, max_new_tokens=2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdaptInfer(), "exactly one of budget"),
        (lambda: AdaptInfer(budget=20, schedule=STAGES), "exactly one of budget"),
        (lambda: AdaptInfer(budget=0), "budget"),
        (lambda: AdaptInfer(budget=-3), "budget"),
        (lambda: AdaptInfer(budget=float("nan")), "budget"),
        (lambda: AdaptInfer(budget=True), "budget"),
        (lambda: AdaptInfer(budget="64"), "budget"),
        (lambda: AdaptInfer(schedule="llava-1.5-7b/64"), "schedule: must be a Schedule"),
        (lambda: AdaptInfer(budget=20, positions="squeeze"), "positions"),
        (lambda: AdaptInfer(budget=20, prior_weight=2.0), "prior_weight"),
        (lambda: Random(budget=20, seed=0.5), "seed"),
    ],
)
def test_pruners_that_make_no_sense(make, message):
    with pytest.raises(PrunerError, match=message):
        make()


def test_compact_positions_of_the_paper():
    assert AdaptInfer.paper(64).positions == "compact"
    assert AdaptInfer.paper(30, model="qwen2-vl-2b").positions == "keep"
    with pytest.raises(ScheduleError, match="there are llava-1.5-7b/128"):
        AdaptInfer.paper(99)
