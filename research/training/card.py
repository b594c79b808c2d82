"""The model card, and the table of docs/results/embedded-model.md.

Every figure comes from the JSON files of `measure.py` and a training run's logs. Where a file is missing, nothing is
written.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from config import Config
from measure import AFTER, FEW, RUNS, TOKENS
from safetensors import safe_open

from adaptinfer.bench.environment import environment
from adaptinfer.embedded.world.questions import KINDS

FOLLOW_UP, PAIR = "follow_up", "pair"
SINGLE = tuple(kind for kind in KINDS if kind not in (FOLLOW_UP, PAIR))
EXAMPLES = {
    "exists": ("is there a red star", "yes, no"),
    "attribute": ("what pattern does the green circle have", "a colour, shape, pattern, size, letter or digit"),
    "count": ("how many red things are there", "0 to 6"),
    "where": ("where is the star", "one of nine: top left, top, ... bottom right"),
    "cell": ("which cell holds the star", "c 4: column a to h, row 1 to 8 from the top"),
    "relation": ("is the star left of the red circle", "yes, no"),
    "compare": ("is the star or the ring bigger", "a shape; yes, no"),
    "odd": ("what is the odd colour among the circles", "a colour, a shape"),
    "read": ("what does the red sign say", "one of 40 words, 10 to 99"),
    "caption": ("name the large shapes", "red star, blue ring"),
    "two_hop": ("what colour is the thing directly above the star", "a colour, a shape"),
    FOLLOW_UP: ("and what shape", "about the thing of the turn before"),
    PAIR: ("which picture has more stars", "first, second, same; yes, no"),
}
PAGE = "docs/results/embedded-model.md"  # its table stands between these two marks
BEGIN, END = "<!-- written by research/training/train.py card: begin -->", "<!-- end -->"


def read(results: Path) -> dict[str, Any]:
    """All documents by name. Raises FileNotFoundError, with what makes it, if one is missing."""
    documents = {}
    for name in ("training", *RUNS):
        file = results / f"{name}.json"
        if not file.exists():
            command = "card --out FOLDER_OF_THE_RUN" if name == "training" else f"measure --only {name}"
            raise FileNotFoundError(f"{file} is missing; it is made by: python research/training/train.py {command}")
        documents[name] = json.loads(file.read_text(encoding="utf-8"))
    return documents


def record(preset: str, config: Config, run: Path, checkpoint: Path, results: Path) -> None:
    """Write what the card tells of a training run: its settings, times and validation curve.

    Phases that the run's folder has no log of, because it went on from an exported checkpoint, stay as they are
    recorded already.

    Raises:
        ValueError: what is recorded already is of another preset.
    """
    file = results / "training.json"
    recorded = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"phases": {}, "curve": []}
    if recorded["phases"] and recorded["preset"] != preset and not (run / "language.jsonl").exists():
        raise ValueError(f"{file} tells of the preset {recorded['preset']}; {run} has no log of phase 2 to replace it")
    phases, curves = {}, {"language": [row for row in recorded["curve"] if "phase" not in row]}
    for name, batch in {"tower": config.tower_batch, "language": config.batch, "practice": config.batch}.items():
        log = run / f"{name}.jsonl"
        if log.exists():
            read = map(json.loads, log.read_text().splitlines())
            rows = [*{row["step"]: row for row in read}.values()]  # stopped between log and save: it is there twice
            phases[name] = {"steps": rows[-1]["step"], "batch": batch, "seconds": rows[-1]["seconds"]}
            curves[name] = rows
        elif name in recorded["phases"] and recorded["preset"] == preset:
            phases[name] = recorded["phases"][name]
    before = curves["language"][-1]["step"] if curves["language"] else 0
    practised = [{**row, "step": before + row["step"], "phase": "practice"} for row in curves.get("practice", ())]
    weights = list(checkpoint.glob("*.safetensors"))
    document = {
        "preset": preset,
        "config": dataclasses.asdict(config),
        "environment": environment(),
        "parameters": sum(math.prod(shape) for part in weights for shape in _shapes(part)),
        "vocabulary": len(json.loads((checkpoint / "tokenizer.json").read_text())["model"]["vocab"]),
        "bytes": sum(part.stat().st_size for part in weights),
        "phases": phases,
        "curve": curves["language"] + practised,
    }
    results.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _shapes(file: Path) -> list[tuple[int, ...]]:
    with safe_open(file, "pt") as tensors:
        return [tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()]  # noqa: SIM118 - is no dictionary


def card(documents: dict[str, Any]) -> str:
    """The whole text of the model card."""
    training = documents["training"]
    config, machine = training["config"], training["environment"]
    tower, decoder = config["tower"], config["decoder"]
    side = config["grid"] * config["patch"]
    phases = training["phases"]
    asked = "\n".join(f"| {kind} | {EXAMPLES[kind][0]} | {EXAMPLES[kind][1]} |" for kind in KINDS)
    hardware = machine["gpu"] or f"{machine['cpu']}, {machine['usable_cores']} cores"
    steps = "\n".join(
        f"| {name} | {phase['steps']:,} × {phase['batch']} pictures | {phase['seconds'] / 60:.0f} min |"
        for name, phase in phases.items()
    )
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
language: en
---

# The embedded model of adaptinfer

A LLaVA of {training["parameters"] / 1e6:.1f} million parameters that answers questions about drawn scenes, trained from
scratch. It comes with the package so that `adaptinfer` can be tried, tested and measured offline. It knows such scenes
and nothing else: what is said here about accuracy says nothing about photographs.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor
from adaptinfer import embedded

model = AutoModelForImageTextToText.from_pretrained(embedded.path())
processor = AutoProcessor.from_pretrained(embedded.path())
```

`python -m adaptinfer.embedded draw --seed 7 scene.png` draws a picture for it and prints questions with their answers.

## What it knows

Pictures of {config["grid"]} × {config["grid"]} patches with 4 to 14 things: ten shapes and signs, eight colours, four
patterns, three sizes, letters, digits, words and numbers, on textured backgrounds (`adaptinfer.embedded.world`).
Questions in English, upper or lower case, "colour" or "color", with or without a question mark:

| kind | example | answer |
|---|---|---|
{asked}

Chat form: `USER: <image>\\nwhat colour is the star ASSISTANT: red</s>USER: ...`, as the chat template writes it.

## Architecture

`LlavaForConditionalGeneration`. Tower: CLIP, {tower[1]} layers of width {tower[0]}, {side} × {side} pixels, patches of
{config["patch"]}, hence {config["grid"] ** 2} vision tokens. Language model: Llama, {decoder[2]} layers of width
{decoder[0]}, {decoder[3]} heads, words as tokens ({training["vocabulary"]}).
bfloat16, {training["bytes"] / 1e6:.1f} MB.

## Training

| phase | steps | time |
|---|---|---|
{steps}

{machine["date"][:10]}, {hardware}, shared with other work. `research/training/README.md` has the commands and
the reasons.

![Loss and accuracy over the steps](../../../../research/training/curve.png)

## Accuracy

Right answers in percent with 95 % intervals over scenes (paired bootstrap; Wilson's where all are right or wrong), each
question asked by itself, greedy, {documents["test"]["dtype"]}; follow-ups in conversations, pairs about two pictures.
Training saw neither split, validation scenes were looked at while it ran. Hard scenes hold small things only.
`python {_command(documents)}`, then `python research/training/train.py card`.

{_accuracy(documents)}

Is the picture looked at? Right answers on test scenes if the picture is blank, its tiles are shuffled, or it is another
scene's:

{_sanity(documents)}

## With fewer vision tokens

{pruned(documents)}

{_bench(documents)}

## What it gets wrong, and where it looks

![Questions that it answers wrongly](../../../../docs/images/embedded_failures.png)

![Attention of the question to the picture, layer by layer](../../../../docs/images/embedded_attention.png)

## Limits

- It will answer anything with one of its words, and be wrong. Its speed says nothing about models of useful size.
- Questions whose description fits several things, or none, have no right answer.
- Pictures that are not square are squeezed. Up to {config["turns"]} turns and two pictures were trained.
- One trained model and one choice of questions: the intervals cover the choice of scenes only.
"""


def _command(documents: dict[str, Any]) -> str:
    """What measures all runs as they were: the command of one of them without its name."""
    return documents["test"]["command"].replace(" --only test", "")


def pruned(documents: dict[str, Any]) -> str:
    """Accuracy at true averages of vision tokens by question type, as a table with a sentence before it."""
    (task,) = documents["pruned"]["tasks"]
    total = documents["training"]["config"]["grid"] ** 2
    kinds = [kind for kind in SINGLE if kind in task["kinds"]]
    rows = [_row("all", _condition(task, "vanilla"), kinds)]
    for budget in TOKENS:
        for series in ("adaptinfer", AFTER, "random", "random-before", "stride", "stride-before", "resized"):
            name = f"{series} {budget}"
            found = _condition(task, name)
            if found is not None:
                rows.append(_row(f"{budget}, {series}", found, kinds))
            elif name in task["refused"] and series == "adaptinfer":
                rows.append([f"{budget}, {series}", "", "not met", *[""] * len(kinds)])
    return (
        f"Right answers in percent to {task['answers']} questions on {task['groups']} test scenes at true averages of "
        f"vision tokens a layer, of {total} (± half of the 95 % interval). *before*: chosen in front of the language "
        "model, so that no layer sees the others; *resized*: a smaller picture, the tower's positions interpolated.\n\n"
        + _table(["tokens", "true average", "all", *kinds], rows)
    )


def _accuracy(documents: dict[str, Any]) -> str:
    """Kinds by split; the single kinds of scenes, follow-ups of conversations, pairs."""
    places = {
        FOLLOW_UP: ("-more", "world-turns"),
        PAIR: ("-more", "world-pair"),
    }
    rows = []
    for kind in ("all", *KINDS):
        cells = []
        for split, hard in (("validation", ""), ("test", ""), ("validation", "-hard"), ("test", "-hard")):
            more, task_name = places.get(kind, ("", f"world{hard}"))
            task = _task(documents[split + more], task_name)
            found = None if hard and more else _part(_condition(task, "vanilla"), kind)
            cells.append(_interval(found))
        rows.append([kind, *cells])
    return _table(["kind", "validation", "test", "validation, hard", "test, hard"], rows)


def _sanity(documents: dict[str, Any]) -> str:
    names = ("vanilla", "blank", "shuffled", "wrong")
    rows = []
    for kind in ("all", *KINDS):
        more = {FOLLOW_UP: ("test-more", "world-turns"), PAIR: ("test-more", "world-pair")}
        run, task_name = more.get(kind, ("test", "world"))
        task = _task(documents[run], task_name)
        rows.append([kind, *(_interval(_part(_condition(task, name), kind)) for name in names)])
    return _table(["kind", *names], rows)


def _bench(documents: dict[str, Any]) -> str:
    """Whether scenes can tell methods apart, at few tokens: as a table and in a sentence."""
    rows, kept = [], {}
    for name in ("world", "world-hard"):
        task = _task(documents["few"], name)
        kinds = [kind for kind in SINGLE if kind in task["kinds"]]
        kept[name] = {row["series"]: row for row in task["conditions"]}
        for series in ("vanilla", "evidence-before", "evidence", "adaptinfer", "random-before", "random", "resized"):
            if series in kept[name]:
                rows.append(_row(f"{name}, {series}", kept[name][series], list(SINGLE)))
            else:
                rows.append([f"{name}, {series}", "", "not met", *[""] * len(kinds)])
    usual, hard = kept["world"], kept["world-hard"]
    told = []
    share = usual["evidence-before"]["relative"]["value"] if "evidence-before" in usual else None
    if share is not None:  # or vanilla has no right answer
        told.append(f"what is asked about, alone, keeps {100 * share:.1f} % of vanilla's right answers (wanted: 95)")
    for scenes, series, wanted in ((usual, "random-before", 25), (hard, "resized", 15)):
        if series in scenes:
            lost = -100 * scenes[series]["difference"]["value"]
            told.append(
                f"{series} loses {lost:.1f} points{' on hard scenes' if scenes is hard else ''} (wanted: {wanted})"
            )
    return (
        f"Can scenes tell methods apart? At a true {100 * FEW:.0f} % of the tokens "
        + "; ".join(told)
        + ".\n\n"
        + _table(["scenes, what is kept", "true average", "all", *SINGLE], rows)
    )


def into(text: str, block: str) -> str:
    """A text with what stands between its two marks replaced. Raises ValueError if it has no marks."""
    start, stop = text.index(BEGIN) + len(BEGIN), text.index(END)
    return f"{text[:start]}\n\n{block}\n\n{text[stop:]}"


def _task(document: dict[str, Any], name: str) -> dict[str, Any]:
    """A task of a run by its name without its split."""
    return next(task for task in document["tasks"] if task["name"].partition(":")[0] == name)


def _condition(task: dict[str, Any], name: str) -> dict[str, Any] | None:
    return next((row for row in task["conditions"] if row["name"] == name), None)


def _part(condition: dict[str, Any] | None, kind: str) -> dict[str, Any] | None:
    if condition is None:
        return None
    return condition["accuracy"] if kind == "all" else condition["kinds"].get(kind)


def _row(label: str, condition: dict[str, Any] | None, kinds: Sequence[str]) -> list[str]:
    assert condition is not None
    found = condition["accuracy"]
    all_kinds = f"{100 * found['value']:.1f} ± {50 * (found['high'] - found['low']):.1f}"
    return [label, f"{condition['true_average']:.1f}", all_kinds, *(_value(_part(condition, kind)) for kind in kinds)]


def _value(found: dict[str, Any] | None) -> str:
    return "" if found is None or found["value"] is None else f"{100 * found['value']:.0f}"


def _interval(found: dict[str, Any] | None) -> str:
    if found is None or found["value"] is None:
        return ""
    return f"{100 * found['value']:.1f} ({100 * found['low']:.1f}–{100 * found['high']:.1f})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows))
