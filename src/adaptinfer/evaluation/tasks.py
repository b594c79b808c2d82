"""Tasks by name: a word (`world`) or a file (`mine.jsonl:anls`)."""

from __future__ import annotations

from adaptinfer.errors import InputError
from adaptinfer.evaluation.jsonl import JsonlTask
from adaptinfer.evaluation.metrics import METRICS
from adaptinfer.evaluation.samples import Task
from adaptinfer.evaluation.world import FORMS, WorldTask


def load_task(spec: str) -> Task:
    """A task by its name or file.

    Args:
        spec: a name in `FORMS`, optionally with ``:validation``; or the path of a JSONL file, optionally with ``:`` and
            the name of a metric.

    Raises:
        InputError: no such task, split, metric or file, or a file that is malformed.
    """
    name, _, option = spec.rpartition(":") if ":" in spec else (spec, "", "")
    if name in FORMS:
        return WorldTask(name, option or "test")
    if name.endswith(".jsonl") and option in ("", *METRICS):
        return JsonlTask(name, option or "exact")
    if spec.endswith(".jsonl"):  # a path with a colon in it
        return JsonlTask(spec, "exact")
    if name.endswith(".jsonl"):
        raise InputError(f"task {spec!r}: there is no metric {option!r}; there are {', '.join(METRICS)}")
    raise InputError(
        f"task {spec!r}: there is none of that name; there are {', '.join(FORMS)}, or give a file that ends in .jsonl"
    )
