"""Methods that select before the language model: each against its formula, written out slowly or worked by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptinfer.pruners import FasterVLM, HiRED, Pool, PruMerge, PruMergePlus, Scans, VisionZip, VisPruner
from adaptinfer.pruners.cdpruner import likely_set, relevance
from adaptinfer.pruners.divprune import farthest_first
from adaptinfer.pruners.hired import apportioned
from adaptinfer.pruners.pool import cells
from adaptinfer.pruners.prumerge import outliers_and_uniform
from adaptinfer.pruners.selecting import rank_within, shared_out
from adaptinfer.pruners.starpro import pivots
from adaptinfer.pruners.views import FeatureView
from adaptinfer.pruners.vispruner import without_duplicates


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Made:
    """Stands in for the encoded images of a view: whatever a test made up."""

    def __init__(self, attention=None, joined=None, keys=None, projector=None, tokens=None, crops=None, ends=None):
        self.values = {"attention": attention, "joined": joined, "keys": keys, "projector": tokens}
        self.projector, self._crops, self._ends = projector, crops, ends
        self.cropped = crops is not None

    def taken(self, read):
        values = self.values[read.what]
        return values[read.layer] if isinstance(values, dict) else values

    def crops(self):
        raise AssertionError("asked by `at` alone")

    def line_ends(self):
        raise AssertionError("asked by `at` alone")

    def at(self, places, rows, values):
        if values == self.line_ends:
            return torch.zeros(places.shape, dtype=torch.bool) if self._ends is None else self._ends
        return self._crops if values == self.crops else values


def view_of(features, keep, text=None, pictures=None, **made):
    """A view of one picture; attention [B, H, V] and keys [B, V, K, D] as a method sees them."""
    if "attention" in made:
        layers = made["attention"] if isinstance(made["attention"], dict) else {-1: made["attention"]}
        swapped = {layer: values.transpose(1, 2) for layer, values in layers.items()}
        made["attention"] = {**dict.fromkeys((-2, -1, 0, 5), next(iter(swapped.values()))), **swapped}
    text = noise(len(features), 3, features.shape[2], seed=9) if text is None else text
    places = torch.arange(features.shape[1]).expand(len(features), -1)
    return FeatureView(features, text, keep, pictures, rows=None, _images=Made(**made), _places=places)


def kept_of(selection):
    return [row.nonzero()[:, 0].tolist() for row in selection.kept]


# -- formulas, by hand ----------------------------------------------------------------------------------------------


def cosines(points):
    points = np.asarray(points, dtype=np.float64)
    points = points / np.linalg.norm(points, axis=1, keepdims=True)
    return points @ points.T


def test_divprune_picks_the_furthest_of_the_nearest():
    features = noise(2, 11, 5)
    for row, picked in zip(features, farthest_first(features, 6), strict=True):
        distance = 1 - cosines(row)
        alone = [min(distance[i, j] for j in range(11) if j != i) for i in range(11)]
        expected = [int(np.argmax(alone))]
        while len(expected) < 6:
            rest = [i for i in range(11) if i not in expected]
            expected.append(max(rest, key=lambda i: min(distance[i, j] for j in expected)))
        assert picked.tolist() == expected


def test_divprune_by_hand():
    """Four directions in the plane: the one opposite to the others' cluster first, then its opposite."""
    angles = torch.tensor([0.0, 10.0, 20.0, 180.0]).deg2rad()
    features = torch.stack([angles.cos(), angles.sin()], dim=1)[None]
    assert farthest_first(features, 4)[0].tolist() == [3, 0, 2, 1]


def test_cdpruner_maximises_the_determinant_step_by_step():
    features, weight = noise(2, 9, 6), torch.rand(2, 9, generator=torch.Generator().manual_seed(1)) + 0.1
    for row, r, picked in zip(features, weight, likely_set(features, weight, 5), strict=True):
        kernel = cosines(row) * np.outer(r, r)
        expected: list[int] = []
        while len(expected) < 5:
            rest = [i for i in range(9) if i not in expected]
            expected.append(max(rest, key=lambda i: np.linalg.det(kernel[np.ix_([*expected, i], [*expected, i])])))
        assert picked.tolist() == expected


def test_cdpruner_relevance_is_the_mean_cosine_scaled_within_a_sample():
    features, text = noise(2, 7, 4), noise(2, 3, 4, seed=1)
    for row, words, got in zip(features, text, relevance(features, text), strict=True):
        mean = [np.mean([cosines([v, t])[0, 1] for t in words.numpy()]) for v in row.numpy()]
        expected = (np.array(mean) - min(mean)) / (max(mean) - min(mean))
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_more_tokens_than_dimensions_are_still_all_different():
    features = noise(1, 12, 3)
    for picked in (likely_set(features, torch.ones(1, 12), 11), pivots(features, 11), farthest_first(features, 11)):
        assert len(set(picked[0].tolist())) == 11


def test_starpro_covers_by_pivoted_qr():
    features = noise(2, 10, 6)
    for row, picked in zip(features, pivots(features, 5), strict=True):
        rest, expected = row.double().numpy().T.copy(), []
        for _ in range(5):
            norms = [np.linalg.norm(rest[:, i]) if i not in expected else -1 for i in range(10)]
            best = int(np.argmax(norms))
            expected.append(best)
            q = rest[:, best] / norms[best]
            rest = rest - np.outer(q, q @ rest)
        assert picked.tolist() == expected


def test_fastervlm_takes_the_mean_over_heads():
    attention = torch.tensor([[[0.9, 0.1, 0.2, 0.3], [0.0, 0.7, 0.2, 0.3]]])  # means .45 .4 .2 .3
    view = view_of(noise(1, 4, 2), 2, attention=attention)
    assert kept_of(FasterVLM(budget=2).select_before(view)) == [[0, 1]]


def test_vispruner_drops_near_duplicates_among_the_rest():
    # Attention takes 0 and 1. Of the rest 2..7, even places 2 4 6 meet odd places 3 5 7: 4 resembles 5 most.
    angles = torch.tensor([0, 1, 10, 90, 200, 201, 60, 300.0]).deg2rad()
    features = torch.stack([angles.cos(), angles.sin()], dim=1)[None]
    attention = torch.tensor([[[9.0, 8, 1, 1, 1, 1, 1, 1]]])
    view = view_of(features, 7, attention=attention)
    assert kept_of(VisPruner(budget=7, important_share=2 / 7).select_before(view)) == [[0, 1, 2, 3, 5, 6, 7]]
    # Next round: 6 2 (the more similar first) and 3 5 7. Even places 6 3 7, at 60 90 300 degrees, meet 2 and 5, at 10
    # and 201: nearest by 50, 80 and 70, so 6 goes.
    view = dataclasses.replace(view, keep=6)
    assert kept_of(VisPruner(budget=6, important_share=2 / 6, step=1).select_before(view)) == [[0, 1, 2, 3, 5, 7]]


def test_vispruner_pairs_by_falling_attention():
    """Attention takes 3; then come 1 0 2 4, at 5 0 180 and 90 degrees. 1 and 2 meet 0 and 4: 1 goes, by 5."""
    angles = torch.tensor([0.0, 5, 180, 45, 90]).deg2rad()
    features = torch.stack([angles.cos(), angles.sin()], dim=1)[None]
    view = view_of(features, 4, attention=torch.tensor([[[3.0, 4, 2, 9, 1]]]))
    # In the picture's order 0 and 2 would have met 1 and 4, and 0 gone.
    assert kept_of(VisPruner(budget=4, important_share=0.25).select_before(view)) == [[0, 2, 3, 4]]


def test_vispruner_compares_what_enters_the_projector():
    angles = torch.tensor([0.0, 0, 90, 88, 85]).deg2rad()
    tokens = torch.stack([angles.cos(), angles.sin()], dim=1)[None]
    made = {"attention": torch.tensor([[[9.0, 4, 3, 2, 1]]]), "tokens": tokens, "projector": lambda x: x}
    # 1 and 3, at 0 and 88, meet 2 and 4, at 90 and 85: nearest by 85 and 2, so 3 goes. Projected ones are all alike.
    view = view_of(torch.ones(1, 5, 3), 4, **made)
    assert kept_of(VisPruner(budget=4, important_share=0.25).select_before(view)) == [[0, 1, 2, 4]]


def test_vispruner_takes_line_ends_for_duplicates():
    # Behind 0 stand 1 2 3 4: even places 1 3 meet 2 4. Ends of lines are zeros, yet 3 resembles 4 entirely.
    tokens = torch.tensor([[[1.0, 0], [1, 0], [1, 1], [0, 0], [0, 0]]])
    made = {"attention": torch.tensor([[[9.0, 4, 3, 0, 0]]]), "tokens": tokens, "projector": lambda x: x}
    view = view_of(torch.ones(1, 5, 3), 4, ends=(tokens == 0).all(dim=2), **made)
    assert kept_of(VisPruner(budget=4, important_share=0.25).select_before(view)) == [[0, 1, 2, 4]]


@given(st.integers(1, 40), st.integers(1, 9), st.data())
def test_duplicates_are_dropped_down_to_any_count(total, step, data):
    count = data.draw(st.integers(0, total))
    left = without_duplicates(noise(2, total, 4, seed=total), count, step)
    assert left.shape == (2, count)
    assert all(len(set(row)) == count and set(row) <= set(range(total)) for row in left.tolist())


@pytest.mark.parametrize("merge", ["add", "average"])
def test_visionzip_by_hand(merge):
    batch, total, keep, width = 2, 13, 6, 4
    features, tokens, keys = (
        noise(batch, total, 3),
        noise(batch, total, width, seed=1),
        noise(batch, total, 2, 5, seed=2),
    )
    attention, matrix = noise(batch, 3, total, seed=3).softmax(2), noise(width, 3, seed=4)
    view = view_of(
        features, keep, attention=attention, keys=keys, tokens=tokens, projector=lambda x: (x @ matrix).tanh()
    )
    selection = VisionZip(budget=keep, dominant_share=0.5, merge=merge).select_before(view)
    for b in range(batch):
        scores = attention[b].sum(0).tolist()
        dominant = sorted(range(total), key=lambda i: -scores[i])[:3]
        rest = [i for i in range(total) if i not in dominant]
        centres = rest[:: len(rest) // 3][:3]
        assert kept_of(selection)[b] == sorted(dominant + centres)
        likeness = cosines(keys[b].mean(1))
        best = {i: max(centres, key=lambda c: likeness[i, c]) for i in rest if i not in centres}
        joined = {c: [i for i, centre in best.items() if centre == c] for c in centres}
        assert sum(map(len, joined.values())) == 7
        for i in range(total):
            expected = features[b, i]
            if joined.get(i):
                mean = torch.stack([tokens[b, j] for j in joined[i]]).mean(0)
                both = torch.stack([tokens[b, j] for j in [i, *joined[i]]]).mean(0)
                expected = ((tokens[b, i] + mean if merge == "add" else both) @ matrix).tanh()
            torch.testing.assert_close(selection.hidden[b, i], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("keep", [1, 4])
def test_prumerge_by_hand(keep):
    """One of four stands for all that were not picked; a budget of one is a pick."""
    total, picks = 9, max(1, keep - 1)
    features, keys = noise(1, total, 4), noise(1, total, 2, 3, seed=1)
    joined = noise(1, total, 1, seed=2).softmax(1)
    selection = PruMerge(budget=keep, neighbours=4).select_before(view_of(features, keep, joined=joined, keys=keys))
    weight, likeness = joined[0, :, 0], cosines(keys[0].flatten(1))
    picked = sorted(range(total), key=lambda i: -weight[i])[:picks]
    rest = [i for i in range(total) if i not in picked]
    assert kept_of(selection) == [sorted([*picked, *rest[-1:]] if keep > 1 else picked)]
    for i in range(total):
        expected = features[0, i].clone()
        if i in picked:
            near = sorted((j for j in range(total) if j != i), key=lambda j: -likeness[i, j])[:4]
            expected += sum(weight[j] * features[0, j] for j in near)
        elif i == rest[-1] and keep > 1:
            expected = sum(weight[j] * features[0, j] for j in rest)
        torch.testing.assert_close(selection.hidden[0, i], expected, atol=1e-5, rtol=0)


def test_prumerge_without_merging():
    joined = torch.tensor([[[0.1], [0.4], [0.2], [0.3]]])
    selection = PruMerge(budget=2, neighbours=0).select_before(view_of(noise(1, 4, 2), 2, joined=joined))
    assert kept_of(selection) == [[1, 3]] and selection.hidden is None


def test_prumerge_plus_fills_up_with_a_uniform_sample():
    score = torch.tensor([[0.0, 1, 2, 3, 100, 4, 5, 6, 7, 90, 8]])
    low, high = np.quantile(score[0].numpy(), [0.25, 0.75])
    assert [i for i in range(11) if score[0, i] > high + 1.5 * (high - low)] == [4, 9]
    assert outliers_and_uniform(score, 1)[0].nonzero()[:, 0].tolist() == [4]
    # Three places among the nine others: every third of them, 2 6 8 and 10 being their third, sixth and ninth.
    assert outliers_and_uniform(score, 5)[0].nonzero()[:, 0].tolist() == [2, 4, 6, 9, 10]
    assert PruMergePlus(budget=5)._choose(score, 5).equal(outliers_and_uniform(score, 5))


@given(st.integers(1, 60), st.data())
def test_outliers_and_uniform_keep_exactly_the_budget(total, data):
    keep = data.draw(st.integers(1, total))
    score = noise(3, total, seed=total).pow(3)
    assert outliers_and_uniform(score, keep).sum(1).tolist() == [keep] * 3
    spread = np.quantile(score.double().numpy(), [0.25, 0.75], axis=1)
    outlier = score.double().numpy() > (spread[1] + 1.5 * (spread[1] - spread[0]))[:, None]
    chosen = outliers_and_uniform(score, keep).numpy()
    assert ((chosen & outlier).sum(1) == np.minimum(outlier.sum(1), keep)).all()


def test_hired_divides_a_budget_over_crops():
    """An overview of 2 x 2, and two crops side by side: 2 x 4 with a column of line ends."""
    crops = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2, 2, 1, 1, 2, 2, 2]])
    early = torch.tensor([[[4.0, 1, 2, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]]])  # the better half: one left, one right
    late = torch.tensor([[[1.0, 2, 3, 4, 1, 2, 9, 8, 0, 3, 4, 7, 6, 0]]])
    view = view_of(
        noise(1, 14, 2),
        6,
        pictures=(((2, 2), (2, 5)),),
        attention={0: early, -2: late},
        crops=crops,
    )
    # Half for the overview: 1 2 3. Of the other three one each, 10 and 6, and of equal quotients the earlier, 7.
    assert kept_of(HiRED(budget=6).select_before(view)) == [[1, 2, 3, 6, 7, 10]]
    # Of seven, three for the overview and four for the crops: two each.
    view = dataclasses.replace(view, keep=7)
    assert kept_of(HiRED(budget=7).select_before(view)) == [[1, 2, 3, 6, 7, 9, 10]]


def test_apportioned_by_quotients():
    group = torch.tensor([[1, 1, 1, 2, 2, 2]])
    share = torch.tensor([[5.0, 5, 5, 1, 1, 1]])
    score = torch.tensor([[1.0, 3, 2, 1, 2, 3]])
    # 5 / .5, 5 / 1.5, 5 / 2.5 = 10, 3.3, 2 and 2, .67, .4; of equal ones the earlier token wins
    assert apportioned(group, share, score, 2)[0].nonzero()[:, 0].tolist() == [1, 2]
    assert apportioned(group, share, score, 4)[0].nonzero()[:, 0].tolist() == [0, 1, 2, 5]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=30))
def test_rank_within_groups(tokens):
    group, score = (torch.tensor([column]) for column in zip(*tokens, strict=True))
    expected = [
        sum(g == own and (s > mine or (s == mine and j < i)) for j, (g, s) in enumerate(tokens))
        for i, (own, mine) in enumerate(tokens)
    ]
    assert rank_within(group, score.float())[0].tolist() == expected


def test_vscan_scans_windows_and_the_whole():
    """4 x 4 tokens in windows of 2 x 2: the best of each, then the best of all; the others join what they are like."""
    early = torch.tensor([[[4.0, 1, 1, 1, 1, 1, 3, 1, 1, 1, 1, 1, 2, 1, 1, 5]]])
    late = torch.zeros(1, 1, 16)
    late[0, 0, [0, 1, 5]] = torch.tensor([9.0, 8, 7])
    features, ends = noise(1, 16, 6), torch.zeros(1, 16, dtype=torch.bool)
    ends[0, 3] = True
    made = {"tokens": noise(1, 16, 5, seed=1), "projector": torch.nn.Linear(5, 6)}  # projected ones are compared
    view = view_of(features, 6, pictures=(((4, 4),),), attention={5: early, -2: late}, ends=ends, **made)
    selection = Scans(budget=6, local_share=4 / 6, window=2).select_before(view)
    kept = [0, 1, 5, 6, 12, 15]  # 0 6 12 15 by window; 1 and 5 by the late block, where 0 is taken already
    assert kept_of(selection) == [kept]
    likeness = cosines(features[0])
    best = {i: max(kept, key=lambda c: likeness[i, c]) for i in range(16) if i not in kept and i != 3}
    joined = {k: [k] + [i for i, centre in best.items() if centre == k] for k in kept}
    for k in kept:
        expected = features[0, joined[k]].mean(0)
        torch.testing.assert_close(selection.hidden[0, k], expected, atol=1e-5, rtol=0)


@given(st.integers(1, 24), st.integers(1, 24), st.data())
def test_pooling_cells_are_a_partition_into_rectangles(rows, columns, data):
    count = data.draw(st.integers(0, rows * columns))
    found = cells(rows, columns, count)
    assert len(found) == count
    if count:
        assert sorted(token for _, members in found for token in members) == list(range(rows * columns))
    for middle, members in found:
        assert middle in members
        high, wide = {m // columns for m in members}, {m % columns for m in members}
        assert members == [r * columns + c for r in sorted(high) for c in sorted(wide)]
    sizes = [len(members) for _, members in found]
    if count == rows * columns:
        assert set(sizes) == {1}


def test_pooling_is_the_mean_of_each_cell():
    features = noise(2, 36, 3)
    selection = Pool(budget=4).select_before(view_of(features, 4, pictures=(((6, 6),),)))
    assert kept_of(selection) == [[7, 10, 25, 28]] * 2
    expected = torch.nn.functional.adaptive_avg_pool2d(features.view(2, 6, 6, 3).permute(0, 3, 1, 2), 2)
    torch.testing.assert_close(selection.hidden[:, [7, 10, 25, 28]], expected.flatten(2).transpose(1, 2))


@given(st.integers(0, 500), st.lists(st.integers(1, 60), min_size=1, max_size=8))
def test_a_budget_is_shared_out_in_whole_tokens(keep, sizes):
    keep = min(keep, sum(sizes))
    parts = shared_out(keep, sizes)
    assert sum(parts) == keep and all(part <= size for part, size in zip(parts, sizes, strict=True))
    assert all(abs(part - keep * size / sum(sizes)) < 1 for part, size in zip(parts, sizes, strict=True))
