"""Accuracy of the embedded model by kind of question, whole and pruned, on scenes it was not trained on.

    python benchmarks/embedded_accuracy.py                        # the whole model, 500 test scenes, 4 questions each
    python benchmarks/embedded_accuracy.py --budgets 0.33 0.22 0.11 --json results.json

Everything goes the way a user's question goes: a 512-pixel picture, the checkpoint folder, processor, chat template,
`generate`; each question is asked by itself. A budget is the true average share of vision tokens given to a layer.
Beside AdaptInfer stand two controls: `random`, and `evidence`, which keeps the tokens of the objects asked about and
fills up at random. A bench is worth something if `evidence` loses little and `random` loses a lot.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from adaptinfer import METHODS, Pruner
from adaptinfer.embedded import path
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


def plans(budgets: list[float], methods: list[str]) -> dict[str, Plan]:
    """What to measure, by name."""
    found: dict[str, Plan] = {"whole": lambda batch, asked: None}
    for budget in budgets:
        for method in methods:
            found[f"{method} {budget:g}"] = _plan(method, budget)
    return found


def _plan(method: str, budget: float) -> Plan:
    def plan(batch: int, asked: Asked) -> Pruner:
        if method == "evidence":
            cells = tuple(tuple(row * GRID + col for row, col in question.evidence) for _, question in asked)
            return Evidence(budget=budget, cells=cells, seed=batch)
        if method == "random":
            return METHODS[method](budget=budget, seed=batch)  # pyright: ignore[reportCallIssue]
        return METHODS[method](budget=budget)

    return plan


def answers(model, processor, asked: Asked, pruner: Pruner | None) -> list[str]:
    """What the model says, each question asked by itself about its own picture."""
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}],
            add_generation_prompt=True,
        )
        for _, question in asked
    ]
    pictures = [[render(scene, 512)] for scene, _ in asked]
    inputs = processor(text=prompts, images=pictures, padding=True, return_tensors="pt").to(model.device, model.dtype)
    with pruner(model) if pruner else contextlib.nullcontext():
        out = model.generate(**inputs, max_new_tokens=4)
    return processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def margin(right: int, of: int) -> float:
    """Half the width of the 95 % interval of a share, in points (Wilson)."""
    share, z = right / of, 1.96
    return 100 * z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of)) / (1 + z * z / of)


def main() -> None:
    """Measure and print one line for each plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--questions", type=int, default=4, help="for each scene")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--budgets", type=float, nargs="*", default=[], help="true average shares, such as 0.33")
    parser.add_argument("--methods", nargs="*", default=["adaptinfer", "random", "evidence"])
    parser.add_argument("--checkpoint", type=Path, default=None, help="default: the embedded one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    options = parser.parse_args()

    folder = options.checkpoint or path()
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=getattr(torch, options.dtype), local_files_only=True
    )
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    asked: Asked = []
    for seed in SPLITS[options.split][: options.scenes]:
        scene = sample_scene(seed)
        asked += [(scene, question) for question in questions_for(scene, 0, options.questions)]
    print(f"{len(asked)} questions on {options.scenes} {options.split} scenes, {options.dtype}, {platform.machine()}")
    print(f"{'right answers, %':24}{'all':>12}" + "".join(f"{kind:>12}" for kind in KINDS))
    results = {}
    for name, plan in plans(options.budgets, options.methods).items():
        started = time.perf_counter()
        hits: dict[str, list[bool]] = {kind: [] for kind in KINDS}
        for batch, start in enumerate(range(0, len(asked), BATCH)):
            part = asked[start : start + BATCH]
            for (_, question), answer in zip(part, answers(model, processor, part, plan(batch, part)), strict=True):
                hits[question.kind].append(answer == question.answer)
        counts = {"all": [hit for kind in KINDS for hit in hits[kind]], **hits}
        results[name] = {
            kind: {"accuracy": sum(of) / len(of), "questions": len(of), "margin_points": margin(sum(of), len(of))}
            for kind, of in counts.items()
            if of
        }
        cells = "".join(f"{100 * r['accuracy']:7.1f}±{r['margin_points']:4.1f}" for r in results[name].values())
        print(f"{name:24}{cells}   {time.perf_counter() - started:.0f} s", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"arguments": {k: str(v) for k, v in vars(options).items()}, **results}))


if __name__ == "__main__":
    main()
