"""What the scripts here record beside their figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adaptinfer.bench.environment import environment
from adaptinfer.evaluation.plan import EvaluationPlan
from adaptinfer.pictures import Picture

RESULTS = Path("build/results")
"""Where results go unless told otherwise; ``--json research/results/NAME.json`` is for runs that are committed."""


def write(name: str, content: dict[str, Any], path: Path | None = None) -> Path:
    """Write results with their environment to ``build/results/NAME.json`` (or ``path``)."""
    target = path or RESULTS / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"environment": environment(), **content}, indent=2) + "\n", encoding="utf-8")
    return target


def first_vision_tokens(plan: EvaluationPlan) -> int:
    """Vision tokens in the first prompt of the plan's only task."""
    (task,) = plan.loaded_tasks.values()
    sample = plan.loaded_samples[task.name][0]
    shown = [Picture(sample.id, picture) for picture in task.pictures(sample)]
    return plan.checkpoint.prompt(shown, sample.turns[0].question).vision_tokens
