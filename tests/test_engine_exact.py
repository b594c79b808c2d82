"""What must not change at all, and what must not depend on how a prompt is run."""

from __future__ import annotations

import copy
import sys
import threading

import pytest
import tiny
import torch
from oracle import Oracle, grown
from transformers import DynamicCache

import adaptinfer
from adaptinfer import AdaptInfer, Schedule, Stage, UnsupportedError, attach
from adaptinfer.pruners import Random

GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "eos_token_id": None}
GREEDY["suppress_tokens"] = [tiny.IMAGE, tiny.VIDEO]  # a random model may say them, and then look for their image
TWO_STAGES = Schedule((Stage(1, 20), Stage(3, 6)), tiny.LAYERS)
EVERY_MODEL = [(family, attention) for family in tiny.FAMILIES for attention in ("sdpa", "eager")]
each_model = pytest.mark.parametrize(("family", "attention"), EVERY_MODEL, ids=["-".join(pair) for pair in EVERY_MODEL])
each_family = pytest.mark.parametrize("family", tiny.FAMILIES)


def three(family):
    return [tiny.simple(family, after=5, seed=1), tiny.simple(family, after=13, seed=2), tiny.simple(family, seed=3)]


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


@each_model
@pytest.mark.parametrize("pruner", ["budget", "stages"])
def test_keeping_all_is_vanilla_bit_for_bit(models, family, attention, pruner):
    model = models(family, attention)
    inputs = tiny.batch(family, three(family))
    count = tiny.LLAVA_TOKENS if family == "llava" else 48
    keep_all = {
        "budget": AdaptInfer(budget=count),
        "stages": AdaptInfer(schedule=Schedule((Stage(0, count), Stage(2, 1.0)), tiny.LAYERS)),
    }[pruner]
    before, tokens = logits(model, inputs), model.generate(**inputs, **GREEDY)
    with attach(model, keep_all) as handle:
        assert torch.equal(logits(model, inputs), before)
        assert torch.equal(model.generate(**inputs, **GREEDY), tokens)
    assert handle.report.stages == ()
    assert handle.report.kv_bytes == handle.report.vanilla_kv_bytes


@each_model
def test_text_alone_is_vanilla_bit_for_bit(models, family, attention):
    model = models(family, attention)
    inputs = tiny.batch(family, [tiny.words(tiny.Prompt(), 12, 1), tiny.words(tiny.Prompt(), 7, 2)])
    inputs.pop("mm_token_type_ids", None)
    before, tokens = logits(model, inputs), model.generate(**inputs, **GREEDY)
    with attach(model, AdaptInfer(schedule=TWO_STAGES)) as handle:
        assert torch.equal(logits(model, inputs), before)
        assert torch.equal(model.generate(**inputs, **GREEDY), tokens)
    assert handle.report.vision_tokens == (0, 0)


def snapshot(model):
    """Everything that attaching touches, by identity."""
    state = {}
    for name, module in model.named_modules():
        attributes = {key: id(value) for key, value in vars(module).items() if not key.endswith("_hooks")}
        hooks = {key: list(value) for key, value in vars(module).items() if key.endswith("_hooks")}
        state[name] = (type(module), attributes, hooks)
    return state


@each_model
def test_detached_is_never_attached(models, family, attention):
    model = models(family, attention)
    inputs = tiny.batch(family, three(family))
    before, expected = logits(model, inputs), None
    clean = snapshot(model)
    expected = model.generate(**inputs, **GREEDY)
    clean = snapshot(model)  # Qwen keeps its rope deltas on the model after a forward
    handle = attach(model, AdaptInfer(schedule=TWO_STAGES))
    assert snapshot(model).keys() == clean.keys() and snapshot(model) != clean
    assert not torch.equal(logits(model, inputs), before)
    handle.detach()
    handle.detach()
    assert torch.equal(model.generate(**inputs, **GREEDY), expected)
    after = snapshot(model)
    for attributes in (clean, after):
        for _, names, _ in attributes.values():
            names.pop("rope_deltas", None)
    assert after == clean
    assert torch.equal(logits(model, inputs), before)


@each_model
def test_disabled_is_vanilla(models, family, attention):
    model = models(family, attention)
    inputs = tiny.batch(family, three(family))
    before, tokens = logits(model, inputs), model.generate(**inputs, **GREEDY)
    with AdaptInfer(schedule=TWO_STAGES)(model) as handle:
        pruned = logits(model, inputs)
        report = handle.report
        with adaptinfer.disabled(model):
            assert torch.equal(logits(model, inputs), before)
            assert torch.equal(model.generate(**inputs, **GREEDY), tokens)
            assert model(**inputs, labels=inputs["input_ids"]).loss is not None, "nothing is refused"
        assert handle.report is report
        assert torch.equal(logits(model, inputs), pruned)


def test_disabled_needs_a_pruner(models):
    with pytest.raises(adaptinfer.AdaptInferError, match="no pruner is attached"), adaptinfer.disabled(models("llava")):
        pass


@each_model
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_its_samples(models, family, attention, side):
    """Silent bugs 4 and 6: row 0's choice for every sample, masks of the old length."""
    model = models(family, attention)
    prompts = [*three(family), tiny.simple(family, images=2, seed=8, after=4)]
    schedule = Schedule((Stage(1, 0.4), Stage(2, 0.5)), tiny.LAYERS)
    with attach(model, AdaptInfer(schedule=schedule)) as handle:
        together = logits(model, tiny.batch(family, prompts, side))
        report = handle.report
        longest = max(map(len, prompts))
        for b, prompt in enumerate(prompts):
            alone = logits(model, tiny.batch(family, [prompt]))
            offset = longest - len(prompt) if side == "left" else 0
            for s in range(2):
                assert (report.kept[s][b] - offset).tolist() == handle.report.kept[s][0].tolist()
                torch.testing.assert_close(report.scores[s][b], handle.report.scores[s][0], atol=1e-5, rtol=1e-4)
            # Rows without padding around them agree in every position, so compare them all.
            torch.testing.assert_close(together[b, offset : offset + len(prompt)], alone[0], atol=1e-5, rtol=0)


@each_model
@pytest.mark.parametrize("stages", [((1, 20), (3, 6)), ((0, 2),), ((1, 44), (2, 3))])
def test_early_drop_changes_nothing(models, family, attention, stages):
    model = models(family, attention)
    schedule = Schedule(tuple(Stage(*stage) for stage in stages), tiny.LAYERS)
    inputs = tiny.batch(family, three(family))
    with attach(model, AdaptInfer(schedule=schedule), early_drop=True) as handle:
        early, early_kept = logits(model, inputs), handle.report.kept
        early_tokens = model.generate(**inputs, **GREEDY)
    with attach(model, AdaptInfer(schedule=schedule), early_drop=False) as handle:
        late, late_kept = logits(model, inputs), handle.report.kept
        assert torch.equal(model.generate(**inputs, **GREEDY), early_tokens)
    torch.testing.assert_close(early, late, atol=1e-6, rtol=0)
    for one, other in zip(early_kept, late_kept, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_early_drop_spares_the_work(models, monkeypatch):
    """The pruning layer's attention, output projection and MLP see survivors only."""
    model = models("llava")
    layer = model.get_decoder().layers[1]
    inputs = tiny.batch("llava", [tiny.simple("llava")])
    linear, attend = torch.nn.functional.linear, torch.nn.functional.scaled_dot_product_attention
    rows, queries = {}, []

    def counting_linear(x, weight, bias=None):
        rows[id(weight)] = x.shape[-2]
        return linear(x, weight, bias)

    def counting_attention(query, *args, **kwargs):
        queries.append(query.shape[2])
        return attend(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "linear", counting_linear)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counting_attention)
    with attach(model, AdaptInfer(schedule=Schedule((Stage(1, 12), Stage(3, 6)), tiny.LAYERS))):
        logits(model, inputs)
    entered = inputs["input_ids"].shape[1]
    first, second = entered - tiny.LLAVA_TOKENS + 12, entered - tiny.LLAVA_TOKENS + 6
    assert rows[id(layer.self_attn.k_proj.weight)] == entered
    assert rows[id(layer.self_attn.o_proj.weight)] == first
    assert rows[id(layer.mlp.gate_proj.weight)] == first
    # In layer 3 more than half of the tokens go on, so all rows keep the causal kernel.
    assert queries[-tiny.LAYERS :] == [entered, first, first, first, second, second]


@each_family
def test_sdpa_and_eager_choose_the_same_tokens(models, family):
    inputs = tiny.batch(family, three(family))
    kept = []
    for attention in ("sdpa", "eager"):
        with attach(models(family, attention), AdaptInfer(schedule=TWO_STAGES)) as handle:
            logits(models(family, attention), inputs)
        kept.append([[row.tolist() for row in stage] for stage in handle.report.kept])
    assert kept[0] == kept[1]


@each_model
def test_every_layer_caches_exactly_what_it_was_given(models, family, attention):
    """Silent bug 5: a layer run twice stores its keys twice."""
    model = models(family, attention)
    prompt = tiny.simple(family)
    inputs = tiny.batch(family, [prompt])
    cache = DynamicCache(config=model.config.get_text_config())
    with attach(model, AdaptInfer(schedule=TWO_STAGES)) as handle:
        model.generate(**inputs, **GREEDY, past_key_values=cache)
    vision = sum(token == tiny.IMAGE for token in prompt)
    text = len(prompt) - vision
    given = [vision, vision, 20, 20, 6, 6]
    assert handle.report.tokens_per_layer == [tuple(given)]
    new = GREEDY["max_new_tokens"] - 1  # the last token is never fed
    assert [layer.keys.shape[2] for layer in cache.layers] == [text + v + new for v in given]
    assert all(cache.get_seq_length(layer) == len(prompt) + new for layer in range(tiny.LAYERS))
    held = sum(2 * layer.keys[:, :, :-new].numel() * 4 for layer in cache.layers)
    assert handle.report.kv_bytes == held


@each_model
def test_repeated_runs_are_identical(models, family, attention):
    """Silent bugs 7 and 8: indices left over from an earlier prompt, random tie-breaking."""
    model = models(family, attention)
    first, other = (
        tiny.batch(family, [tiny.simple(family, seed=seed, before=before)]) for seed, before in ((1, 5), (2, 11))
    )
    with attach(model, AdaptInfer(schedule=TWO_STAGES)) as handle:
        logits(model, first)
        once = logits(model, other)
        kept = [row.tolist() for stage in handle.report.kept for row in stage]
        logits(model, first)
        assert torch.equal(logits(model, other), once)
        assert [row.tolist() for stage in handle.report.kept for row in stage] == kept
    with attach(model, AdaptInfer(schedule=TWO_STAGES)):
        assert torch.equal(logits(model, other), once)


def test_equal_scores_keep_the_earliest_tokens(models):
    class Flat(AdaptInfer):
        def score(self, view):
            return torch.zeros(view.vision_index.shape)

    inputs = tiny.batch("llava", [tiny.simple("llava", before=7)])
    with attach(models("llava"), Flat(schedule=TWO_STAGES)) as handle:
        logits(models("llava"), inputs)
    assert handle.report.kept[0][0].tolist() == list(range(7, 27))


def test_long_questions_are_not_cut(models):
    """Silent bug 6: no maximum length hides in the pruning code."""
    prompts = [tiny.simple("llava", before=150, after=300)]
    inputs = tiny.batch("llava", prompts)
    oracle = Oracle(models("llava", "eager"), {1: [20], 3: [6]}, (tiny.IMAGE, tiny.VIDEO))
    kept = oracle.settle(inputs)
    with attach(models("llava"), AdaptInfer(schedule=TWO_STAGES)) as handle:
        result = logits(models("llava"), inputs)
    assert [[row.tolist() for row in stage] for stage in handle.report.kept] == kept
    alive = oracle.alive[3]
    torch.testing.assert_close(result[alive], oracle.logits(inputs)[alive], atol=1e-5, rtol=0)


@pytest.mark.parametrize("text", ["mistral", "qwen2"])
def test_other_text_models_of_llava(text):
    model, eager = tiny.llava("sdpa", text), tiny.llava("eager", text)
    inputs = tiny.batch("llava", three("llava"))
    oracle = Oracle(eager, {1: [20] * 3, 3: [6] * 3}, (tiny.IMAGE, tiny.VIDEO))
    kept = oracle.settle(inputs)
    tokens, _ = oracle.generate(inputs, 5)
    with attach(model, AdaptInfer(schedule=TWO_STAGES)) as handle:
        assert torch.equal(model.generate(**inputs, **GREEDY)[:, -5:], tokens)
    assert [[row.tolist() for row in stage] for stage in handle.report.kept] == kept


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_prior_weight_reaches_the_score(models, weight):
    inputs = tiny.batch("llava", three("llava"))
    oracle = Oracle(models("llava", "eager"), {1: [20] * 3, 3: [6] * 3}, (tiny.IMAGE, tiny.VIDEO), prior_weight=weight)
    kept = oracle.settle(inputs)
    with attach(models("llava"), AdaptInfer(schedule=TWO_STAGES, prior_weight=weight)) as handle:
        logits(models("llava"), inputs)
    assert [[row.tolist() for row in stage] for stage in handle.report.kept] == kept


# -- ways of decoding ------------------------------------------------------------------------------------------


@each_model
@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}], ids=["beams", "n-best"]
)
def test_beam_search_is_the_masked_beam_search(models, family, attention, options):
    prompts = [tiny.simple(family, after=5, seed=1), tiny.simple(family, after=13, seed=2)]
    inputs = tiny.batch(family, prompts)
    oracle = Oracle(models(family, "eager"), {1: [20, 20], 3: [6, 6]}, (tiny.IMAGE, tiny.VIDEO))
    oracle.settle(inputs)
    expected = oracle.generate_with(inputs, **GREEDY, **options)
    with attach(models(family, attention), AdaptInfer(schedule=TWO_STAGES)):
        assert torch.equal(models(family, attention).generate(**inputs, **GREEDY, **options), expected)


@each_model
def test_sampling_draws_from_the_masked_distribution(models, family, attention):
    inputs = tiny.batch(family, three(family))
    oracle = Oracle(models(family, "eager"), {1: [20] * 3, 3: [6] * 3}, (tiny.IMAGE, tiny.VIDEO))
    oracle.settle(inputs)
    sampling = {**GREEDY, "do_sample": True, "top_k": 0, "num_return_sequences": 2}
    torch.manual_seed(5)
    expected = oracle.generate_with(inputs, **sampling)
    torch.manual_seed(5)
    with attach(models(family, attention), AdaptInfer(schedule=TWO_STAGES)):
        assert torch.equal(models(family, attention).generate(**inputs, **sampling), expected)


def test_streaming_yields_the_same_tokens(models):
    class Collect:
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens.extend(value.flatten().tolist())

        def end(self):
            self.ended = True

    model, inputs = models("llava"), tiny.batch("llava", [tiny.simple("llava")])
    streamer = Collect()
    with attach(model, AdaptInfer(schedule=TWO_STAGES)):
        expected = model.generate(**inputs, **GREEDY)
        model.generate(**inputs, **GREEDY, streamer=streamer)
    assert streamer.tokens == expected[0].tolist() and streamer.ended


@each_model
def test_a_new_image_in_a_later_turn(models, family, attention):
    """The second image is pruned by its own question and scores; the first turn's survivors stay as they were."""
    model = models(family, attention)
    first = tiny.simple(family, seed=21)
    second = tiny.simple(family, seed=22, before=3)
    inputs = tiny.batch(family, [first])
    oracle = Oracle(models(family, "eager"), {1: [20], 3: [6]}, (tiny.IMAGE, tiny.VIDEO))
    oracle.settle(inputs)
    both = tiny.Prompt()
    both.extend([*first, *second])
    both.images, both.grids = [*first.images, *second.images], [*first.grids, *second.grids]
    turn = tiny.batch(family, [both])
    # The oracle settles the second turn on top of the first turn's masks.
    fixed = {
        layer: torch.nn.functional.pad(alive, (0, len(second)), value=True) for layer, alive in oracle.alive.items()
    }
    oracle.alive, kept = {}, []
    placeholder = turn["input_ids"][0] == tiny.IMAGE
    new = torch.arange(len(both)) >= len(first)
    alive_new = torch.ones(1, len(both), dtype=torch.bool)
    from oracle import best, score

    oracle.alive = dict(fixed)
    for layer, keep in ((1, 20), (3, 6)):
        attention_map = oracle._run(turn, output_attentions=True).attentions[layer][0].numpy()
        candidates = (placeholder & new & alive_new[0]).nonzero()[:, 0].tolist()
        last = placeholder.nonzero().max().item()
        stay = best(score(attention_map, candidates, list(range(last + 1, len(both)))), keep)
        alive_new[0, [c for c in candidates if c not in stay]] = False
        for later in fixed:
            if later >= layer:
                oracle.alive[later] = fixed[later] & alive_new
        kept.append(stay)
    expected = oracle.logits(turn)

    with attach(model, AdaptInfer(schedule=TWO_STAGES)) as handle, torch.no_grad():
        cache = DynamicCache(config=model.config.get_text_config())
        out = model(**inputs, past_key_values=cache, use_cache=True)
        more = tiny.batch(family, [second])
        more["attention_mask"] = turn["attention_mask"]
        if family == "qwen2_5_vl":  # a single forward cannot know its place; generate hands positions on
            positions, _ = model.model.get_rope_index(**{k: v for k, v in turn.items() if k != "pixel_values"})
            more["position_ids"] = positions[..., len(first) :]
        out = model(**more, past_key_values=cache)
    assert [stage[0].tolist() for stage in handle.report.kept] == kept
    assert handle.report.cached_tokens == len(first)
    survivors = oracle.alive[3][0, len(first) :]
    torch.testing.assert_close(out.logits[0, survivors], expected[0, len(first) :][survivors], atol=1e-5, rtol=0)


def test_a_copied_cache_goes_its_own_way(models):
    model, inputs = models("llava", "eager"), tiny.batch("llava", three("llava"))
    with attach(model, AdaptInfer(schedule=TWO_STAGES)), torch.no_grad():
        out = model(**inputs, use_cache=True)
        branches = []
        for token in (7, 8):
            cache = copy.deepcopy(out.past_key_values)
            step = grown(inputs, torch.full((3, 1), token))
            branches.append(
                model(
                    input_ids=step["input_ids"][:, -1:], attention_mask=step["attention_mask"], past_key_values=cache
                ).logits
            )
        step = grown(inputs, torch.full((3, 1), 7))
        original = model(
            input_ids=step["input_ids"][:, -1:],
            attention_mask=step["attention_mask"],
            past_key_values=out.past_key_values,
        ).logits
    assert torch.equal(branches[0], original) and not torch.equal(branches[1], original)


def test_batch_operations_on_a_pruned_cache(models):
    """Selecting, repeating and cropping move the history along with the keys.

    In float64: another batch size takes other matrix kernels, whose float32 sums differ by an amount that depends on
    the processor. SDPA, because transformers' eager attention gives NaN on padded rows there.
    """
    model, prompts = copy.deepcopy(models("llava", "sdpa")).double(), three("llava")
    inputs = tiny.batch("llava", prompts)
    inputs["pixel_values"] = inputs["pixel_values"].double()

    def step(cache, rows, token=7):
        more = grown(inputs, torch.full((3, 1), token))
        return model(
            input_ids=more["input_ids"][rows, -1:], attention_mask=more["attention_mask"][rows], past_key_values=cache
        ).logits

    with attach(model, AdaptInfer(schedule=TWO_STAGES)), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        plain = step(copy.deepcopy(cache), [0, 1, 2])
        chosen = copy.deepcopy(cache)
        chosen.batch_select_indices(torch.tensor([2, 0]))
        torch.testing.assert_close(step(chosen, [2, 0]), plain[[2, 0]], atol=1e-12, rtol=0)
        repeated = copy.deepcopy(cache)
        repeated.batch_repeat_interleave(2)
        torch.testing.assert_close(step(repeated, [0, 0, 1, 1, 2, 2]), plain[[0, 0, 1, 1, 2, 2]], atol=1e-12, rtol=0)
        cropped = copy.deepcopy(cache)
        step(cropped, [0, 1, 2], token=9)
        cropped.crop(-1)
        torch.testing.assert_close(step(cropped, [0, 1, 2]), plain, atol=1e-12, rtol=0)
        with pytest.raises(UnsupportedError, match="were pruned"):
            cropped.crop(-30)
        cropped.reset()
        assert all(getattr(layer, "history", None) is None for layer in cropped.layers)


# -- isolation ------------------------------------------------------------------------------------------


def test_two_threads_on_one_model(models):
    """Silent bug 12: nothing of a call is kept where another thread can see it."""
    model = models("llava")
    prompts = [tiny.simple("llava", seed=seed, before=3 + seed, after=4 + seed) for seed in range(6)]
    inputs = [tiny.batch("llava", [prompt]) for prompt in prompts]
    with attach(model, AdaptInfer(schedule=TWO_STAGES)) as handle:
        alone = [model.generate(**item, **GREEDY) for item in inputs]
        kept = []
        for item in inputs:
            logits(model, item)
            kept.append([row.tolist() for stage in handle.report.kept for row in stage])
        failures = []
        start = threading.Barrier(2)

        def work(numbers):
            start.wait()
            for _ in range(4):
                for i in numbers:
                    if not torch.equal(model.generate(**inputs[i], **GREEDY), alone[i]):
                        failures.append(("tokens", i))
                    if [row.tolist() for stage in handle.report.kept for row in stage] != kept[i]:
                        failures.append(("report", i))

        threads = [threading.Thread(target=work, args=(numbers,)) for numbers in ((0, 2, 4), (1, 3, 5))]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)  # change threads inside forwards, not only between them
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
    assert not failures


def test_disabling_in_one_thread_leaves_the_other_alone(models):
    model, inputs = models("llava"), tiny.batch("llava", [tiny.simple("llava")])
    vanilla = logits(model, inputs)
    with attach(model, AdaptInfer(schedule=TWO_STAGES)):
        pruned, seen = logits(model, inputs), []
        with adaptinfer.disabled(model):
            thread = threading.Thread(target=lambda: seen.append(logits(model, inputs)))
            thread.start()
            thread.join()
            assert torch.equal(logits(model, inputs), vanilla)
    assert torch.equal(seen[0], pruned)


def test_two_models_in_turn(models):
    one, other = models("llava"), models("qwen2_5_vl")
    first, second = tiny.batch("llava", three("llava")), tiny.batch("qwen2_5_vl", three("qwen2_5_vl"))
    with attach(one, AdaptInfer(schedule=TWO_STAGES)):
        alone = logits(one, first)
    schedule = Schedule((Stage(2, 11),), tiny.LAYERS)
    vanilla = logits(other, second)
    with attach(one, AdaptInfer(schedule=TWO_STAGES)) as a:
        assert torch.equal(logits(other, second), vanilla), "attaching to one model leaves the other alone"
        with attach(other, Random(schedule=schedule)) as b:
            logits(other, second)
            assert torch.equal(logits(one, first), alone)
            assert [len(stage[0]) for stage in a.report.kept] == [20, 6]
            assert [len(stage[0]) for stage in b.report.kept] == [11]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_call_leaves_nothing_behind(models, monkeypatch, error):
    """Also when the user interrupts: torch skips hooks then."""
    from adaptinfer.engine.forward import ACTIVE

    model, inputs = models("llava"), tiny.batch("llava", three("llava"))
    with attach(model, AdaptInfer(schedule=TWO_STAGES)):
        expected = logits(model, inputs)
        layer = model.get_decoder().layers[3]

        def explode(*args, **kwargs):
            raise error("half way")

        with monkeypatch.context() as patch:
            patch.setattr(layer.mlp, "forward", explode)
            with pytest.raises(error, match="half way"):
                logits(model, inputs)
        assert ACTIVE.get() is None
        assert torch.equal(logits(model, inputs), expected)


def test_the_report_of_another_thread_is_readable(models):
    model, inputs = models("llava"), tiny.batch("llava", [tiny.simple("llava")])
    with attach(model, AdaptInfer(schedule=TWO_STAGES)) as handle:
        assert handle.report is None
        thread = threading.Thread(target=lambda: logits(model, inputs))
        thread.start()
        thread.join()
        assert handle.report is not None and handle.report.vision_tokens == (tiny.LLAVA_TOKENS,)


def test_random_is_the_same_alone_and_in_a_batch(models):
    model, prompts = models("llava"), three("llava")
    with attach(model, Random(schedule=TWO_STAGES, seed=4)) as handle:
        logits(model, tiny.batch("llava", prompts))
        together = handle.report.kept
        longest = max(map(len, prompts))
        for b, prompt in enumerate(prompts):
            logits(model, tiny.batch("llava", [prompt]))
            for s in range(2):
                assert (together[s][b] - (longest - len(prompt))).tolist() == handle.report.kept[s][0].tolist()
    with attach(model, Random(schedule=TWO_STAGES, seed=5)) as handle:
        logits(model, tiny.batch("llava", prompts))
        assert together[0][0].tolist() != handle.report.kept[0][0].tolist()


@each_model
def test_the_model_without_its_head(models, family, attention):
    """`AutoModel` classes prune too: they return hidden states of the prompt's full length."""
    model = models(family, attention)
    inputs = tiny.batch(family, three(family))
    with attach(model, AdaptInfer(schedule=TWO_STAGES)):
        expected = logits(model, inputs)
    with attach(model.base_model, AdaptInfer(schedule=TWO_STAGES)) as handle, torch.no_grad():
        hidden = model.base_model(**inputs).last_hidden_state
        assert [len(stage[0]) for stage in handle.report.kept] == [20, 6]
    assert torch.equal(model.lm_head(hidden), expected)
