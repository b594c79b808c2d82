"""One run shared by several processes: each answers its share of batches into its own file.

They are those of ``accelerate launch``, which starts one a GPU, or of ``torchrun`` (accelerate itself starts several on
CPUs through MPI only).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptinfer.errors import InputError
from adaptinfer.evaluation.journal import Block, Journal
from adaptinfer.evaluation.plan import EvaluationPlan, Unit, units

_WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")


@dataclass(frozen=True)
class Processes:
    """This process among those of a run.

    Attributes:
        index: from 0; the first one reports.
        count: of processes.
        local: index on this machine.
        state: accelerate's, by which they wait for each other; None for a single process.
    """

    index: int = 0
    count: int = 1
    local: int = 0
    state: Any = None

    @classmethod
    def of_environment(cls, device: str) -> Processes:
        """As the launcher left it in the environment.

        Args:
            device: as it was asked for; ``"cpu"`` lets the processes talk without GPUs.

        Raises:
            InputError: there are several, and accelerate is not installed.
        """
        if all(os.environ.get(name, "1") == "1" for name in _WORLD_SIZES):
            return cls()
        try:
            from accelerate import PartialState
        except ImportError:
            raise InputError("several processes: needs accelerate (pip install accelerate)") from None
        import torch

        state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
        return cls(state.process_index, state.num_processes, state.local_process_index, state)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that reports."""
        return self.index == 0

    def device(self, name: str) -> str:
        """The device of this process: each takes its own GPU if there are any."""
        if self.count == 1 or name not in ("auto", "cuda"):
            return name
        import torch

        return f"cuda:{self.local}" if torch.cuda.is_available() else "cpu"

    def journal(self, folder: Path, plan: EvaluationPlan) -> tuple[Journal, set[Block]]:
        """This process's file of answers, opened, and the blocks that are done; the first one repairs what a kill left.

        The blocks are the same in every process, so that their shares are of one list: none appends before the last
        barrier, and files that others create meanwhile hold a header and no block. `Journal.done` would not do: a late
        process sees what faster ones have answered since.

        Raises:
            InputError: the folder cannot be written, is in use, or holds answers of another run.
        """
        journal = Journal(folder, plan.config(), None if self.is_main else self.index)
        done: set[Block] = set()
        if self.is_main:
            done = journal.open()
        self._wait()
        if not self.is_main:
            done = journal.open()
        self._wait()
        return journal, done

    def share(self, todo: Sequence[Unit]) -> list[Unit]:
        """Every ``count``-th unit."""
        return list(todo[self.index :: self.count])

    def finish(self, plan: EvaluationPlan, journal: Journal) -> bool:
        """Wait for the others and, in the first process, make one file of all; tells whether this is the first.

        Raises:
            InputError: that file cannot be written, or answers are missing in it.
        """
        self._wait()
        if self.is_main:
            journal.merge(list(plan.loaded_tasks), [condition.name for condition in plan.conditions])
            missing = sum(len(unit.wanted) for unit in units(plan, journal.done()))
            if missing:
                raise InputError(
                    f"folder {str(journal.folder)!r}: {missing} blocks of answers are missing, so there is no report "
                    "yet; run the same command again to have them answered"
                )
        return self.is_main

    def _wait(self) -> None:
        if self.state is not None:
            self.state.wait_for_everyone()
