"""Controls that only an evaluation can have: it knows where the evidence lies, and it may change the pictures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import torch
from PIL import Image, ImageStat
from torch import Tensor

from adaptinfer.errors import InputError
from adaptinfer.evaluation.samples import Cell
from adaptinfer.functional import counter_uniform, marked_first
from adaptinfer.pruners.before import Selector
from adaptinfer.pruners.contracts import Pruner, Selection
from adaptinfer.pruners.selecting import of_score
from adaptinfer.pruners.views import FeatureView, StageView

RESIZED = "resized"
"""The control that is no change of pictures alone: `adaptinfer.resize.Resize` at each budget."""

_TILES = 8  # along each side of a shuffled picture


@dataclasses.dataclass(frozen=True)
class Evidence(Pruner):
    """Keep the tokens of what is asked about, and fill up at random: what a perfect choice of tokens would reach.

    Attributes:
        cells: per sample, numbers of its vision tokens in the order of the prompt.
        counts: per sample, how many vision tokens it has.
        seed: of the tokens that fill up.
    """

    name: ClassVar[str] = "evidence"
    reference: ClassVar[str] = "control"

    cells: tuple[tuple[int, ...], ...] = ()
    counts: tuple[int, ...] = ()
    seed: int = 0

    def score(self, view: StageView) -> Tensor:
        ranking = _ranking(self, view.vision_index.device)
        # One ranking for all stages, so the tokens that entered this one are the best of it.
        entered = view.vision_index.shape[1]
        here = entered if view.vision_mask is None else view.vision_mask.sum(dim=1, keepdim=True)
        places = ranking.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        alive = marked_first(places < here, entered)
        return ranking.gather(1, alive)


@dataclasses.dataclass(frozen=True)
class EvidenceBefore(Selector):
    """The same before the language model, so that no layer ever sees another token.

    Attributes:
        cells, counts, seed: as in `Evidence`.
    """

    name: ClassVar[str] = "evidence-before"
    reference: ClassVar[str] = "control"

    cells: tuple[tuple[int, ...], ...] = ()
    counts: tuple[int, ...] = ()
    seed: int = 0

    def select_before(self, view: FeatureView) -> Selection:
        ranking = _ranking(self, view.features.device)[:, : view.count]
        return of_score(ranking if view.rows is None else ranking.index_select(0, view.rows), view.keep)


def _ranking(control: Evidence | EvidenceBefore, device: torch.device) -> Tensor:
    """Evidence above the rest in random order above fillers, float32 [B, V]."""
    width = max(control.counts)
    ranking = counter_uniform(width, control.seed, 0, device).repeat(len(control.counts), 1)
    for row, (tokens, count) in enumerate(zip(control.cells, control.counts, strict=True)):
        ranking[row, list(tokens)] += 1
        ranking[row, count:] = -1
    return ranking


ORACLES: dict[str, type[Evidence | EvidenceBefore]] = {each.name: each for each in (Evidence, EvidenceBefore)}
"""Controls that know where the evidence lies, by name."""


def evidence_tokens(
    cells: Sequence[Cell], grid: tuple[int, int] | None, pictures: int, vision_tokens: int
) -> list[int]:
    """Numbers of the vision tokens that show some cells.

    Args:
        cells: of the evidence.
        grid: rows and columns that they count.
        pictures: in the prompt, each with the same number of vision tokens, laid out in rows.
        vision_tokens: in the prompt.

    Raises:
        InputError: the task tells no evidence, or its grid is not the model's (or a coarser one that fits into it).
    """
    if grid is None:
        raise InputError("evidence: this task does not say where the evidence lies")
    rows, columns = grid
    each, rest = divmod(vision_tokens, pictures)
    scale = math.isqrt(each // (rows * columns))
    if rest or each != rows * columns * scale * scale:
        raise InputError(
            f"evidence: a picture of this model has {each} vision tokens, "
            f"and the evidence is on a grid of {rows} x {columns}"
        )
    return [
        picture * each + (row * scale + down) * columns * scale + column * scale + right
        for picture, row, column in cells
        for down in range(scale)
        for right in range(scale)
    ]


# Changes of pictures: (picture, number of the sample) -> picture.


def _blank(picture: Image.Image, number: int) -> Image.Image:
    mean = tuple(round(value) for value in ImageStat.Stat(picture).mean)
    return Image.new("RGB", picture.size, mean)


def _shuffled(picture: Image.Image, number: int) -> Image.Image:
    width, height = (max(_TILES, edge // _TILES * _TILES) for edge in picture.size)
    values = np.asarray(picture.resize((width, height)) if (width, height) != picture.size else picture)
    tiles = values.reshape(_TILES, height // _TILES, _TILES, width // _TILES, 3).swapaxes(1, 2)
    tiles = tiles.reshape(_TILES * _TILES, height // _TILES, width // _TILES, 3)
    order = torch.randperm(len(tiles), generator=torch.Generator().manual_seed(number)).numpy()
    mixed = tiles[order].reshape(_TILES, _TILES, height // _TILES, width // _TILES, 3).swapaxes(1, 2)
    return Image.fromarray(np.ascontiguousarray(mixed.reshape(height, width, 3)))


def _wrong(picture: Image.Image, number: int) -> Image.Image:
    return picture  # the runner hands in another sample's


VIEWS: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "blank": _blank,
    "shuffled": _shuffled,
    "wrong": _wrong,
}
"""Changes of pictures, by name.

- ``blank``: one colour, the picture's mean: what can be answered without looking.
- ``shuffled``: cut into 8 x 8 tiles, in random order: what needs no positions.
- ``wrong``: another sample's picture.
"""
