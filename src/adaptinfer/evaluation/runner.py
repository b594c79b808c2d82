"""Every batch of every task under every condition: the loop that one process, several, or Ray's actors run.

Batches are the unit of everything: fixed slices of a task's samples, so that whoever works on one, and in which order,
changes no answer. Within a batch vanilla comes first, because its next-token distribution is what others are held to.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from adaptinfer.errors import AdaptInferError, InputError
from adaptinfer.evaluation.answerer import Answerer, Outcome, PromptBatch
from adaptinfer.evaluation.conditions import VANILLA, Condition
from adaptinfer.evaluation.controls import ORACLES, RESIZED, VIEWS, evidence_tokens
from adaptinfer.evaluation.journal import Journal, Record
from adaptinfer.evaluation.metrics import METRICS
from adaptinfer.evaluation.plan import EvaluationPlan, Unit
from adaptinfer.evaluation.samples import SampleError, Task, TaskSample
from adaptinfer.pruners import Pruner
from adaptinfer.resize import Resize

_MOST_SKIPPED = 0.1  # of a task's samples; above, something is wrong with the task and not with a sample


def run(
    plan: EvaluationPlan, journal: Journal, todo: Sequence[Unit], done: Callable[[str, str], None]
) -> Worker | None:
    """Answer all units in this process, each block on disk before the next begins.

    Args:
        plan: the run.
        journal: where answers go.
        todo: what is left of it.
        done: called with each block's task and condition.

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

    def __init__(self, plan: EvaluationPlan, records: Iterable[Record]) -> None:
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
                    f"the first is {name!r}: {reason} (once they are repaired, begin in another folder)"
                )


class _OutOfMemoryError(InputError):
    """Nothing that a method refuses, so it ends the run."""


class Worker:
    """A loaded model that answers units."""

    def __init__(self, plan: EvaluationPlan) -> None:
        self._plan, self._answerer = plan, Answerer(plan.checkpoint)

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

    def first_prompt(self, task_name: str) -> Callable[[Condition], tuple[PromptBatch, Pruner | Resize | None]]:
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
        return self._answerer.model

    def _set_up(
        self,
        condition: Condition,
        seed: int,
        number: int,
        task: Task,
        samples: Sequence[TaskSample],
        pictures: dict[str, list[Image.Image]],
        plain: PromptBatch,
    ) -> tuple[PromptBatch, Pruner | Resize | None]:
        """What a condition makes of a batch: its prompts, and what is around the call that answers them."""
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

    def _answer(
        self, task: Task, samples: Sequence[TaskSample], batch: PromptBatch, pruner: Pruner | Resize | None
    ) -> Outcome:
        longest = max(len(sample.turns) for sample in samples)
        # A conversation that is over repeats its last question, so that the batch stays whole; that answer is not used.
        later = [
            [sample.turns[min(turn, len(sample.turns) - 1)].question for turn in range(1, longest)]
            for sample in samples
        ]
        try:
            return self._answerer.answer(batch, later, task.max_new_tokens, pruner)
        except torch.OutOfMemoryError as error:
            raise _OutOfMemoryError(
                f"--batch {self._plan.batch}: {self._plan.checkpoint.device} has too little memory; take a smaller "
                "batch, in another folder"
            ) from error

    def _pictures(
        self, task: Task, samples: Sequence[TaskSample]
    ) -> tuple[dict[str, list[Image.Image]], dict[str, str]]:
        pictures, unusable = {}, {}
        for sample in samples:
            try:
                pictures[sample.id] = task.pictures(sample)
            except SampleError as error:
                unusable[sample.id] = str(error)
        return pictures, unusable

    def _batch(
        self, samples: Sequence[TaskSample], pictures: dict[str, list[Image.Image]], resize: Resize | None = None
    ) -> PromptBatch:
        questions = [sample.turns[0].question for sample in samples]
        return self._answerer.batch(questions, [pictures[sample.id] for sample in samples], resize)

    def _changed(
        self, condition: Condition, task: Task, samples: Sequence[TaskSample], pictures: dict[str, list[Image.Image]]
    ) -> PromptBatch:
        """The batch with something done to its pictures."""
        change, changed = VIEWS[condition.view or ""], {}
        for sample in samples:
            shown = self._others(task, sample) if condition.view == "wrong" else pictures[sample.id]
            number = int.from_bytes(hashlib.sha256(sample.id.encode()).digest()[:4], "big")
            changed[sample.id] = [change(picture, number + n) for n, picture in enumerate(shown)]
        return self._batch(samples, changed)

    def _others(self, task: Task, sample: TaskSample) -> list[Image.Image]:
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
        self, unit: Unit, task: Task, samples: Sequence[TaskSample], outcome: Outcome, vanilla: Outcome
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


def _place(unit: Unit, sample: TaskSample, turn: int) -> Record:
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
