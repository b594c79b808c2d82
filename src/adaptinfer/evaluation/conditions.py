"""What stands side by side in one run: vanilla, methods at true budgets, published schedules, controls, sanity rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from adaptinfer.checkpoints import Checkpoint
from adaptinfer.errors import AdaptInferError, InputError
from adaptinfer.evaluation.controls import ORACLES, RESIZED, VIEWS, Evidence
from adaptinfer.pruners import Random, registry
from adaptinfer.pruners.before import Selector, TwoPart
from adaptinfer.pruners.config import from_pretrained
from adaptinfer.pruners.contracts import Positions, Pruner, PrunerError
from adaptinfer.schedule import Schedule, ScheduleError

VANILLA = "vanilla"
_SEED_STRIDE = 10_007  # a prime, so that runs and batches share no seed


@dataclass(frozen=True)
class Condition:
    """One way to answer all questions.

    Attributes:
        name: in records and tables, unique.
        series: points of one series make a line in plots: a method, a control.
        budget: as it was asked for; methods of one budget are compared with each other.
        pruner: what is attached; None where nothing is pruned.
        view: what is done to the pictures, a name in `controls.VIEWS` or `RESIZED`; None leaves them alone.
        seeds: runs that are averaged; more than one where chance is involved.
        refusal: why the method cannot be set up at all; then nothing is run.
    """

    name: str
    series: str
    budget: float | None = None
    pruner: Pruner | None = None
    view: str | None = None
    seeds: int = 1
    refusal: str | None = None

    @property
    def is_control(self) -> bool:
        """A row that tells what the bench can show, and no method that anybody would use."""
        return self.view is not None or (self.pruner is not None and self.pruner.reference == "control")

    def pruner_for(self, seed: int, batch: int, cells: Sequence[Sequence[int]], counts: Sequence[int]) -> Pruner | None:
        """The pruner of one batch.

        Args:
            seed: which of the runs.
            batch: number of the batch: chance falls differently in each, or one unlucky pattern would decide.
            cells: per sample, the vision tokens that hold evidence.
            counts: per sample, all its vision tokens.
        """
        if self.pruner is None:
            return None
        changes: dict[str, Any] = {}
        if _has_seed(type(self.pruner)):
            changes["seed"] = _SEED_STRIDE * seed + batch
        if self.pruner.name in ORACLES:
            changes |= {"cells": tuple(map(tuple, cells)), "counts": tuple(counts)}
        return dataclasses.replace(self.pruner, **changes) if changes else self.pruner

    def identity(self) -> dict[str, Any]:
        """Plain values that tell this condition from any other."""
        settings = None if self.pruner is None else repr(self.pruner)  # a dataclass: its class and all fields
        plain = {"name": self.name, "view": self.view, "seeds": self.seeds, "budget": self.budget, "settings": settings}
        code = None if self.pruner is None else registry.code_digest(self.pruner)
        return plain if code is None else {**plain, "code": code}


def conditions(
    methods: Sequence[str],
    budgets: Sequence[float],
    positions: Sequence[str] = (),
    presets: Sequence[str] = (),
    schedules: Sequence[str] = (),
    saved: Sequence[Path] = (),
    seeds: int = 3,
    controls: bool = True,
) -> list[Condition]:
    """Vanilla, then every method at every budget, presets, schedules from files, saved pruners, and controls.

    Args:
        methods: names or addresses as `method_of` takes them; the first is the one that others are compared with.
        budgets: true averages in tokens, or below 1 as shares.
        positions: none leaves a method its own; several stand side by side, as an ablation.
        presets: ``[method:]model/label``, published schedules with their papers' positions.
        schedules: ``[method:]file``, stages and keeps as `Schedule.save` or ``adaptinfer calibrate`` writes them.
        saved: folders or files of `Pruner.save_pretrained`.
        seeds: runs of whatever has a seed.
        controls: add `random`, `evidence` and `resized` at every budget, and blank, shuffled and wrong pictures.

    Raises:
        InputError: an unknown method or way of positions, or two conditions of one name.
        PrunerError: a saved pruner or a budget that makes no sense.
        ScheduleError: an unknown preset, or a file that holds no schedule.
    """
    known = [(name, method_of(name)) for name in methods]
    for way in positions:
        if way not in get_args(Positions):
            raise InputError(f"positions: must be one of {', '.join(get_args(Positions))}, not {way!r}")
    for budget in budgets:
        Random(budget=budget)  # raises for what no method could take
    if controls and "random" not in methods:
        known.append(("random", Random))
    found = [Condition(VANILLA, VANILLA)]
    for name, method in known:
        for way in positions or [None]:
            # Which tokens stay is up to chance either way, so one row of `random` is enough.
            if name == "random" and way not in (None, *positions[:1]):
                continue
            label = way if len(positions) > 1 and name != "random" else None
            settings = {} if way is None else {"positions": way}
            found += [_condition(method, budget, settings, label, seeds) for budget in budgets]
    found += [Condition(name, name, None, published(name)) for name in presets]
    found += [_from_file(name, seeds) for name in schedules]
    for path in saved:
        pruner = from_pretrained(path)
        name = (path.parent if path.is_file() else path).resolve().name
        found.append(_row(name, name, pruner.budget, pruner, seeds))
    if controls:
        if Evidence.name not in methods:
            found += [_condition(Evidence, budget, {}, None, seeds) for budget in budgets]
        found += [Condition(f"{RESIZED} {budget:g}", RESIZED, budget, view=RESIZED) for budget in budgets]
        found += [Condition(view, view, view=view) for view in VIEWS]
    names = [each.name for each in found]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"condition {name!r}: would be run twice; leave one of them out")
    return found


def first_refusals(found: Sequence[Condition], checkpoint: Checkpoint, vision_tokens: int) -> dict[str, str]:
    """Conditions that cannot run on this model with such a prompt, and why; no weights are read.

    Raises:
        InputError: that is true of every method, so a run would have nothing to tell.
    """
    refusals = {}
    pruned = [each for each in found if each.pruner is not None or each.refusal]
    for each in pruned:
        try:
            if each.pruner is None:
                raise PrunerError(each.refusal or "")
            checkpoint.check(each.pruner)
            each.pruner.plan(checkpoint.num_layers, vision_tokens, checkpoint.family.scoring).keeps(vision_tokens)
        except AdaptInferError as error:
            refusals[each.name] = str(error)
    if pruned and len(refusals) == len(pruned):
        name, reason = next(iter(refusals.items()))
        raise ScheduleError(f"{reason} ({name}; none of the methods and budgets can run)")
    return refusals


def _condition(
    method: type[Pruner], budget: float, settings: dict[str, Any], label: str | None, seeds: int
) -> Condition:
    suffix = "" if label is None else f" {label}"
    series, name = f"{method.name}{suffix}", f"{method.name} {budget:g}{suffix}"
    try:
        pruner = method(budget=budget, **settings)
    except AdaptInferError as error:  # this method has no such setting, or not that budget
        return Condition(name, series, budget, refusal=str(error))
    return _row(name, series, budget, pruner, seeds)


def _row(name: str, series: str, budget: float | None, pruner: Pruner, seeds: int) -> Condition:
    """With several seeds only where chance is involved."""
    return Condition(name, series, budget, pruner, seeds=seeds if _has_seed(type(pruner)) else 1)


def method_of(name: str, asker: str = "method") -> type[Pruner]:
    """A method by its name (a control that knows the evidence, or one of the registry), or ``package.module:Class``.

    Raises:
        InputError: there is none of that name; begins with ``asker``.
        PrunerError: there is no such class.
    """
    there = [*registry.names(), *ORACLES]
    if name not in there and ":" not in name:
        raise InputError(
            f"{asker}: there is no method {name!r}; there are {', '.join(there)}, and package.module:Class"
        )
    return ORACLES.get(name) or registry.find(name)


def published(name: str) -> Pruner:
    """``[method:]model/label`` as its paper ran it; the default method is AdaptInfer.

    Raises:
        InputError: there is no such method.
        PrunerError, ScheduleError: it has no such published schedule.
    """
    method, _, schedule = name.rpartition(":")
    model, _, label = schedule.partition("/")
    return method_of(method or "adaptinfer", f"preset {name!r}").paper(label, model)


def _from_file(name: str, seeds: int) -> Condition:
    """``[method:]file``; the default method is AdaptInfer."""
    method, _, file = name.partition(":")
    if method not in registry.names():  # the colon, if there is one, is the file's
        method, file = "adaptinfer", name
    path = Path(file)
    pruner = registry.find(method)(schedule=Schedule.load(path))
    label = path.resolve().parent.name if path.stem == "schedule" else path.stem
    return _row(f"{method} {label}", f"{method} {label}", None, pruner, seeds)


def stage_of(method: type[Pruner] | None) -> str:
    """Where a method prunes: ``inside`` the language model, ``before`` it, or ``both``."""
    if method is None or not issubclass(method, (Selector, TwoPart)):
        return "inside"
    return "both" if issubclass(method, TwoPart) else "before"


def _has_seed(method: type[Pruner]) -> bool:
    return any(field.name == "seed" for field in dataclasses.fields(method))
