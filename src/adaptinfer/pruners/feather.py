"""FEATHER: attention without position, united with an even sample of the picture (arXiv 2412.13180)."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from adaptinfer.functional import attention_rows, gather_tokens, per_sample, top_k_mask
from adaptinfer.pruners.contracts import Capabilities, Pruner, PrunerError, Selection, published_schedules
from adaptinfer.pruners.views import StageView


@dataclasses.dataclass(frozen=True)
class FEATHER(Pruner):
    """Keep what the last token attends to most without rotary embedding; at the first stage, an even sample as well.

    With rotary embedding, tokens near the question win, which is the bottom of the picture. The score is the softmax
    over vision tokens alone, the mean over heads. The even sample is every third token of every third row of a square
    picture, every ninth token of anything else.

    The published first stage unites the best 30 % with the sample, so its size varies with the picture. Here the best
    of the others fill the sample up to a fixed number: as published the size to expect if both were independent, 217 of
    576, then 9 % of these. Where so few are kept that the sample would take more than half, its stride is wider.

    Attributes:
        stride: of the even sample, in rows and columns.
    """

    name: ClassVar[str] = "feather"
    reference: ClassVar[str] = "arXiv 2412.13180"
    published = published_schedules({"70%": {7: 217, 15: 19}})

    stride: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.stride, bool) or not isinstance(self.stride, int) or self.stride < 1:
            raise PrunerError(f"stride: must be a whole number of at least 1, not {self.stride!r}")

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(needs=("rotary",))

    def score(self, view: StageView) -> Tensor:
        plain = view.without_rotary
        query = gather_tokens(plain.query, view.last_text, dim=2)
        key = gather_tokens(plain.key, view.vision_index, dim=2)
        mask = None if view.vision_mask is None else view.vision_mask[:, None, None, :]
        attention = attention_rows(query, key, view.scaling, mask, view.softcap)
        return view.total(attention.sum(dim=1)[:, 0]) / view.all_heads

    def select(self, view: StageView, keeps: tuple[int, ...]) -> Selection:
        score = self.score(view)
        candidates = torch.ones_like(score, dtype=torch.bool) if view.vision_mask is None else view.vision_mask
        ranking = score
        if view.first:  # no score exceeds 1
            ranking = score + 2 * (self._even_sample(view.vision_counts, keeps, score.device) & candidates)
        return Selection(top_k_mask(ranking, candidates, per_sample(keeps, score.device)), score)

    def _even_sample(self, counts: tuple[int, ...], keeps: tuple[int, ...], device: torch.device) -> Tensor:
        """bool [B or 1, V]."""
        sizes = [_grid(count) for count in counts]
        strides = [self._stride(size, keep) for size, keep in zip(sizes, keeps, strict=True)]
        place = torch.arange(max(counts), device=device)[None]
        width = per_sample([columns for _, columns in sizes], device)
        down = per_sample([rows for rows, _ in strides], device)
        across = per_sample([columns for _, columns in strides], device)
        return (place // width % down == 0) & (place % width % across == 0)

    def _stride(self, size: tuple[int, int], keep: int) -> tuple[int, int]:
        """Stride down and across a grid, such that the sample is at most half of what is kept."""
        rows, columns = size
        step = self.stride
        while True:
            strides = (step, step) if rows > 1 else (1, step * step)
            sample = math.ceil(rows / strides[0]) * math.ceil(columns / strides[1])
            if 2 * sample <= keep or sample == 1:
                return strides
            step += 1


def _grid(tokens: int) -> tuple[int, int]:
    """Rows and columns of a square picture; anything else is one row."""
    side = math.isqrt(tokens)
    return (side, side) if side * side == tokens and tokens else (1, max(1, tokens))
