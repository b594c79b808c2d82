"""Corners that reviewers found: odd masks, video, later turns of padded batches, reordered caches, honest reports."""

from __future__ import annotations

import copy
import gc
import weakref

import oracle as slow
import pytest
import tiny
import torch
import zoo
from oracle import Oracle, grown
from transformers import DynamicCache, GenerationConfig

from adaptinfer import AdaptInfer, AdaptInferError, Schedule, ScheduleError, Stage, UnsupportedError, attach
from adaptinfer.pruners import Random
from adaptinfer.pruners import views as stage_module

TWO_STAGES = Schedule((Stage(1, 20), Stage(3, 6)), tiny.LAYERS)
PLACEHOLDERS = (tiny.IMAGE, tiny.VIDEO)


@torch.no_grad()
def logits(model, inputs, **extra):
    return model(**inputs, **extra).logits


def kept_of(report):
    return [[row.tolist() for row in stage] for stage in report.kept]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_masked_part_of_an_image_is_padding(models, attention):
    """Zeros in the mask over vision and text tokens: they are no candidates, and the question is not cut."""
    inputs = tiny.batch("llava", [tiny.simple("llava"), tiny.simple("llava", seed=4)])
    inputs["attention_mask"][0, 5:25] = 0
    inputs["attention_mask"][1, 57] = 0
    positions = {"position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)}
    schedule = Schedule((Stage(1, 10),), tiny.LAYERS)

    class Masked(Oracle):
        def settle(self, given):
            """Masked placeholders are no vision tokens."""
            ids = given["input_ids"].masked_fill(given["attention_mask"] == 0, 7)
            return super().settle({**given, "input_ids": ids})

        def _run(self, given, **kwargs):
            return super()._run({**given, "input_ids": inputs["input_ids"]}, **kwargs)

    oracle = Masked(models("llava", "eager"), {1: [10, 10]}, PLACEHOLDERS)
    kept = oracle.settle(inputs)
    with attach(models("llava", attention), AdaptInfer(schedule=schedule)) as handle:
        result = logits(models("llava", attention), inputs, **positions)
    assert kept_of(handle.report) == kept
    assert handle.report.vision_tokens == (tiny.LLAVA_TOKENS - 20, tiny.LLAVA_TOKENS)
    alive = oracle.alive[1] & inputs["attention_mask"].bool()
    torch.testing.assert_close(result[alive], oracle.logits(inputs)[alive], atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_video(models, attention):
    """Video tokens are vision tokens, beside images and alone."""
    grid = (2, 8, 8)
    patches = grid[0] * grid[1] * grid[2]
    prompt = tiny.qwen_image(tiny.words(tiny.Prompt(), 4, 1), 2, (1, 8, 8))
    prompt.extend([5, tiny.VISION_START] + [tiny.VIDEO] * (patches // 4) + [tiny.VISION_END])
    tiny.words(prompt, 7, 3)
    inputs = tiny.batch("qwen2_5_vl", [prompt])
    inputs["mm_token_type_ids"] = inputs["mm_token_type_ids"] + 2 * (inputs["input_ids"] == tiny.VIDEO).int()
    inputs["pixel_values_videos"] = torch.randn(patches, 96, generator=torch.Generator().manual_seed(4))
    inputs["video_grid_thw"] = torch.tensor([grid])
    oracle = Oracle(models("qwen2_5_vl", "eager"), {1: [14], 3: [5]}, PLACEHOLDERS)
    kept = oracle.settle(inputs)
    tokens, _ = oracle.generate(inputs, 4)
    model = models("qwen2_5_vl", attention)
    with attach(model, AdaptInfer(schedule=Schedule((Stage(1, 14), Stage(3, 5)), tiny.LAYERS))) as handle:
        out = model.generate(
            **inputs, max_new_tokens=4, do_sample=False, eos_token_id=None, suppress_tokens=list(PLACEHOLDERS)
        )
    assert kept_of(handle.report) == kept
    assert torch.equal(out[:, -4:], tokens)
    assert any(inputs["input_ids"][0, i] == tiny.VIDEO for i in kept[0][0])


@pytest.mark.parametrize("positions", ["keep", "compact"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_images_in_both_turns_of_a_padded_batch(models, attention, positions):
    """Turn two brings new images, its own padding, and what turn one kept; then decoding goes on."""
    model, eager = models("llava", attention), models("llava", "eager")
    first = [tiny.simple("llava", after=5, seed=31), tiny.simple("llava", after=11, seed=32)]
    second = [tiny.simple("llava", before=2, after=8, seed=33), tiny.simple("llava", before=2, after=3, seed=34)]
    turns = [tiny.batch("llava", first), tiny.batch("llava", second)]
    both = {
        "input_ids": torch.cat([turn["input_ids"] for turn in turns], dim=1),
        "attention_mask": torch.cat([turn["attention_mask"] for turn in turns], dim=1),
        # placeholders are filled row by row, so each row's images stand together
        "pixel_values": torch.stack(
            [image for a, b in zip(first, second, strict=True) for image in a.images + b.images]
        ),
    }
    start, length = turns[0]["input_ids"].shape[1], both["input_ids"].shape[1]
    where = (both["attention_mask"].cumsum(-1) - 1).clamp(min=0)

    oracle = Oracle(eager, {1: [20, 20], 3: [6, 6]}, PLACEHOLDERS, positions)
    oracle.settle(turns[0])
    oracle.alive = {
        layer: torch.nn.functional.pad(alive, (0, length - start), value=True) for layer, alive in oracle.alive.items()
    }
    kept = []
    dropped_later = torch.zeros(2, length, dtype=torch.bool)
    for layer, keep in ((1, 20), (3, 6)):
        maps = oracle._run(both, output_attentions=True).attentions[layer].numpy()
        chosen = []
        for b in range(2):
            vision = [i for i in range(start, length) if both["input_ids"][b, i] == tiny.IMAGE]
            text = [i for i in range(vision[-1] + 1, length) if both["attention_mask"][b, i]]
            alive = [i for i in vision if not dropped_later[b, i]]
            stay = slow.best(slow.score(maps[b], alive, text), keep)
            dropped_later[b, [i for i in alive if i not in stay]] = True
            chosen.append(stay)
        for later in oracle.alive:
            if later >= layer:
                oracle.alive[later] = oracle.alive[later] & ~dropped_later
        kept.append(chosen)
    expected = oracle.logits(both)
    step = grown(both, torch.tensor([[7], [9]]))
    expected_step = oracle.logits(step)[:, -1]

    with attach(model, AdaptInfer(schedule=TWO_STAGES, positions=positions)) as handle, torch.no_grad():
        cache = DynamicCache(config=model.config.get_text_config())
        model(**turns[0], position_ids=where[:, :start], past_key_values=cache)
        turn = {**turns[1], "attention_mask": both["attention_mask"]}
        out = model(**turn, position_ids=where[:, start:], past_key_values=cache).logits
        decoded = model(
            input_ids=step["input_ids"][:, -1:],
            attention_mask=step["attention_mask"],
            position_ids=where[:, -1:] + 1,
            past_key_values=cache,
        ).logits
    assert kept_of(handle.report) == kept
    compared = oracle.alive[3][:, start:] & turns[1]["attention_mask"].bool()
    torch.testing.assert_close(out[compared], expected[:, start:][compared], atol=1e-5, rtol=0)
    torch.testing.assert_close(decoded[:, -1], expected_step, atol=1e-5, rtol=0)
    report = handle.report
    assert report.cached_tokens == start
    per_token = 2 * 2 * 16 * 4 * 2 * tiny.LAYERS  # keys and values, heads, size, float32, samples, layers
    assert report.vanilla_kv_bytes == per_token * length


def test_reordering_moves_the_history(models):
    """Beams may only move within a sample, but a cache does not know that: rows change places with their history."""
    model = models("llava", "eager")
    inputs = tiny.batch("llava", [tiny.simple("llava", after=5, seed=1), tiny.simple("llava", after=13, seed=2)])
    step = grown(inputs, torch.tensor([[7], [9]]))
    swap = torch.tensor([1, 0])

    def decode(cache, rows):
        return model(
            input_ids=step["input_ids"][rows, -1:], attention_mask=step["attention_mask"][rows], past_key_values=cache
        ).logits

    with attach(model, AdaptInfer(schedule=TWO_STAGES)), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        plain = decode(copy.deepcopy(cache), [0, 1])
        cache.reorder_cache(swap)
        histories = {id(layer.history) for layer in cache.layers if getattr(layer, "history", None)}
        torch.testing.assert_close(decode(cache, [1, 0]), plain[swap], atol=1e-6, rtol=0)
    assert len(histories) == 2, "layers after one stage share one history"


def test_another_attached_model_inside_a_forward(models):
    """A pruner that asks a second pruned model gets that model's own answer."""
    one, other = models("llava"), models("qwen2_5_vl")
    first = tiny.batch("llava", [tiny.simple("llava")])
    second = tiny.batch("qwen2_5_vl", [tiny.simple("qwen2_5_vl")])
    embeddings = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(1))
    answers = []

    class Asking(AdaptInfer):
        def score(self, view):
            answers.append((logits(other, second), other.get_decoder()(inputs_embeds=embeddings).last_hidden_state))
            return super().score(view)

    with attach(other, AdaptInfer(schedule=Schedule((Stage(2, 11),), tiny.LAYERS))), torch.no_grad():
        alone = logits(other, second), other.get_decoder()(inputs_embeds=embeddings).last_hidden_state
        with attach(one, AdaptInfer(schedule=TWO_STAGES)):
            expected = logits(one, first)
        with attach(one, Asking(schedule=TWO_STAGES)):
            assert torch.equal(logits(one, first), expected)
    assert len(answers) == 2
    for pruned, plain in answers:
        assert torch.equal(pruned, alone[0]) and torch.equal(plain, alone[1])


def test_a_long_document_after_the_image_is_scored_in_parts(models, monkeypatch):
    """The same scores, a few heads at a time, so that text rows x keys stays small."""
    model = models("llava")
    inputs = tiny.batch("llava", [tiny.simple("llava", after=200), tiny.simple("llava", after=150, seed=3)])
    for weight in (1.0, 0.4):
        with attach(model, AdaptInfer(schedule=TWO_STAGES, prior_weight=weight)) as handle:
            whole = logits(model, inputs)
            scores = handle.report.scores[0]
            with monkeypatch.context() as patch:
                patch.setattr(stage_module, "_LARGEST", 1)
                parts = logits(model, inputs)
            assert torch.equal(whole, parts)
            for one, other in zip(scores, handle.report.scores[0], strict=True):
                torch.testing.assert_close(one, other)


def test_report_counts_a_samples_own_tokens(models):
    prompts = [tiny.simple("llava", after=5), tiny.simple("llava", after=60, seed=1)]
    with attach(models("llava"), AdaptInfer(schedule=TWO_STAGES)) as handle:
        logits(models("llava"), tiny.batch("llava", prompts))
        together = handle.report
        alone = []
        for prompt in prompts:
            logits(models("llava"), tiny.batch("llava", [prompt]))
            alone.append(handle.report)
    assert together.text_tokens == tuple(len(prompt) - tiny.LLAVA_TOKENS for prompt in prompts)
    assert together.flops == sum(report.flops for report in alone)
    assert together.vanilla_flops == sum(report.vanilla_flops for report in alone)
    assert together.kv_bytes > sum(report.kv_bytes for report in alone), "padding is held too, and said so"
    with attach(models("llava"), AdaptInfer(schedule=TWO_STAGES), early_drop=False) as handle:
        logits(models("llava"), tiny.batch("llava", prompts))
    assert together.flops < handle.report.flops < together.vanilla_flops


def test_random_does_not_depend_on_the_stages_of_others(models):
    """A stage at which this sample drops nothing must not shift its random numbers."""
    model = models("llava")
    schedule = Schedule((Stage(0, 49), Stage(2, 20)), tiny.LAYERS)
    small, large = tiny.simple("llava"), tiny.simple("llava", images=2)
    with attach(model, Random(schedule=schedule, seed=2)) as handle:
        logits(model, tiny.batch("llava", [small]))
        (alone,) = kept_of(handle.report)[-1]
        logits(model, tiny.batch("llava", [small, large]))
        offset = len(large) - len(small)
        assert [i - offset for i in kept_of(handle.report)[-1][0]] == alone


def test_the_models_own_generation_config_counts(models):
    """transformers fills what a passed config leaves open from the model's own."""
    model, inputs = models("llava"), tiny.batch("llava", [tiny.simple("llava")])
    before = model.generation_config
    try:
        model.generation_config = GenerationConfig(cache_implementation="paged", pad_token_id=0)
        with attach(model, AdaptInfer(schedule=TWO_STAGES)):
            with pytest.raises(UnsupportedError, match="cache_implementation='paged'"):
                model.generate(**inputs, generation_config=GenerationConfig(max_new_tokens=3))
            assert model.generate(**inputs, max_new_tokens=2, cache_implementation="dynamic").shape[0] == 1
    finally:
        model.generation_config = before


def test_a_users_own_generate_comes_back():
    model = tiny.llava()
    mine = model.generate

    def generate(*args, **kwargs):
        return mine(*args, **kwargs)

    model.generate = generate
    with attach(model, AdaptInfer(schedule=TWO_STAGES)):
        assert model.generate is not generate
    assert model.generate is generate


def test_a_backend_chosen_after_attaching(models):
    model, inputs = tiny.llava(), tiny.batch("llava", [tiny.simple("llava")])
    with attach(model, AdaptInfer(schedule=TWO_STAGES)) as handle:
        logits(model, inputs)
        kept = kept_of(handle.report)
        model.set_attn_implementation("eager")
        logits(model, inputs)
        assert kept_of(handle.report) == kept
        text = model.config.get_text_config()
        text._attn_implementation_internal = "paged|sdpa"
        with pytest.raises(UnsupportedError, match=r"'paged\|sdpa' is not supported"):
            logits(model, inputs)
        text._attn_implementation_internal = "eager"


@pytest.mark.parametrize("pruner", [64, AdaptInfer, TWO_STAGES, None])
def test_attaching_what_is_no_pruner(models, pruner):
    with pytest.raises(AdaptInferError, match=r"must be a pruner such as AdaptInfer\(budget=64\)"):
        attach(models("llava"), pruner)


def test_a_budget_that_one_sample_cannot_meet_names_it(models):
    model = models("qwen2_5_vl")
    prompts = [tiny.simple("qwen2_5_vl"), tiny.simple("qwen2_5_vl", grid=(1, 4, 4), seed=1)]
    with (
        attach(model, AdaptInfer(budget=20)),
        pytest.raises(ScheduleError, match=r"more than the 4 vision tokens .*\(sample 1 of the batch\)"),
    ):
        logits(model, tiny.batch("qwen2_5_vl", prompts))


def test_only_pruning_layers_carry_the_hooks_of_early_drop(models):
    model, inputs = models("llava"), tiny.batch("llava", [tiny.simple("llava")])
    layers = model.get_decoder().layers
    with attach(model, AdaptInfer(schedule=TWO_STAGES)):
        logits(model, inputs)
        assert [i for i, layer in enumerate(layers) if layer.mlp._forward_pre_hooks] == [1, 3]
    assert not any(layer.mlp._forward_pre_hooks or layer.mlp._forward_hooks for layer in layers)


def test_a_detached_handle_lets_go_of_the_model():
    model, inputs = tiny.llava(), tiny.batch("llava", [tiny.simple("llava")])
    with attach(model, AdaptInfer(schedule=TWO_STAGES)) as handle:
        logits(model, inputs)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert handle.report.vision_tokens == (tiny.LLAVA_TOKENS,), "the report stays readable"


def test_detaching_waits_for_running_calls():
    """Behind a stage the layers need the pruner to the end, in whichever thread the call runs."""
    model, inputs = tiny.llava(), tiny.batch("llava", [tiny.simple("llava")])
    with attach(model, AdaptInfer(schedule=TWO_STAGES)) as handle:
        expected = logits(model, inputs)
        hook = model.get_decoder().layers[2].register_forward_hook(lambda *_: handle.detach())
        with pytest.raises(AdaptInferError, match="let its calls end before you detach"):
            logits(model, inputs)
        hook.remove()
        assert torch.equal(logits(model, inputs), expected)


def test_wrappers_that_outlive_the_pruner():
    """Somebody wraps forward and generate after attaching and keeps them: they go on as vanilla."""
    model, inputs = tiny.llava(), tiny.batch("llava", [tiny.simple("llava")])
    vanilla = logits(model, inputs)
    handle = attach(model, AdaptInfer(schedule=TWO_STAGES))
    inner, generate = model.base_model.forward, model.generate
    model.base_model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    assert not torch.equal(logits(model, inputs), vanilla)
    handle.detach()
    assert torch.equal(logits(model, inputs), vanilla)
    assert generate(**inputs, max_new_tokens=2, use_cache=False).shape[0] == 1


def test_a_forward_replaced_while_attached():
    """Without our forward nothing would be pruned, and nobody would notice."""
    model, inputs = tiny.llava(), tiny.batch("llava", [tiny.simple("llava")])
    before = model.base_model.forward
    with attach(model, AdaptInfer(schedule=TWO_STAGES)):
        model.base_model.forward = before
        with pytest.raises(AdaptInferError, match="was replaced while a pruner is attached"):
            logits(model, inputs)
        embeddings = model.get_input_embeddings()(inputs["input_ids"])
        assert model.get_decoder()(inputs_embeds=embeddings).last_hidden_state is not None, "the bare decoder is free"


def test_scores_stay_float32_under_autocast(models):
    inputs = tiny.batch("llava", [tiny.simple("llava")])
    with attach(models("llava"), AdaptInfer(schedule=TWO_STAGES)) as handle:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits(models("llava"), inputs)
        assert all(stage.scores.dtype == torch.float32 for stage in handle.report.stages)
        scores = handle.report.scores[0][0]
        assert len(scores.unique()) == len(scores)


def test_a_video_of_thousands_of_tokens():
    """Too many for an oracle that holds attention; so the kept positions are believed, and the rest is checked."""
    model = zoo.SETUPS["qwen2_5_vl"].build("sdpa")
    prompt = zoo.simple("qwen2_5_vl", video=True, grid=(18, 24, 24))
    inputs = zoo.batch("qwen2_5_vl", [prompt])
    count = zoo.vision_tokens("qwen2_5_vl", prompt)
    assert count == 18 * 24 * 24 // 4 > 2500
    with attach(model, AdaptInfer(budget=0.25)) as handle, torch.no_grad():
        logits = model(**inputs).logits
        report = handle.report
    vision = torch.isin(inputs["input_ids"], torch.tensor([tiny.IMAGE, tiny.VIDEO]))
    alive, hooks = {}, []
    for stage, (kept,) in zip(report.stages, report.kept, strict=True):
        alive[stage.layer] = ~vision
        alive[stage.layer][0, kept] = True
    length = vision.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()

    def hook_for(number):
        def hook(module, args, kwargs):
            earlier = [layer for layer in alive if layer < number]
            seen = causal[None, None] & alive[max(earlier)][:, None, None, :] if earlier else causal[None, None]
            return args, {**kwargs, "attention_mask": seen}

        return hook

    for number, layer in enumerate(model.get_decoder().layers):
        hooks.append(layer.register_forward_pre_hook(hook_for(number), with_kwargs=True))
    with torch.no_grad():
        expected = model(**inputs).logits
    for hook in hooks:
        hook.remove()
    survivors = alive[max(alive)]
    torch.testing.assert_close(logits[survivors], expected[survivors], atol=1e-5, rtol=0)
    assert report.true_average[0] == pytest.approx(count / 4, rel=0.01)
