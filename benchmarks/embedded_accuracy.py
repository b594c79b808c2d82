"""Accuracy of the embedded model by kind of question, whole and pruned, on scenes it was not trained on.

    python benchmarks/embedded_accuracy.py                        # 500 test scenes, 4 questions each
    python benchmarks/embedded_accuracy.py --budgets --split validation     # the whole model only, other scenes

Everything goes the way a user's question goes: a 512-pixel picture, the checkpoint folder, processor, chat template,
`generate`; each question is asked by itself. A budget is the true average share of vision tokens given to a layer.
Beside AdaptInfer stand two controls: `random`, the mean of several seeds, and `evidence`, which keeps the tokens of the
objects asked about and fills up at random. A bench is worth something if `evidence` loses little and `random` a lot.
"""

import argparse
import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import write
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature

from adaptinfer import METHODS, Pruner
from adaptinfer.embedded import path as embedded_path
from adaptinfer.embedded.questions import KINDS, Question, questions_for
from adaptinfer.embedded.scenes import GRID, SPLITS, Scene, render, sample_scene
from adaptinfer.engine.stage import StageView
from adaptinfer.functional import counter_uniform

BATCH = 32
Asked = list[tuple[Scene, Question]]
Plan = Callable[[int, Asked], Pruner | None]  # batch number and its questions -> how to prune


@dataclasses.dataclass(frozen=True)
class Evidence(Pruner):
    """The control from above: tokens of the objects asked about first, others at random."""

    name = "evidence"
    reference = "control"

    cells: tuple[tuple[int, ...], ...] = ()  # per sample, token numbers among 64
    seed: int = 0

    def score(self, view: StageView) -> Tensor:
        device = view.vision_index.device
        ranking = counter_uniform(GRID * GRID, self.seed, 0, device).repeat(len(self.cells), 1)
        for row, tokens in enumerate(self.cells):
            ranking[row, list(tokens)] += 1
        # One ranking for all stages, so the tokens that entered this one are the best of it.
        entered = ranking.topk(view.vision_index.shape[1]).indices.sort().values
        return ranking.gather(1, entered)


def plans(budgets: list[float], methods: list[str], seeds: int) -> dict[str, list[Plan]]:
    """What to measure, by name; plans of one name differ in their seed and are averaged."""
    found: dict[str, list[Plan]] = {"whole": [lambda batch, asked: None]}
    for budget in budgets:
        for method in methods:
            runs = range(1 if method == "adaptinfer" else seeds)
            found[f"{method} {budget:.0%}"] = [_plan(method, budget, seed) for seed in runs]
    return found


def _plan(method: str, budget: float, run: int) -> Plan:
    def plan(batch: int, asked: Asked) -> Pruner:
        seed = 10_007 * run + batch  # other tokens in every batch, or one unlucky pattern would decide
        if method == "evidence":
            cells = tuple(tuple(row * GRID + col for row, col in question.evidence) for _, question in asked)
            return Evidence(budget=budget, cells=cells, seed=seed)
        if method == "random":
            return METHODS[method](budget=budget, seed=seed)  # pyright: ignore[reportCallIssue]
        return METHODS[method](budget=budget)

    return plan


def prompts(processor, asked: Asked) -> BatchFeature:
    """Model inputs, left-padded: each question by itself, about its own picture."""
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}],
            add_generation_prompt=True,
        )
        for _, question in asked
    ]
    pictures = [[render(scene, 512)] for scene, _ in asked]
    return processor(text=texts, images=pictures, padding=True, return_tensors="pt")


def answers(model, processor, inputs: BatchFeature, pruner: Pruner | None) -> tuple[list[str], float]:
    """What the model says, and the vision tokens that a layer was given on average."""
    with pruner(model) if pruner else contextlib.nullcontext() as handle:
        out = model.generate(**inputs, max_new_tokens=4)
    said = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    report = handle.report if handle else None
    return said, report.true_average[0] if report else float(GRID * GRID)


def margin(right: float, of: int) -> float:
    """Half the width of the 95 % interval of a share, in points (Wilson)."""
    share, z = right / of, 1.96
    return 100 * z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of)) / (1 + z * z / of)


def main() -> None:
    """Measure and print one line for each plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--questions", type=int, default=4, help="for each scene")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument(
        "--budgets", type=float, nargs="*", default=[0.33, 0.22, 0.11], help="true average shares, such as 0.33"
    )
    parser.add_argument("--methods", nargs="*", default=["adaptinfer", "random", "evidence"])
    parser.add_argument("--seeds", type=int, default=3, help="runs of a method with randomness in it")
    parser.add_argument("--checkpoint", type=Path, default=None, help="default: the embedded one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path, help="where to write all numbers; default: build/results/")
    options = parser.parse_args()

    folder = options.checkpoint or embedded_path()
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=getattr(torch, options.dtype), local_files_only=True
    )
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    asked: Asked = []
    for seed in SPLITS[options.split][: options.scenes]:
        scene = sample_scene(seed)
        asked += [(scene, question) for question in questions_for(scene, 0, options.questions)]
    parts = [asked[start : start + BATCH] for start in range(0, len(asked), BATCH)]
    batches = [(part, prompts(processor, part).to(model.device, model.dtype)) for part in parts]
    table = Table(
        title=f"Embedded model, {len(asked)} questions on {options.scenes} {options.split} scenes: right answers, %"
    )
    for column in ("", "tokens a layer", "all", *KINDS):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    results = {}
    started = time.perf_counter()
    for name, runs in plans(options.budgets, options.methods, options.seeds).items():
        hits: dict[str, list[bool]] = {kind: [] for kind in KINDS}
        average = 0.0
        for plan in runs:
            for number, (part, inputs) in enumerate(batches):
                said, average = answers(model, processor, inputs, plan(number, part))
                for (_, question), answer in zip(part, said, strict=True):
                    hits[question.kind].append(answer == question.answer)
        counts = {"all": [hit for kind in KINDS for hit in hits[kind]], **hits}
        results[name] = {
            "true_average": average,
            "seeds": len(runs),
            "accuracy": {
                kind: {
                    "share": sum(of) / len(of),
                    "questions": len(of) // len(runs),
                    "margin_points": margin(sum(of) / len(runs), len(of) // len(runs)),
                }
                for kind, of in counts.items()
                if of
            },
        }
        cells = [f"{100 * r['share']:.1f} ±{r['margin_points']:.1f}" for r in results[name]["accuracy"].values()]
        table.add_row(name if len(runs) == 1 else f"{name}, {len(runs)} seeds", f"{average:.1f}", *cells)
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    console.print("± half of the 95 % interval (Wilson), for the number of questions and not for that times seeds")
    arguments = {key: str(value) for key, value in vars(options).items()}
    path = write("embedded_accuracy", {"arguments": arguments, "results": results}, options.json)
    console.print(f"written to {path}", soft_wrap=True)


if __name__ == "__main__":
    main()
