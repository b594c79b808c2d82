"""The schedule optimiser against slow truths: every schedule tried one by one, survivors followed token by token."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from adaptinfer.calibration.objective import FlopCost, KeptMass, TokenCost
from adaptinfer.calibration.optimise import frontier, optimise, published_shape, with_layers
from adaptinfer.calibration.programme import Programme, keep_grid
from adaptinfer.errors import InputError
from adaptinfer.schedule import ModelShape, Schedule, ScheduleError, Stage

SHAPE = ModelShape(5, 8, 2, 2, 4, 16)


def readings(seed: int, depth: int, sizes: list[int], agreement: float = 0.5):
    """Attention and scores of random samples; scores agree more or less with the attention."""
    rng = np.random.default_rng(seed)
    made = []
    for index, size in enumerate(sizes):
        mass = rng.random((depth, size)).astype(np.float32) ** 3
        score = (agreement * mass + (1 - agreement) * rng.random((depth, size))).astype(np.float32)
        made.append(
            SimpleNamespace(index=index, kind="", mass=mass, score=score, vision_tokens=size, text_tokens=7 + index)
        )
    return made


def kept_slowly(reading, schedule: Schedule, nested: bool = True) -> float:
    """Kept mass of one sample; not ``nested``: each stage chooses among all tokens."""
    tokens = list(range(reading.vision_tokens))
    alive, kept = tokens, 0.0
    keeps = dict(zip([stage.layer for stage in schedule.stages], schedule.keeps(len(tokens)), strict=True))
    for layer in range(schedule.num_layers):
        kept += sum(float(reading.mass[layer, token]) for token in alive)
        if layer in keeps:
            among = alive if nested else tokens
            ranked = sorted(among, key=lambda token: (-reading.score[layer, token], token))
            alive = sorted(ranked[: keeps[layer]])
    return kept / float(reading.mass.sum(dtype=np.float64))


def every_schedule(depth: int, tokens: int, stages: int):
    for layers in itertools.combinations(range(depth - 1), stages):
        for keeps in itertools.combinations(range(tokens - 1, -1, -1), stages):
            yield Schedule(tuple(map(Stage, layers, keeps)), depth, tokens)


def spent(schedule: Schedule, cost) -> int:
    given = schedule.tokens_per_layer()
    kept = dict(zip([stage.layer for stage in schedule.stages], schedule.keeps(), strict=True))
    return sum(cost.layer(count, kept.get(layer, count)) for layer, count in enumerate(given))


@given(st.integers(0, 10**6), st.lists(st.integers(3, 9), min_size=1, max_size=4), st.data())
def test_kept_mass_follows_every_token(seed, sizes, data):
    depth = 5
    made = readings(seed, depth, sizes)
    mass = KeptMass(made, range(depth))
    assert mass.vision_tokens == max(sorted(set(sizes)), key=sizes.count)
    layers = data.draw(st.sets(st.integers(0, depth - 2), max_size=3).map(sorted))
    keeps = sorted(
        data.draw(st.lists(st.integers(0, mass.vision_tokens), min_size=len(layers), max_size=len(layers))),
        reverse=True,
    )
    schedule = Schedule(tuple(map(Stage, layers, keeps)), depth, mass.vision_tokens)
    slow = [kept_slowly(reading, schedule) for reading in made]
    assert mass.of(schedule) == pytest.approx(slow, abs=1e-6)
    last = np.array([len(made) - 1])
    assert mass.some(last).of(schedule) == pytest.approx(slow[-1:], abs=1e-6)
    assert mass.cost(TokenCost(), layers, keeps) == spent(schedule, TokenCost())


def test_equal_scores_go_to_the_earlier_token():
    (reading,) = readings(0, 3, [4])
    reading.score = np.zeros((3, 4), dtype=np.float32)
    mass = KeptMass([reading], range(3))
    kept = float(reading.mass[0].sum() + reading.mass[1:, :2].sum()) / float(reading.mass.sum())
    assert mass.of(Schedule((Stage(0, 2),), 3, 4)) == pytest.approx(kept, abs=1e-6)


def test_keeping_all_or_nothing():
    mass = KeptMass(readings(1, 4, [6, 6]), range(4))
    assert mass.of(Schedule((), 4, 6)) == pytest.approx([1, 1])
    assert mass.of(Schedule((Stage(0, 0),), 4, 6)) == pytest.approx(mass.by_layer[:, 0])


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("cost", [TokenCost(), FlopCost(SHAPE, 7)], ids=["tokens", "flops"])
def test_the_programme_is_brute_force(stages, cost):
    depth, tokens = 5, 5
    for seed in range(4):
        made = readings(seed, depth, [tokens] * 3, agreement=0.3 * seed)
        mass = KeptMass(made, range(depth))
        ways = list(every_schedule(depth, tokens, stages))
        values = [np.mean([kept_slowly(reading, way, nested=False) for reading in made]) for way in ways]
        costs = [spent(way, cost) for way in ways]
        everything = mass.cost(cost, (), ())
        programme = Programme(mass, cost, int(0.7 * everything), stages)
        for share in (0.3, 0.45, 0.7):
            budget = int(share * everything)
            best = max((value for value, price in zip(values, costs, strict=True) if price <= budget), default=None)
            found = programme.best(stages, budget)
            if best is None:
                assert found is None
                continue
            assert found is not None and spent(found, cost) <= budget and len(found.stages) == stages
            value = np.mean([kept_slowly(reading, found, nested=False) for reading in made])
            # FLOPs are counted in 4096ths of the budget, rounded up; tokens are exact.
            assert value == pytest.approx(best, abs=1e-6 if isinstance(cost, TokenCost) else 0.02)


@pytest.mark.parametrize("seed", range(6))
def test_as_it_runs_it_is_close_to_the_best_there_is(seed):
    depth, tokens, stages = 5, 6, 2
    made = readings(seed, depth, [tokens] * 3, agreement=0.15 * seed)
    mass = KeptMass(made, range(depth))
    budget = int(0.5 * depth * tokens)
    ways = [way for number in (1, 2) for way in every_schedule(depth, tokens, number)]
    best = max(mass.of(way).mean() for way in ways if spent(way, TokenCost()) <= budget)
    choice, tried = optimise(mass, TokenCost(), budget, stages)
    assert spent(choice.schedule, TokenCost()) <= budget
    assert choice.kept_mass == pytest.approx(mass.of(choice.schedule).mean())
    assert 0.98 * best <= choice.kept_mass <= best + 1e-9
    assert set(tried) == {1, 2}
    # With one stage there is nothing that its tokens could have been chosen from but all: the programme is exact.
    alone = max(mass.of(way).mean() for way in every_schedule(depth, tokens, 1) if spent(way, TokenCost()) <= budget)
    assert tried[1].kept_mass == pytest.approx(alone, abs=1e-6)


def every_lone_stage(mass: KeptMass, cost, budget: int):
    """All schedules of one stage within a budget, whatever the keep."""
    for layer, keep in itertools.product(mass.possible, range(mass.vision_tokens)):
        if mass.cost(cost, (layer,), (keep,)) <= budget:
            yield Schedule((Stage(layer, keep),), mass.num_layers, mass.vision_tokens)


@settings(max_examples=12)
@given(
    st.integers(0, 10**6),
    st.sampled_from([0.12, 0.25, 0.33, 0.4, 0.7]),
    st.booleans(),
    st.sampled_from([40, 120, 256]),
    st.booleans(),
)
@example(0, 0.33, False, 256, True)
def test_never_worse_than_the_published_shape_nor_than_with_fewer_stages(seed, share, flops, tokens, alike):
    depth = 12
    made = readings(seed, depth, [tokens] * 4 + [tokens - 9], agreement=(seed % 7) / 6)
    for reading in made if alike else ():  # the same tokens matter everywhere, so early stages are the best
        reading.mass[:] = reading.mass[0]
        reading.score[:] = reading.mass
    mass = KeptMass(made, range(depth))
    cost = FlopCost(ModelShape(depth, 8, 2, 2, 4, 16), mass.text_tokens) if flops else TokenCost()
    budget = int(max(share, 0.45 * flops) * mass.cost(cost, (), ()))
    published = published_shape(mass, cost, budget)
    kept = []
    for stages in (1, 2, 3, 4, None):
        choice, tried = optimise(mass, cost, budget, stages)
        assert spent(choice.schedule, cost) <= budget
        assert choice.kept_mass == pytest.approx(mass.of(choice.schedule).mean())
        assert stages is None or len(choice.schedule.stages) <= stages
        assert list(tried) == list(range(1, (stages or 4) + 1))
        by_stages = [each.kept_mass for each in tried.values()]
        assert by_stages == sorted(by_stages)
        if published is not None:
            assert spent(published, cost) <= budget
            layers = [stage.layer for stage in published.stages]
            number = stages or len(layers)
            for some in itertools.combinations(layers, min(number, len(layers))):
                like = with_layers(mass, cost, budget, some)
                assert like is None or choice.kept_mass >= mass.of(like).mean() - 1e-9
            if number >= len(layers):
                assert choice.kept_mass >= mass.of(published).mean() - 1e-9
        kept += [choice.kept_mass] if stages else []
    assert kept == sorted(kept)
    (point,) = frontier(mass, cost, [budget], 3)
    assert spent(point.schedule, cost) <= budget and point.kept_mass >= kept[0] - 1e-9


@settings(max_examples=10)
@given(st.integers(0, 10**6), st.floats(0.2, 0.95), st.booleans(), st.sampled_from([30, 81, 150]))
def test_one_stage_is_brute_force_over_every_keep(seed, share, flops, tokens):
    depth = 6
    mass = KeptMass(readings(seed, depth, [tokens] * 3 + [tokens + 11], agreement=(seed % 7) / 6), range(depth))
    cost = FlopCost(ModelShape(depth, 8, 2, 2, 4, 16), mass.text_tokens) if flops else TokenCost()
    budget = int(max(share, 0.5 * flops) * mass.cost(cost, (), ()))
    best = max(mass.of(way).mean() for way in every_lone_stage(mass, cost, budget))
    assert optimise(mass, cost, budget, 1)[0].kept_mass == pytest.approx(best, abs=1e-9)


def test_two_stages_lie_close_to_a_search_of_all_pairs():
    depth, tokens = 8, 90
    mass = KeptMass(readings(3, depth, [tokens] * 8, agreement=0.4), range(depth))
    budget = int(0.33 * depth * tokens)
    best = 0.0
    for first, second in itertools.combinations(mass.possible, 2):
        for keep in range(1, tokens, 2):
            span = second - first
            left = budget - (first + 1) * tokens - span * keep
            later = min(keep - 1, left // (depth - 1 - second))
            if left >= 0 and later >= 0:
                best = max(best, mass.of(mass.schedule((first, second), (keep, later))).mean())
    choice, _ = optimise(mass, TokenCost(), budget, 2)
    assert choice.kept_mass >= best - 0.001


@pytest.mark.parametrize("extra", [0, 1, 1000, 10**5])
def test_a_budget_that_barely_can_be_met(extra):
    """The programme counts in rounded units, so it may find nothing where one stage that keeps nothing just fits."""
    mass = KeptMass(readings(2, 12, [256] * 2), range(12))
    cost = FlopCost(ModelShape(12, 256, 8, 4, 32, 704), mass.text_tokens)
    budget = mass.cost(cost, (0,), (0,)) + extra
    for stages in (1, 2, None):
        choice, _ = optimise(mass, cost, budget, stages)
        assert spent(choice.schedule, cost) <= budget and choice.schedule.stages[0].layer == 0
    (point,) = frontier(mass, cost, [budget], 3)
    assert spent(point.schedule, cost) <= budget


@pytest.mark.parametrize("stages", [0, -1, 2.5, True, "2"])
def test_a_number_of_stages_that_is_none(stages):
    mass = KeptMass(readings(2, 5, [9]), range(5))
    with pytest.raises(ScheduleError, match="stages: must be a whole number from 1 on"):
        optimise(mass, TokenCost(), 30, stages)


def test_the_published_shape_is_that_of_the_solver():
    mass = KeptMass(readings(0, 32, [576]), range(32))
    found = published_shape(mass, TokenCost(), 64 * 32)
    assert [(stage.layer, stage.keep) for stage in found.stages] == [(1, 79), (10, 16), (20, 2)]  # METHOD's 79/16/2
    at = with_layers(mass, TokenCost(), 64 * 32, (1, 15))
    assert [stage.layer for stage in at.stages] == [1, 15] and 0.99 * 64 < at.true_average() <= 64
    assert with_layers(mass, TokenCost(), 64 * 32, (5, 15)) is None, "too late for such a budget"


def test_stages_sit_where_they_can():
    mass = KeptMass(readings(3, 12, [40] * 3), range(3, 12, 4))
    assert mass.possible == (3, 7), "no layer follows the last"
    choice, _ = optimise(mass, TokenCost(), 240)
    assert {stage.layer for stage in choice.schedule.stages} <= {3, 7}


def test_the_data_choose_few_stages_if_few_are_enough():
    made = readings(5, 8, [30] * 6, agreement=1.0)
    for reading in made:
        reading.mass[1:] = reading.mass[1]  # the same tokens matter everywhere
        reading.score[:] = reading.mass[1]
    choice, tried = optimise(KeptMass(made, range(8)), TokenCost(), 8 * 10)
    assert len(choice.schedule.stages) == 1 and choice.schedule.stages[0].layer == 0
    assert choice.kept_mass >= 0.99 * max(each.kept_mass for each in tried.values())


def test_budgets_at_both_ends():
    mass = KeptMass(readings(6, 6, [20] * 2), range(6))
    choice, _ = optimise(mass, TokenCost(), 6 * 20)
    assert choice.schedule.stages == () and choice.kept_mass == pytest.approx(1)
    with pytest.raises(ScheduleError, match="no schedule meets 3 vision tokens a layer.*layer 0.*comes to 3.333"):
        optimise(mass, TokenCost(), 6 * 3)
    choice, _ = optimise(mass, TokenCost(), 20)
    assert choice.schedule.stages == (Stage(0, 0),)


def test_no_attention_at_all():
    (reading,) = readings(0, 4, [5])
    reading.mass[:] = 0
    with pytest.raises(InputError, match="no sample could be used"):
        KeptMass([reading], range(4))


def test_the_grid_of_keeps():
    assert keep_grid(64) == list(range(64))
    grid = keep_grid(2880)
    assert grid[0] == 0 and grid[-1] == 2879 and grid == sorted(set(grid)) and len(grid) <= 41


def test_readings_beyond_the_memory_are_thinned_evenly(monkeypatch):
    made = readings(0, 4, [10] * 40)
    monkeypatch.setattr("adaptinfer.calibration.objective._MEMORY", 16 * 4 * 10 * 12)
    mass = KeptMass(made, range(4))
    assert 8 <= len(mass) <= 16
    whole = [float(reading.mass[0].sum() / reading.mass.sum()) for reading in made]
    step = 40 // len(mass) if 40 % len(mass) == 0 else 4
    assert mass.by_layer[:, 0] == pytest.approx(whole[::step], abs=1e-6)
