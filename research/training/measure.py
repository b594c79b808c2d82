"""The evaluations that the model card tells of: tasks and conditions for `adaptinfer.evaluation`, and JSON of each.

Scenes of validation and test, hard ones, conversations and pairs; pictures that are blank, shuffled or another scene's;
pruning at true averages by question type, beside what a perfect choice of tokens would reach.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from transformers.utils.logging import disable_progress_bar

from adaptinfer import AdaptInfer
from adaptinfer.bench.environment import environment
from adaptinfer.checkpoints import EMBEDDED
from adaptinfer.evaluation.conditions import Condition, conditions
from adaptinfer.evaluation.journal import Journal
from adaptinfer.evaluation.plan import EvaluationPlan, units, weights_digest
from adaptinfer.evaluation.runner import run
from adaptinfer.evaluation.summary import finite, summarise
from adaptinfer.pruners import DivPrune

RESULTS = Path(__file__).parent.parent / "results" / "embedded"
FEW = 0.11
"""A true share of the vision tokens at which scenes must tell methods apart (see the model card)."""
TOKENS = (128, 64, 32, 16)
"""True averages of vision tokens a layer."""
AFTER = "divprune >> adaptinfer"


@dataclass(frozen=True)
class Run:
    """One evaluation: its tasks, its conditions, and samples of each task."""

    tasks: tuple[str, ...]
    conditions: tuple[Condition, ...]
    samples: int


def _sanity() -> list[Condition]:
    return [each for each in conditions([], [], seeds=1) if each.budget is None]


def _pruned() -> list[Condition]:
    """Every method at every budget. Where AdaptInfer alone cannot meet one, DivPrune selects before it."""
    found = conditions(["adaptinfer", "random", "stride", "random-before", "stride-before"], TOKENS, seeds=1)
    found = [each for each in found if each.series not in ("evidence", "blank", "shuffled", "wrong")]
    least = min(TOKENS)
    after = DivPrune(budget=2 * least) >> AdaptInfer(budget=least)
    return [*found, Condition(f"{AFTER} {least}", AFTER, least, after)]


def _few() -> list[Condition]:
    found = conditions(["adaptinfer", "evidence-before", "random-before"], [FEW], seeds=1)
    return [each for each in found if each.budget is not None or each.series == "vanilla"]


RUNS: dict[str, Run] = {
    name: Run(tasks, tuple(found), samples)
    for name, tasks, found, samples in (
        ("validation", tuple(f"world{form}:validation" for form in ("", "-hard")), _sanity()[:1], 2000),
        ("validation-more", tuple(f"world{form}:validation" for form in ("-turns", "-pair")), _sanity()[:1], 500),
        ("test", ("world", "world-hard"), _sanity(), 2000),
        ("test-more", ("world-turns", "world-pair"), _sanity(), 500),
        ("pruned", ("world",), _pruned(), 1000),
        ("few", ("world", "world-hard"), _few(), 1000),
    )
}


def measure(names: Sequence[str], samples: int | None, results: Path, work: Path, device: str) -> None:
    """Answer what is not on disk yet under ``work``, and write one JSON file a run.

    Args:
        names: of :data:`RUNS`.
        samples: of each task, in place of a run's own.
        results: folder of the JSON files.
        work: folder of the answers; a run that was stopped goes on there.
        device: as `adaptinfer eval` takes it.
    """
    disable_progress_bar()  # of reading weights
    for name in names:
        here = RUNS[name]
        plan = EvaluationPlan(EMBEDDED, here.tasks, here.conditions, samples or here.samples, 32, device)
        journal = Journal(work / name, plan.config())
        todo = units(plan, journal.open())
        with Progress(console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task(name, total=sum(len(unit.wanted) for unit in todo))
            run(plan, journal, todo, lambda task, condition, bar=bar, p=progress: p.advance(bar))
        tasks = summarise(plan, journal.records())
        for task in tasks:
            task.pop("pairs")
        document: dict[str, Any] = {
            "command": f"research/training/train.py measure --only {name}"
            + (f" --samples {samples}" if samples else ""),
            "environment": environment(),
            "weights": weights_digest(EMBEDDED),
            "dtype": plan.checkpoint.dtype,
            "tasks": finite(tasks),
        }
        results.mkdir(parents=True, exist_ok=True)
        target = results / f"{name}.json"
        target.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        told = ", ".join(f"{task['answers']} answers to {task['name']}" for task in tasks)
        print(f"{name}: {told}; written to {target}")
