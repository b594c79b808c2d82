"""Runs a published table again: every row and every task through lmms-eval, at pinned settings, and prints it.

A script beside this file says which model, rows, tasks and figures. lmms-eval brings the data (from the Hugging Face
hub, or its cache), the prompts (pinned by its version) and the metrics; our plug-in brings the pruned model.

    pip install 'adaptinfer[lmms-eval]' lmms-eval==0.7.3
    python research/tables/llava_1_5_7b.py --limit 200          # a first look
    python research/tables/llava_1_5_7b.py                      # the whole table, resumed row by row
"""

import argparse
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from adaptinfer.evaluation.published import published_for
from adaptinfer.pruners import METHODS
from adaptinfer.schedule import Budget

LMMS_EVAL = "0.7.3"
"""The version whose prompts and metrics the tables are pinned to."""

METRICS = {
    "gqa": "exact_match",
    "mme": "mme_perception_score",
    "pope": "pope_f1_score",
    "scienceqa_img": "exact_match",
    "seedbench": "seed_image",
    "textvqa_val": "exact_match",
    "vizwiz_vqa_val": "exact_match",
    "vqav2_val": "exact_match",
    "docvqa_val": "anls",
    "mmbench_en_dev": "gpt_eval_score",
}
"""The figure that stands for a task. MMBench's needs an API key, see lmms-eval; ``--tasks`` leaves it out."""

LLAVA_TASKS = (
    "gqa", "mmbench_en_dev", "mme", "pope", "scienceqa_img", "textvqa_val", "vizwiz_vqa_val", "vqav2_val", "seedbench",
)  # fmt: skip
"""What the papers run LLaVA-1.5 on, as lmms-eval calls it."""

SIDE_BY_SIDE = (
    "adaptinfer", "adaptinfer+", "divprune", "cdpruner", "visionzip", "fastv", "sparsevlm", "pyramiddrop", "random",
)  # fmt: skip
"""The methods that are held against each other at equal true budgets."""


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        name: as it is printed.
        arguments: of the plug-in, beside the model.
        published: share of vanilla in percent as it stands in the paper, over its own benchmarks; None if in none.
        true_average: vision tokens that a layer is given, by our count.
    """

    name: str
    arguments: str = ""
    published: str | None = None
    true_average: float | None = None


@dataclass(frozen=True)
class Table:
    """A table: what the paper ran, as far as it says so."""

    title: str
    model: str
    tasks: tuple[str, ...]
    rows: tuple[Row, ...]


def at_true_budgets(*budgets: float) -> tuple[Row, ...]:
    """`SIDE_BY_SIDE`, budget by budget: true averages in tokens or, below 1, shares of the picture's."""
    return tuple(
        Row(
            f"{method} true {budget:{'.0%' if Budget(budget).is_share else 'g'}}",
            f"method={method},budget={budget}",
            true_average=None if Budget(budget).is_share else budget,
        )
        for budget in budgets
        for method in SIDE_BY_SIDE
    )


def of_other_papers(nominal: int = 64, vision_tokens: int = 576) -> tuple[Row, ...]:
    """Each other method as its paper ran LLaVA-1.5-7B: its schedule of a nominal budget, else the nearest true one.

    The paper's figure stands beside the schedule of that label alone; nobody printed it for another.
    """
    rows = []
    for method, kind in METHODS.items():
        if kind.reference == "control" or not kind.published:
            continue
        averages = {name: schedule.true_average(vision_tokens) for name, schedule in kind.published.items()}
        preset = f"llava-1.5-7b/{nominal}"
        figure = published_for(method, nominal / vision_tokens) if preset in averages else None
        if preset not in averages:
            preset = min(averages, key=lambda name: abs(averages[name] - nominal))
        row = f"{method} paper {preset.partition('/')[2]}"
        printed = figure and figure.relative
        rows.append(Row(row, f"preset={method}:{preset}", printed, round(averages[preset], 1)))
    return tuple(rows)


def run(table: Table) -> None:
    """Run what is missing, then print. The first row is vanilla."""
    parser = argparse.ArgumentParser(description=table.title)
    parser.add_argument("--model", default=table.model, help="a folder in place of the hub id")
    parser.add_argument("--tasks", nargs="*", default=table.tasks)
    parser.add_argument("--include-path", help="folder of tasks that lmms-eval does not bring")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--limit", type=int, help="questions of each task; default: all")
    parser.add_argument("--output", type=Path, default=Path("build/tables"))
    parser.add_argument("--dry-run", action="store_true", help="print the commands and leave")
    options = parser.parse_args()

    scores: dict[str, dict[str, float]] = {}
    for row in table.rows:
        folder = options.output / Path(options.model).name / row.name.replace(" ", "_").replace("/", "_")
        arguments = ",".join(filter(None, [f"pretrained={options.model}", row.arguments]))
        command = [sys.executable, "-m", "lmms_eval", "--model", "adaptinfer", "--model_args", arguments]
        command += ["--tasks", ",".join(options.tasks), "--batch_size", str(options.batch_size)]
        command += ["--output_path", str(folder)]
        command += ["--limit", str(options.limit)] if options.limit else []
        command += ["--include_path", options.include_path] if options.include_path else []
        if options.dry_run:
            print(shlex.join(command))
            continue
        if not list(folder.rglob("*_results.json")):
            subprocess.run(command, check=True)
        scores[row.name] = read_scores(folder, options.tasks)
    if not options.dry_run:
        print(shown(table, options.tasks, scores))


def read_scores(folder: Path, tasks: list[str]) -> dict[str, float]:
    """The figure of each task from the newest results that lmms-eval wrote below a folder."""
    files = sorted(folder.rglob("*_results.json"))
    if not files:
        raise SystemExit(f"{folder}: lmms-eval left no results there")
    results = json.loads(files[-1].read_text(encoding="utf-8"))["results"]
    scores = {}
    for task in tasks:
        figures = {
            key.partition(",")[0]: value for key, value in results[task].items() if isinstance(value, int | float)
        }
        wanted = METRICS.get(task) or next(key for key in figures if "stderr" not in key)
        scores[task] = float(figures[wanted])
    return scores


def shown(table: Table, tasks: list[str], scores: dict[str, dict[str, float]]) -> str:
    """The table as Markdown: scores, their mean share of vanilla's, and the paper's in a column of its own."""
    vanilla = scores[table.rows[0].name]
    head = ["", *tasks, "mean of vanilla, %", "true tokens", "in the paper, its own benchmarks, %"]
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    for row in table.rows:
        ours = scores[row.name]
        share = 100 * sum(ours[task] / vanilla[task] for task in tasks) / len(tasks)
        cells = [row.name, *(f"{ours[task]:.4g}" for task in tasks), f"{share:.1f}"]
        cells += ["" if row.true_average is None else f"{row.true_average:g}", row.published or ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([f"{table.title}; lmms-eval {LMMS_EVAL}", "", *lines])
