"""What `search.py` searches: axes of text-guided pruning, candidates, and each as a pruner at a true budget."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from adaptinfer import AdaptInfer, Pruner, Schedule, ScheduleError, Stage, solve
from adaptinfer.pruners import METHODS, TextGuided
from adaptinfer.pruners.before import Selector
from adaptinfer.schedule import Budget

Setting = dict[str, Any]
"""A value for every axis."""

SHAPES: dict[str, dict[int, int] | None] = {
    "published": None,
    "one early": {1: 64},
    "one late": {8: 64},
    "two mild": {1: 128, 16: 64},
    "two steep": {1: 192, 16: 16},
    "two late": {4: 128, 16: 32},
    "three mild": {1: 192, 10: 96, 20: 48},
    "three early": {0: 192, 4: 64, 12: 16},
    "three late": {4: 128, 14: 48, 24: 16},
    "four": {1: 256, 6: 96, 12: 32, 20: 8},
}
"""Layers of 32 and keeps of 576 whose depths and proportions a budget stretches; None is AdaptInfer's own."""

AXES: dict[str, tuple[Any, ...]] = {
    "words": ("soft", "uniform", "last", "max", "union"),
    "heads": (1.0, 0.75, 0.5, 0.25),
    "normalised": (False, True),
    "rotary": (True, False),
    "coverage": (0.0, 0.1, 0.25, 0.5),
    "covers": ("hidden", "keys", "even"),
    "before": (None, "divprune", "coverage", "fastervlm", "cdpruner"),
    "room": (2.0, 1.25, 1.5, 3.0),
    "shape": tuple(SHAPES),
}
"""The first value of each is AdaptInfer's. ``room`` is what a selection before the model lets in, over the budget."""

PLAIN: Setting = {axis: values[0] for axis, values in AXES.items()}
OURS: Setting = PLAIN | {"words": "max", "before": "cdpruner", "room": 1.25, "shape": "three mild"}
"""`AdaptInferPlus`."""

_TEXT_GUIDED = ("words", "heads", "normalised", "rotary", "coverage", "covers")
IDLE = {"covers": "coverage", "room": "before"}  # says nothing as long as the other one is off


def canonical(setting: Setting) -> Setting:
    """The same with axes that say nothing at their first value."""
    return {axis: PLAIN[axis] if IDLE.get(axis) and not setting[IDLE[axis]] else setting[axis] for axis in AXES}


def single_changes(start: Setting = PLAIN) -> list[Setting]:
    """A setting with one axis moved; an axis that needs another one on comes with that at its first value that is."""
    found = []
    for axis, values in AXES.items():
        needed, switched = IDLE.get(axis), {}
        if needed and not start[needed]:
            switched = {needed: AXES[needed][-1 if needed == "coverage" else 1]}
        found += [canonical(start | switched | {axis: value}) for value in values if value != start[axis]]
    return [setting for number, setting in enumerate(found) if setting not in found[:number]]


def candidates(count: int, seed: int, start: Setting = PLAIN) -> list[Setting]:
    """Single changes of a setting, it itself if it is not AdaptInfer, then ``count`` random combinations.

    All are different, and the same for the same seed. In a combination every axis is the start's half of the time: what
    is wrong in many places teaches little of each.
    """
    found, rng = single_changes(start), random.Random(seed)
    found += [start] if start != PLAIN and start not in found else []
    wanted = len(found) + count
    while len(found) < wanted:
        setting = {axis: rng.choice(rng.choice((values, (start[axis],)))) for axis, values in AXES.items()}
        setting = canonical(setting)
        if setting not in found and setting != PLAIN:
            found.append(setting)
    return found


def pruner_of(
    setting: Setting, budget: float, num_layers: int, vision_tokens: int, scoring: Sequence[int] | None = None
) -> Pruner:
    """A setting as a pruner whose true average is the budget.

    Args:
        setting: a value for every axis.
        budget: tokens, or below 1 a share.
        num_layers: of the model.
        vision_tokens: in a prompt.
        scoring: layers in which a stage may sit; None for all.

    Raises:
        ScheduleError: it cannot be met so.
    """
    average = float(Budget(budget).tokens(vision_tokens))
    options: dict[str, Any] = {axis: setting[axis] for axis in _TEXT_GUIDED}
    entering = vision_tokens
    if setting["before"]:
        entering = Budget(average).whole_tokens(vision_tokens, setting["room"]) if average >= 1 else 1
        if entering == vision_tokens:
            raise ScheduleError(f"budget: {setting['room']} times {average:.4g} is all the vision tokens there are")
    shape = SHAPES[setting["shape"]]
    like = None if shape is None else Schedule(tuple(Stage(*stage) for stage in shape.items()), 32, 576)
    # A budget below 1 would be a share.
    schedule = solve(average if average >= 1 else average / entering, num_layers, entering, possible=scoring, like=like)
    inside = TextGuided(schedule=schedule, **options)
    return _selector(setting["before"], entering) >> inside if setting["before"] else inside


def reference(budget: float, num_layers: int, vision_tokens: int, scoring: Sequence[int] | None) -> tuple[str, Pruner]:
    """AdaptInfer at a budget; where it cannot meet that alone, after DivPrune at twice the budget."""
    pruner = AdaptInfer(budget=budget)
    try:
        pruner.plan(num_layers, vision_tokens, scoring)
        return "adaptinfer", pruner
    except ScheduleError:
        after = _selector("divprune", 2 * budget) >> pruner
        after.plan(num_layers, vision_tokens, scoring)
        return "divprune >> adaptinfer", after


def _selector(name: str, budget: float) -> Selector:
    method = METHODS[name](budget=budget)
    assert isinstance(method, Selector)
    return method


def told(setting: Setting) -> str:
    """What differs from AdaptInfer."""
    changes = []
    for axis, value in setting.items():
        if value == PLAIN[axis]:
            continue
        changes.append({"normalised": "normalised", "rotary": "no rotary"}.get(axis, f"{axis} {value}"))
    if setting["before"]:
        changes = [text for text in changes if not text.startswith(("before", "room"))]
        changes.append(f"after {setting['before']} x{setting['room']:g}")
    return ", ".join(changes) or "adaptinfer"
