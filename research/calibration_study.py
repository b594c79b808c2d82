"""The calibration study: how many samples a schedule needs, whether it moves with the question, and what it is worth.

    python research/calibration_study.py --samples 2048 --repeats 5 --scenes 120 # the committed run: 6 minutes on two
                                                                                  # quiet cores
    python research/calibration_study.py              # 512 samples, 100 scenes
    python research/calibration_study.py --quick      # a minute or two: shows that every part works, and nothing else

Parts: the recording (training scenes), `sizes`, `kinds`, `seeds`, `worth`. Each writes OUTPUT/PART.json at its end,
and is left out if it was made with the same options before; the recording goes on where it was stopped.
Kept mass is always judged on samples that did not shape the schedule; accuracy is that of the embedded model on test
scenes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, write
from rich.progress import track

from adaptinfer import AdaptInfer, Schedule
from adaptinfer.calibration.detect import histogram, read_off
from adaptinfer.calibration.distributed import Job, record_alone
from adaptinfer.calibration.objective import KeptMass, TokenCost
from adaptinfer.calibration.optimise import optimise, published_shape, with_layers
from adaptinfer.calibration.record import Reading
from adaptinfer.calibration.result import interval
from adaptinfer.calibration.samples import Sample
from adaptinfer.calibration.scenes import held_out
from adaptinfer.calibration.shifts import detect_shifts, distances
from adaptinfer.checkpoints import EMBEDDED, Checkpoint
from adaptinfer.evaluation.metrics import METRICS
from adaptinfer.evaluation.world import WorldTask

STAGES = 3
BATCH = 32
Chosen = tuple[tuple[int, int], ...]  # (layer, keep) of each stage


@dataclasses.dataclass
class Study:
    """What all parts share."""

    options: argparse.Namespace
    checkpoint: Checkpoint
    readings: list[Reading]
    layers: list[int]
    fingerprint: str

    def mass(self, readings: Sequence[Reading]) -> KeptMass:
        return KeptMass(readings, self.layers)

    def budget(self, share: float) -> int:
        """In token-layers."""
        mass = self.mass(self.readings[:1])
        return int(share * mass.vision_tokens * mass.num_layers)

    def choose(self, readings: Sequence[Reading], share: float) -> Schedule:
        return optimise(self.mass(readings), TokenCost(), self.budget(share), STAGES)[0].schedule


def main() -> None:
    """Run every part that is not there yet, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--samples", type=int, default=512, help="half of them shape schedules, half judge them")
    parser.add_argument("--repeats", type=int, default=10, help="draws of each size")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.33, 0.22, 0.11], help="true average shares")
    parser.add_argument("--scenes", type=int, default=100, help="test scenes, for accuracy")
    parser.add_argument("--questions", type=int, default=4, help="for each of them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="as few samples, draws, budgets and scenes as make sense")
    parser.add_argument("-o", "--output", type=Path, help="default: build/results/calibration_study (-quick if quick)")
    options = parser.parse_args()
    if options.quick:
        options.samples, options.repeats, options.budgets, options.scenes = 64, 2, [0.22], 4
    options.output = options.output or RESULTS / f"calibration_study{'-quick' if options.quick else ''}"
    told = {key: str(value) for key, value in vars(options).items() if key != "output"}

    job = Job(
        options.model,
        "scenes",
        options.output / "recording",
        options.samples,
        AdaptInfer(budget=0.5),
        options.seed,
        device="cpu",
    )
    recording, _ = record_alone(job, lambda text: print(f"\r{text:60}", end="", flush=True))
    print()
    study = Study(
        options,
        Checkpoint(options.model, device="cpu"),
        list(recording.readings(options.samples)),
        recording.about["model"]["scoring"],
        recording.about["model"]["fingerprint"],
    )
    for part in (sizes, kinds, seeds, worth):
        file = options.output / f"{part.__name__}.json"
        if file.exists() and json.loads(file.read_text())["options"] == told:
            results = json.loads(file.read_text())["results"]
        else:
            results = json.loads(json.dumps(part(study)))
            write(part.__name__, {"options": told, "results": results}, file)
        print(f"\n{_TABLES[part.__name__](results)}\n\nwritten to {file}")


def halves(study: Study) -> tuple[list[Reading], list[Reading]]:
    """Samples that shape schedules, and samples that judge them."""
    return study.readings[::2], study.readings[1::2]


def sizes(study: Study) -> list[dict[str, Any]]:
    """Schedules from 8, 16, ... samples, drawn several times each."""
    shaping, judging = halves(study)
    judge, share = study.mass(judging), study.options.budgets[len(study.options.budgets) // 2]
    reference = judge.of(study.choose(shaping, share)).mean()
    found = []
    for size in (size for size in (8, 16, 32, 64, 128, 256, 512, 1024) if size <= len(shaping)):
        draws = []
        for draw in track(range(study.options.repeats), f"{size} samples"):
            rng = np.random.default_rng((study.options.seed, size, draw))
            picked = [shaping[index] for index in rng.choice(len(shaping), size)]  # with replacement: a bootstrap
            schedule = study.choose(picked, share)
            shifts = detect_shifts(matrices(picked, study.layers), study.layers, repeats=39, resamples=1)
            draws.append(
                {
                    "stages": stages_of(schedule),
                    "kept_mass": judge.of(schedule).mean(),
                    "shifts": sorted(shift.layer for shift in shifts.found),
                    "published": read_off(histogram(picked, study.layers, 50), STAGES, judge.num_layers),
                }
            )
        kept = [draw["kept_mass"] for draw in draws]
        found.append(
            {
                "size": size,
                "draws": len(draws),
                "budget": share,
                "kept_mass": [float(np.mean(kept)), *map(float, np.quantile(kept, (0.025, 0.975)))],
                "lost_points": 100 * float(reference - np.mean(kept)),
                "agreement": {key: agreement([draw[key] for draw in draws]) for key in ("shifts", "published")}
                | {"layers": agreement([[layer for layer, _ in draw["stages"]] for draw in draws])},
                "most_frequent": most_frequent([draw["stages"] for draw in draws]),
            }
        )
    return found


def kinds(study: Study) -> dict[str, Any]:
    """A schedule for each kind of question, judged on each kind: does it move, and what does moving it gain?"""
    shaping, judging = halves(study)
    share = study.options.budgets[len(study.options.budgets) // 2]
    counts = Counter(reading.kind for reading in shaping)
    fair = len(shaping) / len(counts) / 2  # kinds that few scenes can be asked about would leave all others few samples
    judged = {reading.kind for reading in judging}
    names = sorted(name for name in counts if counts[name] >= fair and name in judged)
    least = min(counts[name] for name in names)
    sets = {name: [reading for reading in shaping if reading.kind == name][:least] for name in names}
    sets["all kinds"] = shaping[:: max(1, len(shaping) // least)][:least]
    judges = {name: study.mass([reading for reading in judging if reading.kind == name]) for name in names}
    rows = {}
    for name, readings in track(list(sets.items()), "kinds"):
        schedule = study.choose(readings, share)
        shifts = detect_shifts(matrices(readings, study.layers), study.layers)
        rows[name] = {
            "stages": stages_of(schedule),
            "shifts": sorted(shift.layer for shift in shifts.found),
            "published": read_off(histogram(readings, study.layers), STAGES, schedule.num_layers),
            "kept_mass": {other: float(judge.of(schedule).mean()) for other, judge in judges.items()},
        }
    return {"budget": share, "samples": least, "rows": rows}


def seeds(study: Study) -> list[dict[str, Any]]:
    """Schedules from disjoint sets of scenes, all judged on the others."""
    shaping, judging = halves(study)
    judge, found = study.mass(judging), []
    for share in study.options.budgets:
        for number in track(range(4), f"seeds at {share:.0%}"):
            schedule = study.choose(shaping[number::4], share)
            kept = judge.of(schedule)
            found.append(
                {
                    "budget": share,
                    "set": number,
                    "stages": stages_of(schedule),
                    "kept_mass": [float(kept.mean()), *interval(kept)],
                }
            )
    return found


def worth(study: Study) -> list[dict[str, Any]]:
    """Published shape, detected and optimised stages at equal true budgets: kept mass and accuracy, both held out."""
    shaping, judging = halves(study)
    mass, judge = study.mass(shaping), study.mass(judging)
    answer = answering(study)
    vanilla = answer(None)
    found = [{"budget": 1.0, "way": "nothing dropped", "stages": (), "right": vanilla}]
    shifts = detect_shifts(matrices(shaping, study.layers), study.layers)
    detected = {
        "published detector": read_off(histogram(shaping, study.layers), STAGES, mass.num_layers),
        "attention shifts": tuple(sorted(shift.layer for shift in shifts.found)),
    }
    for share in study.options.budgets:
        budget = study.budget(share)
        ways: dict[str, Schedule | None] = {"published shape": published_shape(mass, TokenCost(), budget)}
        for name, layers in detected.items():
            ways[name] = with_layers(mass, TokenCost(), budget, layers) if layers else None
            early = first_stage_before(mass, budget, layers)
            ways[f"{name}, first stage moved"] = None if ways[name] else early
        for number in (1, 2, STAGES):
            ways[f"optimised, {number} stages"] = optimise(mass, TokenCost(), budget, number)[0].schedule
        published = None
        for name, schedule in ways.items():
            row: dict[str, Any] = {"budget": share, "way": name, "layers": detected.get(name.partition(",")[0], ())}
            if schedule is not None:
                kept, right = judge.of(schedule), answer(schedule)
                published = right if published is None else published
                row |= {
                    "stages": stages_of(schedule),
                    "true_average": schedule.true_average(),
                    "kept_mass": [float(kept.mean()), *interval(kept)],
                    "right": right,
                    "gain": [difference(right, published), *_paired(right, published, study.options.questions)],
                }
            found.append(row)
    return found


def first_stage_before(mass: KeptMass, budget: int, layers: Sequence[int]) -> Schedule | None:
    """The detected layers with their first moved to the first possible one, where they are too late for a budget."""
    return with_layers(mass, TokenCost(), budget, (mass.possible[0], *layers[1:])) if layers else None


def answering(study: Study) -> Callable[[Schedule | None], list[bool]]:
    """A function that asks the held-out questions under a schedule, and says which answers are right.

    What was asked before is read from OUTPUT/answers.json.
    """
    options, file = study.options, study.options.output / "answers.json"
    model, processor = study.checkpoint.load(), study.checkpoint.processor
    asked = list(held_out(options.scenes, options.questions))
    order = sorted(
        range(len(asked)), key=lambda place: asked[place][0].kind
    )  # a batch is as slow as its longest answer
    batches = [order[start : start + BATCH] for start in range(0, len(asked), BATCH)]
    key = f"{study.fingerprint} {options.scenes} {options.questions}"
    known: dict[str, list[bool]] = json.loads(file.read_text()).get(key, {}) if file.exists() else {}

    @torch.inference_mode()
    def answer(schedule: Schedule | None) -> list[bool]:
        name = "vanilla" if schedule is None else _stages(stages_of(schedule))
        if name not in known:
            right = [False] * len(asked)
            pruner = AdaptInfer(schedule=schedule or Schedule((), study.checkpoint.num_layers))
            with pruner(model):
                for batch in track(batches, f"asking, {name}"):
                    inputs = prompts(processor, [asked[place][0] for place in batch])
                    out = model.generate(**inputs, max_new_tokens=WorldTask.max_new_tokens)
                    said = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
                    for place, text in zip(batch, said, strict=True):
                        right[place] = METRICS[WorldTask.metric](text, [asked[place][1]]) == 1
            known[name] = right
            file.write_text(json.dumps({key: known}))
        return known[name]

    return answer


def prompts(processor: Any, samples: Sequence[Sample]) -> Any:
    """Left-padded inputs, each question by itself."""
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.question}]}],
            add_generation_prompt=True,
        )
        for sample in samples
    ]
    return processor(text=texts, images=[list(sample.images) for sample in samples], padding=True, return_tensors="pt")


def matrices(readings: Sequence[Reading], layers: list[int]) -> np.ndarray:
    return np.stack([distances(reading.mass[layers]) for reading in readings])


def stages_of(schedule: Schedule) -> Chosen:
    return tuple((stage.layer, int(stage.keep)) for stage in schedule.stages)


def agreement(found: Sequence[Sequence[Any]]) -> float:
    """Mean Jaccard overlap between two draws: 1 if all found the same."""
    pairs = [(set(a), set(b)) for number, a in enumerate(found) for b in found[number + 1 :]]
    return float(np.mean([len(a & b) / len(a | b) if a | b else 1.0 for a, b in pairs]))


def most_frequent(found: Sequence[Chosen]) -> Chosen:
    return max(sorted(set(found)), key=list(found).count)


def difference(right: Sequence[bool], other: Sequence[bool]) -> float:
    """In points."""
    return 100 * float(np.mean(right) - np.mean(other))


def _paired(right: Sequence[bool], other: Sequence[bool], questions: int) -> Iterator[float]:
    """The 95 % interval of the difference in points, over scenes."""
    by_scene = (np.array(right, dtype=float) - np.array(other, dtype=float)).reshape(-1, questions).mean(axis=1)
    return (100 * end for end in interval(by_scene))


# ---------------------------------------------------------------------------------------------------- tables


def _stages(stages: Sequence[Sequence[int]]) -> str:
    return ", ".join(f"{keep} after {layer}" for layer, keep in stages) or "none"


def _layers(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers)) or "none"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _percent(mean: float, low: float, high: float) -> str:
    return f"{100 * mean:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def _sizes_table(results: list[dict[str, Any]]) -> str:
    header = [
        "samples",
        "draws",
        "kept mass, %",
        "below all, points",
        "same layers: optimised",
        "shifts",
        "published detector",
        "most frequent stages",
    ]
    rows = [
        [
            str(row["size"]),
            str(row["draws"]),
            _percent(*row["kept_mass"]),
            f"{row['lost_points']:.2f}",
            *(f"{row['agreement'][key]:.2f}" for key in ("layers", "shifts", "published")),
            _stages(row["most_frequent"]),
        ]
        for row in results
    ]
    return f"**Sample size** (budget {results[0]['budget']:.0%})\n\n" + _table(header, rows)


def _kinds_table(results: dict[str, Any]) -> str:
    names = [name for name in results["rows"] if name in results["rows"]["all kinds"]["kept_mass"]]
    rows = [
        [name, _stages(row["stages"]), _layers(row["shifts"]), _layers(row["published"])]
        + [f"{100 * row['kept_mass'][other]:.1f}" for other in names]
        for name, row in results["rows"].items()
    ]
    header = ["shaped by", "stages", "shifts", "published detector", *(f"kept on {name}, %" for name in names)]
    return f"**Kinds of question** ({results['samples']} samples each, budget {results['budget']:.0%})\n\n" + _table(
        header, rows
    )


def _seeds_table(results: list[dict[str, Any]]) -> str:
    rows = [
        [f"{row['budget']:.0%}", str(row["set"]), _stages(row["stages"]), _percent(*row["kept_mass"])]
        for row in results
    ]
    return "**Disjoint sets of scenes**\n\n" + _table(["budget", "set", "stages", "kept mass, %"], rows)


def _worth_table(results: list[dict[str, Any]]) -> str:
    rows = []
    for row in results:
        start = [f"{row['budget']:.0%}", row["way"]]
        if row["way"] == "nothing dropped":
            rows.append([*start, "", "", "100", f"{100 * np.mean(row['right']):.1f}", ""])
        elif "right" not in row:
            if "moved" not in row["way"]:
                rows.append([*start, f"layers {_layers(row['layers'])}: not within the budget", "", "", "", ""])
        else:
            gain, low, high = row["gain"]
            rows.append(
                [
                    *start,
                    _stages(row["stages"]),
                    f"{row['true_average']:.1f}",
                    _percent(*row["kept_mass"]),
                    f"{100 * np.mean(row['right']):.1f}",
                    "" if row["way"] == "published shape" else f"{gain:+.1f} ({low:+.1f} to {high:+.1f})",
                ]
            )
    header = [
        "budget",
        "chosen by",
        "stages",
        "true average",
        "kept mass, %",
        "right, %",
        "against the published shape",
    ]
    return f"**What it is worth** ({len(results[0]['right'])} questions on test scenes)\n\n" + _table(header, rows)


_TABLES: dict[str, Callable[[Any], str]] = {
    "sizes": _sizes_table,
    "kinds": _kinds_table,
    "seeds": _seeds_table,
    "worth": _worth_table,
}


if __name__ == "__main__":
    main()
