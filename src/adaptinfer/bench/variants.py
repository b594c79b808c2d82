"""What is compared in one run: vanilla, an attached pruner that keeps everything, and pruned ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from adaptinfer.errors import InputError, UnsupportedError
from adaptinfer.schedule import Schedule, ScheduleError, preset

if TYPE_CHECKING:
    from adaptinfer.engine.families import Family
    from adaptinfer.pruners.contracts import Pruner


EarlyDrop = Literal["on", "off", "both"]

VANILLA, KEEP_ALL = "vanilla", "keep all"
_USUAL_SHARES = (1 / 3, 2 / 9, 1 / 9)  # 192, 128 and 64 of LLaVA-1.5's 576


@dataclass(frozen=True)
class Variant:
    """One way to run the same prompt.

    Attributes:
        name: in tables.
        pruner: what is attached; None for vanilla, where nothing is.
        early_drop: whether pruning layers skip the outputs of tokens that they drop.
        preset: name of the published schedule, if it is one.
        compiled: whether its decoder runs in CUDA graphs.
    """

    name: str
    pruner: Pruner | None = None
    early_drop: bool = True
    preset: str | None = None
    compiled: bool = False


def check_names(methods: Sequence[str], presets: Sequence[str]) -> None:
    """Refuse unknown methods and presets.

    Raises:
        PrunerError: there is no such method.
        ScheduleError: there is no such preset.
    """
    from adaptinfer.pruners.registry import find

    for method in methods:
        find(method)
    for name in presets:
        preset(name)


def variants(
    methods: Sequence[str],
    budgets: Sequence[float],
    presets: Sequence[str],
    early_drop: EarlyDrop,
    vision_tokens: int,
    num_layers: int,
    schedules: Sequence[tuple[str, Schedule]] = (),
    compiled: bool = False,
) -> list[Variant]:
    """Vanilla, keep-all, every method at every budget, the presets as the paper ran them, and schedules from files.

    Args:
        methods: names, or ``package.module:Class``.
        budgets: true averages in tokens, or below 1 as shares. None at all: a third, two ninths and a ninth of the
            vision tokens (192, 128 and 64 of 576), unless there are presets or schedules; those that layer 0 of a
            shallow model exceeds by itself are left out.
        presets: names in `PRESETS`; AdaptInfer with the published schedule and positions.
        early_drop: ``"both"`` measures every pruned variant also without early drop.
        vision_tokens: in the prompt.
        num_layers: of the decoder.
        schedules: by the names of their files; AdaptInfer with these stages.
        compiled: measure every attached variant also in CUDA graphs, except those that select before the model.

    Raises:
        PrunerError: a budget that is no positive number.
        InputError: two different variants have one name.
    """
    from adaptinfer.pruners import AdaptInfer
    from adaptinfer.pruners.registry import find

    if not budgets and not presets and not schedules:
        budgets = [max(1, round(share * vision_tokens)) for share in _USUAL_SHARES if share * num_layers > 1]
    pruned: list[tuple[str, Pruner, str | None]] = [
        (f"{method} {budget:g}", find(method)(budget=budget), None) for method in methods for budget in budgets
    ]
    for name in presets:
        model, _, label = name.partition("/")
        pruned.append((name, AdaptInfer.paper(label, model), name))
    pruned += [(name, AdaptInfer(schedule=schedule), None) for name, schedule in schedules]

    # A budget of all tokens is solved without a stage: hooks, masks and cache layers run, and nothing is dropped.
    found = [Variant(VANILLA), Variant(KEEP_ALL, AdaptInfer(budget=vision_tokens))]
    for name, pruner, published in pruned:
        if pruner.capabilities.acts_after:  # it needs the outputs of all tokens, so there is no early drop
            found.append(Variant(name, pruner, False, published))
            continue
        if early_drop in ("on", "both"):
            found.append(Variant(name, pruner, True, published))
        if early_drop in ("off", "both"):
            found.append(Variant(f"{name}, late", pruner, False, published))
    by_name: dict[str, Variant] = {}
    for variant in found:
        if by_name.setdefault(variant.name, variant) != variant:
            raise InputError(f"{variant.name!r} would be the name of two variants; rename the schedule's file")
    found = list(by_name.values())
    if not compiled:
        return found
    beside = [[variant, replace(variant, name=f"{variant.name}, compiled", compiled=True)] for variant in found[1:]]
    pairs = [pair[: 1 + (pair[0].pruner is None or not pair[0].pruner.capabilities.before)] for pair in beside]
    return [found[0], *(variant for pair in pairs for variant in pair)]


def check_variants(
    found: Sequence[Variant], family: Family, num_layers: int, vision_tokens: int
) -> dict[str, Schedule]:
    """The schedule of each variant by name; vanilla's has no stages.

    Raises:
        ScheduleError: a budget that cannot be met, or a schedule for a model of another depth; names the variant.
        UnsupportedError: a variant renumbers positions, and the model has none that can be renumbered.
    """
    schedules = {}
    for variant in found:
        if variant.pruner is not None and variant.pruner.positions == "compact" and family.rotary is None:
            raise UnsupportedError(
                f"variant {variant.name!r}: its positions are compact, and {family.model_type} supports 'keep' only"
            )
        try:
            if variant.pruner is None:
                schedule = Schedule((), num_layers, vision_tokens)
            else:
                layers = family.stage_layers(variant.pruner.capabilities.needs)
                schedule = variant.pruner.plan(num_layers, vision_tokens, layers)
            schedule.keeps(vision_tokens)
        except ScheduleError as error:
            raise ScheduleError(f"{error} (variant {variant.name!r})") from None
        schedules[variant.name] = schedule
    return schedules
