"""Search for the text-guided configuration that keeps most accuracy at a true budget, on validation scenes.

    python research/search.py                               # the embedded model, validation scenes
    python research/search.py --candidates 12 --samples 64 128 256 -o build/results/small          # a first look

    python research/search.py --around research/results/search.json -o build/results/around      # on from there
    python research/search.py --around adaptinfer+ --candidates 0 --samples 640 -o build/results/ablation

Candidates (`search_space.py`) are AdaptInfer with one thing changed, for every value of every axis (an ablation by
itself), and random combinations; with `--around`, the same of what an earlier search found at each budget, or of
adaptinfer+. They run by successive halving: every rung takes a third of them to more samples.
All answers are in OUTPUT/answers.jsonl: a run that was stopped goes on, and one that is over prints its tables again.

Figures of the last table are of samples that no earlier rung has seen. The best of many is still flattered by having
been chosen: confirm it once, on test scenes, by the command that stands below the tables. Test scenes are refused here.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, first_vision_tokens, write
from rich.console import Console
from rich.progress import Progress
from search_space import AXES, OURS, PLAIN, Setting, candidates, canonical, pruner_of, reference
from search_tables import tables

from adaptinfer import AdaptInferPlus, InputError, ScheduleError
from adaptinfer.checkpoints import EMBEDDED
from adaptinfer.evaluation.conditions import VANILLA, Condition
from adaptinfer.evaluation.journal import Journal, Record
from adaptinfer.evaluation.plan import EvaluationPlan, units
from adaptinfer.evaluation.runner import run
from adaptinfer.evaluation.statistics import Resamples, verdict
from adaptinfer.evaluation.summary import finite, summarise
from adaptinfer.evaluation.world import FORMS
from adaptinfer.pruners import METHODS, Random

KEPT = 1 / 3  # of the candidates, from one rung to the next


@dataclasses.dataclass
class Search:
    """Conditions of one search, and what is on disk of it."""

    plan: EvaluationPlan
    journal: Journal
    settings: dict[str, Setting]  # by the name of the condition
    references: dict[float, str]  # names, by budget
    starts: dict[float, Setting]  # whose changes the candidates are, by budget
    unmet: dict[float, int]  # candidates that a budget rules out

    def condition(self, name: str) -> Condition:
        """By its name."""
        return next(condition for condition in self.plan.conditions if condition.name == name)

    def budget(self, name: str) -> float:
        """Of a condition that has one."""
        budget = self.condition(name).budget
        assert budget is not None
        return budget

    def start_name(self, budget: float) -> str:
        """Of the condition whose changes the candidates of a budget are: the reference, where that is AdaptInfer."""
        of = (n for n, setting in self.settings.items() if self.budget(n) == budget and setting == self.starts[budget])
        return next(of, self.references[budget])

    def answer(self, names: Iterable[str], batches: int) -> None:
        """Answer the first batches under these conditions, as far as that is not on disk."""
        wanted, todo = {VANILLA, *names}, []
        for unit in units(self.plan, self.journal.done()):
            pairs = tuple(pair for pair in unit.wanted if pair[0] in wanted)
            if unit.batch < batches and pairs:
                todo.append(dataclasses.replace(unit, wanted=pairs))
        with Progress(console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task(f"{batches} batches", total=sum(len(unit.wanted) for unit in todo))
            run(self.plan, self.journal, todo, lambda task, name: progress.advance(bar))

    def records(self, names: Iterable[str], first: int, last: int) -> list[Record]:
        """Answers of some conditions to batches first..last - 1."""
        wanted = {VANILLA, *names}
        return [r for r in self.journal.records() if r["condition"] in wanted and first <= r["batch"] < last]

    def best(self, names: Sequence[str], batches: int, count: int) -> list[str]:
        """The most accurate, best first; of equal ones whose next tokens are nearest to vanilla's, then the earlier."""
        scores: dict[str, list[float]] = defaultdict(list)
        apart: dict[str, list[float]] = defaultdict(list)
        for record in self.records(names, 0, batches):
            if "score" in record:
                scores[record["condition"]].append(record["score"])
                apart[record["condition"]].append(record.get("kl", 0.0))
        ran = [name for name in names if name in scores]
        return sorted(ran, key=lambda name: (-np.mean(scores[name]), np.mean(apart[name])))[:count]

    def halve(self, rungs: Sequence[int], finalists: int) -> dict[float, list[str]]:
        """Successive halving at each budget. Returns the finalists, best first."""
        left = {budget: [n for n in self.settings if self.budget(n) == budget] for budget in self.references}
        others = [c.name for c in self.plan.conditions if c.name not in self.settings and c.name != VANILLA]
        for number, batches in enumerate(rungs):
            self.answer([*others, *(name for names in left.values() for name in names)], batches)
            last = number == len(rungs) - 1
            left = {
                budget: self.best(names, batches, len(names) if last else max(finalists, math.ceil(KEPT * len(names))))
                for budget, names in left.items()
            }
        return {budget: names[:finalists] for budget, names in left.items()}

    def judged(self, finalists: dict[float, list[str]], first: int, last: int) -> dict[str, Any]:
        """The evaluation's summary of finalists, references and controls, on some batches."""
        names = [name for found in finalists.values() for name in found]
        chosen = [c for c in self.plan.conditions if c.name in names]
        others = [c for c in self.plan.conditions if c.name not in self.settings]
        plan = dataclasses.replace(self.plan, conditions=(*chosen, *others))  # "the earlier less the later one"
        (entry,) = summarise(plan, self.records([c.name for c in plan.conditions], first, last))
        return entry

    def changes(self, batches: int) -> dict[str, dict[str, Any]]:
        """Of each candidate of the first rung, its difference to the start of its budget."""
        names = [c.name for c in self.plan.conditions]
        place = {name: n for n, name in enumerate(names)}
        records = [r for r in self.records(names, 0, batches) if "score" in r]
        groups = {group: n for n, group in enumerate(dict.fromkeys(r["group"] for r in records))}
        sums, counts = np.zeros((len(groups), len(names))), np.zeros((len(groups), len(names)))
        for record in records:
            cell = groups[record["group"]], place[record["condition"]]
            sums[cell] += record["score"]
            counts[cell] += 1
        resamples = Resamples(sums, counts)
        found = {}
        for name in self.settings:
            difference = resamples.difference(place[name], place[self.start_name(self.budget(name))])
            if math.isfinite(difference.value):
                found[name] = dataclasses.asdict(difference) | {"verdict": verdict(difference)}
        return found


def set_up(options: argparse.Namespace) -> Search:
    """The search that the command line asks for; no weights are read."""
    plan = EvaluationPlan(options.model, (options.task,), (), max(options.samples), options.batch, options.device)
    vision_tokens = first_vision_tokens(plan)
    place = plan.checkpoint.num_layers, vision_tokens, plan.checkpoint.family.scoring
    starts = starting_points(options.around, options.budgets)
    settings, references, unmet, conditions = {}, {}, {}, [Condition(VANILLA, VANILLA)]
    for budget in options.budgets:
        series, pruner = reference(budget, *place)
        references[budget] = f"{series} {budget:g}"
        conditions.append(Condition(references[budget], series, budget, pruner))
        unmet[budget] = 0
        for number, setting in enumerate(candidates(options.candidates, options.seed, starts[budget])):
            try:
                pruner = pruner_of(setting, budget, *place)
            except ScheduleError:
                unmet[budget] += 1
                continue
            name = f"c{number} {budget:g}"
            settings[name] = setting
            conditions.append(Condition(name, f"c{number}", budget, pruner))
        for control in (Random(budget=budget), METHODS["random-before"](budget=budget)):
            conditions.append(Condition(f"{control.name} {budget:g}", control.name, budget, control, seeds=3))
    plan = dataclasses.replace(plan, conditions=tuple(conditions))
    return Search(plan, Journal(options.output, plan.config()), settings, references, starts, unmet)


def starting_points(around: Path | None, budgets: Sequence[float]) -> dict[float, Setting]:
    """The best setting that an earlier search found at each budget, or that of adaptinfer+; AdaptInfer's without one.

    Raises:
        InputError: the file is none of a search, or says nothing of a budget.
    """
    if around is None:
        return dict.fromkeys(budgets, PLAIN)
    if str(around) == AdaptInferPlus.name:
        return dict.fromkeys(budgets, OURS)
    try:
        found = json.loads(around.read_text())["finalists"]
        starts = {budget: canonical(PLAIN | found[f"{budget:g}"][0]["setting"]) for budget in budgets}
    except (OSError, ValueError, LookupError, TypeError) as error:
        budgets_told = ", ".join(f"{budget:g}" for budget in budgets)
        raise InputError(f"--around {around}: not figures of a search at {budgets_told} ({error})") from None
    unknown = {axis: value for start in starts.values() for axis, value in start.items() if value not in AXES[axis]}
    if unknown:
        raise InputError(f"--around {around}: axes or values that this search does not have: {unknown}")
    return starts


def main() -> None:
    """Search, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--task", default="world:validation", help="a file of one's own, or (the default) %(default)s")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.33, 0.22, 0.11, 0.06], help="true averages")
    parser.add_argument("--candidates", type=int, default=60, help="random combinations, beside single changes")
    parser.add_argument("--samples", type=int, nargs="+", default=[128, 384, 1536], help="of each rung, ascending")
    parser.add_argument(
        "--around", type=Path, metavar="JSON", help="figures of an earlier search, to go on from, or adaptinfer+"
    )
    parser.add_argument("--finalists", type=int, default=3, help="at each budget")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0, help="of the random combinations")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "search")
    parser.add_argument("--json", type=Path, help="where to write all figures; default: build/results/search.json")
    options = parser.parse_args()
    name, _, split = options.task.partition(":")
    if name in FORMS and split != "validation":
        parser.error(f"--task {options.task}: what is searched on can confirm nothing; take {name}:validation")
    rungs = [math.ceil(samples / options.batch) for samples in options.samples]
    if rungs != sorted(set(rungs)):
        parser.error("--samples: every rung needs at least one batch more than the one before")
    console = Console(width=None if sys.stdout.isatty() else 180)
    try:
        search = set_up(options)
        search.journal.open()
        finalists = search.halve(rungs, options.finalists)
    except InputError as error:
        parser.error(str(error))
    entry = search.judged(finalists, rungs[-2] if len(rungs) > 1 else 0, rungs[-1])
    changes = search.changes(rungs[0])
    for table in tables(search, finalists, entry, changes):
        console.print(table)
    winners = []
    for budget, reference_name in search.references.items():
        if search.unmet[budget]:
            console.print(
                f"{budget:g}: {search.unmet[budget]} candidates cannot meet it; held against {reference_name}"
            )
        if finalists[budget]:
            pruner = search.condition(finalists[budget][0]).pruner
            assert pruner is not None
            pruner.save_pretrained(options.output / f"best-{budget:g}")
            winners.append(f"--budget {budget:g} --pruner {options.output / f'best-{budget:g}'}")
    confirm = f"adaptinfer eval --task world --samples 2000 {' '.join(winners)} -o {options.output / 'confirmed'}"
    content = {
        "arguments": {key: str(value) for key, value in vars(options).items()},
        "rungs": [count * options.batch for count in rungs],
        "finalists": {
            f"{budget:g}": [
                {
                    "name": name,
                    "setting": search.settings[name],
                    "pruner": search.condition(name).pruner.to_document(),  # pyright: ignore[reportOptionalMemberAccess]
                }
                for name in names
            ]
            for budget, names in finalists.items()
        },
        "last_rung": entry,
        "first_rung": {name: {"setting": search.settings[name], **each} for name, each in changes.items()},
    }
    console.print(f"to confirm, once: {confirm}", soft_wrap=True)
    console.print(f"written to {write('search', finite(content), options.json)}", soft_wrap=True)


if __name__ == "__main__":
    main()
