"""One run on Ray: actors hold the model and answer batches, this process writes them down."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from adaptinfer.errors import InputError
from adaptinfer.evaluation.journal import Journal
from adaptinfer.evaluation.plan import EvaluationPlan, Unit
from adaptinfer.evaluation.runner import Losses, Worker


class _Actor:
    """A loaded model on one of Ray's workers. Rows are units as JSON, one a call."""

    def __init__(self, plan: EvaluationPlan, threads: int, prepare: Callable[[], None]) -> None:
        prepare()
        torch.set_num_threads(threads)  # as many as the driver has: sums in another order would differ in the last bit
        self._worker = Worker(plan)

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        (text,) = rows["unit"]
        task, batch, wanted = json.loads(text)
        unit = Unit(task, batch, tuple((name, seed) for name, seed in wanted))
        return {"blocks": [json.dumps(list(self._worker.blocks(unit)))]}


def run_on_ray(
    plan: EvaluationPlan,
    journal: Journal,
    todo: Sequence[Unit],
    actors: int,
    done: Callable[[str, str], None],
    prepare: Callable[[], None],
) -> None:
    """Answer all units on Ray actors; blocks are written as batches come back, in whatever order.

    A lost actor is started again and its batch repeated. Each actor takes a GPU if the plan's device is one.

    Args:
        plan, journal, todo, done: as in `runner.run`.
        actors: how many hold the model.
        prepare: called first in each actor, such as to silence its log.

    Raises:
        InputError: Ray is not installed, too many samples cannot be used, or the disk is full.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
        import ray.data  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError("--ray: needs Ray; install the extra: pip install 'adaptinfer[ray]'") from None
    if not todo:
        return
    losses = Losses(plan, journal.records())
    started = not ray.is_initialized()
    if started:
        cpus = max(actors + 1, os.cpu_count() or 1)  # actors share cores if there are more of them than cores
        ray.init(log_to_driver=False, include_dashboard=False, logging_level="error", num_cpus=cpus)
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        rows = [{"unit": json.dumps([unit.task, unit.batch, unit.wanted])} for unit in todo]
        answered = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Actor,
            fn_constructor_args=(plan, torch.get_num_threads(), prepare),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=1,
            num_gpus=1 if plan.checkpoint.device.startswith("cuda") else 0,
        )
        for row in answered.iter_rows():
            for block in json.loads(row["blocks"]):
                journal.append(block)
                losses.add(block)
                done(block[0]["task"], block[0]["condition"])
    finally:
        if started:
            ray.shutdown()
