"""Answers to figures: one plain document, from which the report and the plots are made."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from adaptinfer.evaluation.conditions import VANILLA, Condition, stage_of
from adaptinfer.evaluation.journal import Record
from adaptinfer.evaluation.metrics import RIGHT, normalise, yes_or_no
from adaptinfer.evaluation.plan import EvaluationPlan
from adaptinfer.evaluation.statistics import Resamples, verdict, yes_no
from adaptinfer.schedule import Budget

FORMAT, VERSION = "adaptinfer.evaluation", 1

ALL = "all"
_COSTS = ("true_average", "flops", "kv_bytes")
_SAME_BUDGET = 0.03


def summarise(plan: EvaluationPlan, records: Iterable[Record]) -> list[dict[str, Any]]:
    """One entry per task.

    An answer is identified by its place (sample, turn); the scores of several seeds at one place are averaged first.
    Intervals resample groups of samples that share pictures.
    """
    by_task: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_task[record["task"]].append(record)
    return [_task(plan, name, by_task[name]) for name in plan.loaded_tasks]


def _task(plan: EvaluationPlan, name: str, records: list[Record]) -> dict[str, Any]:
    task = plan.loaded_tasks[name]
    skipped = {record["sample"]: record["skipped"] for record in records if "skipped" in record}
    refused = {record["condition"]: record["refused"] for record in records if "refused" in record}
    answers: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if "score" in record and record["condition"] not in refused:
            answers[record["condition"]].append(record)
    ran = [condition for condition in plan.conditions if condition.name in answers]
    entry: dict[str, Any] = {
        "name": name,
        "metric": task.metric,
        "answers": len(answers[VANILLA]),
        "samples": len({record["sample"] for record in answers[VANILLA]}),
        "groups": len({record["group"] for record in answers[VANILLA]}),
        "skipped": skipped,
        "refused": refused,
        "kinds": {},
        "conditions": [],
        "pairs": [],
    }
    if not answers[VANILLA]:
        return entry
    kinds, turns = _slices(answers[VANILLA])
    columns = [(condition.name, part) for condition in ran for part in (ALL, *kinds, *turns)]
    place = {column: number for number, column in enumerate(columns)}
    resamples = Resamples(*_by_group(answers, place, turns))
    vanilla = _by_place(answers[VANILLA])
    entry["kinds"] = {kind: _count(answers[VANILLA], "kind", kind) for kind in kinds}
    entry["turns"] = len(turns)
    costs = {condition.name: _costs(answers[condition.name]) for condition in ran}
    ran = [_with_budget(condition, ran, costs) for condition in ran]
    for condition in ran:
        here, whole = place[condition.name, ALL], place[VANILLA, ALL]
        difference = resamples.difference(here, whole)
        entry["conditions"].append(
            _described(condition)
            | costs[condition.name]
            | {f"{cost}_share": costs[condition.name][cost] / costs[VANILLA][cost] for cost in _COSTS}
            | {
                "accuracy": asdict(resamples.mean(here)),
                "difference": asdict(difference),
                "verdict": None if condition.name == VANILLA else verdict(difference),
                "relative": asdict(resamples.ratio(here, whole)),
                "kinds": {
                    kind: asdict(resamples.mean(place[condition.name, kind]))
                    | {"difference": asdict(resamples.difference(place[condition.name, kind], place[VANILLA, kind]))}
                    for kind in kinds
                },
                "turns": [asdict(resamples.mean(place[condition.name, turn])) for turn in turns],
                "yes_no": _yes_no(answers[condition.name]),
            }
            | _changes(answers[condition.name], vanilla)
        )
    entry["pairs"] = _pairs(ran, resamples, place)
    budgets = list(dict.fromkeys(condition.budget for condition in ran if condition.budget is not None))
    entry["conditions"].sort(key=lambda row: _order(row, budgets))
    return entry


def _with_budget(condition: Condition, ran: list[Condition], costs: dict[str, dict[str, float]]) -> Condition:
    """A schedule or a saved pruner counts as of the nearest asked-for budget that its true average meets within 3 %."""
    if condition.budget is not None or condition.pruner is None:
        return condition
    whole, own = costs[VANILLA]["true_average"], costs[condition.name]["true_average"]
    asked = {each.budget: Budget(each.budget).share(whole) * whole for each in ran if each.budget is not None}
    near = {budget: abs(own - tokens) for budget, tokens in asked.items() if abs(own - tokens) <= _SAME_BUDGET * tokens}
    return dataclasses.replace(condition, budget=min(near, key=near.__getitem__)) if near else condition


def _order(row: dict[str, Any], budgets: list[float]) -> tuple[bool, int, bool]:
    """Vanilla, then budget by budget the methods before the controls, then what has no budget."""
    at = budgets.index(row["budget"]) if row["budget"] in budgets else len(budgets)
    return row["name"] != VANILLA, at, row["control"]


def _described(condition: Condition) -> dict[str, Any]:
    return {
        "name": condition.name,
        "series": condition.series,
        "method": None if condition.pruner is None else condition.pruner.name,
        "budget": condition.budget,
        "control": condition.is_control,
        "pruned": condition.pruner is not None,
        "stage": None if condition.pruner is None else stage_of(type(condition.pruner)),
        "positions": None if condition.pruner is None else condition.pruner.positions,
        "reference": None if condition.pruner is None else condition.pruner.reference,
        "seeds": condition.seeds,
    }


def _slices(vanilla: list[Record]) -> tuple[list[str], list[int]]:
    """Kinds in the order in which they turn up, and turns if there is more than one."""
    kinds = list(dict.fromkeys(record["kind"] for record in vanilla))
    turns = sorted({record["turn"] for record in vanilla})
    return [kind for kind in kinds if kind != ALL], turns if len(turns) > 1 else []


def _by_group(
    answers: dict[str, list[Record]], place: dict[tuple[str, Any], int], turns: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Sums of scores and numbers of answers, [groups, columns]; seeds of one place count as one answer."""
    groups = {group: n for n, group in enumerate(dict.fromkeys(record["group"] for record in answers[VANILLA]))}
    sums, counts = (np.zeros((len(groups), len(place))) for _ in range(2))
    for name, records in answers.items():
        seeds = len({record["seed"] for record in records})
        for record in records:
            row = groups[record["group"]]
            parts = dict.fromkeys((ALL, record["kind"], *([record["turn"]] if turns else [])))
            for column in (place[name, part] for part in parts):
                sums[row, column] += record["score"] / seeds
                counts[row, column] += 1 / seeds
    return sums, counts


def _by_place(records: list[Record]) -> dict[tuple[str, int], Record]:
    return {(record["sample"], record["turn"]): record for record in records}


def _costs(records: list[Record]) -> dict[str, float]:
    first = [record for record in records if record["turn"] == 0]
    return {cost: sum(record[cost] for record in first) / len(first) for cost in ("vision_tokens", *_COSTS)}


def _changes(records: list[Record], vanilla: dict[tuple[str, int], Record]) -> dict[str, float]:
    """How the answers differ from vanilla's, as shares of all answers of all seeds."""
    pairs = [(record, vanilla[record["sample"], record["turn"]]) for record in records]
    first = [record for record in records if record["turn"] == 0]

    def share(of: Iterable[bool]) -> float:
        return sum(of) / len(pairs)

    return {
        "flips": share(normalise(ours["answer"]) != normalise(theirs["answer"]) for ours, theirs in pairs),
        "correct_to_wrong": share(ours["score"] < RIGHT <= theirs["score"] for ours, theirs in pairs),
        "wrong_to_correct": share(theirs["score"] < RIGHT <= ours["score"] for ours, theirs in pairs),
        "top1_agreement": sum(record["top1"] for record in first) / len(first),
        "kl": sum(record["kl"] for record in first) / len(first),
    }


def _yes_no(records: list[Record]) -> dict[str, Any]:
    """Precision and recall for each kind whose references are all yes or no."""
    kinds: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        kinds[record["kind"]].append(record)
    return {
        kind: asdict(yes_no([each["answer"] for each in found], [each["references"][0] for each in found]))
        for kind, found in kinds.items()
        if all(normalise(reference) == yes_or_no(reference) for each in found for reference in each["references"])
    }


def _pairs(ran: list[Condition], resamples: Resamples, place: dict[tuple[str, Any], int]) -> list[dict[str, Any]]:
    """Every two conditions of one budget, the earlier one less the later one."""
    found = []
    for first, second in itertools.combinations(ran, 2):
        if first.budget is not None and first.budget == second.budget:
            difference = resamples.difference(place[first.name, ALL], place[second.name, ALL])
            found.append(
                {
                    "budget": first.budget,
                    "first": first.name,
                    "second": second.name,
                    "difference": asdict(difference),
                    "verdict": verdict(difference),
                }
            )
    return found


def _count(records: list[Record], field: str, value: Any) -> int:
    return sum(record[field] == value for record in records)


def finite(value: Any) -> Any:
    """The document with None in place of NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
