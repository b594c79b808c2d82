"""Reuse of the tokens before the first image: the same answers as without, from fewer tokens, in bounded memory."""

from __future__ import annotations

import threading

import pytest
import tiny
import torch
import zoo
from transformers import LlamaConfig, LlamaForCausalLM

from adaptinfer import AdaptInfer, InputError, PrefixCache, UnsupportedError, attach

OPTIONS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "eos_token_id": None}
OPTIONS["suppress_tokens"] = list(zoo.PLACEHOLDERS)
BEFORE = 12
# Refused, refused, and one that cannot go on from any cache in transformers itself.
NOT = ("granite4_vision", "paligemma", "paligemma2", "ernie4_5_vl_moe")
FAMILIES = [name for name in zoo.SETUPS if name not in NOT]
USUAL = ("llava", "qwen2_5_vl", "gemma3", "qwen3_5")


def answer(model, inputs, **options):
    out = model.generate(**inputs, **OPTIONS, **options, return_dict_in_generate=True, output_logits=True)
    return out.sequences, torch.stack(out.logits)


def alike(name, prompts: int = 1, seed: int = 1):
    """Prompts of one length that begin alike; the family's own marker of an image belongs to the beginning."""
    made = []
    for number in range(prompts):
        prompt = zoo.words(zoo.Prompt(), BEFORE, seed)
        zoo.SETUPS[name].add_image(prompt, 100 + number)
        made.append(zoo.words(prompt, 9, 1000 + number))
    return zoo.batch(name, made)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in USUAL else pytest.mark.full) for n in FAMILIES])
@pytest.mark.parametrize("pruned", [False, True], ids=["vanilla", "pruned"])
@pytest.mark.parametrize("samples", [1, 2])
def test_the_same_answer(name, pruned, samples):
    model = zoo.SETUPS[name].build("sdpa")
    inputs = alike(name, samples)
    handle = attach(model, AdaptInfer(budget=0.7)) if pruned else None
    tokens, logits = answer(model, inputs)
    kept = handle.report.kept if handle else []
    prefixes = PrefixCache(model)
    for _ in range(2):  # computed, then reused
        again, found = answer(model, inputs, past_key_values=prefixes.start(inputs))
        torch.testing.assert_close(found, logits, atol=max(1e-5, zoo.SETUPS[name].tolerance), rtol=0)
        assert torch.equal(again, tokens)
        if handle:
            assert handle.report.cached_tokens == prefixes.tokens >= BEFORE
            assert all(torch.equal(*pair) for pair in zip(handle.report.kept[-1], kept[-1], strict=True))


@pytest.mark.parametrize("pruned", [False, True], ids=["vanilla", "pruned"])
@pytest.mark.parametrize("samples", [1, 2])
def test_beams(pruned, samples):
    model = tiny.llava()
    inputs = alike("llava", samples)
    if pruned:
        attach(model, AdaptInfer(budget=0.7))
    options = {**OPTIONS, "num_beams": 3, "num_return_sequences": 3}
    found = model.generate(**inputs, **options)
    again = model.generate(**inputs, **options, past_key_values=PrefixCache(model).start(inputs, copies=3))
    assert torch.equal(again, found)


def test_changed_weights():
    """After a cast the prefix is computed anew by itself, after a change in place by `clear`."""
    model = tiny.llava()
    inputs, prefixes = alike("llava"), PrefixCache(model)
    prefixes.start(inputs)
    model.double()
    assert prefixes.start(inputs).layers[0].keys.dtype == torch.float64
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    prefixes.clear()
    assert prefixes.tokens == 0
    assert torch.equal(prefixes.start(inputs).layers[0].keys, PrefixCache(model).start(inputs).layers[0].keys)


def test_what_cannot_be_meant():
    model = tiny.llava()
    prefixes = PrefixCache(model)
    for wrong in (0, 1.5, "2", True):
        with pytest.raises(InputError, match="max_tokens: must be a whole number from 1"):
            PrefixCache(model, wrong)
        with pytest.raises(InputError, match="copies: must be a whole number from 1"):
            prefixes.start(alike("llava"), copies=wrong)
    with pytest.raises(InputError, match="no input_ids"):
        prefixes.start({})


def test_another_beginning_is_another_entry_and_the_oldest_goes():
    model = tiny.llava()
    prefixes = PrefixCache(model, max_tokens=2 * BEFORE)
    one, two, three = (alike("llava", seed=seed) for seed in (1, 2, 3))
    for inputs in (one, two):
        prefixes.start(inputs)
    assert prefixes.tokens == 2 * BEFORE
    prefixes.start(one)  # used last
    prefixes.start(three)
    assert prefixes.tokens == 2 * BEFORE
    calls = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    prefixes.start(one)
    assert not calls, "what was used last is still there"
    prefixes.start(two)
    assert calls
    hook.remove()


def test_a_request_does_not_touch_what_is_kept():
    model = tiny.llava()
    inputs, prefixes = alike("llava"), PrefixCache(model)
    cache = prefixes.start(inputs)
    cache.layers[0].keys.zero_()
    answer(model, inputs, past_key_values=cache)
    assert prefixes.start(inputs).get_seq_length() == BEFORE
    assert prefixes.start(inputs).layers[0].keys.any()


def test_nothing_to_reuse():
    model = tiny.llava()
    prefixes = PrefixCache(model, max_tokens=BEFORE)
    first = tiny.batch("llava", [tiny.simple("llava", before=0)])
    text = tiny.batch("llava", [tiny.words(tiny.Prompt(), 20, 1)])
    padded = tiny.batch("llava", [tiny.simple("llava", after=5), tiny.simple("llava")])
    different = tiny.batch("llava", [tiny.simple("llava", seed=1), tiny.simple("llava", seed=2)])
    long = tiny.batch("llava", [tiny.simple("llava", before=BEFORE + 1)])
    for inputs in (first, text, padded, different, long):
        cache = prefixes.start(inputs)
        assert cache.get_seq_length() == 0
        plain = answer(model, inputs)[0]
        assert torch.equal(answer(model, inputs, past_key_values=cache)[0], plain)
    assert prefixes.tokens == 0


def test_threads_share_it():
    model = tiny.llava()
    prefixes = PrefixCache(model)
    inputs = [alike("llava", seed=seed) for seed in range(4)]
    with attach(model, AdaptInfer(budget=20)):
        expected = [answer(model, each)[0] for each in inputs]
        found = [None] * 4

        def run(number):
            for _ in range(3):
                found[number] = answer(model, inputs[number], past_key_values=prefixes.start(inputs[number]))[0]

        threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_refusals():
    with pytest.raises(InputError, match="max_tokens: must be a whole number from 1"):
        PrefixCache(tiny.llava(), max_tokens=0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    with pytest.raises(UnsupportedError, match="llama is not a vision-language model"):
        PrefixCache(LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32)))
    with pytest.raises(UnsupportedError, match="paligemma reads its prompt in both directions"):
        PrefixCache(zoo.SETUPS["paligemma"].build("eager"))
