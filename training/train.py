"""Train the embedded model: a small LLaVA, from scratch, on scenes that are drawn for it.

    python training/train.py tower --preset cpu      # phase 1: the vision tower by itself, then frozen
    python training/train.py language --preset cpu   # phase 2: projector and language model, on questions
    python training/train.py export --preset cpu     # write the checkpoint folder that the package ships
    python training/train.py all --preset full       # all of it

The two phases are LLaVA's: a tower that already sees, frozen, then a language model that learns to use it. Both go on
from their last save, exactly as if they had never stopped, and stop by themselves after ``--minutes``. What a scene is
and what is asked about it is defined in `adaptinfer.embedded.world`; nothing of that is repeated here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import torch
import typer
from config import PRESETS, Config
from language import train_language
from llava import build_model, build_processor, build_tokenizer
from safetensors.torch import load_file, save_file
from tower import train_tower

CHECKPOINT = Path(__file__).parent.parent / "src" / "adaptinfer" / "embedded" / "checkpoint"
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


@app.command()
def tower(preset: Preset = "full", out: Out = None, minutes: Minutes = 1e9) -> None:
    """Train the vision tower on per-patch labels and on matching captions."""
    config, folder = _settle(preset, out)
    train_tower(config, folder, minutes)


@app.command()
def language(preset: Preset = "full", out: Out = None, minutes: Minutes = 1e9) -> None:
    """Train projector and language model on questions, and draw the curves."""
    config, folder = _settle(preset, out)
    train_language(config, folder, minutes)
    draw_curves(folder)


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
    model.load_state_dict(torch.load(folder / "language.pt", map_location="cpu", weights_only=True)["model"])
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
    """Tower, language model and export in one go; ``--minutes`` counts for each phase."""
    config, folder = _settle(preset, out)
    if train_tower(config, folder, minutes) and train_language(config, folder, minutes):
        draw_curves(folder)
        export(preset, out, to)


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


def draw_curves(folder: Path) -> None:
    """Draw loss and held-out accuracy of phase 2 over the steps."""
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in (folder / "language.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows]
    figure, (upper, lower) = plt.subplots(2, 1, sharex=True, figsize=(9, 8))
    upper.plot(steps, [row["loss"] for row in rows])
    upper.set(ylabel="loss on answers", yscale="log")
    colours = plt.get_cmap("tab20").colors  # pyright: ignore
    for colour, kind in zip(colours, [*rows[-1]["later"], *rows[-1]["pairs"]], strict=False):
        shares = [100 * {**row["later"], **row["pairs"]}.get(kind, float("nan")) for row in rows]
        lower.plot(steps, shares, label=kind, color=colour)
    lower.set(xlabel="step", ylabel="right answers on validation scenes, %")
    lower.legend(ncols=3, fontsize=8)
    figure.savefig(folder / "curve.png", dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    app()
