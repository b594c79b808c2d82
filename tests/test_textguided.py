"""TextGuided: every setting against its formula, written out slowly, and what all of them share."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import test_methods
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_methods import prompts, run
from test_methods_inside import STAGES, keeps_what_the_formula_says
from transformers import StaticCache

from adaptinfer import AdaptInfer, PrunerError, Schedule, Stage, UnsupportedError, attach, from_pretrained
from adaptinfer.pruners import DivPrune, FastV, TextGuided
from adaptinfer.pruners.textguided import farthest_added, holding, in_turn
from adaptinfer.serving.vllm_plugin.plan import Planner
from adaptinfer.serving.vllm_plugin.refusals import check_method

HEADS, KV_HEADS = 4, 2  # of tiny.llava


# -- slow formulas --------------------------------------------------------------------------------------------------


def attention(layer, rotary):
    """[H, N, N], zeros where nothing is seen."""
    if rotary:
        return layer.attention()
    q, k, alive = layer.projected("q_proj"), layer.projected("k_proj"), layer.given["alive"]
    found = np.zeros((HEADS, q.shape[1], q.shape[1]))
    for h in range(HEADS):
        for j in layer.text:
            seen = [i for i in alive if i <= j]
            logits = np.array([q[h, j] @ k[h // (HEADS // KV_HEADS), i] / math.sqrt(16) for i in seen])
            found[h, j, seen] = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    return found


def slowly(layer, words, heads=1.0, normalised=False, rotary=True):
    """Score by the definition in the class's docstring."""
    a, text = attention(layer, rotary), layer.text[-1:] if words == "last" else layer.text
    vote = {(h, j, v): a[h, j, v] for h in range(HEADS) for j in text for v in layer.vision}
    mass = {h: sum(vote[h, j, v] for j in text for v in layer.vision) for h in range(HEADS)}
    counted = sorted(mass, key=lambda h: -mass[h])[: max(1, math.floor(heads * HEADS + 0.5))]
    if words == "soft":
        for h in range(HEADS):
            for j in text:
                weight = sum(a[h, i, j] + a[h, j, i] - (a[h, j, j] if i == j else 0) for i in text)
                for v in layer.vision:
                    vote[h, j, v] *= weight
    if normalised:
        total = {h: sum(vote[h, j, v] for j in text for v in layer.vision) for h in range(HEADS)}
        vote = {(h, j, v): x / total[h] for (h, j, v), x in vote.items()}
    given = {(j, v): sum(vote[h, j, v] for h in counted) for j in text for v in layer.vision}
    if words == "max":
        return {v: max(given[j, v] for j in text) for v in layer.vision}
    if words != "union":
        return {v: sum(given[j, v] for j in text) for v in layer.vision}
    lists = [sorted(layer.vision, key=lambda v, j=j: (-given[j, v], v)) for j in text]
    line = []
    for called in zip(*lists, strict=True):
        new = sorted({v for v in called if v not in line}, key=lambda v: (-max(given[j, v] for j in text), v))
        line += new
    return {v: -float(place) for place, v in enumerate(line)}


def covering(layer, keep, covers, share, words="soft"):
    """1 for what is kept: the best by votes, then what covers."""
    score, more = slowly(layer, words), math.floor(share * keep)
    kept = sorted(score, key=lambda v: (-score[v], v))[: keep - more]
    left = sorted(set(layer.vision) - set(kept))
    if covers == "even":
        kept += [v for r, v in enumerate(left) if (r + 1) * more // len(left) > r * more // len(left)]
        return {v: float(v in kept) for v in layer.vision}
    points = layer.hidden() / np.linalg.norm(layer.hidden(), axis=1, keepdims=True)

    for _ in range(more):
        best = min(left, key=lambda v: (max(points[v] @ points[w] for w in kept), v))
        kept.append(best)
        left.remove(best)
    return {v: float(v in kept) for v in layer.vision}


OPTIONS = [
    {"words": "soft"},
    {"words": "uniform"},
    {"words": "last"},
    {"words": "max"},
    {"words": "union"},
    {"words": "soft", "heads": 0.5},
    {"words": "last", "heads": 0.25},
    {"words": "max", "heads": 0.75, "normalised": True},
    {"words": "soft", "normalised": True},
    {"words": "soft", "rotary": False},
    {"words": "union", "rotary": False, "normalised": True, "heads": 0.5},
]


def named(options):
    return ", ".join(f"{key}={value}" for key, value in options.items())


@pytest.mark.parametrize("options", OPTIONS, ids=named)
def test_it_keeps_what_its_formula_says(models, options):
    pruner = TextGuided(schedule=STAGES, **options)
    keeps_what_the_formula_says(models, "sdpa", pruner, lambda layer, keep: slowly(layer, **options))


@pytest.mark.parametrize("options", [{"words": "soft", "normalised": True}, {"words": "max", "heads": 0.25}], ids=named)
def test_fillers_weigh_nothing(models, options):
    """The scores of a sample are its own, though a batch fills its vision tokens up to those of another one."""
    samples = [tiny.simple("llava", before=40, after=30, seed=1), tiny.simple("llava", images=2, after=12)]
    assert len(samples[0]) == len(samples[1]), "no padding, so what fills the first one up are words"
    pruner = TextGuided(schedule=Schedule((Stage(1, 0.4),), tiny.LAYERS), **options)
    _, together = run(models("llava"), tiny.batch("llava", samples), pruner)
    for b, sample in enumerate(samples):
        _, alone = run(models("llava"), tiny.batch("llava", [sample]), pruner)
        (one,), (other,) = alone.stages, together.stages
        torch.testing.assert_close(one.scores[0], other.scores[b, : one.scores.shape[1]], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("covers", ["hidden", "even"])
@pytest.mark.parametrize("words", ["soft", "union"])
def test_coverage_is_what_its_formula_says(models, covers, words):
    pruner = TextGuided(schedule=STAGES, words=words, coverage=0.4, covers=covers)
    slow = partial(covering, covers=covers, share=0.4, words=words)
    keeps_what_the_formula_says(models, "sdpa", pruner, slow)


def test_keys_cover_with_their_positions(models):
    """All heads' keys after rotary embedding, one vector a token."""
    seen = []

    class Looking(TextGuided):
        def select(self, view, keeps):
            chosen = super().select(view, keeps)
            seen.append((view.key, view.vision_index, chosen))
            return chosen

    pruner = Looking(schedule=Schedule((Stage(1, 9),), tiny.LAYERS), coverage=0.6, covers="keys")
    run(models("llava"), tiny.batch("llava", [tiny.simple("llava")]), pruner)
    ((key, index, chosen),) = seen
    points = key[0, :, index[0]].permute(1, 0, 2).reshape(49, -1).double()
    points = points / points.norm(dim=1, keepdim=True)
    kept = chosen.score[0].topk(4).indices.tolist()
    for _ in range(5):
        nearest = (points @ points[kept].T).amax(dim=1)
        kept.append(min(set(range(49)) - set(kept), key=lambda v: (float(nearest[v]), v)))
    assert chosen.kept[0].nonzero()[:, 0].tolist() == sorted(kept)


def test_as_it_stands_it_is_adaptinfer(models):
    inputs = tiny.batch("llava", prompts("llava"))
    for ours, published in ((TextGuided, AdaptInfer), (partial(TextGuided, words="uniform"), None)):
        _, report = run(models("llava"), inputs, ours(schedule=STAGES))
        reference = published(schedule=STAGES) if published else AdaptInfer(schedule=STAGES, prior_weight=0.0)
        _, expected = run(models("llava"), inputs, reference)
        for one, other in zip(report.kept, expected.kept, strict=True):
            assert [row.tolist() for row in one] == [row.tolist() for row in other]
        if published:
            for one, other in zip(report.stages, expected.stages, strict=True):
                real = one.entered_mask
                torch.testing.assert_close(one.scores[real], other.scores[real])


def test_the_last_word_of_all_heads_is_fastv(models):
    inputs = tiny.batch("llava", prompts("llava"))
    _, one = run(models("llava"), inputs, TextGuided(schedule=STAGES, words="last"))
    _, other = run(models("llava"), inputs, FastV(schedule=STAGES))
    assert [[row.tolist() for row in s] for s in one.kept] == [[row.tolist() for row in s] for s in other.kept]


# -- pure functions -------------------------------------------------------------------------------------------------


def test_in_turn_worked_by_hand():
    """Word 0 ranks 0 1 2 3, word 1 ranks 3 0 2 1. Round 1 calls 0 and 3, 3 has the larger vote; round 2 calls 1."""
    votes = torch.tensor([[[0.5, 0.3, 0.1, 0.0], [0.2, 0.0, 0.1, 0.7]]])
    assert in_turn(votes).tolist() == [[-1, -2, -3, 0]]
    # Without the second word the first one's own order is left; without token 0 the others move up.
    assert in_turn(votes, torch.tensor([[True, False]])).tolist() == [[0, -1, -2, -3]]
    without = in_turn(votes, None, torch.tensor([[False, True, True, True]]))
    assert without[0, 1:].tolist() == [-1, -2, 0]


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 9)),
    ties=st.booleans(),
    seed=st.integers(0, 999),
)
def test_in_turn_is_the_loop(shape, ties, seed):
    generator = torch.Generator().manual_seed(seed)
    votes = torch.rand(shape, generator=generator)
    votes = (votes * 3).floor() if ties else votes
    words = torch.rand(shape[:2], generator=generator) < 0.7
    words[:, 0] = True
    there = torch.rand(shape[0], shape[2], generator=generator) < 0.7
    got = in_turn(votes, words, there)
    for b in range(shape[0]):
        tokens = there[b].nonzero()[:, 0].tolist()
        rows = [votes[b, t].tolist() for t in words[b].nonzero()[:, 0].tolist()]
        line = []
        for called in zip(*(sorted(tokens, key=lambda v, r=r: (-r[v], v)) for r in rows), strict=True):
            line += sorted({v for v in called if v not in line}, key=lambda v: (-max(r[v] for r in rows), v))
        assert sorted(tokens, key=lambda v: -float(got[b, v])) == line


def test_farthest_worked_by_hand():
    """Directions of 0°, 10°, 80°, 90°, 200° with the first kept: 200° is furthest, then 90°; 80° would be next."""
    angles = torch.tensor([0.0, 10.0, 80.0, 90.0, 200.0]) * math.pi / 180
    points = torch.stack([angles.cos(), angles.sin()], dim=1)[None] * torch.tensor([1.0, 5.0, 2.0, 1.0, 0.1])[:, None]
    kept = torch.tensor([[True, False, False, False, False]])
    assert farthest_added(points, kept, ~kept, [2]).tolist() == [[False, False, False, True, True]]
    left = torch.tensor([[False, True, True, True, False]])  # 200° cannot be added
    assert farthest_added(points, kept, left, [2]).tolist() == [[False, True, False, True, False]]


@given(rows=st.lists(st.tuples(st.integers(1, 8), st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=3))
def test_as_many_are_added_as_wanted(rows):
    """Samples of different length that want different numbers; fillers are never added, nothing is added twice."""
    rows = [(n, min(k, n), min(more, n - min(k, n))) for n, k, more in rows]
    longest = max(n for n, _, _ in rows)
    place = torch.arange(longest)[None]
    real = place < torch.tensor([[n] for n, _, _ in rows])
    kept = place < torch.tensor([[k] for _, k, _ in rows])
    points = torch.randn(len(rows), longest, 3, generator=torch.Generator().manual_seed(1))
    added = farthest_added(points, kept, real & ~kept, [more for _, _, more in rows])
    assert added.sum(dim=1).tolist() == [more for _, _, more in rows]
    assert not (added & (kept | ~real)).any()


# -- counts that vary -----------------------------------------------------------------------------------------------


def test_holding_worked_by_hand():
    """4 + 3 of 10 are 0.7, and so is the next row's 7; zeros are never needed, one token always is."""
    score = torch.tensor([[1.0, 4.0, 2.0, 3.0], [7.0, 0.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert [holding(score, share).tolist() for share in (0.0, 0.69, 0.71, 1.0)] == [
        [1, 1, 1],
        [2, 1, 1],
        [3, 2, 1],
        [4, 2, 1],
    ]


def test_each_sample_keeps_what_holds_the_mass(models):
    """Never more than planned, in a batch as alone, and the report says what was kept."""
    samples, model = prompts("llava"), models("llava")
    asked = []

    class Looking(TextGuided):
        def select(self, view, keeps):
            asked.append((keeps, view.vision_counts))
            return super().select(view, keeps)

    pruner = Looking(schedule=Schedule((Stage(1, 0.5), Stage(3, 0.9)), tiny.LAYERS), mass=0.35)
    inputs = tiny.batch("llava", samples)
    _, report = run(model, inputs, pruner)
    for keeps, entered in asked:
        assert all(keep <= count for keep, count in zip(keeps, entered, strict=True))
    counts = [[len(row) for row in stage] for stage in report.kept]
    planned = [pruner.schedule.keeps(count) for count in report.vision_tokens]
    assert any(counts[0][b] < planned[b][0] for b in range(3)) and len({*counts[0]}) > 1
    for b, sample in enumerate(samples):
        now = report.vision_tokens[b]
        for s, stage in enumerate(report.stages):
            votes = report.scores[s][b].double().sort(descending=True).values
            assert len(votes) == now
            needed = 1 + int((votes.cumsum(0) < 0.35 * votes.sum()).sum())
            now = min(needed, planned[b][s], now)
            assert counts[s][b] == now
            assert report.tokens_per_layer[b][stage.layer + 1] == now
        _, alone = run(model, tiny.batch("llava", [sample]), pruner)
        pad = inputs["input_ids"].shape[1] - len(sample)
        for s in range(2):
            assert (report.kept[s][b] - pad).tolist() == alone.kept[s][0].tolist()
    kept = sum(sum(tokens) for tokens in report.tokens_per_layer) / tiny.LAYERS
    assert sum(report.true_average) == pytest.approx(kept)


@pytest.mark.parametrize("options", [{}, {"coverage": 0.3, "words": "max"}], ids=named)
def test_varying_counts_are_the_masked_run(models, options):
    method = made({"mass": 0.3, **options})
    test_methods.test_pruned_is_the_masked_run(models, method, "llava", "keep")
    test_methods.test_alone_and_in_a_batch(models, method, "llava")


def test_varying_counts_behind_a_selection(models):
    pruner = DivPrune(budget=0.5) >> TextGuided(budget=0.3, mass=0.3)
    assert pruner.capabilities.varies
    _, report = run(models("llava"), tiny.batch("llava", prompts("llava")), pruner)
    assert [len(row) for row in report.kept[0]] == [25, 49, 25]
    for average, count in zip(report.true_average, report.vision_tokens, strict=True):
        assert average <= 0.3 * count + 0.5


def test_varying_counts_are_refused_where_they_must_be_known(models):
    model = models("llava")
    inputs = tiny.batch("llava", [tiny.simple("llava")])
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=160)
    with attach(model, TextGuided(schedule=STAGES, mass=0.5)), torch.no_grad():
        with pytest.raises(UnsupportedError, match="textguided settles how many .* static cache"):
            model(**inputs, past_key_values=cache)
        with pytest.raises(UnsupportedError, match="static cache"):
            model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(UnsupportedError, match=r"vLLM needs these counts beforehand; make them fixed"):
        check_method(Planner(TextGuided(budget=0.3, mass=0.5), 6))
    with pytest.raises(PrunerError, match="mass: the union of words"):
        TextGuided(budget=0.3, mass=0.5, words="union")
    with pytest.raises(PrunerError, match="mass: must be a number from 0 to 1"):
        TextGuided(budget=0.3, mass=1.5)


# -- what every method must do --------------------------------------------------------------------------------------

MIXED = [
    {"words": "union", "coverage": 0.3},
    {"words": "max", "heads": 0.5, "coverage": 0.5, "covers": "even"},
    {"words": "soft", "rotary": False, "normalised": True, "coverage": 0.25, "covers": "keys"},
    {"words": "last", "heads": 0.5, "normalised": True},
]
SHARED = [
    test_methods.test_keeps_exactly_the_budget_in_order,
    test_methods.test_alone_and_in_a_batch,
    test_methods.test_deterministic,
    test_methods.test_keeping_all_is_vanilla,
]


@pytest.mark.parametrize("options", MIXED, ids=named)
@pytest.mark.parametrize("shared", SHARED, ids=lambda test: test.__name__)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_shared_properties(models, shared, options, family):
    shared(models, made(options), family)


@pytest.mark.parametrize("options", MIXED, ids=named)
def test_more_shared_properties(models, monkeypatch, tmp_path, options):
    method = made(options)
    test_methods.test_pruned_is_the_masked_run(models, method, "llava", "keep")
    test_methods.test_half_precision_scores_are_float32_and_finite(method)
    test_methods.test_saved_and_loaded(tmp_path, method)
    test_methods.test_a_few_rows_and_heads_at_a_time(models, monkeypatch, method)


@pytest.mark.parametrize("options", MIXED, ids=named)
@pytest.mark.parametrize("uneven", [False, True])
def test_no_layer_reads_the_device(monkeypatch, options, uneven):
    test_methods.test_no_layer_reads_the_device(monkeypatch, made(options), "sdpa", uneven)


def made(options):
    method = partial(TextGuided, **options)
    method.name = TextGuided.name
    return method


# -- beside others --------------------------------------------------------------------------------------------------


def test_behind_a_selection_before_the_model(models, tmp_path):
    """Half by diversity of features, then stages; the budget is the true average of the whole."""
    pruner = DivPrune(budget=0.5) >> TextGuided(budget=0.2, words="union", coverage=0.3)
    _, report = run(models("llava"), tiny.batch("llava", [tiny.simple("llava")]), pruner)
    assert report.stages[0].layer == -1 and len(report.kept[0][0]) == 25
    assert report.true_average[0] == pytest.approx(0.2 * 49, abs=0.5)
    pruner.save_pretrained(tmp_path)
    assert from_pretrained(tmp_path) == pruner


def test_vllm_serves_what_queries_and_keys_decide():
    for words in ("soft", "uniform", "last", "max", "union"):
        check_method(Planner(TextGuided(budget=0.3, words=words, heads=0.5), 6))
    check_method(Planner(TextGuided(budget=0.3, coverage=0.2), 6))
    with pytest.raises(UnsupportedError, match="textguided needs rotary, and in vLLM a method reads queries, keys"):
        check_method(Planner(TextGuided(budget=0.3, rotary=False), 6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"words": "first"}, "words: must be one of"),
        ({"covers": "space"}, "covers: must be one of"),
        ({"heads": 0}, "heads: must be a share above 0"),
        ({"heads": 1.5}, "heads: must be a number from 0 to 1"),
        ({"coverage": 1}, "coverage: must be a share below 1"),
        ({"coverage": -0.1}, "coverage: must be a number from 0 to 1"),
        ({"rotary": 1}, "rotary: must be True or False"),
        ({"normalised": "no"}, "normalised: must be True or False"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(PrunerError, match=message):
        TextGuided(budget=64, **options)
