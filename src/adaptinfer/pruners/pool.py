"""The control that looks at nothing: average pooling of each picture to the wanted number of tokens."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import torch
from torch import Tensor

from adaptinfer.pruners.before import Selector
from adaptinfer.pruners.contracts import Selection
from adaptinfer.pruners.selecting import shared_out
from adaptinfer.pruners.views import FeatureView, Grids


@dataclasses.dataclass(frozen=True)
class Pool(Selector):
    """Average pooling of the projected features over cells of about the same size, before the language model.

    A row's budget is shared out over its pictures (frames, crops) by their tokens. A cell's mean stands at the position
    of the token in its middle. Line ends of any-resolution pictures are pooled as one more column.
    """

    name: ClassVar[str] = "pool"
    reference: ClassVar[str] = "control"

    def select_before(self, view: FeatureView) -> Selection:
        device = view.features.device
        middles, members, weights = (
            part.to(device, non_blocking=True) for part in _pooling(sum(view.need_pictures(self.name), ()), view.keep)
        )
        features = view.features.float()
        parts = features[:, members.flatten()].unflatten(1, members.shape)  # [B, keep, m, d]
        means = (parts * weights[..., None]).sum(dim=2)
        kept = torch.zeros(view.count, dtype=torch.bool, device=device).index_fill(0, middles, True)
        kept = kept.expand(len(features), -1)
        return Selection(kept, kept.float(), features.index_copy(1, middles, means))


@functools.lru_cache(maxsize=64)
def _pooling(grids: Grids, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each cell the token in its middle [keep], its members [keep, m] and their weights (fillers: 0); on the CPU."""
    found, start = [], 0
    shares = shared_out(keep, [rows * columns for rows, columns in grids])
    for (rows, columns), count in zip(grids, shares, strict=True):
        found += [(start + middle, [start + each for each in own]) for middle, own in cells(rows, columns, count)]
        start += rows * columns
    members, weights = torch.zeros(2, keep, max(len(own) for _, own in found))
    for cell, (_, own) in enumerate(found):
        members[cell, : len(own)], weights[cell, : len(own)] = torch.tensor(own), 1 / len(own)
    return torch.tensor([middle for middle, _ in found]), members.long(), weights


def cells(rows: int, columns: int, count: int) -> list[tuple[int, list[int]]]:
    """Cut a grid into exactly ``count`` rectangles of about the same size and shape.

    Bands of rows first, as many as make cells nearly as wide as high; then each band into its share of the cells.

    Args:
        rows, columns: of the grid.
        count: at most rows * columns.

    Returns:
        For each cell, row by row: the token in its middle and all its tokens, as numbers row * columns + column.
    """
    if not count:
        return []
    wanted = round((count * rows / columns) ** 0.5)
    bands = min(max(wanted, -(-count // columns)), rows, count)
    found = []
    for band in range(bands):
        top, bottom = band * rows // bands, (band + 1) * rows // bands
        share = (band + 1) * count // bands - band * count // bands
        for cell in range(share):
            left, right = cell * columns // share, (cell + 1) * columns // share
            members = [row * columns + column for row in range(top, bottom) for column in range(left, right)]
            found.append(((top + bottom - 1) // 2 * columns + (left + right - 1) // 2, members))
    return found
