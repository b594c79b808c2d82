"""Every batch of every task under every condition: the loop that one process, several, or Ray's actors run.

Batches are the unit of everything: fixed slices of a task's samples, so that whoever works on one, and in which order,
changes no answer. Within a batch vanilla comes first, because its next-token distribution is what others are held to.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptinfer.errors import AdaptInferError, InputError
from adaptinfer.evaluation.conditions import VANILLA, Condition
from adaptinfer.evaluation.journal import Block, Record
from adaptinfer.evaluation.metrics import METRICS
from adaptinfer.evaluation.tasks import Sample, SampleError, Task, load_task
from adaptinfer.resize import Resize

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from adaptinfer.checkpoints import Checkpoint, DType
    from adaptinfer.evaluation.journal import Journal
    from adaptinfer.evaluation.subject import Batch, Outcome
    from adaptinfer.pruners.base import Pruner

__all__ = ["Losses", "Plan", "Unit", "Worker", "run", "units", "weights_digest"]

_MOST_SKIPPED = 0.1  # of a task's samples; above, something is wrong with the task and not with a sample
_WHOLE_FILE = 64 * 2**20  # bytes; of larger weight files only name and size are looked at


@dataclass(frozen=True)
class Plan:
    """A whole run, in plain values that travel to other processes.

    Attributes:
        model: ``"embedded"``, a folder or a hub id.
        tasks: as `load_task` takes them.
        conditions: in the order of tables; vanilla is first.
        samples: of each task; None for all.
        skip: samples of each task to leave out before these, since an earlier look has used them.
        batch: samples answered at once.
        device: of the model.
        dtype: likewise.
        trust_remote_code: run Python code that comes with the model.
    """

    model: str
    tasks: tuple[str, ...]
    conditions: tuple[Condition, ...]
    samples: int | None = None
    batch: int = 32
    device: str = "auto"
    dtype: DType = "auto"
    trust_remote_code: bool = False
    skip: int = 0

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """Its model, weights unread."""
        from adaptinfer.checkpoints import Checkpoint

        return Checkpoint(self.model, trust_remote_code=self.trust_remote_code, device=self.device, dtype=self.dtype)

    @cached_property
    def loaded_tasks(self) -> dict[str, Task]:
        """By name. Raises InputError if two have one name."""
        found = [load_task(spec) for spec in self.tasks]
        by_name = {task.name: task for task in found}
        if len(by_name) < len(found):
            raise InputError("task: two have the same name; evaluate them in runs of their own")
        return by_name

    @cached_property
    def loaded_samples(self) -> dict[str, Sequence[Sample]]:
        """Of each task, by its name."""
        count = None if self.samples is None else self.skip + self.samples
        return {name: task.samples(count)[self.skip :] for name, task in self.loaded_tasks.items()}

    def batch_of(self, task: str) -> int:
        """Samples in a batch of a task.

        Conversations are batched with holes in the mask, where shorter answers end; rotary positions with more than one
        axis count tokens and not what a mask leaves of them, so there each conversation is a batch of its own.
        """
        talks = any(len(sample.turns) > 1 for sample in self.loaded_samples[task])
        return 1 if talks and self.checkpoint.family.rotary is None else self.batch

    def config(self) -> dict[str, Any]:
        """Everything that decides the answers, for the header of the file and to compare with it."""
        import torch
        import transformers

        from adaptinfer import __version__

        return {
            "model": self.model,
            "weights": weights_digest(self.model),
            "dtype": self.checkpoint.dtype,
            "device": self.checkpoint.device.partition(":")[0],
            "tasks": {name: task.identity() for name, task in self.loaded_tasks.items()},
            "samples": self.samples,
            "skip": self.skip,
            "batch": self.batch,
            "conditions": [condition.identity() for condition in self.conditions],
            "adaptinfer": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclass(frozen=True)
class Unit:
    """One batch of one task, and the (condition, seed) pairs that are still to be answered."""

    task: str
    batch: int
    wanted: tuple[tuple[str, int], ...]


def units(plan: Plan, done: set[Block]) -> list[Unit]:
    """What is left to do, in order."""
    found = []
    for task, samples in plan.loaded_samples.items():
        for batch in range(math.ceil(len(samples) / plan.batch_of(task))):
            wanted = tuple(
                (condition.name, seed)
                for condition in plan.conditions
                for seed in range(condition.seeds)
                if (task, batch, condition.name, seed) not in done
            )
            if wanted:
                found.append(Unit(task, batch, wanted))
    return found


def run(plan: Plan, journal: Journal, todo: Sequence[Unit], done: Callable[[str, str], None]) -> Worker | None:
    """Answer all units in this process, each block on disk before the next begins.

    Args:
        plan: the run.
        journal: where answers go.
        todo: what is left of it.
        done: told of each block's task and condition.

    Returns:
        The worker with its loaded model; None if there was nothing to do.

    Raises:
        InputError: too many samples of a task cannot be used, or the disk is full.
    """
    if not todo:
        return None
    worker, losses = Worker(plan), Losses(plan, journal.records())
    for unit in todo:
        for block in worker.blocks(unit):
            journal.append(block)
            losses.add(block)
            done(unit.task, block[0]["condition"])
    return worker


class Losses:
    """Samples that cannot be used, counted task by task.

    Args:
        plan: the run.
        records: what is on disk already.

    Raises:
        InputError: more than a tenth of a task's samples is lost, here or in `add`.
    """

    def __init__(self, plan: Plan, records: Iterable[Record]) -> None:
        self._plan = plan
        self._lost: dict[str, dict[str, str]] = {}
        self.add(records)

    def add(self, records: Iterable[Record]) -> None:
        """Count what is lost among these."""
        for record in records:
            if "skipped" in record:
                self._lost.setdefault(record["task"], {})[record["sample"]] = record["skipped"]
        for task, lost in self._lost.items():
            total = len(self._plan.loaded_samples[task])
            if len(lost) > _MOST_SKIPPED * total:
                name, reason = next(iter(lost.items()))
                raise InputError(
                    f"task {task!r}: {len(lost)} of {total} samples cannot be used, which is too many to leave out; "
                    f"the first is {name!r}: {reason} (once they are mended, begin in another folder)"
                )


class _OutOfMemoryError(InputError):
    """Nothing that a method refuses, so it ends the run."""


class Worker:
    """A loaded model that answers units."""

    def __init__(self, plan: Plan) -> None:
        from adaptinfer.evaluation.subject import Subject

        self._plan, self._subject = plan, Subject(plan.checkpoint)

    def blocks(self, unit: Unit) -> Iterator[list[Record]]:
        """The records of each wanted condition and seed, in the order of the plan."""
        task, size = self._plan.loaded_tasks[unit.task], self._plan.batch_of(unit.task)
        everybody = self._plan.loaded_samples[unit.task]
        samples = everybody[unit.batch * size : (unit.batch + 1) * size]
        pictures, unusable = self._pictures(task, samples)
        usable = [sample for sample in samples if sample.id not in unusable]
        lost = [
            {**_place(unit, sample, turn), "skipped": unusable[sample.id]}
            for sample in samples
            if sample.id in unusable
            for turn in range(len(sample.turns))
        ]
        if not usable:
            yield from ([{**record, "condition": name, "seed": seed} for record in lost] for name, seed in unit.wanted)
            return
        plain = self._batch(usable, pictures)
        vanilla = self._answer(task, usable, plain, None)
        for condition in self._plan.conditions:
            for seed in range(condition.seeds):
                if (condition.name, seed) not in unit.wanted:
                    continue
                try:
                    outcome = vanilla
                    if condition.name != VANILLA:
                        batch, pruner = self._set_up(condition, seed, unit.batch, task, usable, pictures, plain)
                        outcome = self._answer(task, usable, batch, pruner)
                    records = list(self._records(unit, task, usable, outcome, vanilla))
                except _OutOfMemoryError:
                    raise
                except AdaptInferError as error:
                    records = [
                        {**_place(unit, sample, turn), "refused": str(error)}
                        for sample in usable
                        for turn in range(len(sample.turns))
                    ]
                yield [{**record, "condition": condition.name, "seed": seed} for record in [*records, *lost]]

    def first_prompt(self, task_name: str) -> Callable[[Condition], tuple[Batch, Pruner | Resize | None]]:
        """A function that gives the first usable sample of a task, alone, as a condition sees it.

        Raises:
            InputError: no sample can be used.
        """
        task = self._plan.loaded_tasks[task_name]
        for sample in self._plan.loaded_samples[task_name]:
            pictures, unusable = self._pictures(task, [sample])
            if not unusable:
                plain = self._batch([sample], pictures)
                return lambda condition: self._set_up(condition, 0, 0, task, [sample], pictures, plain)
        raise InputError(f"task {task_name!r}: no sample can be used")

    @property
    def model(self) -> Any:
        """The loaded model."""
        return self._subject.model

    def _set_up(
        self,
        condition: Condition,
        seed: int,
        number: int,
        task: Task,
        samples: Sequence[Sample],
        pictures: dict[str, list[Image.Image]],
        plain: Batch,
    ) -> tuple[Batch, Pruner | Resize | None]:
        """What a condition makes of a batch: its prompts, and what is around the call that answers them."""
        from adaptinfer.evaluation.controls import ORACLES, RESIZED, evidence_tokens

        if condition.refusal is not None:
            raise InputError(condition.refusal)
        if condition.view == RESIZED:
            assert condition.budget is not None
            resize = Resize(condition.budget)
            return self._batch(samples, pictures, resize), resize
        if condition.view is not None:
            return self._changed(condition, task, samples, pictures), None
        cells: list[list[int]] = [[] for _ in samples]
        if condition.pruner is not None and condition.pruner.name in ORACLES:
            for sample, found, count in zip(samples, cells, plain.vision_tokens, strict=True):
                asked = [cell for turn in sample.turns for cell in turn.evidence]
                found += evidence_tokens(asked, task.grid, len(pictures[sample.id]), count)
        return plain, condition.pruner_for(seed, number, cells, plain.vision_tokens)

    def _answer(self, task: Task, samples: Sequence[Sample], batch: Batch, pruner: Pruner | Resize | None) -> Outcome:
        longest = max(len(sample.turns) for sample in samples)
        # A conversation that is over repeats its last question, so that the batch stays whole; nobody reads the answer.
        later = [
            [sample.turns[min(turn, len(sample.turns) - 1)].question for turn in range(1, longest)]
            for sample in samples
        ]
        import torch

        try:
            return self._subject.answer(batch, later, task.max_new_tokens, pruner)
        except torch.OutOfMemoryError as error:
            raise _OutOfMemoryError(
                f"--batch {self._plan.batch}: the memory of {self._plan.checkpoint.device} does not suffice; take a "
                "smaller batch, in another folder"
            ) from error

    def _pictures(self, task: Task, samples: Sequence[Sample]) -> tuple[dict[str, list[Image.Image]], dict[str, str]]:
        pictures, unusable = {}, {}
        for sample in samples:
            try:
                pictures[sample.id] = task.pictures(sample)
            except SampleError as error:
                unusable[sample.id] = str(error)
        return pictures, unusable

    def _batch(
        self, samples: Sequence[Sample], pictures: dict[str, list[Image.Image]], resize: Resize | None = None
    ) -> Batch:
        questions = [sample.turns[0].question for sample in samples]
        return self._subject.batch(questions, [pictures[sample.id] for sample in samples], resize)

    def _changed(
        self, condition: Condition, task: Task, samples: Sequence[Sample], pictures: dict[str, list[Image.Image]]
    ) -> Batch:
        """The batch with something done to its pictures."""
        from adaptinfer.evaluation.controls import VIEWS

        change, changed = VIEWS[condition.view or ""], {}
        for sample in samples:
            shown = self._others(task, sample) if condition.view == "wrong" else pictures[sample.id]
            number = int.from_bytes(hashlib.sha256(sample.id.encode()).digest()[:4], "big")
            changed[sample.id] = [change(picture, number + n) for n, picture in enumerate(shown)]
        return self._batch(samples, changed)

    def _others(self, task: Task, sample: Sample) -> list[Image.Image]:
        """The pictures of the next sample that has other ones."""
        everybody = self._plan.loaded_samples[task.name]
        start = next(n for n, each in enumerate(everybody) if each.id == sample.id)
        for step in range(1, len(everybody)):
            other = everybody[(start + step) % len(everybody)]
            if other.group != sample.group:
                try:
                    return task.pictures(other)
                except SampleError:
                    continue
        raise InputError("wrong: all samples of this task are about the same pictures")

    def _records(
        self, unit: Unit, task: Task, samples: Sequence[Sample], outcome: Outcome, vanilla: Outcome
    ) -> Iterator[Record]:
        tops, divergences = _compared(outcome.logits, vanilla.logits)
        score = METRICS[task.metric]
        for row, sample in enumerate(samples):
            for number, turn in enumerate(sample.turns):
                answer = outcome.answers[number][row]
                record = _place(unit, sample, number) | {
                    "answer": answer,
                    "references": list(turn.answers),
                    "score": score(answer, turn.answers),
                }
                if number == 0:  # later prompts hold the condition's own answers, so they are not the same prompt
                    record |= {"top1": tops[row], "kl": divergences[row]} | dataclasses.asdict(outcome.costs[row])
                yield record


def _place(unit: Unit, sample: Sample, turn: int) -> Record:
    return {
        "task": unit.task,
        "batch": unit.batch,
        "condition": "",
        "seed": 0,
        "sample": sample.id,
        "group": sample.group,
        "turn": turn,
        "kind": sample.turns[turn].kind,
    }


def _compared(logits: Tensor, vanilla: Tensor) -> tuple[list[bool], list[float]]:
    """Per sample: whether the likeliest next token is vanilla's, and KL(vanilla || this) in nats."""
    ours, theirs = logits.log_softmax(dim=-1), vanilla.log_softmax(dim=-1)
    divergence = (theirs.exp() * (theirs - ours)).sum(dim=-1)
    same = logits.argmax(dim=-1) == vanilla.argmax(dim=-1)
    return same.tolist(), [round(max(0.0, value), 6) for value in divergence.tolist()]


def weights_digest(model: str) -> str | None:
    """Of a checkpoint's files but its model card; None for one on the hub, whose name stands for it."""
    from adaptinfer.checkpoints import EMBEDDED
    from adaptinfer.embedded import path as embedded_path

    folder = embedded_path() if model == EMBEDDED else Path(model).expanduser()
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.is_file() and not file.name.startswith(".") and file.suffix != ".md":
            size = file.stat().st_size
            digest.update(f"{file.name}/{size}/".encode())
            if size <= _WHOLE_FILE:
                digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
