"""Calibration in one call: record what is missing, detect, optimise."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from adaptinfer.bench.environment import versions
from adaptinfer.calibration.detect import LEAST_LAYERS, histogram, read_off
from adaptinfer.calibration.objective import FlopCost, KeptMass, TokenCost
from adaptinfer.calibration.optimise import check_budget, check_stages, frontier, optimise, published_shape, with_layers
from adaptinfer.calibration.record import Reader, Reading, check_method, describe_method, fingerprint
from adaptinfer.calibration.result import Calibration, Candidate, FrontierPoint, interval
from adaptinfer.calibration.samples import Source
from adaptinfer.calibration.shifts import detect_shifts, distances
from adaptinfer.calibration.sources import ListSource, open_source
from adaptinfer.calibration.store import PART, Recording, about, check_skipped, digest_of, record_part
from adaptinfer.errors import InputError, check_whole
from adaptinfer.pruners.contracts import Pruner
from adaptinfer.schedule import Budget, ModelShape, Schedule, ScheduleError

_Way = tuple[str, tuple[int, ...], Schedule | None]  # name, layers that a detector found, schedule
_SHARES = (0.04, 0.06, 0.08, 0.11, 0.16, 0.22, 0.33, 0.5, 0.75)  # of the vision tokens, in the picture
_SCENES = 256  # by default: there are millions
_MOST_DETECTED = 3  # the published proportions of keeps are for so many stages


@dataclass(frozen=True)
class Target:
    """What a schedule may cost.

    Attributes:
        amount: vision tokens a layer is given on average, or below 1 a share of them; or a share of the FLOPs.
        flops: whether it is a share of the decoder's prefill FLOPs.

    Raises:
        ScheduleError: it is no positive number, or a share of FLOPs above 1.
    """

    amount: float
    flops: bool = False

    def __post_init__(self) -> None:
        Budget(self.amount)  # raises
        if self.flops and self.amount > 1:
            raise ScheduleError(f"budget: a share of the FLOPs lies between 0 and 1, not at {self.amount:g}")

    def described(self, mass: KeptMass) -> dict[str, Any]:
        """What was asked for, in JSON: tokens as well as their share, whichever was given."""
        if self.flops:
            return {"flops_share": self.amount}
        budget = Budget(self.amount)
        return {
            "true_average": float(budget.tokens(mass.vision_tokens)),
            "vision_tokens": mass.vision_tokens,
            "share": float(budget.share(mass.vision_tokens)),
        }

    def resolve(self, mass: KeptMass, shape: ModelShape) -> tuple[TokenCost | FlopCost, int]:
        """The cost of a layer, and how much of it all layers may come to.

        Raises:
            ScheduleError: more tokens than there are.
        """
        if self.flops:
            cost = FlopCost(shape, mass.text_tokens)
            return cost, int(self.amount * mass.cost(cost, (), ()))
        average = Budget(self.amount).tokens(mass.vision_tokens)
        return TokenCost(), int(float(average) * mass.num_layers + 1e-9)


def calibrate(
    model: Any,
    processor: Any,
    samples: Iterable[Any] | Source | str | Path,
    budget: float = 64,
    *,
    flops: bool = False,
    stages: int | None = None,
    count: int | None = None,
    method: Pruner | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Calibration:
    """Choose stages and keeps for a model from its own attention.

    Args:
        model: a loaded vision-language model without a pruner.
        processor: the one that belongs to it.
        samples: `Sample`, ``(image, question)`` or ``{"image": ..., "question": ...}`` each; a source; or what the
            command's ``--data`` takes, as text or path.
        budget: true average of vision tokens a layer is given, or below 1 a share of them.
        flops: ``budget`` is a share of the decoder's prefill FLOPs instead.
        stages: how many at most; None lets the data choose.
        count: samples to use; None for all, and 256 of the built-in scenes.
        method: whose scores choose tokens; None for AdaptInfer.
        folder: keeps the recording, so that a stopped run goes on and another budget needs no new one.
        seed: of resampling, and of which scenes.
        progress: told in a few words what is going on.

    Raises:
        InputError: too many samples that cannot be used, or a folder with a recording of something else.
        ScheduleError: a budget that no schedule meets, or less than one stage.
        UnsupportedError: pruning does not fit the model, or the method has no score to record.
    """
    wanted = Target(budget, flops)
    check_stages(stages)
    check_whole("seed", seed, 0)
    if count is not None:
        check_whole("count", count)
    method = method or _default_method()
    check_method(method)
    source: Source
    if isinstance(samples, (str, Path)):
        samples = str(samples)
        source = open_source(samples, seed)
        count = count or (_SCENES if samples.partition(":")[0] == "scenes" else None)
    else:
        source = samples if hasattr(samples, "identity") else ListSource(samples)  # pyright: ignore
    count = min(count or len(source), len(source))
    with ExitStack() as stack:
        reader = stack.enter_context(Reader(model, processor, method))
        content = content_of(reader, getattr(model.config, "name_or_path", "") or type(model).__name__, source)
        home = Path(folder) / "recording" if folder else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        recording = Recording(home, content)
        if recording.missing(count):
            check_reach(reader, source, count, wanted)
        record(reader, source, recording, count, progress)
        return analyse(recording, count, wanted, reader.shape, stages=stages, seed=seed, progress=progress)


def content_of(reader: Reader, name: str, source: Source) -> dict[str, Any]:
    """What a recording by this reader from this source is of."""
    model = {
        "name": name,
        "dtype": str(reader.model.dtype).removeprefix("torch."),
        "fingerprint": fingerprint(reader.model),
    }
    return about(reader, model, describe_method(reader.method), source.identity)


def check_reach(reader: Reader, source: Source, count: int, budget: Target) -> None:
    """Refuse a budget that is out of reach for each of the first samples, by the lengths of their prompts alone.

    Raises:
        ScheduleError: no schedule meets it.
    """
    refusal: ScheduleError | None = None
    for index in range(min(PART, count)):
        try:
            vision, text = reader.tokens(source[index])
        except InputError:
            continue  # is named when it is read
        if not vision:
            continue
        flat = np.ones((reader.shape.num_layers, vision), dtype=np.float32)
        mass = KeptMass([Reading(index, "", "", flat, flat, text)], reader.scoring)
        try:
            check_budget(mass, *budget.resolve(mass, reader.shape))
        except ScheduleError as error:
            refusal = refusal or error
        else:
            return
    if refusal is not None:
        raise refusal


def record(
    reader: Reader,
    source: Source,
    recording: Recording,
    count: int,
    progress: Callable[[str], None],
    share: tuple[int, int] = (0, 1),
) -> None:
    """Record the parts that are missing, and those with samples that could not be used and now can.

    Args:
        reader: of the model.
        source: of samples.
        recording: where to.
        count: samples.
        progress: told which sample is read.
        share: (i, n) takes every n-th part, from the i-th on.

    Raises:
        InputError: too many samples cannot be used, the disk is full, or the pictures have changed.
    """
    recording.check_pictures(source, count)
    skipped, digest = [], digest_of(recording.about)
    # The first process sees to skipped samples in all parts: it is the one that waits for the others and goes on.
    repaired = [
        part for part in recording.with_skips(count) if share[0] == 0 and _repaired(reader, source, recording, part)
    ]
    for part in [*repaired, *recording.missing(count)]:
        if part in repaired or part.start // PART % share[1] == share[0]:
            recording.write(
                part,
                record_part(
                    reader, source, part, digest, lambda index: progress(f"reading sample {index + 1} of {count}")
                ),
            )
            skipped += recording.skipped_in(part)
            check_skipped(skipped, count)


def _repaired(reader: Reader, source: Source, recording: Recording, part: range) -> bool:
    """Whether a sample that could not be used now can, or cannot for another reason."""
    for each in recording.skipped_in(part):
        try:
            reader.read(each.index, source[each.index])
        except InputError as error:
            if str(error) == each.reason:
                continue
        return True
    return False


def analyse(
    recording: Recording,
    count: int,
    budget: Target,
    shape: ModelShape,
    *,
    stages: int | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Calibration:
    """Detect shifts and choose a schedule from a recording that is there.

    Args:
        recording: of the first ``count`` samples.
        count: samples.
        budget: of the schedule.
        shape: of the model's decoder.
        stages: as in `calibrate`.
        seed: of resampling.
        progress: told in a few words what is going on.

    Raises:
        InputError: too many samples could not be used, or the model is too shallow.
        ScheduleError: a budget that no schedule meets.
    """
    check_stages(stages)
    skipped = recording.skipped(count)
    check_skipped(skipped, count)
    layers = recording.about["model"]["scoring"]
    if len(layers) < LEAST_LAYERS:
        raise InputError(f"a change point needs {LEAST_LAYERS} layers with attention, the model has {len(layers)}")
    mass = KeptMass(recording.readings(count), layers)
    cost, total = budget.resolve(mass, shape)
    check_budget(mass, cost, total)
    progress("detecting shifts")
    published_detector = histogram(recording.readings(count), layers, seed=seed)
    found = {}
    for kind in ("js", "rank"):
        matrices = np.stack([distances(reading.mass[layers], kind) for reading in recording.readings(count)])
        found[kind] = detect_shifts(matrices, layers, seed=seed)
    progress("optimising the schedule")
    choice, tried = optimise(mass, cost, total, stages)

    most = min(stages or _MOST_DETECTED, _MOST_DETECTED)
    shifted = [shift.layer for shift in found["js"].found[:most] if shift.layer < mass.num_layers - 1]
    detected = {
        "published detector": read_off(published_detector, most, mass.num_layers),
        "attention shifts": tuple(sorted(shifted)),
    }
    ways: list[_Way] = [("published shape", (), published_shape(mass, cost, total))]
    for name, at in detected.items():
        ways.append((name, at, with_layers(mass, cost, total, at) if at else None))
    ways.append(("optimised", (), choice.schedule))
    progress("kept mass against budget")
    low, high = np.quantile(mass.by_layer, (0.1, 0.9), axis=0)
    provenance = {
        "model": recording.about["model"],
        "method": recording.about["method"],
        "data": recording.about["data"],
        "samples": len(mass),
        "skipped": len(skipped),
        "budget": budget.described(mass),
        "stages": stages,
        "kept_mass": choice.kept_mass,
        "versions": versions(),
    }
    return Calibration(
        schedule=choice.schedule,
        candidates=tuple(_candidates(mass, ways, seed)),
        by_stages={number: each.kept_mass for number, each in tried.items()},
        mass_by_layer=np.stack([low, mass.by_layer.mean(axis=0), high]),
        histogram=published_detector,
        shifts=found["js"],
        rank_shifts=found["rank"],
        frontier=tuple(_frontier(mass, stages or _MOST_DETECTED)),
        provenance=provenance,
        skipped=tuple(each.reason for each in skipped),
    )


def _candidates(mass: KeptMass, ways: Sequence[_Way], seed: int) -> Iterator[Candidate]:
    """How each did; gains are over the first, the published shape."""
    kept = {name: mass.of(schedule) for name, _, schedule in ways if schedule is not None}
    published = kept.get(ways[0][0])
    for name, layers, schedule in ways:
        if name not in kept:
            yield Candidate(name, None, layers)
            continue
        judged = Candidate(name, schedule, layers, float(kept[name].mean()), *interval(kept[name], seed))
        if published is not None:
            gain = kept[name] - published
            low, high = interval(gain, seed)
            judged = replace(judged, gain=float(gain.mean()), gain_low=low, gain_high=high)
        yield judged


def _frontier(mass: KeptMass, stages: int) -> Iterator[FrontierPoint]:
    """Points at true averages that the model can meet."""
    cost = TokenCost()
    averages = [share * mass.vision_tokens for share in _SHARES]
    budgets = [int(average * mass.num_layers) for average in averages]
    least = mass.cost(cost, mass.possible[:1], [0])
    budgets = [budget for budget in budgets if budget >= least]
    for budget, best in zip(budgets, frontier(mass, cost, budgets, stages), strict=True):
        published = published_shape(mass, cost, budget)
        kept = None if published is None else float(mass.of(published).mean())
        yield FrontierPoint(budget / mass.num_layers, kept, best.kept_mass)


def _default_method() -> Pruner:
    from adaptinfer.pruners import AdaptInfer

    return AdaptInfer(budget=0.5)  # of which only the score is used
