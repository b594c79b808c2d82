"""Which score chooses best, when every method has the same stages?

    python research/same_stages.py

A method's published stages, stretched to a small budget, decide much of its accuracy. Here all methods inside the model
keep equally many tokens after the same layers, in two ways: one cut after layer 0, and AdaptInfer+'s stages after its
selection before the model. Only the score differs. Answers are in OUTPUT/answers.jsonl; a stopped run goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from common import RESULTS, first_vision_tokens, write
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from adaptinfer import AdaptInferPlus, InputError, Pruner, Schedule, ScheduleError, solve
from adaptinfer.checkpoints import EMBEDDED
from adaptinfer.evaluation.conditions import VANILLA, Condition
from adaptinfer.evaluation.journal import Journal
from adaptinfer.evaluation.plan import EvaluationPlan, units
from adaptinfer.evaluation.runner import run
from adaptinfer.evaluation.summary import finite, summarise
from adaptinfer.pruners import METHODS, CDPruner, TextGuided
from adaptinfer.pruners.before import Selector, TwoPart
from adaptinfer.schedule import BEFORE

WAYS = ONE_CUT, AFTER = "one cut", "after CDPruner"
_SEEDS = 3


def scores() -> dict[str, Pruner]:
    """Every method inside the model, and the score of AdaptInfer+; budgets are placeholders."""
    inside = {name: method for name, method in METHODS.items() if not issubclass(method, (Selector, TwoPart))}
    del inside["textguided"]  # as it stands it is AdaptInfer
    found = {name: method(budget=1) for name, method in inside.items()}
    return {"adaptinfer+": TextGuided(budget=1, words="max"), **found}


def arranged(score: Pruner, way: str, budget: float, num_layers: int, vision_tokens: int) -> Pruner:
    """A method's score at the stages of one arrangement.

    Raises:
        ScheduleError: layer 0 alone exceeds the budget, or it is so large that nothing is selected before the model.
    """
    if way == ONE_CUT:
        return dataclasses.replace(
            score, budget=None, schedule=solve(budget, num_layers, vision_tokens, [0], shape=[1])
        )
    first, *rest = AdaptInferPlus(budget=budget).plan(num_layers, vision_tokens).stages
    if first.layer != BEFORE:
        raise ScheduleError(f"budget: {budget:g}: so many vision tokens that nothing is selected before")
    before, inside = (Schedule(tuple(stages), num_layers) for stages in ([first], rest))
    return CDPruner(schedule=before) >> dataclasses.replace(score, budget=None, schedule=inside)


def set_up(options: argparse.Namespace) -> EvaluationPlan:
    """The run that the command line asks for; no weights are read."""
    plan = EvaluationPlan(options.model, (options.task,), (), options.samples, options.batch, options.device)
    num_layers, vision_tokens = plan.checkpoint.num_layers, first_vision_tokens(plan)
    conditions = [Condition(VANILLA, VANILLA)]
    for budget in options.budgets:
        for way in WAYS:
            for name, score in scores().items():
                try:
                    pruner = arranged(score, way, budget, num_layers, vision_tokens)
                except ScheduleError:
                    continue
                seeds = _SEEDS if name == "random" else 1
                conditions.append(Condition(f"{name} {budget:g} {way}", name, budget, pruner, seeds=seeds))
    return dataclasses.replace(plan, conditions=tuple(conditions))


def table(entry: dict[str, Any], budgets: list[float]) -> Table:
    """Accuracy of every score, the best mean first."""
    title = f"{entry['name']}: right, % of {entry['answers']} answers (half of the 95 % interval)"
    found = Table(title=title, title_justify="left")
    found.add_column("")
    columns = [(budget, way) for budget in budgets for way in WAYS]
    rows = {row["name"]: row["accuracy"] for row in entry["conditions"]}
    there = [each for each in columns if any(name.endswith(f" {each[0]:g} {each[1]}") for name in rows)]
    for budget, way in there:
        found.add_column(f"{budget:g}\n{way}", justify="right")
    cells = {name: [rows.get(f"{name} {budget:g} {way}") for budget, way in there] for name in scores()}
    for name in sorted(cells, key=lambda name: -sum(cell["value"] for cell in cells[name] if cell)):
        found.add_row(name, *map(_points, cells[name]))
    found.add_section()
    found.add_row(VANILLA, _points(rows[VANILLA]))
    return found


def _points(accuracy: dict[str, float] | None) -> str:
    if accuracy is None:
        return ""
    return f"{100 * accuracy['value']:.1f} ({50 * (accuracy['high'] - accuracy['low']):.1f})"


def main() -> None:
    """Answer, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--task", default="world")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.33, 0.22, 0.11, 0.06], help="true averages")
    parser.add_argument("--samples", type=int, default=480)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="auto")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "same_stages")
    parser.add_argument("--json", type=Path, help="where to write all figures; default: build/results/same_stages.json")
    options = parser.parse_args()
    try:
        plan = set_up(options)
        journal = Journal(options.output, plan.config())
        journal.open()
    except InputError as error:
        parser.error(str(error))
    todo = units(plan, journal.done())
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("answers", total=sum(len(unit.wanted) for unit in todo))
        run(plan, journal, todo, lambda task, name: progress.advance(bar))
    (entry,) = summarise(plan, journal.records())
    Console(width=None if sys.stdout.isatty() else 200).print(table(finite(entry), options.budgets))
    arguments = {key: str(value) for key, value in vars(options).items()}
    content = finite({"arguments": arguments, "entry": {**entry, "pairs": []}})
    Console().print(f"written to {write('same_stages', content, options.json)}", soft_wrap=True)


if __name__ == "__main__":
    main()
