"""Stages and keeps for a wanted true average."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from adaptinfer.schedule.budget import Budget
from adaptinfer.schedule.checks import ScheduleError, exact, positive, round_half_up, whole
from adaptinfer.schedule.presets import PUBLISHED_KEEPS, PUBLISHED_LAYERS
from adaptinfer.schedule.stages import Schedule, Stage, checked_layers

_MOST_BEFORE_FIRST_STAGE = Fraction(3, 4)  # of the budget; 71 % in the published schedule that spends most there


def solve(
    budget: Budget | float,
    num_layers: int,
    vision_tokens: int,
    layers: Sequence[int] | None = None,
    shape: Sequence[int | float] | None = None,
    possible: Sequence[int] | None = None,
    like: Schedule | None = None,
) -> Schedule:
    """A schedule whose true average is `budget`: vision tokens per layer, or a share of all of them if below 1.

    `layers` are the stages' layers. None takes the published depths, 1, 10 and 20 of 32, in proportion, and puts the
    first stage earlier as long as the layers up to it would take more than 3/4 of the budget. `shape` gives the
    proportions of the keeps, one per stage, never growing. None takes those of the published schedule with the nearest
    label (per 576 vision tokens). `possible` names the layers in which a stage can sit at all (a model with linear
    attention has others): the default layers then move to the nearest of these, the first one rather to an earlier.
    `like` is another published schedule, whose depths and proportions take the place of these defaults.

    Keeps are whole tokens near those proportions, and none exceeds `vision_tokens` (later stages then get more). The
    average comes out at most 1 % below the budget, else at most 1 % above it, else as near as whole tokens come: one
    token in a stage is one in every layer up to the next stage, so the error stays within half the longest such span,
    divided by num_layers (0.17 tokens on 32 layers). A stage that would drop nothing is left out.

    Raises ScheduleError("budget: ...") if the budget is above the token count, or below what the layers up to the first
    stage are given in any case.
    """
    num_layers = whole("num_layers", num_layers, least=1)
    vision_tokens = whole("vision_tokens", vision_tokens, least=1)
    average = (budget if isinstance(budget, Budget) else Budget(budget)).tokens(vision_tokens)
    if average == vision_tokens:
        return Schedule((), num_layers, vision_tokens)

    total = average * num_layers  # in token-layers, exact
    if like is not None:
        layers, shape = _solver_stages_like(like, num_layers, vision_tokens, total, possible)
    depths = _solver_layers(layers, num_layers, vision_tokens, total, possible)
    head = vision_tokens * (depths[0] + 1) if depths else vision_tokens * num_layers
    if head > total:
        where = f"layer {depths[0]}" if depths else f"the last layer, {num_layers - 1}"
        raise ScheduleError(
            f"budget: a true average of {float(average):.4g} vision tokens is out of reach: all {vision_tokens} pass "
            f"through {where}, which makes {head / num_layers:.4g} on {num_layers} layers even if none is kept after; "
            "take a larger budget" + (" or an earlier first stage" if depths and depths[0] > 0 else "")
        )
    proportions = _solver_shape(shape, depths, label=average / vision_tokens * 576)
    spans = [after - layer for layer, after in zip(depths, [*depths[1:], num_layers - 1], strict=True)]
    ideal = _ideal_keeps(total - head, spans, proportions, vision_tokens)
    keeps = _whole_keeps(ideal, spans, total - head, total / 100, vision_tokens)
    stages, entering = [], vision_tokens
    for layer, keep in zip(depths, keeps, strict=True):
        if keep < entering:
            stages.append(Stage(layer, keep))
        entering = keep
    return Schedule(tuple(stages), num_layers, vision_tokens)


def _solver_layers(
    layers: Sequence[int] | None, num_layers: int, vision_tokens: int, total: Fraction, possible: Sequence[int] | None
) -> list[int]:
    if layers is not None:
        if not isinstance(layers, Sequence) or isinstance(layers, str):
            raise ScheduleError(f"layers: must be a sequence of layer numbers, not {layers!r}")
        return checked_layers("layers[{}]", list(layers), num_layers)
    depths = [Fraction(depth, 32) for depth in PUBLISHED_LAYERS]
    return sorted(set(_layers_at(depths, num_layers, total / vision_tokens, possible)))


def _solver_stages_like(
    like: Schedule, num_layers: int, vision_tokens: int, total: Fraction, possible: Sequence[int] | None
) -> tuple[list[int], list[int]]:
    """Layers and proportions of another schedule's stages; of stages that fall into one layer the last one counts."""
    depths = [Fraction(stage.layer, like.num_layers) for stage in like.stages]
    layers = _layers_at(depths, num_layers, total / vision_tokens, possible)
    merged = dict(zip(layers, like.keeps(like.vision_tokens or 576), strict=bool(layers)))
    return list(merged), list(merged.values())


def _layers_at(
    depths: list[Fraction], num_layers: int, whole_layers: Fraction, possible: Sequence[int] | None
) -> list[int]:
    """Layers at relative depths, ascending. `whole_layers` is how many layers with all tokens the budget would pay."""
    allowed = [layer for layer in range(num_layers - 1) if possible is None or layer in possible]
    if not allowed or not depths:
        return []
    scaled = (round_half_up(depth * num_layers) for depth in depths)
    first, *later = [min(allowed, key=lambda layer: (abs(layer - depth), layer)) for depth in scaled]
    earliest_enough = math.floor(_MOST_BEFORE_FIRST_STAGE * whole_layers) - 1
    if first > earliest_enough:
        first = max((layer for layer in allowed if layer <= earliest_enough), default=allowed[0])
    return [first, *later]


def _solver_shape(shape: Sequence[int | float] | None, depths: list[int], label: Fraction) -> list[Fraction]:
    """One proportion per stage. A zero becomes next to nothing, so that it can grow once all others are full."""
    if shape is None:
        nearest = min(PUBLISHED_KEEPS, key=lambda nominal: abs(nominal - label))
        shape = PUBLISHED_KEEPS[nearest][: len(depths)]
    if len(shape) != len(depths):
        raise ScheduleError(f"shape: {len(depths)} stages (at layers {depths}) need as many numbers, not {len(shape)}")
    proportions: list[Fraction] = []
    for index, value in enumerate(shape):
        proportion = exact(positive(f"shape[{index}]", value, or_zero=index > 0))
        if proportions and proportion > proportions[-1]:
            raise ScheduleError(f"shape[{index}]: {value} is more than {shape[index - 1]}, and keeps never grow")
        proportions.append(proportion)
    return [max(value, proportions[0] / 10**9) for value in proportions]


def _ideal_keeps(room: Fraction, spans: list[int], proportions: list[Fraction], most: int) -> list[Fraction]:
    """Fractional keeps in the given proportions, cut at `most`, that fill `room` token-layers exactly."""
    for full in range(len(spans)):  # stages that are cut: the first ones, since proportions never grow
        left = room - most * sum(spans[:full])
        scale = left / sum(p * span for p, span in zip(proportions[full:], spans[full:], strict=True))
        if scale * proportions[full] <= most:
            return [Fraction(most)] * full + [scale * p for p in proportions[full:]]
    raise AssertionError("room is less than `most` in every layer, so some stage is not full")


def _whole_keeps(
    ideal: list[Fraction], spans: list[int], room: Fraction, tolerance: Fraction, most: int
) -> tuple[int, ...]:
    """Whole keeps around `ideal` that never grow: inside the tolerance those nearest to `ideal`, below before above.

    Looks at two values either side of each keep, and carries the nearest way to every total from stage to stage.
    """
    ways = {(0, most): (0.0, ())}  # (token-layers so far, last keep) -> (squared distance to ideal, keeps)
    for wanted, span in zip(ideal, spans, strict=True):
        floor, further = math.floor(wanted), {}
        for (total, last), (distance, keeps) in ways.items():
            for keep in range(max(0, floor - 1), min(last, floor + 2) + 1):
                state, way = (total + keep * span, keep), (distance + (keep - float(wanted)) ** 2, (*keeps, keep))
                further[state] = min(way, further.get(state, way))
        ways = further

    def rank(state: tuple[int, int]) -> tuple[float, float]:
        error, distance = state[0] - room, ways[state][0]
        if abs(error) <= tolerance:
            return (0 if error <= 0 else 1), distance
        return 2 + float(abs(error)), distance

    return ways[min(ways, key=rank)][1]
