"""Both shift detectors, on curves whose answer is known, and on curves in which there is nothing to find."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import ruptures
from hypothesis import given
from hypothesis import strategies as st

from adaptinfer.calibration.detect import Histogram, breakpoints, histogram, published_layers, read_off, salient_curves
from adaptinfer.calibration.shifts import detect_shifts, distances, split_gains
from adaptinfer.errors import InputError

DEPTH = 32


def spike(layer: int, depth: int = DEPTH) -> np.ndarray:
    curve = np.zeros(depth)
    curve[layer] = 1.0
    return curve


def published(curve: np.ndarray) -> int:
    """What the published detector says of one token, and what our many-at-once form says, which must be the same."""
    (layer,) = published_layers(curve[:, None])
    assert breakpoints(np.cumsum(curve, dtype=np.float64)) == layer
    return layer


def test_a_constant_curve_yields_layer_15_of_32():
    assert published(np.ones(DEPTH)) == 15
    assert published(np.ones(28)) == 13


def test_a_spike_yields_the_layer_before():
    for layer in range(2, 31):
        assert published(spike(layer)) == layer - 1


def test_attention_in_layer_0_is_invisible():
    nothing = published(np.zeros(DEPTH))
    assert nothing == 29, "of equal gains the last"
    assert published(spike(0)) == nothing
    assert published(spike(0) * 100 + spike(20)) == 19


def test_1_is_the_smallest_answer():
    assert published(spike(1)) == published(spike(2)) == 1
    assert published(np.geomspace(1, 1e-9, DEPTH)) >= 1


def test_scale_does_not_matter():
    curve = np.random.default_rng(0).random(DEPTH)
    assert published(curve) == published(37 * curve)


def gain(curve: np.ndarray, at: int) -> float:
    cost = ruptures.costs.CostL2().fit(np.cumsum(curve)[:, None])
    return cost.error(0, len(curve)) - cost.error(0, at) - cost.error(at, len(curve))


@given(st.lists(st.floats(0, 1), min_size=4, max_size=40))
def test_many_at_once_is_ruptures(values):
    curve = np.array(values)
    (theirs,) = published_layers(curve[:, None])
    ours = int(breakpoints(np.cumsum(curve)))
    assert 1 <= ours <= len(curve) - 3
    assert ours == theirs or gain(curve, ours + 1) == pytest.approx(gain(curve, theirs + 1), rel=1e-9, abs=1e-12)


def test_the_tenth_with_the_most_attention_is_looked_at():
    mass = np.ones((DEPTH, 39)) * 0.01
    mass[5, 7], mass[20, 30] = 9.0, 8.0
    assert salient_curves(mass).shape == (3, DEPTH)
    assert published_layers(mass)[1:] == [4, 19], "with token 0, the first of equals"
    assert salient_curves(np.ones((DEPTH, 3))).shape == (1, DEPTH)


def test_too_shallow_for_a_change_point():
    with pytest.raises(InputError, match="at least 4 layers, the model has 3"):
        published_layers(np.ones((3, 5)))


def readings(mass: np.ndarray):
    return [SimpleNamespace(index=index, mass=each) for index, each in enumerate(mass)]


def test_the_histogram_of_nothing_is_its_null():
    mass = np.random.default_rng(1).random((60, DEPTH, 40)) ** 4
    found = histogram(readings(mass), range(DEPTH))
    assert found.counts.sum() == 60 * 4 and found.samples == 60 and found.flat == 15
    assert found.null_mean.sum() == pytest.approx(240)
    inside = (found.null_low <= found.counts) & (found.counts <= found.null_high)
    assert inside.mean() > 0.85
    # and yet it has a peak, in the middle: without its null it looks like a finding
    assert 10 <= found.counts.argmax() <= 20


def test_the_histogram_of_a_shift_stands_out():
    mass = np.random.default_rng(2).random((40, DEPTH, 40)) * 0.1
    mass[:, 9, :4] += 5.0
    mass[:20, 24, :4] += 9.0
    found = histogram(readings(mass), range(DEPTH))
    assert found.counts[8] + found.counts[23] > 0.9 * found.counts.sum()
    assert read_off(found, 3, DEPTH) == (8, 23)
    assert read_off(found, 1, DEPTH) == (8,) or read_off(found, 1, DEPTH) == (23,)


def test_curves_go_over_layers_with_attention_only():
    mass = np.random.default_rng(3).random((5, DEPTH, 20))
    layers = range(3, DEPTH, 4)
    found, dense = histogram(readings(mass), layers), histogram(readings(mass[:, layers]), range(8))
    assert found.layers == tuple(layers) and (found.counts == dense.counts).all()
    assert found.flat == layers[dense.flat]


def known(counts, high=10.0, mean=5.0, layers=None):
    counts = np.array(counts)
    return Histogram(
        tuple(layers or range(len(counts))),
        counts,
        np.full(len(counts), mean),
        np.zeros(len(counts)),
        np.full(len(counts), high),
        flat=3,
        samples=9,
    )


def test_stages_are_read_off_by_the_rule():
    counts = [0, 90, 80, 0, 11, 10, 0, 0, 0, 0, 50, 0, 0, 0, 0, 99]
    assert read_off(known(counts), 3, 16) == (1, 4, 10), "not 2, beside 1; not 5, inside the band; not 15, the last"
    assert read_off(known(counts), 2, 16) == (1, 10)
    assert read_off(known([10] * 16), 3, 16) == ()
    assert read_off(known([0, 20, 0, 20], layers=[3, 7, 11, 15]), 3, 16) == (7,)


# ---------------------------------------------------------------------------------------------------- shifts


def test_distances_by_hand():
    mass = np.array([[1.0, 0, 0, 0], [0, 3.0, 0, 0], [2.0, 2, 0, 0], [5, 5, 5, 5], [0, 0, 0, 0]])
    found = distances(mass)
    assert found[0, 1] == pytest.approx(1), "nothing in common is one bit"
    assert found[0, 2] == pytest.approx(1.5 - 0.75 * np.log2(3)), "(3/4, 1/4) against its halves"
    assert found[3, 4] == 0, "no attention at all is taken for an even one"
    assert (np.diag(found) == 0).all() and np.allclose(found, found.T)
    ranked = distances(np.array([[1.0, 2, 3, 4], [10, 20, 30, 99], [4, 3, 2, 1], [2, 1, 4, 3]]), "rank")
    assert ranked[0].tolist() == pytest.approx([0, 0, 1, 0.2])  # Spearman 1, 1, -1, 0.6


def test_gains_are_the_dispersion_between():
    rng = np.random.default_rng(4)
    points = rng.random((9, 3))
    squared = ((points[:, None] - points) ** 2).sum(axis=2)
    for at, gain in enumerate(split_gains(squared), 1):
        left, right = points[:at], points[at:]
        between = sum(len(side) * ((side.mean(axis=0) - points.mean(axis=0)) ** 2).sum() for side in (left, right))
        assert gain == pytest.approx(between)


def planted(boundaries, samples=12, depth=16, tokens=30, seed=5):
    """Attention that is random from layer to layer, around one distribution per segment of depth and sample."""
    rng = np.random.default_rng(seed)
    mass = rng.random((samples, depth, tokens))
    for start, stop in zip([0, *boundaries], [*boundaries, depth], strict=True):
        mass[:, start:stop] += 4 * (rng.random((samples, 1, tokens)) > 0.8)
    return np.stack([distances(each) for each in mass])


@pytest.mark.parametrize("boundaries", [(1,), (8,), (15,), (1, 10), (4, 9, 13)])
def test_planted_shifts_are_found_layer_0_included(boundaries):
    found = detect_shifts(planted(boundaries), range(16))
    assert sorted(shift.layer for shift in found.found) == list(boundaries)
    for shift in found.found:
        assert shift.confidence > 0.95 and shift.nearby >= shift.confidence and shift.p_value <= 0.05
    assert sum(shift.explained for shift in found.found) < 1
    gains = [shift.explained for shift in found.found]
    assert len(gains) < 3 or gains[0] >= max(gains[1:])
    for boundary in boundaries:
        assert found.steps[boundary - 1] > found.null_high
    quiet = np.delete(found.steps, [boundary - 1 for boundary in boundaries])
    assert (quiet < found.null_low).all()


def test_nothing_is_found_where_nothing_is():
    verdicts = []
    for seed in range(40):
        matrices = planted((), samples=6, depth=10, seed=100 + seed)
        verdicts.append(bool(detect_shifts(matrices, range(10), repeats=39, resamples=2).found))
    assert sum(verdicts) <= 6, "2 of 40 are to be expected at a level of 5 %; more than 6 are not (p = 0.003)"


def test_layers_without_attention_are_named_by_their_own_numbers():
    found = detect_shifts(planted((8,)), range(3, 67, 4))
    assert [shift.layer for shift in found.found] == [35]
