"""Selections before the language model inside the engine: what every such method must do, in every family."""

from __future__ import annotations

import dataclasses
import inspect
import threading

import numpy as np
import pytest
import tiny
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from oracle import Oracle

import adaptinfer
from adaptinfer import (
    AdaptInfer,
    AdaptInferPlus,
    PrunerError,
    Schedule,
    ScheduleError,
    Stage,
    UnsupportedError,
    attach,
    from_pretrained,
)
from adaptinfer.engine.vision.images import Images, select_before
from adaptinfer.engine.vision.recorder import Recorder
from adaptinfer.engine.vision.tower import Encoded
from adaptinfer.pruners import (
    METHODS,
    CDPruner,
    Composed,
    DivPrune,
    FasterVLM,
    Pool,
    PruMerge,
    PyramidDrop,
    Scans,
    STARPro,
    TextGuided,
    VisionZip,
    VisPruner,
    VScan,
)
from adaptinfer.pruners.before import Selector, TwoPart

METHODS_BEFORE = {name: method for name, method in METHODS.items() if issubclass(method, (Selector, TwoPart))}
MERGING = {"visionzip", "prumerge", "prumerge+", "scans", "vscan", "pool", "tome"}
each_method = pytest.mark.parametrize("method", METHODS_BEFORE.values(), ids=METHODS_BEFORE)
# ToMe merges inside CLIP and SigLIP towers only; see test_tome.
each_method_and_family = pytest.mark.parametrize(
    ("method", "family"),
    [
        pytest.param(method, family, id=f"{name}-{family}")
        for name, method in METHODS_BEFORE.items()
        for family in tiny.FAMILIES
        if (name, family) != ("tome", "qwen2_5_vl")
    ],
)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def prompts(family):
    return [
        tiny.simple(family, after=5, seed=1),
        tiny.simple(family, after=13, seed=2, images=2),
        tiny.simple(family, seed=3),
        tiny.words(tiny.Prompt(), 12, 4),
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
    assert METHODS[method.name] is method and method.reference and method.__doc__
    assert getattr(adaptinfer, method.__name__) is method


@each_method_and_family
def test_keeps_exactly_the_budget_in_order_alone_and_in_a_batch(models, method, family):
    """Padding on the left, different numbers of images, a row without any; twice the same."""
    model, samples, pruner = models(family), prompts(family), method(budget=0.4)
    inputs = tiny.batch(family, samples)
    logits, together = run(model, inputs, pruner)
    torch.rand(7)  # global random state is not used
    again, _ = run(model, inputs, pruner)
    assert torch.equal(logits, again)
    longest = max(map(len, samples))
    for b, prompt in enumerate(samples):
        _, alone = run(model, tiny.batch(family, [prompt]), pruner)
        vision = prompt.count(tiny.IMAGE)
        planned = pruner.plan(tiny.LAYERS, vision).tokens_per_layer(vision) if vision else (0,) * tiny.LAYERS
        by_layer = {stage.layer: rows[0] for stage, rows in zip(alone.stages, alone.kept, strict=True)}
        kept = None
        for stage, rows in zip(together.stages, together.kept, strict=True):
            assert len(rows[b]) == planned[stage.layer + 1]
            assert (inputs["input_ids"][b, rows[b]] == tiny.IMAGE).all() and (rows[b].diff() > 0).all()
            if vision:  # a stage that is one of another row's alone keeps what is there
                kept = by_layer.get(stage.layer, kept)
                assert kept is not None and (rows[b] - (longest - len(prompt))).tolist() == kept.tolist()


@each_method
@pytest.mark.parametrize("budget", [0.5, 0.3, 25])
def test_meets_a_true_average(models, method, budget):
    inputs, pruner = tiny.batch("llava", prompts("llava")[:1]), method(budget=budget)
    _, report = run(models("llava"), inputs, pruner)
    (vision,) = report.vision_tokens
    wanted = budget * vision if budget < 1 else budget
    assert report.true_average[0] == pytest.approx(wanted, abs=0.75)
    held = [vision] * tiny.LAYERS
    for stage in report.stages:
        held[stage.layer + 1 :] = [int(stage.kept_mask.sum())] * (tiny.LAYERS - stage.layer - 1)
    assert tuple(held) == report.tokens_per_layer[0], "the report says what really happened"
    (schedule,), (text,) = report.schedules, report.text_tokens
    early_drop = not pruner.capabilities.acts_after
    assert report.flops == schedule.prefill_flops(report.shape, text, vision, early_drop=early_drop)


@each_method_and_family
def test_keeping_all_is_vanilla(models, method, family):
    model, inputs = models(family), positioned(models(family), tiny.batch(family, prompts(family)))
    with torch.no_grad():
        vanilla = model(**inputs).logits
    pruned, report = run(model, inputs, method(schedule=Schedule((Stage(-1, 1.0),), tiny.LAYERS)))
    assert torch.equal(pruned, vanilla) and report.stages == ()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, vanilla), "nothing stays behind"


class Masked(Oracle):
    """The slow truth: dropped tokens masked from layer 0 on, features that were merged put in place of their own."""

    def take(self, inputs, report, entering):
        vision, alive = inputs["input_ids"] == tiny.IMAGE, torch.ones_like(inputs["input_ids"], dtype=torch.bool)
        for stage, kept in zip(report.stages, report.kept, strict=True):
            alive = alive & ~vision
            for b, row in enumerate(kept):
                alive[b, row] = True
            self.alive[stage.layer] = alive
        self.features, self.at = entering, report.stages[0]
        return inputs["attention_mask"].bool() & alive

    def _run(self, inputs, **kwargs):
        def replace(module, args, kwargs):
            hidden = args[0].clone()
            for b, (places, marks) in enumerate(zip(self.at.kept, self.at.kept_mask, strict=True)):
                hidden[b, places[marks]] = self.features[b, marks]
            return (hidden, *args[1:]), kwargs

        hook = self.model.get_decoder().layers[0].register_forward_pre_hook(replace, with_kwargs=True)
        try:
            return super()._run(inputs, **kwargs)
        finally:
            hook.remove()


def given_to_layer_0(model, inputs):
    seen = []
    hook = model.get_decoder().layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        logits = model(**positioned(model, inputs)).logits
    hook.remove()
    return seen[0], logits


@each_method_and_family
@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_pruned_is_the_masked_run(models, method, family, positions):
    """Prefill and cached decoding of a ragged, padded batch, against full runs without a cache."""
    if (family, positions) == ("qwen2_5_vl", "compact"):
        return  # refused, as for every method
    model, inputs = models(family), tiny.batch(family, prompts(family))
    with attach(model, method(budget=0.4, positions=positions)) as handle:
        entering, logits = given_to_layer_0(model, inputs)
        report = handle.report
        out = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, eos_token_id=None, suppress_tokens=[tiny.IMAGE, tiny.VIDEO]
        )
    oracle = Masked(models(family, "eager"), {}, (tiny.IMAGE, tiny.VIDEO), positions)
    real = oracle.take(inputs, report, entering)
    torch.testing.assert_close(logits[real], oracle.logits(inputs)[real], atol=1e-5, rtol=0)
    tokens, _ = oracle.generate(inputs, 3)
    assert torch.equal(out[:, inputs["input_ids"].shape[1] :], tokens)
    embedded, _ = given_to_layer_0(model, inputs)
    for b, (places, marks) in enumerate(zip(oracle.at.kept, oracle.at.kept_mask, strict=True)):
        as_projected = torch.equal(embedded[b, places[marks]], entering[b, marks])
        assert as_projected == (method.name not in MERGING or not marks.any()), "methods that merge, and no others"


@each_method
def test_nothing_is_read_on_the_host(method):
    """On the meta device there is nothing to read: `.item()`, `nonzero` or a boolean index anywhere would raise."""
    counts, keeps = (16, 16, 32, 0), (6, 6, 32, 0)
    ids = torch.zeros(4, 40, dtype=torch.long, device="meta")
    pruner = method(budget=0.4)
    encoded = Encoded("image", [16] * 4, [((4, 4),)] * 4)
    shapes = {"attention": (4, 16, 3), "joined": (4, 16, 1), "keys": (4, 16, 3, 5)}
    shapes |= {"projector": (4, 16, 7), "groups": (4, 16, 1)}
    encoded.taken = {read: [torch.zeros(shapes[read.what], device="meta")] for read in pruner.capabilities.reads}

    class Layout:
        vision_counts, unguided_counts = counts, (0, 0, 0, 0)

    class Tower:
        @staticmethod
        def per_feature(encoded, read):
            return encoded.taken[read][0].flatten(0, 1)

    projector = torch.nn.Linear(7, 8, device="meta")
    images = Images([encoded], ids, Layout, {"image": (0,), "video": (1,)}, Tower, "llava", projector)  # pyright: ignore
    selection, hidden = select_before(
        pruner,  # pyright: ignore
        torch.zeros(4, 40, 8, device="meta"),
        images,
        torch.zeros(4, 32, dtype=torch.long, device="meta"),
        counts,
        torch.zeros(4, 5, dtype=torch.long, device="meta"),
        (5, 5, 4, 5),
        keeps,
    )
    assert selection.kept.shape == selection.score.shape == (4, 32) and hidden.shape == (4, 40, 8)
    assert selection.score.dtype == torch.float32


@each_method
def test_half_precision_is_chosen_in_float32(method):
    model = tiny.llava().to(torch.bfloat16)
    inputs = tiny.batch("llava", prompts("llava"))
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, report = run(model, inputs, method(budget=0.4))
    assert torch.isfinite(logits[inputs["attention_mask"].bool()]).all()
    for stage in report.stages:
        assert stage.scores.dtype == torch.float32
        assert torch.isfinite(stage.scores[stage.entered_mask]).all()


@each_method
def test_published_schedules_are_true_averages(method):
    for name, schedule in method.published.items():
        model, label = name.split("/")
        assert method.paper(label, model).plan(32, 576) is schedule
        assert schedule.true_average() == float(label)
        assert method(budget=float(label)).plan(32, 576).tokens_per_layer() == schedule.tokens_per_layer()


@each_method
def test_saved_and_loaded(tmp_path, method):
    pruner = method(budget=0.25)
    pruner.save_pretrained(tmp_path)
    assert from_pretrained(tmp_path) == pruner


# -- the vision tower, in every family ------------------------------------------------------------------------------

TRACED = [
    "llava",
    "pixtral",
    "llava_next",
    "llava_onevision",
    "mistral3",
    "qwen2_5_vl",
    "internvl",
    "smolvlm",
    "gemma3",
]
TRACED_TOO = ["qwen2_vl", "qwen3_vl", "qwen3_5", "glm4v", "idefics3", "paligemma", "vipllava", "aya_vision"]
FULL = [pytest.param(name, marks=pytest.mark.full) for name in TRACED_TOO]


@pytest.mark.parametrize("name", [*TRACED, *FULL])
def test_vision_tokens_are_traced_to_their_tower_tokens(monkeypatch, name):
    """Change one token in the tower's last block: the features that change are those said to come from it."""
    setup = zoo.SETUPS[name]
    model, size = setup.build("sdpa"), setup.sizes[-1]
    inputs = setup.collate([zoo.simple(name, seed=1, **size), zoo.simple(name, seed=2, images=2, **size)], "left")
    pruner = FasterVLM(budget=0.5, layer=-1)
    seen, make = [], Recorder.images
    monkeypatch.setattr(Recorder, "images", lambda *args: seen.append(make(*args)) or seen[-1])
    with attach(model, pruner), torch.no_grad():
        model(**inputs)
        images = seen[0]
        encoded, tower, (read,) = images._encoded[0], images._tower, pruner.capabilities.reads
        encode = model.base_model.get_image_features
        arguments = {key: value for key, value in inputs.items() if key in inspect.signature(encode).parameters}

        def features():
            made = encode(**arguments)
            return torch.cat([each.reshape(-1, each.shape[-1]) for each in getattr(made, "pooler_output", made)])

        before, shapes = features(), [piece.shape[:2] for piece in encoded.taken[read]]
        sizes = [rows * columns for rows, columns in shapes]
        mlps = [part for path, part in tower.blocks[-1].named_modules() if path.endswith(("mlp", "feed_forward"))]
        for token in np.random.default_rng(0).integers(0, sum(sizes), 8):

            def change(module, args, output, token=token):
                flat = output.reshape(-1, output.shape[-1]).clone()
                flat[token] += 50 * noise(flat.shape[1], seed=3)
                return flat.reshape(output.shape)

            hook = mlps[0].register_forward_hook(change)
            changed = (features() - before).abs().amax(dim=1) > 1e-6
            hook.remove()
            one = torch.zeros(sum(sizes))
            one[token] = 1
            pieces = [part.view(*shape, 1) for part, shape in zip(one.split(sizes), shapes, strict=True)]
            told = tower.per_feature(dataclasses.replace(encoded, taken={read: pieces}), read)[:, 0] > 0
            assert torch.equal(told, changed), token
    for row, pictures in zip(inputs["input_ids"], images.pictures, strict=True):
        tokens = sum(token in zoo.PLACEHOLDERS for token in row.tolist())
        assert sum(rows * columns for grids in pictures for rows, columns in grids) == tokens


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_class_tokens_attention_is_the_towers_own(attention):
    """Against transformers' own attention outputs."""
    model, inputs = tiny.llava(attention), tiny.batch("llava", prompts("llava")[:2])
    with torch.no_grad():
        tower = tiny.llava("eager").base_model.vision_tower
        full = tower(inputs["pixel_values"], output_attentions=True).attentions
    for layer in (-1, 0):
        expected = full[layer][:, :, 0, 1:].mean(dim=1)  # [images, patches]
        _, report = run(model, inputs, FasterVLM(budget=0.3, layer=layer))
        for scores, images in zip(report.scores[0], (expected[0], expected[1:].flatten()), strict=True):
            torch.testing.assert_close(scores, images, atol=1e-6, rtol=0)


def test_heads_joined_into_one():
    """PruMerge's attention against whole queries and keys of the last block, made by hand."""
    model, inputs = tiny.llava(), tiny.batch("llava", prompts("llava")[:1])
    tower = model.base_model.vision_tower
    vision = tower.vision_model if hasattr(tower, "vision_model") else tower
    with torch.no_grad():
        hidden = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
        block = vision.encoder.layers[-1]
        states = block.layer_norm1(hidden)
        query, key = block.self_attn.q_proj(states)[0, 0], block.self_attn.k_proj(states)[0]
        expected = (key @ query / len(query) ** 0.5).softmax(dim=0)[1:]
    _, report = run(model, inputs, PruMerge(budget=0.3))
    torch.testing.assert_close(report.scores[0][0], expected, atol=1e-6, rtol=0)


def test_without_a_class_token_attention_is_the_mean_over_rows(monkeypatch):
    setup = zoo.SETUPS["paligemma"]
    inputs = setup.collate([zoo.simple("paligemma", seed=1)], "left")
    with torch.no_grad():
        tower = setup.build("eager").base_model.vision_tower
        full = tower(inputs["pixel_values"], output_attentions=True).attentions
    monkeypatch.setattr("adaptinfer.engine.vision.tower._LARGEST", 4 * 49 * 5)  # five rows at a time
    _, report = run(setup.build("sdpa"), inputs, FasterVLM(budget=0.3, layer=-1))
    torch.testing.assert_close(report.scores[0][0], full[-1].mean(dim=(1, 2))[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["llava_next", "qwen3_vl", *FULL])
def test_other_families(name):
    """A batch is its samples, and generate, which encodes images by itself, keeps what a plain call keeps."""
    setup = zoo.SETUPS[name]
    model, size = setup.build("sdpa"), setup.sizes[0]
    samples = [zoo.simple(name, seed=1, **size), zoo.simple(name, seed=2, images=2, **size)]
    inputs = setup.collate(samples, "left")
    pruner = FasterVLM(budget=0.4, layer=-1) >> AdaptInfer(budget=0.2)
    with attach(model, pruner) as handle, torch.no_grad():
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        generated = handle.report
        model(**positioned(model, inputs))
        for one, other in zip(generated.kept, handle.report.kept, strict=True):
            assert [row.tolist() for row in one] == [row.tolist() for row in other]
        for b, sample in enumerate(samples):
            model(**setup.collate([sample], "left"))
            shift = inputs["input_ids"].shape[1] - len(sample)
            assert (handle.report.kept[0][0] + shift).tolist() == generated.kept[0][b].tolist()


# -- generate, threads, several turns -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"use_cache": False},
        {"cache_implementation": "static"},
    ],
    ids=str,
)
def test_ways_to_generate(models, options):
    """Beams repeat rows whose images were encoded once; without a cache every step is a prefill."""
    model, inputs, pruner = models("llava"), tiny.batch("llava", prompts("llava")), VisionZip(budget=0.4)
    _, plain = run(model, inputs, pruner)
    with attach(model, pruner) as handle:
        model.generate(**inputs, max_new_tokens=3, do_sample=False, **options)
        kept = handle.report.kept[0]
    beams = options.get("num_beams", 1)
    assert [row.tolist() for row in kept[::beams]] == [row.tolist() for row in plain.kept[0]]
    assert [row.tolist() for row in kept[beams - 1 :: beams]] == [row.tolist() for row in plain.kept[0]]


def test_an_image_in_a_later_turn(models):
    """The second turn's image is selected by itself."""
    model, pruner = models("llava"), FasterVLM(budget=0.4)
    first, second = tiny.simple("llava", seed=1), tiny.simple("llava", seed=2)
    later = tiny.batch("llava", [second])
    with attach(model, pruner) as handle, torch.no_grad():
        cache = model(**tiny.batch("llava", [first]), use_cache=True).past_key_values
        later["attention_mask"] = torch.ones(1, len(first) + len(second), dtype=torch.long)
        model(**later, past_key_values=cache)
        kept = handle.report.kept[0][0] - len(first)
    _, alone = run(model, tiny.batch("llava", [second]), pruner)
    assert kept.tolist() == alone.kept[0][0].tolist()


def test_threads_do_not_take_each_others_images(models):
    model, pruner, found = models("llava"), FasterVLM(budget=0.3), {}
    samples = [tiny.batch("llava", [tiny.simple("llava", seed=seed)]) for seed in range(4)]
    expected = [run(model, inputs, pruner)[1].kept[0][0].tolist() for inputs in samples]
    with attach(model, pruner) as handle:

        def work(number):
            for _ in range(3):
                model.generate(**samples[number], max_new_tokens=2, do_sample=False)
                found.setdefault(number, []).append(handle.report.kept[0][0].tolist())

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {number: [kept] * 3 for number, kept in enumerate(expected)}


def test_switched_off_and_taken_off(models):
    model, inputs = models("llava"), tiny.batch("llava", prompts("llava"))
    configs = {name: module.config for name, module in model.named_modules() if hasattr(module, "config")}
    before = dict(vars(model.base_model))
    with torch.no_grad():
        vanilla = model(**inputs).logits
        with attach(model, VisionZip(budget=0.3)), adaptinfer.disabled(model):
            assert torch.equal(model(**inputs).logits, vanilla)
    assert all(model.get_submodule(name).config is config for name, config in configs.items())
    assert vars(model.base_model) == before


# -- composition ----------------------------------------------------------------------------------------------------


@given(st.integers(8, 600), st.floats(0.2, 0.99), st.floats(0.3, 1.0), st.sampled_from([6, 12, 28, 32]))
def test_a_composition_meets_the_true_average_of_the_whole(vision, first, second, layers):
    wanted = max(1.0, first * second * vision)
    pruner = DivPrune(budget=first) >> AdaptInfer(budget=wanted)
    entering = DivPrune(budget=first).plan(layers, vision).tokens_per_layer(vision)[0]
    try:
        schedule = pruner.plan(layers, vision)
    except ScheduleError:
        assert wanted > entering or wanted * layers < entering, "above what enters, or less than layer 0 is given"
        return
    assert schedule.tokens_per_layer(vision)[0] == entering
    spans = [stage.layer for stage in schedule.stages if stage.layer >= 0] or [0]
    longest = max(after - layer for layer, after in zip(spans, [*spans[1:], layers - 1], strict=True))
    assert abs(schedule.true_average(vision) - wanted) <= max(0.01 * wanted, 0.5 * longest / layers) + 1e-6


def test_vscan_is_its_scans_and_pyramiddrops_stage(models):
    model, inputs, vscan = models("llava"), tiny.batch("llava", prompts("llava")[:1]), VScan(budget=16)
    before, inside = vscan.plan(tiny.LAYERS, 49).stages
    parts = [Schedule((stage,), tiny.LAYERS) for stage in (before, inside)]
    _, whole = run(model, inputs, vscan)
    _, composed = run(model, inputs, Scans(schedule=parts[0]) >> PyramidDrop(schedule=parts[1]))
    for one, other in zip(whole.kept, composed.kept, strict=True):
        assert torch.equal(one[0], other[0])


def test_ours_is_cdpruner_and_then_the_largest_vote_of_any_word(models):
    model, inputs, ours = models("llava"), tiny.batch("llava", prompts("llava")[:1]), AdaptInferPlus(budget=16)
    before, *inside = ours.plan(tiny.LAYERS, 49).stages
    assert before == Stage(-1, 20) and len(inside) > 1
    first, rest = (Schedule(tuple(stages), tiny.LAYERS) for stages in ([before], inside))
    _, whole = run(model, inputs, ours)
    _, composed = run(model, inputs, CDPruner(schedule=first) >> TextGuided(schedule=rest, words="max"))
    _, soft = run(model, inputs, CDPruner(schedule=first) >> TextGuided(schedule=rest))
    for one, other in zip(whole.kept, composed.kept, strict=True):
        assert torch.equal(one[0], other[0])
    assert any(not torch.equal(one[0], other[0]) for one, other in zip(whole.kept, soft.kept, strict=True))


def test_stages_of_ours_by_hand():
    """5/4 of the budget go in; layers 1, 10 and 20 of 32 keep 4 : 2 : 1 of what makes the budget the average."""
    at = AdaptInferPlus(budget=64, entering=2).plan(32, 576)
    assert [stage.layer for stage in at.stages] == [-1, 1, 10, 20] and at.tokens_per_layer(576)[0] == 128
    assert at.true_average(576) == pytest.approx(64, rel=0.01)
    first, second, third = (stage.keep for stage in at.stages[1:])
    assert first / second == pytest.approx(2, rel=0.05) and second / third == pytest.approx(2, rel=0.05)
    # With 80 that enter, a stage after layer 1 would keep them all: 11 layers are given 80, 10 and 11 layers 2x and x.
    assert AdaptInferPlus(budget=64).plan(32, 576).stages == (Stage(-1, 80), Stage(10, 75), Stage(20, 38))
    assert AdaptInferPlus(budget=64, entering=1).plan(32, 576).stages == (Stage(-1, 64),)
    assert AdaptInferPlus(budget=0.9).plan(32, 576).stages[0].layer >= 0, "5/4 of that is more than there is"
    assert AdaptInferPlus(budget=0.06).plan(12, 256).true_average(256) <= 0.06 * 256, "AdaptInfer cannot: layer 0"
    assert AdaptInferPlus(budget=32).plan(12, 256, (7,)).true_average(256) <= 32, (
        "less enters, as all of it passes 8 layers"
    )
    assert AdaptInferPlus(budget=32).plan(12, 256, (10,)).stages == (Stage(-1, 32),)
    assert AdaptInferPlus(budget=32).plan(12, 256, ()).stages == (Stage(-1, 32),)
    assert AdaptInferPlus(budget=32).plan(1, 256).stages == (Stage(-1, 32),)
    with pytest.raises(PrunerError, match=r"adaptinfer\+ >> ...: it has both parts already"):
        AdaptInferPlus(budget=32) >> AdaptInfer(budget=16)
    for wrong in (0.5, True, "2"):
        with pytest.raises(PrunerError, match="entering: must be a number from 1"):
            AdaptInferPlus(budget=64, entering=wrong)  # pyright: ignore[reportArgumentType]


@given(st.integers(4, 600), st.floats(0.02, 1.0), st.floats(1.0, 4.0), st.sampled_from([6, 12, 28, 32]))
def test_ours_meets_any_true_average(vision, share, entering, layers):
    wanted = max(1.0, share * vision)
    plan = AdaptInferPlus(budget=wanted, entering=entering).plan(layers, vision)
    spans = [stage.layer for stage in plan.stages] or [layers - 1]
    longest = max((after - layer for layer, after in zip(spans, [*spans[1:], layers - 1], strict=True)), default=1)
    assert abs(plan.true_average(vision) - wanted) <= max(0.01 * wanted, 0.5 * longest / layers) + 1e-6


def test_papers_drop_tokens_before_they_number_them():
    for method in (DivPrune, FasterVLM, VisionZip, VScan):
        assert method.paper(64).positions == "compact" and method(budget=64).positions == "keep"


def test_a_composition_by_hand():
    pruner = DivPrune(budget=192) >> AdaptInfer(budget=64)
    schedule = pruner.plan(32, 576)
    assert schedule.stages[0] == Stage(-1, 192) and schedule.true_average() == pytest.approx(64, rel=0.01)
    share = DivPrune(budget=1 / 3) >> AdaptInfer(budget=1 / 9)
    assert share.plan(32, 576) == schedule
    explicit = DivPrune(budget=100) >> AdaptInfer(schedule=Schedule((Stage(3, 0.5), Stage(7, 0.5)), 32))
    assert explicit.plan(32, 576).tokens_per_layer() == (100,) * 4 + (50,) * 4 + (25,) * 24


@pytest.mark.parametrize(
    "pruner",
    [
        DivPrune(budget=192) >> AdaptInfer(budget=64, prior_weight=0.5),
        FasterVLM(schedule=Schedule((Stage(-1, 0.4),), 6), layer=-1)
        >> AdaptInfer(schedule=Schedule((Stage(2, 0.5),), 6)),
        VScan(budget=64, merge=False),
        STARPro(budget=0.2),
        AdaptInferPlus(budget=0.2, entering=3),
    ],
    ids=lambda pruner: pruner.name,
)
def test_compositions_are_saved_and_loaded(tmp_path, pruner):
    pruner.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert loaded == pruner and type(loaded) is type(pruner)


def test_a_composition_file_that_makes_no_sense(tmp_path):
    (DivPrune(budget=192) >> AdaptInfer(budget=64)).save_pretrained(tmp_path)
    file = tmp_path / "adaptinfer_config.json"
    good = file.read_text()
    for old, new, message in [
        ('"method": "divprune"', '"method": "divine"', "before: method: there is no method 'divine'"),
        ('"prior_weight"', '"prior_height"', "inside: prior_height: no setting of adaptinfer"),
        ('"method": "divprune"', '"method": "random"', "before: must select before the language model"),
        ('"before"', '"after"', "after: no setting of composed"),
    ]:
        assert old in good
        file.write_text(good.replace(old, new))
        with pytest.raises(PrunerError, match=message):
            from_pretrained(tmp_path)


# -- refusals -------------------------------------------------------------------------------------------------------


def test_what_is_refused_when_it_is_made(models):
    inside = Schedule((Stage(-1, 20), Stage(1, 10)), tiny.LAYERS)
    with pytest.raises(
        PrunerError, match="divprune selects before the language model, so its only stage is at layer -1"
    ):
        DivPrune(schedule=inside)
    with pytest.raises(PrunerError, match="inside: must prune inside"):
        DivPrune(budget=3) >> FasterVLM(budget=2)
    with pytest.raises(PrunerError, match="before: must select before"):
        Composed(before=AdaptInfer(budget=3), inside=AdaptInfer(budget=2))  # pyright: ignore
    with pytest.raises(PrunerError, match="positions: both methods"):
        DivPrune(budget=3) >> AdaptInfer(budget=2, positions="compact")
    with pytest.raises(ScheduleError, match="adaptinfer scores inside a layer, so it cannot select before the first"):
        attach(models("llava"), AdaptInfer(schedule=inside))
    with pytest.raises(UnsupportedError, match="block 7 of the vision tower is to be read, of 2"):
        attach(models("llava"), FasterVLM(budget=9, layer=7))
    for wrong in ({"important_share": 1.5}, {"step": 0}, {"step": 1.5}):
        with pytest.raises(PrunerError, match=next(iter(wrong))):
            VisPruner(budget=9, **wrong)
    for method in (DivPrune, AdaptInferPlus, VScan):
        with pytest.raises(ScheduleError, match=r"budget: 0.0001 of 256 vision tokens is less than half a token"):
            method(budget=0.0001).plan(12, 256)
        for endless in (float("inf"), 10**400, float("nan")):
            with pytest.raises(PrunerError, match="budget: must be a positive number"):
                method(budget=endless)
    with pytest.raises(ScheduleError, match="budget: 600 is more than the 576"):
        DivPrune(budget=600).plan(32, 576)
    with pytest.raises(
        ScheduleError, match="a true average of 128 vision tokens cannot be met, for divprune lets only 64"
    ):
        (DivPrune(budget=64) >> AdaptInfer(budget=128)).plan(32, 576)


def test_images_from_elsewhere_are_refused_by_methods_that_read_the_tower(models):
    model, inputs = models("llava"), tiny.batch("llava", prompts("llava")[:1])
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        pytest.skip("module transformers has no attribute: encoded images cannot be passed in")
    with torch.no_grad():
        encoded = model.base_model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
    inputs["mm_encoder_outputs"] = {"image": encoded}
    for pruner in (FasterVLM(budget=0.3), Pool(budget=0.3)):
        with pytest.raises(UnsupportedError, match="divprune"):
            run(model, inputs, pruner)
    _, report = run(model, inputs, DivPrune(budget=0.3))
    assert len(report.kept[0][0]) == 15


def test_towers_that_cannot_be_traced_are_refused():
    setup = zoo.SETUPS["gemma4"]
    model = setup.build("sdpa")
    inputs = setup.collate([zoo.simple("gemma4", seed=1)], "left")
    with pytest.raises(UnsupportedError, match="cannot be traced back"):
        run(model, inputs, FasterVLM(budget=0.3, layer=-1))
    with pytest.raises(UnsupportedError, match="pool needs to know where in its picture"):
        run(model, inputs, Pool(budget=0.3))
    _, report = run(model, inputs, DivPrune(budget=0.5))
    assert len(report.kept[0][0]) == report.vision_tokens[0] // 2


def test_methods_before_are_selectors_or_both():
    for method in METHODS_BEFORE.values():
        assert issubclass(method, Selector) or {stage.layer for stage in method(budget=64).plan(32, 576).stages} > {-1}
