"""Pictures for the model card: where the language model looks, layer by layer, and what it gets wrong.

python research/training/pictures.py attention docs/images/embedded_attention.png
python research/training/pictures.py failures docs/images/embedded_failures.png
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import typer
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from adaptinfer import embedded
from adaptinfer.embedded.world.questions import KINDS, Question, questions_for
from adaptinfer.embedded.world.render import render
from adaptinfer.embedded.world.scene import sample_scene
from adaptinfer.embedded.world.things import SPLITS, Scene
from adaptinfer.evaluation.metrics import METRICS

_PATCH = 28  # pixels of a patch, as a user's picture; the processor shrinks it
_KINDS = ("attribute", "read", "count", "two_hop")  # shown in the picture of attention
_WRONG = 8  # failures shown
_LOOKED_AT = 400  # test scenes

File = Annotated[Path, typer.Argument(help="Picture to write.")]
app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)


def _loaded(attention: str) -> tuple[Any, Any, int]:
    model: Any = AutoModelForImageTextToText.from_pretrained(
        embedded.path(), dtype=torch.float32, attn_implementation=attention
    )
    return model, AutoProcessor.from_pretrained(embedded.path()), embedded.patches()[0]


def _inputs(processor: Any, scene: Scene, question: Question) -> Any:
    picture = Image.fromarray(render(scene, _PATCH))
    text = f"USER: <image>\n{question.text} ASSISTANT:"
    return processor(text=text, images=picture, return_tensors="pt")


def _answer(model: Any, processor: Any, inputs: Any) -> str:
    out = model.generate(**inputs)
    return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@app.command()
def attention(file: File, seed: int = 5) -> None:
    """Attention of the question's tokens to the picture, mean over heads and text rows, in each layer."""
    model, processor, grid = _loaded("eager")
    layers = model.config.text_config.num_hidden_layers
    shown = list(range(0, layers, max(1, layers // 8)))
    figure, axes = plt.subplots(len(_KINDS), 1 + len(shown), figsize=(2 * (1 + len(shown)), 2.7 * len(_KINDS)))
    for row, kind in zip(axes, _KINDS, strict=True):
        scene, question = next(
            (scene, asked[0])
            for scene in (sample_scene(SPLITS["test"][seed + i], grid) for i in range(1000))
            if (asked := questions_for(scene, 0, 1, kinds=(kind,)))
        )
        inputs = _inputs(processor, scene, question)
        with torch.no_grad():
            attentions = model(**inputs, output_attentions=True).attentions
        picture = Image.fromarray(render(scene, _PATCH))
        last = int((inputs["input_ids"][0] == processor.image_token_id).nonzero().max())
        row[0].imshow(picture)
        row[0].set_title(textwrap.fill(f"{question.text}? {_answer(model, processor, inputs)}", 30), fontsize=8)
        for axis, layer in zip(row[1:], shown, strict=True):
            seen = attentions[layer][0, :, last + 1 :].mean((0, 1))
            seen = seen[inputs["input_ids"][0] == processor.image_token_id]
            axis.imshow(np.asarray(picture.convert("L")), cmap="gray", alpha=0.6)
            heat = seen.reshape(grid, grid).numpy()
            axis.imshow(heat, cmap="inferno", alpha=0.7, extent=(0, picture.width, picture.height, 0))
            axis.set_title(f"layer {layer}: {100 * float(seen.sum()):.0f} %", fontsize=8)
        for axis in row:
            axis.axis("off")
    figure.suptitle("Where the question looks; in % the attention that goes to the picture")
    figure.tight_layout()
    figure.savefig(file, dpi=90)
    plt.close(figure)


@app.command()
def failures(file: File) -> None:
    """Questions on test scenes that the model gets wrong, no two of one kind while there are others."""
    model, processor, grid = _loaded("sdpa")
    found: dict[str, tuple[Scene, Question, str]] = {}
    for seed in SPLITS["test"][:_LOOKED_AT]:
        scene = sample_scene(seed, grid)
        for question in questions_for(scene, 0, 6):
            if question.kind in found:
                continue
            given = _answer(model, processor, _inputs(processor, scene, question))
            if not METRICS["exact"](given, [question.answer]):
                found[question.kind] = scene, question, given
        if len(found) == _WRONG:
            break
    kinds = [kind for kind in KINDS if kind in found]
    figure, axes = plt.subplots(2, _WRONG // 2, figsize=(14, 8.4))
    for axis in axes.flat:
        axis.axis("off")
    for axis, kind in zip(axes.flat, kinds, strict=False):
        scene, question, given = found[kind]
        axis.imshow(render(scene, _PATCH))
        text = f"{kind}: {question.text}?"
        told = f"right: {question.answer}   given: {given}"
        axis.set_title(f"{textwrap.fill(text, 44)}\n{textwrap.fill(told, 44)}", fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    app()
