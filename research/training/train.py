"""Train the embedded model: a small LLaVA, from scratch, on scenes that are drawn for it.

    python research/training/train.py tower --preset cpu  # phase 1: the vision tower by itself, then frozen
    python research/training/train.py language --preset cpu  # phase 2: projector and language model, on questions
    python research/training/train.py practice --preset cpu  # phase 3: more of it, with drills for what is half learnt
    python research/training/train.py export --preset cpu  # write the checkpoint folder that the package ships
    python research/training/train.py all --preset full  # all of it
    python research/training/train.py measure  # evaluate the shipped checkpoint: results/embedded/
    python research/training/train.py card --preset cpu  # model card, pictures and the site's table, from these

The first two phases are LLaVA's: a tower that already sees, frozen, then a language model that learns to use it. Every
phase goes on from its last save, exactly as if it had never stopped, and stops by itself after ``--minutes``. What a
scene is and what is asked about it is defined in `adaptinfer.embedded.world`; nothing of that is repeated here.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from card import PAGE, into, pruned, read, record
from card import card as model_card
from config import PRESETS, Config
from language import practise, train_language
from llava import build_model, build_processor, build_tokenizer
from measure import RESULTS, RUNS, measure
from pictures import attention, failures
from safetensors.torch import load_file, save_file
from tower import train_tower

from adaptinfer.errors import InputError

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "src" / "adaptinfer" / "embedded" / "checkpoint"
WORK = Path("build") / "embedded-card"
_SHARD = "15MB"

Preset = Annotated[str, typer.Option(help=f"One of {', '.join(PRESETS)}.")]
Out = Annotated[Path | None, typer.Option(help="Folder of logs and resumable states [default: build/embedded-PRESET].")]
Minutes = Annotated[float, typer.Option(help="Stop at the next save after this long.")]
app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)


def _settle(preset: str, out: Path | None) -> tuple[Config, Path]:
    if preset not in PRESETS:
        raise typer.BadParameter(f"unknown {preset!r}; known are {', '.join(PRESETS)}", param_hint="--preset")
    folder = out or Path("build") / f"embedded-{preset}"
    folder.mkdir(parents=True, exist_ok=True)
    return PRESETS[preset], folder


def _tell(done: bool) -> bool:
    """Say so if a phase stopped before its end."""
    if not done:
        print("stopped at a save before the end, as --minutes asked; run it again to go on")
    return done


@app.command()
def tower(preset: Preset = "full", out: Out = None, minutes: Minutes = 1e9) -> None:
    """Train the vision tower on per-patch labels and on matching captions."""
    config, folder = _settle(preset, out)
    _tell(train_tower(config, folder, minutes))


@app.command()
def language(preset: Preset = "full", out: Out = None, minutes: Minutes = 1e9) -> None:
    """Train projector and language model on questions."""
    config, folder = _settle(preset, out)
    if not (folder / "tower.pt").exists():
        raise typer.BadParameter(f"there is no {folder / 'tower.pt'}; train the tower first", param_hint="--out")
    _tell(train_language(config, folder, minutes))


@app.command()
def practice(
    preset: Preset = "full",
    out: Out = None,
    minutes: Minutes = 1e9,
    start: Annotated[
        Path | None, typer.Option(help="Go on from this exported checkpoint, not from the run's own phase 2.")
    ] = None,
) -> None:
    """Train projector and language model further, with drills."""
    config, folder = _settle(preset, out)
    if start is None and not any((folder / name).exists() for name in ("practice.pt", "language.pt")):
        raise typer.BadParameter(
            f"there is no {folder / 'language.pt'} to go on from; train the phase before, or give --start",
            param_hint="--out",
        )
    try:
        _tell(practise(config, folder, minutes, start))
    except InputError as error:
        raise typer.BadParameter(str(error), param_hint="--start") from None


@app.command()
def export(
    preset: Preset = "full",
    out: Out = None,
    to: Annotated[Path, typer.Option(help="The checkpoint folder.")] = CHECKPOINT,
) -> None:
    """Write model (bfloat16 safetensors in shards), tokenizer and processor as an ordinary checkpoint folder."""
    config, folder = _settle(preset, out)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, config)
    saved = [file for name in ("practice.pt", "language.pt") if (file := folder / name).exists()]
    if not saved:
        raise typer.BadParameter(f"there is nothing to export in {folder}; train first", param_hint="--out")
    model.load_state_dict(torch.load(saved[0], map_location="cpu", weights_only=True)["model"])
    for old in to.glob("*.safetensors*"):
        old.unlink()
    model.to(torch.bfloat16).save_pretrained(to, max_shard_size=_SHARD)
    build_processor(tokenizer, config).save_pretrained(to)
    _name_as_published(to)
    print(f"{to}: {model.num_parameters():,} parameters")


@app.command(name="all")
def everything(
    preset: Preset = "full",
    out: Out = None,
    minutes: Minutes = 1e9,
    to: Annotated[Path, typer.Option(help="The checkpoint folder.")] = CHECKPOINT,
) -> None:
    """All phases and export in one go; ``--minutes`` counts for each phase."""
    config, folder = _settle(preset, out)
    if _tell(all(phase(config, folder, minutes) for phase in (train_tower, train_language, practise))):
        export(preset, out, to)


@app.command(name="measure")
def measured(
    only: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(RUNS)}; several times. All if none.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Of each task, in place of a run's own number.")] = None,
    results: Annotated[Path, typer.Option(help="Folder of the JSON files.")] = RESULTS,
    work: Annotated[Path, typer.Option(help="Folder of the answers; a run that was stopped goes on there.")] = WORK,
    device: Annotated[str, typer.Option(help="cpu, cuda; auto: cuda if there is one.")] = "auto",
) -> None:
    """Evaluate the shipped checkpoint for the model card."""
    if unknown := sorted(set(only or ()) - set(RUNS)):
        raise typer.BadParameter(f"unknown {', '.join(unknown)}; known are {', '.join(RUNS)}", param_hint="--only")
    measure(only or list(RUNS), samples, results, work, device)


@app.command()
def card(
    preset: Preset = "full",
    out: Out = None,
    results: Annotated[Path, typer.Option(help="Folder of the JSON files that `measure` wrote.")] = RESULTS,
    to: Annotated[Path, typer.Option(help="Folder to write into, laid out as the repository.")] = ROOT,
    pictures: Annotated[bool, typer.Option(help="Draw failures and attention, which takes the model.")] = True,
) -> None:
    """Write the model card, its pictures, the training curve, and the table of docs/results/embedded-model.md."""
    config, folder = _settle(preset, out)
    if any(folder.glob("*.jsonl")):
        try:
            record(preset, config, folder, CHECKPOINT, results)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--preset") from None
    try:
        documents = read(results)
    except FileNotFoundError as error:
        raise typer.BadParameter(str(error), param_hint="--results") from None
    written = {
        to / CHECKPOINT.relative_to(ROOT) / "README.md": model_card(documents),
        to / PAGE: into((ROOT / PAGE).read_text(encoding="utf-8"), pruned(documents)),
    }
    for file, text in written.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    (to / "research" / "training").mkdir(parents=True, exist_ok=True)
    draw_curves(documents["training"]["curve"], to / "research" / "training" / "curve.png")
    if pictures:
        images = to / "docs" / "images"
        images.mkdir(parents=True, exist_ok=True)
        attention(images / "embedded_attention.png")
        failures(images / "embedded_failures.png")
    print(f"written: {', '.join(str(file) for file in written)}")


def _name_as_published(folder: Path) -> None:
    """Give the tower's weights the published LLaVA's names, which every transformers reads; 5.3 knows no others."""

    def published(name: str) -> str:
        return re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)

    for file in folder.glob("*.safetensors"):
        weights = {published(name): tensor for name, tensor in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
        file.chmod(0o644)  # it is written for the owner alone
    index = folder / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"] = {published(name): file for name, file in content["weight_map"].items()}
        index.write_text(json.dumps(content, indent=2) + "\n")


def draw_curves(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw loss and held-out accuracy of phases 2 and 3 over the steps, from their logs."""
    import matplotlib.pyplot as plt

    steps = [row["step"] for row in rows]
    figure, (upper, lower) = plt.subplots(2, 1, sharex=True, figsize=(9, 8))
    upper.plot(steps, [row["loss"] for row in rows])
    upper.set(ylabel="loss on answers", yscale="log")
    colours = plt.get_cmap("tab20").colors  # pyright: ignore
    for colour, kind in zip(colours, [*rows[-1]["later"], *rows[-1]["pairs"]], strict=False):
        shares = [100 * {**row["later"], **row["pairs"]}.get(kind, float("nan")) for row in rows]
        lower.plot(steps, shares, label=kind, color=colour)
    for row, after in itertools.pairwise(rows):
        if after.get("phase") != row.get("phase"):
            for plot in (upper, lower):
                plot.axvline(row["step"], color="black", linewidth=0.8, linestyle=":")
            upper.text(row["step"], 1.0, " practice", transform=upper.get_xaxis_transform(), va="top")
    lower.set(xlabel="step", ylabel="right answers on validation scenes, %")
    lower.legend(ncols=3, fontsize=8)
    figure.savefig(file, dpi=120, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    app()
