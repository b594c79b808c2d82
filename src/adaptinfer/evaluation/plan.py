"""A run as plain values: model, tasks, conditions, and what of it is still to be answered."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers

from adaptinfer.checkpoints import EMBEDDED, Checkpoint, DType
from adaptinfer.embedded import path as embedded_path
from adaptinfer.errors import InputError
from adaptinfer.evaluation.conditions import Condition
from adaptinfer.evaluation.journal import Block
from adaptinfer.evaluation.samples import Task, TaskSample
from adaptinfer.evaluation.tasks import load_task
from adaptinfer.version import __version__

_WHOLE_FILE = 64 * 2**20  # bytes; of larger weight files only name and size are looked at


@dataclass(frozen=True)
class EvaluationPlan:
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
    def loaded_samples(self) -> dict[str, Sequence[TaskSample]]:
        """Of each task, by its name."""
        count = None if self.samples is None else self.skip + self.samples
        return {name: task.samples(count)[self.skip :] for name, task in self.loaded_tasks.items()}

    def batch_of(self, task: str) -> int:
        """Samples in a batch of a task.

        Conversations are batched with holes in the mask, where shorter answers end; rotary positions with more than one
        axis count tokens and not what a mask leaves of them, so there each conversation is a batch alone.
        """
        talks = any(len(sample.turns) > 1 for sample in self.loaded_samples[task])
        return 1 if talks and self.checkpoint.family.rotary is None else self.batch

    def config(self) -> dict[str, Any]:
        """Everything that decides the answers, for the header of the file and to compare with it."""
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


def units(plan: EvaluationPlan, done: set[Block]) -> list[Unit]:
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


def weights_digest(model: str) -> str | None:
    """Of a checkpoint's files but its model card; None for one on the hub, whose name stands for it."""
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
