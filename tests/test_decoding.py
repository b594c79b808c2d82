"""Every way to decode says what the masked oracle says: searches, guesses, caches, turns, attention backends."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from contextlib import nullcontext

import pytest
import torch
import zoo
from flash_stand_in import flash_stand_in, with_flash
from oracle import Oracle, best, grown, keeps_of, score
from tiny import _TEXT, LAYERS, words
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, QuantizedCache, StaticCache, cache_utils
from zoo import PLACEHOLDERS, Prompt

import adaptinfer
from adaptinfer import AdaptInfer, Schedule, Stage, UnsupportedError, attach
from adaptinfer.engine.layout import read_layout

STEPS = 8
GREEDY = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, "eos_token_id": None}
GREEDY |= {"suppress_tokens": list(PLACEHOLDERS), "pad_token_id": zoo.PAD}
SCHEDULE = Schedule((Stage(1, 0.4), Stage(3, 0.3)), LAYERS)

CORE = ("llava", "qwen2_5_vl")
WINDOWED = ("gemma3", "gemma4", "llava_mistral_window")  # every prompt here is longer than their window of 24
FAMILIES = (*CORE, "qwen3_vl", *WINDOWED)
ATTENTIONS = ("sdpa", "eager")

FORMS = {
    "single": lambda name: [zoo.simple(name)],
    "padded": lambda name: [zoo.simple(name, after=5, seed=1), zoo.simple(name, after=13, seed=2)],
    "uneven": lambda name: [
        zoo.simple(name, images=2, seed=5),
        zoo.simple(name, after=20, seed=6),
        words(Prompt(), 30, 7),
    ],
}


@functools.cache
def _built(name, attention):
    if attention == "flash":
        return with_flash(zoo.SETUPS[name].build("sdpa"))
    model = zoo.SETUPS[name].build("sdpa" if attention == "flex" else attention)
    if attention == "flex":
        model.config.get_text_config()._attn_implementation_internal = "flex_attention"
    return model


def model_of(name, attention="sdpa"):
    model = _built(name, attention)
    if hasattr(model.base_model, "rope_deltas"):
        model.base_model.rope_deltas = None
    return model


def tolerance(name):
    return zoo.SETUPS[name].tolerance


def inputs_of(name, form):
    return zoo.batch(name, FORMS[form](name))


@functools.cache
def oracle_of(name, form):
    """The settled oracle of a form, and the positions that it keeps."""
    prompts = FORMS[form](name)
    oracle = Oracle(model_of(name, "eager"), keeps_of(SCHEDULE, prompts, PLACEHOLDERS), PLACEHOLDERS)
    return oracle, oracle.settle(zoo.batch(name, prompts))


@functools.cache
def truth(name, form):
    """Greedy tokens and logits of the oracle."""
    return oracle_of(name, form)[0].generate(inputs_of(name, form), STEPS)


def answer(model, inputs, **options):
    """New tokens [B, n] and their logits [B, n, V]."""
    options = {**GREEDY, **options}
    out = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, dim=1)


def kept_of(report):
    return [[row.tolist() for row in stage] for stage in report.kept]


def same(name, found, expected):
    torch.testing.assert_close(found[1], expected[1], atol=tolerance(name), rtol=0)
    assert torch.equal(found[0], expected[0])


@pytest.fixture
def lossless(monkeypatch):
    """fp8 caches that store float32: what is left of them is the bookkeeping."""
    if hasattr(cache_utils, "Fp8QuantizedLayer"):  # older transformers have none
        monkeypatch.setattr(cache_utils.Fp8QuantizedLayer, "fp8_dtype", torch.float32)


@pytest.fixture
def no_streams(monkeypatch):
    """Offloading copies between a stream of CUDA's and the default one; on the CPU everything is in order anyway."""

    class Stream:
        def wait_stream(self, other):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: Stream())


def text_config(model):
    return model.config.get_text_config()


def static(model, length=160):
    return StaticCache(config=text_config(model), max_cache_len=length)


# -- routes to the same tokens ------------------------------------------------------------------------------------

ROUTES = {
    "default": lambda model: {},
    "no_cache": lambda model: {"use_cache": False},
    "dynamic": lambda model: {"past_key_values": DynamicCache()},
    "dynamic_config": lambda model: {"past_key_values": DynamicCache(config=text_config(model))},
    "static": lambda model: {"cache_implementation": "static"},
    "static_object": lambda model: {"past_key_values": static(model)},
    "fp8": lambda model: {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}},
    "offloaded": lambda model: {"cache_implementation": "offloaded"},
    "offloaded_static": lambda model: {"cache_implementation": "offloaded_static"},
    "lookup": lambda model: {"prompt_lookup_num_tokens": 3},
    "lookup_static": lambda model: {"prompt_lookup_num_tokens": 3, "past_key_values": static(model)},
    "beam_of_one": lambda model: {"num_beams": 1, "num_return_sequences": 1},
}
ONE_SAMPLE = ("lookup", "lookup_static")  # assisted decoding takes no batches
NO_STATIC = ("llava_mistral_window",)  # refused
NOT_FOR = {
    "fp8": WINDOWED,  # transformers: only for models with full attention alone
    "lookup_static": WINDOWED,  # transformers: a static window cannot be cropped
    **dict.fromkeys(("static", "static_object", "offloaded_static"), NO_STATIC),
}
USUAL = {("llava", "sdpa"), ("qwen2_5_vl", "eager"), ("gemma3", "sdpa"), ("llava_mistral_window", "eager")}


def cells(*axes, possible=lambda *cell: True, usual=lambda *cell: True):
    """The parameters of a test, without impossible ones; those that are not usual are marked ``full``."""
    return [
        pytest.param(*cell, id="-".join(cell), marks=[] if usual(*cell) else [pytest.mark.full])
        for cell in itertools.product(*axes)
        if possible(*cell)
    ]


def possible_route(name, attention, route, form):
    return name not in NOT_FOR.get(route, ()) and (route not in ONE_SAMPLE or form == "single")


def usual_route(name, attention, route, form):
    if name in ("qwen3_vl", "gemma4"):
        return attention == "sdpa" and form == "single"
    return (name, attention) in USUAL and (form == "uneven" or route in (*ONE_SAMPLE, "static"))


@pytest.mark.parametrize(
    ("name", "attention", "route", "form"),
    cells(FAMILIES, ATTENTIONS, ROUTES, FORMS, possible=possible_route, usual=usual_route),
)
def test_every_route_says_the_same(lossless, no_streams, name, attention, route, form):
    model, inputs = model_of(name, attention), inputs_of(name, form)
    with attach(model, AdaptInfer(schedule=SCHEDULE)) as handle:
        found = answer(model, inputs, **ROUTES[route](model))
    same(name, found, truth(name, form))
    assert kept_of(handle.report) == oracle_of(name, form)[1]


# -- searches -----------------------------------------------------------------------------------------------------

SEARCHES = {
    "beams": {"num_beams": 3},
    "n_best": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "top_k": 0, "num_return_sequences": 2},
    "top_k": {"do_sample": True, "top_k": 5, "temperature": 1.5},
    "sampled_beams": {"do_sample": True, "top_k": 0, "num_beams": 2},
    "max_length": {"max_new_tokens": None, "min_new_tokens": None, "max_length": 90},
}
CACHES = {
    "dynamic": lambda model: {},
    "no_cache": lambda model: {"use_cache": False},
    "static": lambda model: {"cache_implementation": "static"},
    "fp8": lambda model: {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}},
    "offloaded": lambda model: {"cache_implementation": "offloaded"},
}


def usual_search(name, attention, search, cache):
    if name in WINDOWED:
        return attention == "sdpa" and search == "beams" and cache in ("dynamic", "static")
    return (name, attention) in USUAL and search in ("n_best", "sampling")


@functools.cache
def searched(name, search):
    """What transformers' own search finds on the oracle."""
    oracle, inputs = oracle_of(name, "padded")[0], inputs_of(name, "padded")
    torch.manual_seed(5)
    # All logits: Gemma 4 goes on with the last token alone in its last layers otherwise, where the oracle masks.
    return oracle.generate_with(inputs, **{**GREEDY, **SEARCHES[search]}, logits_to_keep=0)


@pytest.mark.parametrize(
    ("name", "attention", "search", "cache"),
    cells(
        FAMILIES,
        ATTENTIONS,
        SEARCHES,
        CACHES,
        possible=lambda name, attention, search, cache: name not in NOT_FOR.get(cache, ()),
        usual=usual_search,
    ),
)
def test_searches_go_by_the_masked_distribution(lossless, no_streams, name, attention, search, cache):
    model, inputs = model_of(name, attention), inputs_of(name, "padded")
    expected = searched(name, search)
    torch.manual_seed(5)
    with attach(model, AdaptInfer(schedule=SCHEDULE)):
        found = model.generate(**inputs, **{**GREEDY, **SEARCHES[search]}, **CACHES[cache](model))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("cache", ["dynamic", "no_cache", "static"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_a_row_may_stop_before_the_others(name, cache):
    """What one row says third ends it; the other goes on to the end, and min_new_tokens holds the first up."""
    model, inputs = model_of(name), inputs_of(name, "padded")
    tokens, _ = truth(name, "padded")
    end = tokens[0, 2].item()
    assert end not in tokens[1]
    stop = {**GREEDY, "eos_token_id": end}
    for least in (0, 5):
        expected = oracle_of(name, "padded")[0].generate_with(inputs, **{**stop, "min_new_tokens": least})
        new = expected[:, inputs["input_ids"].shape[1] :]
        assert (new[0] == end).any() == (least == 0) or least
        with attach(model, AdaptInfer(schedule=SCHEDULE)):
            found = model.generate(**inputs, **{**stop, "min_new_tokens": least}, **CACHES[cache](model))
        assert torch.equal(found, expected)


class Listener:
    """A streamer that writes down what it is told."""

    def __init__(self):
        self.heard, self.ended = [], False

    def put(self, value):
        self.heard.append(value.flatten().tolist())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("route", ["default", "no_cache", "static", "lookup"])
@pytest.mark.parametrize("name", CORE)
def test_streaming_tells_the_same_tokens(name, route):
    model, inputs, listener = model_of(name), inputs_of(name, "single"), Listener()
    with attach(model, AdaptInfer(schedule=SCHEDULE)):
        answer(model, inputs, streamer=listener, **ROUTES[route](model))
    prompt, *pieces = listener.heard
    assert prompt == inputs["input_ids"][0].tolist()
    assert list(itertools.chain(*pieces)) == truth(name, "single")[0][0].tolist()
    assert listener.ended and (route == "lookup" or all(len(piece) == 1 for piece in pieces))


# -- assisted decoding --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lengths_of_calls(model):
    """Collect how many tokens each call of the model is given."""
    lengths = []

    def note(module, args, kwargs):
        lengths.append(kwargs["input_ids"].shape[1])

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield lengths
    finally:
        hook.remove()


def greedy_of(name, prompts, steps):
    """Tokens, logits and kept positions of the oracle."""
    inputs = zoo.batch(name, prompts)
    oracle = Oracle(model_of(name, "eager"), keeps_of(SCHEDULE, prompts, PLACEHOLDERS), PLACEHOLDERS)
    kept = oracle.settle(inputs)
    return (*oracle.generate(inputs, steps), kept)


@pytest.mark.parametrize(
    ("name", "cache", "attention"),
    cells(
        FAMILIES,
        ("dynamic", "static", "no_config"),
        ATTENTIONS,
        possible=lambda name, cache, attention: (
            cache != "static" or name not in WINDOWED
        ),  # transformers cannot crop it
        usual=lambda name, cache, attention: attention == "sdpa",
    ),
)
def test_guesses_in_the_first_call_do_not_guide(name, cache, attention):
    """The question repeats itself, so the first call already carries guesses; the choice must be the prompt's own."""
    prompt = zoo.simple(name, after=6, seed=3)
    prompt.extend(prompt[-6:-1])
    tokens, logits, kept = greedy_of(name, [prompt], 12)
    model, inputs = model_of(name, attention), zoo.batch(name, [prompt])
    make = {"dynamic": lambda: None, "static": lambda: static(model), "no_config": DynamicCache}[cache]
    options = {"past_key_values": made} if (made := make()) is not None else {}
    with attach(model, AdaptInfer(schedule=SCHEDULE)) as handle, lengths_of_calls(model) as lengths:
        found = answer(model, inputs, prompt_lookup_num_tokens=4, max_new_tokens=12, min_new_tokens=12, **options)
    assert lengths[0] > len(prompt), "the first call carried no guesses"
    same(name, found, (tokens, logits))
    assert kept_of(handle.report) == kept
    assert handle.report.cached_tokens == 0


def test_guessed_placeholders_are_no_image():
    """What follows the question's last word in the prompt is the image, so a lookup guesses placeholders."""
    prompt = zoo.simple("llava", seed=3)
    prompt.append(prompt[4])
    assert prompt[5] == zoo.IMAGE
    model, inputs = model_of("llava"), zoo.batch("llava", [prompt])
    with pytest.raises(
        ValueError, match="[Ii]mage features and image tokens do not match"
    ):  # transformers' LLaVA minds
        model.generate(**inputs, **{**GREEDY, "suppress_tokens": None}, prompt_lookup_num_tokens=3)
    guessed = torch.cat([inputs["input_ids"], torch.full((1, 3), zoo.IMAGE)], dim=1)
    layout = read_layout(guessed, None, PLACEHOLDERS, len(prompt))
    assert layout.vision_counts == (49,) and layout.text_counts == (10,) and layout.unguided_counts == (0,)


def draft_of(name):
    """A text model that often says what the pruned model says: its own text layers, without the image."""
    model = model_of(name)
    draft = LlamaForCausalLM(LlamaConfig(**_TEXT)).eval()
    draft.model.load_state_dict(model.base_model.language_model.state_dict())
    draft.lm_head.load_state_dict(model.lm_head.state_dict())
    return draft


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize(
    ("name", "cache"), [("llava", "dynamic"), ("llava", "static"), ("llava_mistral_window", "dynamic")]
)
def test_a_draft_model(name, cache, attention):
    model, inputs = model_of(name, attention), inputs_of(name, "single")
    with attach(model, AdaptInfer(schedule=SCHEDULE)) as handle, lengths_of_calls(model) as lengths:
        found = answer(model, inputs, assistant_model=draft_of(name), **CACHES[cache](model))
    same(name, found, truth(name, "single"))
    assert kept_of(handle.report) == oracle_of(name, "single")[1]
    assert max(lengths[1:]) > 1, "nothing was ever guessed"


def test_sampling_with_a_draft_model():
    """Guesses are accepted by chance, so only the same course of the dice can tell; the cache must not change it."""
    model, inputs, draft = model_of("llava"), inputs_of("llava", "single"), draft_of("llava")
    options = {**GREEDY, "do_sample": True, "top_k": 0, "assistant_model": draft}
    found = []
    with attach(model, AdaptInfer(schedule=SCHEDULE)):
        for cache in ("dynamic", "static"):
            torch.manual_seed(9)
            found.append(model.generate(**inputs, **options, **CACHES[cache](model)))
    assert torch.equal(*found)


def test_early_exit_is_refused():
    model, inputs = model_of("llava"), inputs_of("llava", "single")
    with (
        attach(model, AdaptInfer(schedule=SCHEDULE)),
        lengths_of_calls(model) as lengths,
        pytest.raises(UnsupportedError, match="assistant_early_exit .* use prompt_lookup_num_tokens or an assistant"),
    ):
        model.generate(**inputs, **GREEDY, assistant_early_exit=2)
    assert not lengths


# -- what is done to a cache --------------------------------------------------------------------------------------


@torch.no_grad()
def forward(model, inputs, cache, new=None, rows=None):
    """Logits of the prompt, or of its last ``new`` tokens after a cache; positions as generate numbers them."""
    inputs = {key: value if rows is None or "pixel" in key else value[rows] for key, value in inputs.items()}
    places = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    if new is not None:
        inputs = {key: value for key, value in inputs.items() if "pixel" not in key and "types" not in key}
        inputs["input_ids"], places = inputs["input_ids"][:, -new:], places[:, -new:]
        if "token_type_ids" in inputs:
            inputs["token_type_ids"] = inputs["token_type_ids"][:, -new:]
    return model(**inputs, position_ids=places, past_key_values=cache, use_cache=True).logits


def close(found, expected, name="llava"):
    torch.testing.assert_close(found, expected, atol=tolerance(name), rtol=0)


MAKE = {
    "dynamic": lambda model: DynamicCache(),
    "dynamic_config": lambda model: DynamicCache(config=text_config(model)),
    "static": static,
    "fp8": lambda model: QuantizedCache("fp8", text_config(model)),
}
ONE_POSITION = ("llava", "gemma3", "llava_mistral_window")  # families whose positions a test can number by itself


# A static window can be reordered only, which beams test, and not cropped.
HANDLED = [(name, kind) for name in ONE_POSITION for kind in ("dynamic", "dynamic_config")] + [("llava", "static")]


@pytest.mark.parametrize(("name", "kind"), HANDLED)
def test_a_cache_is_copied_repeated_selected_and_reordered(name, kind):
    """What a layer holds moves along with its keys, row by row."""
    model, inputs = model_of(name), inputs_of(name, "uneven")
    oracle, _ = oracle_of(name, "uneven")
    more = grown(inputs, torch.tensor([[7, 8], [9, 10], [11, 12]]))
    plain = oracle.logits(more)[:, -2:]
    with attach(model, AdaptInfer(schedule=SCHEDULE)):
        cache = MAKE[kind](model)
        forward(model, inputs, cache)

        def step(change, rows):
            branch = copy.deepcopy(cache)
            change(branch)
            close(forward(model, more, branch, new=2, rows=rows), plain[rows], name)

        for change, rows in [
            (lambda cache: None, [0, 1, 2]),
            (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
            (lambda cache: cache.batch_select_indices(torch.tensor([1, 2])), [1, 2]),
            (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        ]:
            if kind != "static" or rows in ([0, 1, 2], [2, 0, 0]):
                step(change, rows)
        close(forward(model, more, cache, new=2), plain, name)


@pytest.mark.parametrize(("name", "kind"), HANDLED)
def test_a_cache_is_cropped_after_the_images_only(name, kind):
    model, inputs = model_of(name), inputs_of(name, "padded")
    oracle, _ = oracle_of(name, "padded")
    other = grown(inputs, torch.tensor([[13, 14, 15, 16], [17, 18, 19, 20]]))
    with attach(model, AdaptInfer(schedule=SCHEDULE)):
        cache = MAKE[kind](model)
        forward(model, inputs, cache)
        cache.activate_past_recording()
        close(forward(model, other, cache, new=4), oracle.logits(other)[:, -4:], name)
        cache.crop(-3)  # the first of the four stays
        half = grown(grown(inputs, torch.tensor([[13], [17]])), torch.tensor([[7, 8], [9, 10]]))
        close(forward(model, half, cache, new=2), oracle.logits(half)[:, -2:], name)
        cache.crop(-2)
        more = grown(grown(inputs, torch.tensor([[13], [17]])), torch.tensor([[21, 22, 23], [24, 25, 26]]))
        close(forward(model, more, cache, new=3), oracle.logits(more)[:, -3:], name)
        if name in WINDOWED:
            return  # a window that was cut back to its size cannot be taken back further
        cache.crop(-6)  # two tokens of the question go too: they were kept whole
        again = grown(inputs, torch.tensor([[13], [17]]))
        close(forward(model, again, cache, new=3), oracle.logits(again)[:, -3:], name)
        with pytest.raises(UnsupportedError, match="cannot crop the cache to .* tokens: its first .* were pruned"):
            cache.crop(-7)  # the shorter question has five


AGAIN = [(kind, name) for name in ONE_POSITION for kind in MAKE if name not in NOT_FOR.get(kind, ())]


@pytest.mark.parametrize(("kind", "name"), AGAIN, ids=lambda value: value)
def test_a_reset_cache_is_a_fresh_one(lossless, name, kind):
    """For another prompt of another length, for text alone, without the pruner, and for the pruner again."""
    model, prompts = model_of(name), [zoo.simple(name, after=5, seed=1), zoo.simple(name, after=13, seed=2)]
    text = zoo.batch(name, [words(Prompt(), 31, 3)])
    if name == "gemma3":
        text.pop("token_type_ids")
    cache, first, second = MAKE[kind](model), *(zoo.batch(name, [prompt]) for prompt in prompts)
    vanilla = answer(model, second)
    with attach(model, AdaptInfer(schedule=SCHEDULE)):
        for inputs in (first, second, text, first):
            expected = answer(model, inputs)
            cache.reset()
            same(name, answer(model, inputs, past_key_values=cache), expected)
        with adaptinfer.disabled(model):
            cache.reset()
            same(name, answer(model, second, past_key_values=cache), vanilla)
        cache.reset()
        answer(model, first, past_key_values=cache)
    cache.reset()
    same(name, answer(model, second, past_key_values=cache), vanilla)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", CORE)
def test_fp8_holds_a_quarter_and_reads_what_it_holds(name, attention):
    """Rounding to eight bits moves the logits a little; the first token is said before anything was rounded."""
    model, inputs = model_of(name, attention), inputs_of(name, "padded")
    _, logits = truth(name, "padded")
    with attach(model, AdaptInfer(schedule=SCHEDULE)) as handle:
        answer(model, inputs)
        whole = handle.report.kv_bytes
        options = {**GREEDY, **ROUTES["fp8"](model), "return_dict_in_generate": True, "output_logits": True}
        out = model.generate(**inputs, **options)
        assert whole / 4 <= handle.report.kv_bytes < whole / 4 + 100  # the scales
        assert handle.report.kv_bytes < 0.7 * handle.report.vanilla_kv_bytes
    close(out.logits[0], logits[:, 0], name)
    assert 1e-4 < (out.logits[1] - logits[:, 1]).abs().max() < 0.1


@pytest.mark.parametrize("backend", ["quanto", "hqq"])
@pytest.mark.parametrize("name", CORE)
def test_quantisers_of_other_libraries(name, backend):
    """Group-wise, with a residual of full precision that is flushed now and then."""
    pytest.importorskip({"quanto": "optimum.quanto", "hqq": "hqq"}[backend])
    model, inputs = model_of(name), inputs_of(name, "padded")
    settings = {"backend": backend, "residual_length": 4, "q_group_size": 16}
    settings |= {
        "quanto": {"nbits": 4, "axis_key": 0, "axis_value": 0},
        "hqq": {"nbits": 8, "axis_key": 1, "axis_value": 1},
    }[backend]
    _, logits = truth(name, "padded")
    with attach(model, AdaptInfer(schedule=SCHEDULE)) as handle:
        found = answer(model, inputs, cache_implementation="quantized", cache_config=settings)
        assert kept_of(handle.report) == oracle_of(name, "padded")[1]
        beams = model.generate(**inputs, **GREEDY, num_beams=2, cache_implementation="quantized", cache_config=settings)
    close(found[1][:, 0], logits[:, 0], name)
    bound = {"quanto": 1.5, "hqq": 0.1}[backend]  # four and eight bits
    assert 1e-4 < (found[1][:, 1] - logits[:, 1]).abs().max() < bound
    assert beams.shape[1] == inputs["input_ids"].shape[1] + STEPS


@pytest.mark.parametrize("name", CORE)
def test_quantisers_of_other_libraries_without_loss(monkeypatch, name):
    """The bookkeeping of transformers' group-wise layers, whoever quantises: everything else is exact."""
    layer = type(
        "Lossless", (cache_utils.QuantizedLayer,), {"_quantize": lambda _, t, axis: t, "_dequantize": lambda _, t: t}
    )
    model, inputs = model_of(name), inputs_of(name, "uneven")
    cache = cache_utils.Cache(layers=[layer(residual_length=3) for _ in range(LAYERS)])
    with attach(model, AdaptInfer(schedule=SCHEDULE)):
        same(name, answer(model, inputs, past_key_values=cache), truth(name, "uneven"))
        cache = cache_utils.Cache(layers=[layer(residual_length=3) for _ in range(LAYERS)])
        found = model.generate(**inputs_of(name, "padded"), **GREEDY, num_beams=3, past_key_values=cache)
    assert torch.equal(found, searched(name, "beams"))


def test_static_caches_whose_every_layer_has_a_window_are_refused():
    model, inputs = model_of("llava_mistral_window"), inputs_of("llava_mistral_window", "single")
    for options in (ROUTES["static"], ROUTES["static_object"]):
        with (
            attach(model, AdaptInfer(schedule=SCHEDULE)),
            lengths_of_calls(model.get_decoder()) as lengths,
            pytest.raises(
                UnsupportedError, match="does not say how long the answer may get; leave cache_implementation"
            ),
        ):
            model.generate(**inputs, **GREEDY, **options(model))
        assert not lengths


# -- turns --------------------------------------------------------------------------------------------------------


def settle_turn(oracle, inputs, since):
    """Choose among the vision tokens from position ``since`` on, on top of earlier turns; kept positions per stage."""
    length = inputs["input_ids"].shape[1]
    earlier = {
        layer: torch.nn.functional.pad(alive, (0, length - alive.shape[1]), value=True)
        for layer, alive in oracle.alive.items()
    }
    oracle.alive, new, kept = dict(earlier), torch.ones(1, length, dtype=torch.bool), []
    placeholders = [i for i in range(since, length) if inputs["input_ids"][0, i] in PLACEHOLDERS]
    text = list(range(max(placeholders) + 1, length))
    for layer, keeps in sorted(oracle.keeps.items()):
        attention = oracle._run(inputs, output_attentions=True).attentions[layer][0].numpy()
        ranked = score(attention, [i for i in placeholders if new[0, i]], text)
        kept.append(best(ranked, keeps[0]))
        new[0, [i for i in ranked if i not in kept[-1]]] = False
        oracle.alive |= {later: earlier[later] & new for later in earlier if later >= layer}
    return kept


class Talk:
    """Two turns with an image each on one model, told by the oracle."""

    def __init__(self, name):
        self.first, second = zoo.simple(name, seed=21), zoo.simple(name, seed=22, before=3, after=7)
        self.inputs = zoo.batch(name, [self.first])
        oracle = Oracle(model_of(name, "eager"), keeps_of(SCHEDULE, [self.first], PLACEHOLDERS), PLACEHOLDERS)
        oracle.settle(self.inputs)
        self.answer = oracle.generate(self.inputs, 3)
        # The last answered token was never fed, so it is the first new one of the second turn.
        both = Prompt()
        both.extend([*self.first, *self.answer[0][0].tolist(), *second])
        for part in ("images", "grids", "sizes"):
            setattr(both, part, [*getattr(self.first, part), *getattr(second, part)])
        self.whole = zoo.batch(name, [both])
        self.since = len(self.first) + 2
        self.kept = settle_turn(oracle, self.whole, self.since)
        self.answer_to_both = oracle.generate(self.whole, 3)
        self.turn = dict(self.whole)  # pictures of the new image alone: generate feeds the new tokens alone
        self.turn.update(
            {key: value for key, value in zoo.batch(name, [second]).items() if "pixel" in key or "grid" in key}
        )
        if name == "qwen2_5_vl":  # it could not number the first image without its grid
            model = model_of(name)
            pictures = {key: self.whole[key] for key in ("image_grid_thw", "attention_mask", "mm_token_type_ids")}
            self.turn["position_ids"] = model.base_model.get_rope_index(self.whole["input_ids"], **pictures)[0]


talk_of = functools.cache(Talk)


def possible_talk(name, attention, kind, ids):
    if ids == "new" and name == "qwen2_5_vl":
        return False  # transformers slices its positions by the whole talk
    return name not in NOT_FOR.get(kind, ()) and not (kind == "static" and name in WINDOWED)


@pytest.mark.parametrize(
    ("name", "attention", "kind", "ids"),
    cells(
        (*CORE, "gemma3", "llava_mistral_window"),
        ATTENTIONS,
        MAKE,
        ("all", "new"),
        possible=possible_talk,
        usual=lambda name, attention, kind, ids: (name, attention) in USUAL,
    ),
)
def test_an_image_in_each_of_two_turns(lossless, name, attention, kind, ids):
    """Whether generate is told the whole talk again or its new tokens alone, with a mask for the whole."""
    talk, model = talk_of(name), model_of(name, attention)
    cache, turn = MAKE[kind](model), dict(talk.turn)
    if ids == "new":
        turn |= {key: value[:, talk.since :] for key, value in turn.items() if key == "input_ids" or "types" in key}
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "past_key_values": cache}
    with attach(model, AdaptInfer(schedule=SCHEDULE)) as handle:
        same(name, answer(model, talk.inputs, **options), talk.answer)
        same(name, answer(model, turn, **options), talk.answer_to_both)
    assert handle.report.cached_tokens == talk.since
    assert kept_of(handle.report) == [[row] for row in talk.kept]


def test_an_image_in_a_later_turn_on_static_windows_is_refused():
    talk, model = talk_of("gemma3"), model_of("gemma3")
    with attach(model, AdaptInfer(schedule=SCHEDULE)):
        cache = static(model)
        answer(model, talk.inputs, max_new_tokens=3, min_new_tokens=3, past_key_values=cache)
        with (
            lengths_of_calls(model.get_decoder()) as lengths,
            pytest.raises(UnsupportedError, match="an image in a later turn on a static cache with sliding windows"),
        ):
            model.generate(**talk.turn, **GREEDY, past_key_values=cache)
        assert not lengths


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.full)])
@pytest.mark.parametrize(
    ("name", "kind"), [("llava", kind) for kind in MAKE] + [("gemma3", "dynamic_config"), ("gemma3", "static")]
)
def test_an_image_before_its_question_is_kept_whole(lossless, name, kind, attention):
    """Nothing could guide, so nothing is dropped, and the question of a later call reads all of it."""
    model, prompt = model_of(name, attention), zoo.simple(name, after=0, seed=31)
    while prompt[-1] != zoo.IMAGE:
        prompt.pop()  # what closes an image is text
    image = zoo.batch(name, [prompt])
    asked = grown(image, torch.tensor([[5, 17, 33, 41, 8]]))
    vanilla, alone = answer(model, asked), answer(model, image)
    with attach(model, AdaptInfer(schedule=SCHEDULE)) as handle:
        cache = MAKE[kind](model)
        same(name, answer(model, image), alone)
        forward(model, image, cache)
        report = handle.report
        assert report.stages == () and report.kept == []
        assert report.vision_tokens == (49,) and report.tokens_per_layer == [(49,) * LAYERS]
        assert report.kv_bytes == report.vanilla_kv_bytes > 0
        later = {key: value for key, value in asked.items() if "pixel" not in key}
        same(name, answer(model, later, past_key_values=cache), vanilla)
        assert handle.report is report, "a turn of text is no prefill of vision tokens"
        # In a batch with a sample that has a question, only that one is pruned.
        both = zoo.batch(name, [prompt, zoo.simple(name, seed=32)])
        found = answer(model, both)
        assert [len(row) for row in handle.report.kept[0]] == [0, 20]
        assert handle.report.vision_tokens == (49, 49)
    close(found[1][:1], alone[1], name)


# -- FlashAttention -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "form", "kind"),
    cells(
        (*CORE, "qwen3_vl"),
        FORMS,
        ("dynamic", "static", "static_to_the_brim", "lookup"),
        possible=lambda name, form, kind: kind != "lookup" or form == "single",
        usual=lambda name, form, kind: name in CORE,
    ),
)
def test_flash_attention(name, form, kind):
    """Gaps between survivors' positions must never be taken for the seams of packed sequences."""
    model, inputs = model_of(name, "flash"), inputs_of(name, form)
    model._previous_max_cache_length = -1
    options = {
        "dynamic": lambda: {},
        "static": lambda: {"past_key_values": static(model)},
        "static_to_the_brim": lambda: {"cache_implementation": "static"},  # no room left in the last step
        "lookup": lambda: {"prompt_lookup_num_tokens": 3},
    }[kind]()
    with attach(model, AdaptInfer(schedule=SCHEDULE)) as handle, flash_stand_in() as calls:
        same(name, answer(model, inputs, **options), truth(name, form))
    assert kept_of(handle.report) == oracle_of(name, form)[1]
    paths = {"unpadded"} if form != "single" or kind == "static" else {"dense"}
    assert {call.path for call in calls} == paths | ({"unpadded"} if kind.startswith("static") else set())
    assert len(calls) >= LAYERS


def test_flash_attention_packs_where_the_engine_would_let_it():
    """The stand-in sees what it is there to see: positions with gaps, in a batch of one, are cut into sequences."""
    model, inputs = model_of("llava", "flash"), inputs_of("llava", "single")
    length = inputs["input_ids"].shape[1]
    places = torch.cat([torch.arange(length // 2), torch.arange(length - length // 2)])[None]
    with flash_stand_in() as calls, torch.no_grad():
        model(**inputs, position_ids=places, use_cache=False)
    assert {call.path for call in calls} == {"packed"}
    assert {call.queries for call in calls} == {(length // 2, length - length // 2)}


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", CORE)
def test_flash_attention_in_two_turns(name, kind):
    talk, model = talk_of(name), model_of(name, "flash")
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "past_key_values": MAKE[kind](model)}
    with attach(model, AdaptInfer(schedule=SCHEDULE)) as handle, flash_stand_in() as calls:
        same(name, answer(model, talk.inputs, **options), talk.answer)
        same(name, answer(model, talk.turn, **options), talk.answer_to_both)
    assert kept_of(handle.report) == [[row] for row in talk.kept]
    assert "packed" not in {call.path for call in calls}


class CountingWindows(Oracle):
    """The oracle of a model whose windows count the keys that are there, as FlashAttention's kernel does."""

    def _mask_for(self, number):
        window = self.model.config.get_text_config().sliding_window

        def hook(module, args, kwargs):
            hidden = args[0]
            alive = self._alive_in(number, hidden)
            real = torch.nn.functional.pad(self.real, (0, hidden.shape[1] - self.real.shape[1]), value=True)
            alive = real if alive is None else alive & real
            place = alive.cumsum(dim=1)
            back = place[:, :, None] - place[:, None, :]
            seen = (back < window) & alive[:, None, :] & torch.ones(hidden.shape[1], hidden.shape[1]).tril().bool()
            floor = torch.finfo(hidden.dtype).min
            return args, {**kwargs, "attention_mask": torch.where(seen, 0.0, floor)[:, None]}

        return hook


@pytest.mark.parametrize("form", FORMS)
def test_flash_attention_windows_count_the_keys_that_are_there(form):
    """A choice: the kernel's own window is kept, so it reaches further back over dropped tokens than the others' do."""
    name, prompts = "llava_mistral_window", FORMS[form]("llava_mistral_window")
    inputs = zoo.batch(name, prompts)
    oracle = CountingWindows(model_of(name, "eager"), keeps_of(SCHEDULE, prompts, PLACEHOLDERS), PLACEHOLDERS)
    oracle.real = inputs["attention_mask"].bool()
    kept = oracle.settle(inputs)
    expected = oracle.generate(inputs, STEPS)
    model = model_of(name, "flash")
    with attach(model, AdaptInfer(schedule=SCHEDULE)) as handle, flash_stand_in() as calls:
        found = answer(model, inputs)
    same(name, found, expected)
    assert kept_of(handle.report) == kept
    assert {call.window for call in calls if max(call.keys) > zoo.WINDOW} == {zoo.WINDOW - 1}
    assert (found[1] - truth(name, form)[1]).abs().max() > 1e-2, "the two kinds of window would be the same here"


def test_flash_attention_between_layers_that_share_keys_is_refused():
    model, inputs = model_of("gemma4", "flash"), inputs_of("gemma4", "single")
    with (
        attach(model, AdaptInfer(schedule=SCHEDULE)),
        lengths_of_calls(model.get_decoder()) as lengths,
        pytest.raises(UnsupportedError, match="cannot prune in layer 3: .*prune in layers before 2 only"),
    ):
        model.generate(**inputs, **GREEDY)
    assert not lengths
    with attach(model, AdaptInfer(schedule=Schedule((Stage(1, 0.4),), LAYERS))) as handle, flash_stand_in() as calls:
        answer(model, inputs)
    assert len(handle.report.kept[0][0]) == 19 and {call.path for call in calls} == {"dense"}


def test_sdpa_between_layers_that_share_keys():
    """A layer that reads the keys of an earlier one may have fewer queries than keys, and not the last ones."""
    model, inputs = model_of("gemma4"), inputs_of("gemma4", "single")
    oracle, _ = oracle_of("gemma4", "single")
    with attach(model, AdaptInfer(schedule=SCHEDULE)), torch.no_grad():
        found = model(**inputs).logits
    alive = oracle.alive[3]
    close(found[alive], oracle.logits(inputs)[alive], "gemma4")


# -- flex attention -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "form"),
    cells(
        (*CORE, "llava_mistral_window", "gemma3"),
        FORMS,
        usual=lambda name, form: form == {"llava": "single", "gemma3": "padded"}.get(name, "uneven"),
    ),
)
@pytest.mark.filterwarnings("ignore")  # without its compiler it says that it is slow
def test_flex_attention(name, form):
    """Block masks; interpreted, because inductor has no flex kernel for these shapes on a CPU."""
    model, inputs = model_of(name, "flex"), inputs_of(name, form)
    with attach(model, AdaptInfer(schedule=SCHEDULE)) as handle, torch.compiler.set_stance("force_eager"):
        same(name, answer(model, inputs), truth(name, form))
    assert kept_of(handle.report) == oracle_of(name, form)[1]


# -- what decoding costs ------------------------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Count the operations that wait for the device: a number, or a shape that depends on values."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += any(
            name in str(func) for name in ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select")
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "kind", "form"),
    cells(
        (*CORE, "gemma3", "llava_mistral_window"),
        MAKE,
        FORMS,
        possible=lambda name, kind, form: name not in NOT_FOR.get(kind, ()),
        usual=lambda name, kind, form: form == "uneven",
    ),
)
def test_decoding_reads_the_device_no_more_than_vanilla(name, kind, form):
    """Four steps more, in the same kind of cache, cost as many reads with the pruner as without."""
    model, inputs = model_of(name), inputs_of(name, form)

    def reads(steps):
        with Reads() as mode:
            answer(model, inputs, max_new_tokens=steps, min_new_tokens=steps, past_key_values=MAKE[kind](model))
        return mode.count

    vanilla = reads(6) - reads(2)
    with attach(model, AdaptInfer(schedule=SCHEDULE)):
        pruned = reads(6) - reads(2)
    assert pruned <= vanilla, f"{pruned / 4} reads a step, vanilla {vanilla / 4}"


# -- found by users -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("both", [False, True])
def test_a_pruned_model_drafts(both):
    """A draft forgets the end of the prompt between rounds; all of that is text, which it holds whole."""
    target, draft = model_of("llava"), zoo.SETUPS["llava_qwen2"].build("sdpa")
    inputs = inputs_of("llava", "single")
    with attach(target, AdaptInfer(schedule=SCHEDULE)) if both else nullcontext():
        expected = answer(target, inputs)
        with attach(draft, AdaptInfer(schedule=SCHEDULE)):
            same("llava", answer(target, inputs, assistant_model=draft), expected)


def test_a_model_drafts_for_itself():
    model = model_of("llava")
    inputs = inputs_of("llava", "single")
    with attach(model, AdaptInfer(schedule=SCHEDULE)):
        expected = answer(model, inputs)
        same("llava", answer(model, inputs, assistant_model=model), expected)


def test_guidance_by_the_text_alone_is_not_reported():
    model, inputs = model_of("llava"), inputs_of("llava", "single")
    with attach(model, AdaptInfer(schedule=SCHEDULE)) as handle:
        answer(model, inputs)
        expected = handle.report.tokens_per_layer
        answer(model, inputs, guidance_scale=1.5)
        assert handle.report.tokens_per_layer == expected


def test_a_static_cache_has_room_for_what_is_kept():
    model, inputs = model_of("llava"), inputs_of("llava", "single")
    total = 160
    cache = static(model, total)
    with attach(model, AdaptInfer(schedule=SCHEDULE)) as handle:
        answer(model, inputs, past_key_values=cache)
        given = [tokens for (tokens,) in zip(*handle.report.tokens_per_layer, strict=True)]
        held = handle.report.kv_bytes, handle.report.vanilla_kv_bytes
    rooms = [layer.keys.shape[2] for layer in cache.layers]
    assert rooms == [total - (given[0] - tokens) for tokens in given]
    assert held[0] / held[1] == pytest.approx(sum(rooms) / (total * len(rooms)))
