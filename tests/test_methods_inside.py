"""Methods that prune inside the language model: each choice against its formula, written out slowly.

The slow side sees an unpruned eager model in which dropped tokens are masked (`oracle.Oracle`): its own attention maps
and hidden states. Queries and keys without position are made from them by the layer's weights.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import tiny
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from oracle import Oracle, best
from test_families import made as made
from test_families import schedule_of, zoo_models  # noqa: F401
from test_methods import INSIDE, MASKED, positioned, prompts, run
from transformers import StaticCache

from adaptinfer import PrunerError, Schedule, Stage, UnsupportedError, attach
from adaptinfer.engine.rotary import Rotation
from adaptinfer.functional import evenly_spaced
from adaptinfer.pruners import (
    DART,
    FEATHER,
    METHODS,
    FastV,
    FitPrune,
    PyramidDrop,
    SparseVLM,
    SparseVLMPlus,
    Stride,
    V2Drop,
)
from adaptinfer.pruners.sparsevlm import choose_raters, density_clusters
from adaptinfer.pruners.views import PromptView

STAGES = Schedule((Stage(1, 0.4), Stage(3, 0.5)), tiny.LAYERS)


class Layer:
    """What a slow formula may look at: one sample at one stage's layer, float64 numpy."""

    def __init__(self, model, out, number, b, given, vision, text, first):
        self.model, self.number, self.b, self.given = model, number, b, given
        self.vision, self.text, self.first = vision, text, first
        self._attentions, self._hidden = out.attentions, out.hidden_states
        self.positions = {token: place for place, token in enumerate(sorted(given["real"]))}

    def attention(self, after=0):
        """[H, N, N] of this layer, or of the next."""
        return self._attentions[self.number + after][self.b].double().numpy()

    def hidden(self, after=0):
        """[N, d] entering this layer, or the next."""
        return self._hidden[self.number + after][self.b].double().numpy()

    def normed(self):
        """[N, d] leaving this layer, after the last normalisation."""
        with torch.no_grad():
            return self.model.get_decoder().norm(self._hidden[self.number + 1][self.b]).double().numpy()

    @property
    def embeddings(self):
        return self._hidden[0][self.b].double().numpy()

    def projected(self, name):
        """Queries [H, N, D] or keys [K, N, D] before rotary embedding."""
        layer = self.model.get_decoder().layers[self.number]
        with torch.no_grad():
            states = layer.input_layernorm(self._hidden[self.number][[self.b]])
            made = getattr(layer.self_attn, name)(states)[0]
        return made.view(made.shape[0], -1, 16).transpose(0, 1).double().numpy()


def fastv(layer, keep):
    a = layer.attention()
    return {v: np.mean([a[h, layer.text[-1], v] for h in range(4)]) for v in layer.vision}


def fastv_all(layer, keep):
    a, rows = layer.attention(), layer.given["alive"]
    return {v: sum(a[h, i, v] for h in range(4) for i in rows) / (4 * len(rows)) for v in layer.vision}


def pyramiddrop(layer, keep):
    a = layer.attention(after=1)
    return {v: np.mean([a[h, layer.text[-1], v] for h in range(4)]) for v in layer.vision}


def v2drop(layer, keep):
    before, after = layer.hidden(), layer.hidden(after=1)
    return {v: math.sqrt(sum((x - y) ** 2 for x, y in zip(after[v], before[v], strict=True))) for v in layer.vision}


def fitprune(layer, keep):
    a = layer.attention()

    def received(v, rows):
        return sum(max(a[h, i, v] for h in range(4)) for i in rows) / len(rows)

    return {v: received(v, layer.text) * received(v, layer.vision) for v in layer.vision}


def raters(layer):
    """Text tokens that all vision tokens of the prompt, dropped ones too, are like."""
    e, received = layer.embeddings, dict.fromkeys(layer.text, 0.0)
    for v in layer.given["vision"]:
        logits = {t: float(e[v] @ e[t]) for t in layer.text}
        top = max(logits.values())
        total = sum(math.exp(x - top) for x in logits.values())
        for t, x in logits.items():
            received[t] += math.exp(x - top) / total
    mean = sum(received.values()) / len(received)
    return [t for t in layer.text if received[t] > mean]


def sparsevlm(layer, keep):
    a, chosen = layer.attention(), raters(layer)
    return {v: np.mean([a[h, t, v] for h in range(4) for t in chosen]) for v in layer.vision}


def sparsevlm_plus(layer, keep):
    a, chosen, where = layer.attention(), raters(layer), layer.positions

    def of_ones(t, v):
        """Rotated by m and n, ones give the sum over pairs of 2 cos((m - n) θ)."""
        angles = [(where[t] - where[v]) * 10000.0 ** (-2 * i / 16) for i in range(8)]
        return max(sum(2 * math.cos(x) for x in angles), 0.01 * 16) / math.sqrt(16)

    freed = {(h, v): sum(a[h, t, v] / of_ones(t, v) for t in chosen) for h in range(4) for v in layer.vision}
    mass = {h: sum(freed[h, v] for v in layer.vision) for h in range(4)}
    heads = sorted(mass, key=lambda h: -mass[h])[:2]  # 14 of 32
    return {v: sum(freed[h, v] for h in heads) / (2 * len(chosen)) for v in layer.vision}


def feather(layer, keep):
    q, k = layer.projected("q_proj"), layer.projected("k_proj")
    score = dict.fromkeys(layer.vision, 0.0)
    for h in range(4):
        logits = {v: float(q[h, layer.text[-1]] @ k[h // 2, v]) / 4 for v in layer.vision}
        top = max(logits.values())
        total = sum(math.exp(x - top) for x in logits.values())
        for v, x in logits.items():
            score[v] += math.exp(x - top) / total / 4
    if layer.first:
        side = math.isqrt(len(layer.vision))
        for place, v in enumerate(layer.vision):
            if side * side == len(layer.vision):
                sampled = place // side % 3 == 0 and place % side % 3 == 0
            else:
                sampled = place % 9 == 0
            score[v] += 2 * sampled
    return score


def dart(layer, keep):
    k, states, where = layer.projected("k_proj"), layer.normed(), layer.positions
    norm = {}
    for token in layer.vision + layer.text:
        norm[token] = 0.0
        for h in range(2):
            for i in range(8):
                angle = where[token] * 10000.0 ** (-2 * i / 16)
                x, y = k[h, token, i], k[h, token, i + 8]
                norm[token] += abs(x * math.cos(angle) - y * math.sin(angle))
                norm[token] += abs(y * math.cos(angle) + x * math.sin(angle))
    own = sorted(layer.vision, key=lambda v: -norm[v])[: min(4, keep)]
    pivots = own + sorted(layer.text, key=lambda t: -norm[t])[:4]
    kept = set(own)
    for place, pivot in enumerate(pivots):
        share = (keep - len(own)) // len(pivots) + (place < (keep - len(own)) % len(pivots))

        def likeness(v, pivot=pivot):
            return states[v] @ states[pivot] / np.linalg.norm(states[v]) / np.linalg.norm(states[pivot])

        kept |= set(sorted((v for v in layer.vision if v not in kept), key=likeness)[:share])
    return {v: float(v in kept) for v in layer.vision}


SLOW = {
    "fastv": (FastV(schedule=STAGES), fastv),
    "fastv, all rows": (FastV(schedule=STAGES, rows="all"), fastv_all),
    "pyramiddrop": (PyramidDrop(schedule=STAGES), pyramiddrop),
    "sparsevlm": (SparseVLM(schedule=STAGES, recycled=0), sparsevlm),
    "sparsevlm+": (SparseVLMPlus(schedule=STAGES), sparsevlm_plus),
    "dart": (DART(schedule=STAGES), dart),
    "feather": (FEATHER(schedule=STAGES), feather),
    "v2drop": (V2Drop(schedule=STAGES), v2drop),
    "fitprune": (FitPrune(schedule=STAGES), fitprune),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", SLOW)
def test_it_keeps_what_its_formula_says(models, name, attention):
    keeps_what_the_formula_says(models, attention, *SLOW[name])


def test_dart_compares_behind_the_last_norm():
    """With weights that are not all one."""

    def models(family, attention):
        model = tiny.llava(attention)
        weight = model.get_decoder().norm.weight
        with torch.no_grad():
            weight.copy_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) ** 4 * 5)
        return model

    keeps_what_the_formula_says(models, "sdpa", *SLOW["dart"])


def keeps_what_the_formula_says(models, attention, pruner, slow):
    """Two stages of a padded batch with one and two images, a question of one to thirteen words."""
    eager = models("llava", "eager")
    samples = [*prompts("llava")[:2], tiny.simple("llava", after=2, seed=4)]
    inputs = tiny.batch("llava", samples)
    _, report = run(models("llava", attention), inputs, pruner)

    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    oracle, alive = Oracle(eager, {}, (tiny.IMAGE,)), torch.ones_like(ids, dtype=torch.bool)
    for s, stage in enumerate(STAGES.stages):
        out = oracle._run(inputs, output_attentions=True, output_hidden_states=True)
        alive = alive.clone()
        for b in range(3):
            placeholders = (ids[b] == tiny.IMAGE).nonzero()[:, 0].tolist()
            given = {
                "real": real[b].nonzero()[:, 0].tolist(),
                "alive": (real[b] & alive[b]).nonzero()[:, 0].tolist(),
                "vision": placeholders,
            }
            vision = [v for v in placeholders if alive[b, v]]
            text = [i for i in given["real"] if i > placeholders[-1]]
            keep = len(report.kept[s][b])
            score = slow(Layer(eager, out, stage.layer, b, given, vision, text, s == 0), keep)
            expected = best(score, keep)
            assert report.kept[s][b].tolist() == expected, (s, b)
            alive[b, [v for v in vision if v not in expected]] = False
        oracle.alive[stage.layer] = alive


# -- SparseVLM's recycling ------------------------------------------------------------------------------------------


def clusters_slowly(tokens: np.ndarray, k: int) -> tuple[list[int], list[np.ndarray]]:
    """Centres in order, and the means of their clusters."""
    n, dim = tokens.shape
    d = np.array([[math.sqrt(((tokens[i] - tokens[j]) ** 2).sum() / dim) for j in range(n)] for i in range(n)])
    density = [math.exp(-np.mean(np.sort(d[i])[:k] ** 2)) for i in range(n)]
    peak = []
    for i in range(n):
        denser = [d[i, j] for j in range(n) if (density[j], -j) > (density[i], -i)]
        peak.append(density[i] * (min(denser) if denser else d.max()))
    centres = sorted(range(n), key=lambda i: (-peak[i], i))[:k]
    member = {i: i if i in centres else min(centres, key=lambda c: d[i, c]) for i in range(n)}
    return centres, [np.mean([tokens[i] for i in range(n) if member[i] == c], axis=0) for c in centres]


def test_two_groups_become_their_means():
    """Worked by hand: three tokens around 0, two around 10; the middle ones are the peaks."""
    tokens = torch.tensor([[[0.0], [1.0], [-1.0], [10.0], [12.0]]])
    centres, real, means = density_clusters(tokens, torch.ones(1, 5, dtype=torch.bool), (2,))
    # k = 2: mean d² over itself and its nearest is 1/2 for the first three, 2 for the others. Of equal ones the first
    # leads: token 0 takes the largest distance, 13, token 3 is 9 from the nearest denser one, token 4 only 2 from 3.
    assert centres.tolist() == [[0, 3]] and real.all()
    torch.testing.assert_close(means, torch.tensor([[[0.0], [11.0]]]))


@given(rows=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=3), seed=st.integers(0, 500))
def test_clusters_are_those_of_the_loops(rows, seed):
    """Samples of different length and number of clusters; fillers hold rubbish."""
    rows = [(count, min(k, count)) for count, k in rows]
    longest = max(count for count, _ in rows)
    tokens = torch.randn(len(rows), longest, 5, generator=torch.Generator().manual_seed(seed))
    valid = torch.arange(longest) < torch.tensor([[count] for count, _ in rows])
    centres, real, means = density_clusters(tokens, valid, tuple(k for _, k in rows))
    for b, (count, k) in enumerate(rows):
        expected, mean = clusters_slowly(tokens[b, :count].double().numpy(), k)
        assert centres[b][real[b]].tolist() == expected
        np.testing.assert_allclose(means[b][real[b]], mean, atol=1e-5)


PUBLISHED = {192: (576, (300, 309), (200, 204), (110, 113)), 128: (576, (303, 312), (110, 117), (36, 39))}
PUBLISHED[64] = (576, (66, 82), (30, 32), (17, 18))


@pytest.mark.parametrize("label", PUBLISHED)
def test_published_keeps_are_split_as_published(label):
    entering, *stages = PUBLISHED[label]
    for ranked, keep in stages:
        merged = math.floor(0.3 * (entering - ranked)) + 1
        assert SparseVLM(budget=64).split(entering, keep) == (ranked, merged, merged // 10 + 1)
        entering = keep
    assert [keep for _, keep in stages] == [s.keep for s in SparseVLM.paper(label).schedule.stages]


def test_one_more_than_the_share_is_merged():
    """Of 97 dropped 30 % are 29, and one: 30 in 4 clusters. Of one dropped, that one, alone."""
    assert SparseVLM(budget=64).split(100, 3 + 4) == (3, 30, 4)
    assert SparseVLM(budget=64).split(100, 99) == (98, 1, 1)
    assert SparseVLM(budget=64).split(100, 100) == (100, 0, 0)


@given(entering=st.integers(0, 700), share=st.sampled_from([0.1, 0.3, 0.7, 0.99]), data=st.data())
def test_every_keep_is_met_exactly(entering, share, data):
    keep = data.draw(st.integers(0, entering))
    ranked, merged, clusters = SparseVLM(budget=64, recycled=share).split(entering, keep)
    assert ranked + clusters == keep
    assert 0 <= clusters <= merged <= entering - ranked


def test_survivors_carry_the_recycled_ones(models):
    """What layer 2 is given: the best as they were, each centre as the mean of its cluster, for every sample."""
    eager, model = models("llava", "eager"), models("llava")
    inputs = positioned(model, tiny.batch("llava", prompts("llava")))
    seen = []
    hook = (
        model.get_decoder()
        .layers[2]
        .self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
        )
    )
    schedule = Schedule((Stage(1, 0.4),), tiny.LAYERS)
    try:
        _, report = run(model, inputs, SparseVLM(schedule=schedule))
    finally:
        hook.remove()
    _, plain = run(model, inputs, SparseVLM(schedule=schedule, recycled=0))
    with torch.no_grad():
        states = eager(**inputs, output_hidden_states=True).hidden_states[2]
        norm = eager.get_decoder().layers[2].input_layernorm
    (stage,) = report.stages
    for b, count in enumerate((49, 98, 49)):
        keep = len(report.kept[0][b])
        ranked, merged, clusters = SparseVLM(budget=9).split(count, keep)
        assert clusters > 0
        scores = dict(zip(plain.entered[0][b].tolist(), plain.scores[0][b].tolist(), strict=True))
        order = sorted(scores, key=lambda v: (-scores[v], v))
        left = sorted(order[ranked : ranked + merged], key=order.index)
        centres, means = clusters_slowly(states[b, left].double().numpy(), clusters)
        expected = {v: states[b, v] for v in order[:ranked]}
        expected |= {left[c]: torch.tensor(m).float() for c, m in zip(centres, means, strict=True)}
        assert report.kept[0][b].tolist() == sorted(expected)
        rows = {int(token): i for i, token in enumerate(stage.kept[b]) if stage.kept_mask[b, i]}
        for token, value in expected.items():
            torch.testing.assert_close(seen[0][b, rows[token]], norm(value), atol=2e-5, rtol=0)


def test_raters_worked_by_hand():
    """Two vision tokens alike to the first and the third word; of one word alone that word rates."""
    e = torch.zeros(1, 5, 2)
    e[0, :2] = torch.tensor([[3.0, 0.0], [2.0, 0.0]])
    e[0, 2:] = torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.9, 0.0]])
    index = torch.arange(5)[None]
    assert choose_raters(PromptView(e, index[:, 2:], None, index[:, :2], None)).tolist() == [[True, False, True]]
    assert choose_raters(PromptView(e, index[:, 3:4], None, index[:, :2], None)).tolist() == [[True]]


# -- FEATHER's sample, DART's count, the stride control -------------------------------------------------------------


def test_feather_samples_every_third_row_and_column():
    sample = FEATHER(budget=64)._even_sample((576,), (217,), torch.device("cpu"))
    assert sample.nonzero()[:, 1].tolist() == [
        24 * row + column for row in range(0, 24, 3) for column in range(0, 24, 3)
    ]
    # 58 may hold 29 sampled ones: a stride of 5 makes 25. Every 9th of what is no square; none too many of 4.
    assert FEATHER(budget=64)._even_sample((576,), (58,), torch.device("cpu")).sum() == 25
    assert FEATHER(budget=64)._even_sample((98,), (40,), torch.device("cpu")).nonzero()[:, 1].tolist() == list(
        range(0, 98, 9)
    )
    assert FEATHER(budget=64)._even_sample((49, 98), (4, 4), torch.device("cpu")).sum(dim=1).tolist()[0] <= 2


def test_dart_keeps_its_pivots_and_eight_shares():
    assert [schedule.stages[0].keep for schedule in DART.published.values()] == [196, 132, 68]


@given(rows=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=4))
def test_evenly_spaced(rows):
    rows = [(count, min(keep, count)) for count, keep in rows]
    kept = evenly_spaced([count for count, _ in rows], [keep for _, keep in rows], torch.device("cpu"))
    for row, (count, keep) in zip(kept, rows, strict=True):
        places = row.nonzero()[:, 0]
        assert len(places) == keep and (places < count).all()
        gaps = places.diff()
        assert keep < 2 or gaps.max() - gaps.min() <= 1


def test_stride_worked_by_hand(models):
    _, report = run(
        models("llava"),
        tiny.batch("llava", [tiny.simple("llava")]),
        Stride(schedule=Schedule((Stage(1, 7), Stage(2, 2)), 6)),
    )
    assert [(row[0] - 5).tolist() for row in report.kept] == [[6, 13, 20, 27, 34, 41, 48], [27, 48]]


# -- what the engine gives a method ---------------------------------------------------------------------------------

ROTARY = ["llava", "qwen2_5_vl", "gemma3", "glm4v", "qwen3_5", "gemma4"]


@pytest.mark.parametrize("family", [pytest.param(f, marks=pytest.mark.full if f in ROTARY[4:] else ()) for f in ROTARY])
def test_rotary_embedding_comes_off_again(zoo_models, family):  # noqa: F811
    """Undone, queries and keys are those of a layer that was given no rotation, whatever the model's convention."""
    model, without, plain = zoo_models(family), [], []

    class Undoing(FEATHER):
        def select(self, view, keeps):
            without.append(view.without_rotary)
            return super().select(view, keeps)

    class Looking(FastV):
        def select(self, view, keeps):
            plain.append(view)
            return super().select(view, keeps)

    def unrotated(module, args, kwargs):
        cos, sin = kwargs["position_embeddings"]
        kwargs["position_embeddings"] = torch.ones_like(cos), torch.zeros_like(sin)
        return args, kwargs

    inputs = zoo.batch(family, [zoo.simple(family, after=5), zoo.simple(family, after=9, seed=2)])
    schedule = schedule_of(family, "late")
    with attach(model, Undoing(schedule=schedule)), torch.no_grad():
        model(**inputs)
    (stage,) = schedule.stages
    attention = model.get_decoder().layers[stage.layer].self_attn
    hook = attention.register_forward_pre_hook(unrotated, with_kwargs=True)
    try:
        with attach(model, Looking(schedule=schedule)), torch.no_grad():
            model(**inputs)
    finally:
        hook.remove()
    torch.testing.assert_close(without[0].query, plain[0].query, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(without[0].key, plain[0].key, atol=1e-4, rtol=1e-4)


def test_a_factor_on_the_angles_comes_off_as_well():
    """Long-context variants scale cos and sin; interleaved pairs and a part without rotation are other conventions."""

    def apply(x, cos, sin):
        turned, rest = x[..., :4], x[..., 4:]
        half = torch.stack([-turned[..., 1::2], turned[..., ::2]], dim=-1).flatten(-2)
        return torch.cat([turned * cos[:, None] + half * sin[:, None], rest], dim=-1)

    angles = torch.rand(1, 7, 2).repeat_interleave(2, dim=-1)
    rotation = Rotation(apply, 1.3 * angles.cos(), 1.3 * angles.sin())
    x = torch.randn(2, 3, 7, 6)
    torch.testing.assert_close(rotation.undo(rotation.of(x)), x)


def test_asking_the_next_layer_leaves_no_trace(models):
    """Its cache holds its own survivors once, and hooks on the layer are not called for the question."""
    model = models("llava")
    inputs, calls = tiny.batch("llava", prompts("llava")), []
    hooks = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in model.get_decoder().layers]
    try:
        with attach(model, PyramidDrop(schedule=STAGES)) as handle, torch.no_grad():
            out = model(**inputs)
            assert len(calls) == tiny.LAYERS and not handle.early_drop and not handle.report.early_drop
            tokens = [stage.tokens for stage in handle.report.stages]
        held = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    finally:
        for hook in hooks:
            hook.remove()
    whole = inputs["input_ids"].shape[1]
    assert held == [whole, whole, tokens[0], tokens[0], tokens[1], tokens[1]]


@pytest.mark.parametrize("name", ["pyramiddrop", "feather", "sparsevlm+", "v2drop"])
def test_a_cached_system_prompt_changes_nothing(models, name):
    """The same tokens stay if the words before the picture come from a cache."""
    model, prompt = models("llava"), tiny.simple("llava", before=8, seed=7)
    whole = tiny.batch("llava", [prompt])
    with attach(model, METHODS[name](schedule=STAGES)) as handle, torch.no_grad():
        model(**whole)
        expected = [row[0].tolist() for row in handle.report.kept]
        start = model(input_ids=whole["input_ids"][:, :8], use_cache=True)
        rest = {"input_ids": whole["input_ids"][:, 8:], "attention_mask": whole["attention_mask"]}
        model(**rest, pixel_values=whole["pixel_values"], past_key_values=start.past_key_values)
        kept = [row[0].tolist() for row in handle.report.kept]
    if name == "sparsevlm+":  # divides by a softmax over this call's tokens alone
        assert len(kept[0]) == len(expected[0])
    else:
        assert kept == expected


def test_what_is_refused(models):
    with pytest.raises(PrunerError, match="rows: must be one of"):
        FastV(budget=64, rows="first")
    with pytest.raises(PrunerError, match="recycled: must be a share"):
        SparseVLM(budget=64, recycled=1.0)
    with pytest.raises(PrunerError, match="heads: must be a share"):
        SparseVLMPlus(budget=64, heads=0)
    for method, setting in ((DART, "pivots"), (FEATHER, "stride")):
        with pytest.raises(PrunerError, match=f"{setting}: must be a whole number"):
            method(budget=64, **{setting: 0})
    model = models("llava")
    inputs = tiny.batch("llava", [tiny.simple("llava")])
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=160)
    with attach(model, PyramidDrop(schedule=STAGES)), torch.no_grad():
        model(**inputs, past_key_values=cache)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"]] * 2, dim=1)
        with pytest.raises(UnsupportedError, match=r"pyramiddrop reads the cached keys .* plain DynamicCache"):
            model(**inputs, past_key_values=cache)


# -- every family ---------------------------------------------------------------------------------------------------

USUAL = {("qwen3_5", "pyramiddrop"), ("gemma4", "v2drop"), ("glm4v", "feather"), ("qwen3_vl", "sparsevlm")}


def cells():
    """(family, method); all but a few are marked ``full``."""
    for family in zoo.SETUPS:
        for name in INSIDE:
            if family != "granite4_vision" and name != "adaptinfer":
                marks = () if (family, name) in USUAL else pytest.mark.full
                yield pytest.param(family, name, id=f"{family}-{name}", marks=marks)


@pytest.mark.parametrize(("family", "name"), list(cells()))
def test_every_family(zoo_models, family, name):  # noqa: F811
    """Prefill of a padded batch of different images against the masked run, then some answer."""
    from test_families import SCORING, size

    model, eager = zoo_models(family), zoo_models(family, "eager")
    depth = len(model.get_decoder().layers)
    layers = list(SCORING.get(family, range(depth - 1)))
    pruner = MASKED[name] or METHODS[name](budget=0.5)
    if "next" in pruner.capabilities.needs:
        layers = [layer - 1 for layer in SCORING.get(family, range(depth)) if layer]
    if pruner.capabilities.acts_after and family == "gemma4":
        layers = [layer for layer in layers if layer < 3]
    stages = tuple(Stage(layer, share) for layer, share in zip(layers[:2], (0.5, 0.4), strict=False))
    pruner = type(pruner)(schedule=Schedule(stages, depth), **({"recycled": 0} if name == "sparsevlm" else {}))
    samples = [zoo.simple(family, after=5, seed=1, **size(family, 1)), zoo.simple(family, after=11, seed=2)]
    inputs = zoo.batch(family, samples)
    given = positioned(model, inputs)
    with attach(model, pruner) as handle, torch.no_grad():
        logits, report = model(**given).logits, handle.report
        out = model.generate(**inputs, max_new_tokens=2, suppress_tokens=list(zoo.PLACEHOLDERS))
    assert out.shape[1] > inputs["input_ids"].shape[1] and len(report.stages) == len(stages)
    oracle = Oracle(eager, {}, zoo.PLACEHOLDERS)
    vision = torch.isin(inputs["input_ids"], torch.tensor(zoo.PLACEHOLDERS))
    alive = torch.ones_like(vision)
    for stage, kept, keeps in zip(
        report.stages,
        report.kept,
        zip(*(pruner.schedule.keeps(n) for n in report.vision_tokens), strict=True),
        strict=True,
    ):
        alive = alive & ~vision
        for b, row in enumerate(kept):
            assert len(row) == keeps[b]
            alive[b, row] = True
        oracle.alive[stage.layer] = alive
    real = inputs["attention_mask"].bool() & alive
    torch.testing.assert_close(logits[real], oracle.logits(inputs)[real], atol=zoo.SETUPS[family].tolerance, rtol=0)
