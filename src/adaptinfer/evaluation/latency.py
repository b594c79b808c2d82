"""Latency beside the answers: one prompt at a time, one condition after the other in rounds, nothing else running.

Answers come from batches, whose times would not compare. This takes a task's first prompt alone, batch 1, to put a time
on the report's axis; `adaptinfer bench` measures with more care.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from adaptinfer.ask import DECODED_TOKENS, timed
from adaptinfer.bench.timing import order_of_round, paired_ratios, summarise
from adaptinfer.errors import AdaptInferError
from adaptinfer.evaluation.conditions import VANILLA, Condition
from adaptinfer.evaluation.controls import RESIZED
from adaptinfer.evaluation.plan import EvaluationPlan
from adaptinfer.evaluation.runner import Worker

_WARM_UPS = 1


def measure(plan: EvaluationPlan, worker: Worker, rounds: int, progress: Callable[[str], None]) -> dict[str, Any]:
    """Time to first token and per token of every condition that changes what a prompt costs.

    Args:
        plan: whose conditions and first task.
        worker: with the model.
        rounds: in each, every condition runs once; vanilla's time in the same round is what a ratio is taken of.
        progress: called with what is going on.

    Returns:
        By condition, raw values and what they come to; conditions that refuse are left out.
    """
    task = next(iter(plan.loaded_tasks))
    prompt = worker.first_prompt(task)
    ready: list[Condition] = []
    for condition in plan.conditions:
        if condition.pruner is not None or condition.view == RESIZED or condition.name == VANILLA:
            try:
                _run(condition, prompt, worker, plan.checkpoint.device)
                ready.append(condition)
            except AdaptInferError:
                continue
    raw: dict[str, list[tuple[float, float]]] = {condition.name: [] for condition in ready}
    for number in range(-_WARM_UPS, rounds):
        progress(f"latency, {'warm-up' if number < 0 else f'round {number + 1} of {rounds}'}")
        for condition in order_of_round(ready, number):
            times = _run(condition, prompt, worker, plan.checkpoint.device)
            if number >= 0:
                raw[condition.name].append(times)
    first, step = ({name: [times[part] for times in runs] for name, runs in raw.items()} for part in range(2))
    return {
        "task": task,
        "rounds": rounds,
        "decoded_tokens": DECODED_TOKENS,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "cores": os.cpu_count(),
        "conditions": {
            name: {
                "ttft_ms": asdict(summarise(first[name])),
                "ttft_speed_up": asdict(summarise(paired_ratios(first[VANILLA], first[name]))),
                "decode_ms_per_token": asdict(summarise(step[name])),
                "raw": {"ttft_ms": first[name], "decode_ms_per_token": step[name]},
            }
            for name in raw
        },
    }


def _run(condition: Condition, prompt: Any, worker: Worker, device: str) -> tuple[float, float]:
    batch, pruner = prompt(condition)
    with pruner(worker.model) if pruner else nullcontext():
        return timed(worker.model, batch.inputs, device)
