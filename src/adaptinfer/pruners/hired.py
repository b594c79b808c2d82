"""HiRED: a budget for each crop by how much the picture's overview sees there (arXiv 2408.10945)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from adaptinfer.pruners.before import Selector
from adaptinfer.pruners.contracts import Capabilities, Selection, check_setting
from adaptinfer.pruners.selecting import rank_within, shared_out, top
from adaptinfer.pruners.views import FeatureView, Read


@dataclasses.dataclass(frozen=True)
class HiRED(Selector):
    """The tokens that the class token attends to most (sum over heads), within budgets.

    A row's budget is shared out over its pictures by their tokens. Of an any-resolution picture (LLaVA-NeXT) the
    overview gets a fixed share; the rest goes to the crops by how many of the overview's best tokens lie in their part
    of it: those that the class token attends to most early in the tower, of all the share that the overview does not
    get. A picture without crops is a plain choice by attention.

    Two things of the authors' code are not here: it cuts the overview into runs of tokens, whole lines, where crops lie
    side by side as well, and what rounding leaves of a budget it leaves unused.

    Attributes:
        overview_share: of a picture's budget, if it has crops; parts of a token are cut off.
        early_layer: block of the vision tower whose attention divides the budget.
        layer: block whose attention chooses.
    """

    name: ClassVar[str] = "hired"
    reference: ClassVar[str] = "arXiv 2408.10945"

    overview_share: float = 0.5
    early_layer: int = 0
    layer: int = -2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_setting("overview_share", self.overview_share, 0, 1)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(before=True, reads=(Read("attention", self.layer), Read("attention", self.early_layer)))

    def select_before(self, view: FeatureView) -> Selection:
        pictures = view.need_pictures(self.name)
        attention = view.attention(self.layer).sum(dim=1)
        sizes = [sum(rows * columns for rows, columns in grids) for grids in pictures]
        parts, start = [], 0
        for grids, size, keep in zip(pictures, sizes, shared_out(view.keep, sizes), strict=True):
            here = slice(start, start + size)
            parts.append(self._of_picture(view, grids, here, attention[:, here], keep))
            start += size
        return Selection(torch.cat(parts, dim=1), attention)

    def _of_picture(self, view: FeatureView, grids: tuple, here: slice, attention: Tensor, keep: int) -> Tensor:
        """Marks ``keep`` tokens of one picture, bool [B, size]."""
        if not view.cropped or len(grids) != 2 or grids[1] == (1, 1):  # no crops: one line end stands there
            return top(attention, keep)
        (rows, columns), (high, wide) = grids
        overview = rows * columns
        first = int(keep * self.overview_share)
        first = min(max(first, keep - high * wide), overview)  # what one part has no room for, the other takes
        rest = keep - first
        crops = view.crops()[:, here]
        early = view.attention(self.early_layer).sum(dim=1)[:, here][:, :overview]
        strong = top(early, max(1, int(overview * (1 - self.overview_share)))).float()
        # The crop that lies over each patch of the overview; the last column holds line ends.
        down = torch.arange(rows, device=early.device) * high // rows
        across = torch.arange(columns, device=early.device) * max(1, wide - 1) // columns
        over = crops[:, overview:][:, (down[:, None] * wide + across).flatten()]
        share = ((crops[:, overview:, None] == over[:, None, :]) * strong[:, None, :]).sum(dim=2)
        detail = apportioned(crops[:, overview:], share, attention[:, overview:], rest)
        return torch.cat([top(attention[:, :overview], first), detail], dim=1)


def apportioned(group: Tensor, share: Tensor, score: Tensor, keep: int) -> Tensor:
    """Mark the best tokens of each group, groups by their shares: exactly ``keep``, by highest quotients.

    The token in place r (from 0) of a group with share s asks for a seat with s / (r + 1/2), as in the method of
    Sainte-Laguë, so that no rounding of budgets is left over and a full group passes its seats on.

    Args:
        group: int64 [B, n].
        share: float [B, n], that of each token's group.
        score: float [B, n].
        keep: at most n.

    Returns:
        bool [B, n].
    """
    return top(share / (rank_within(group, score) + 0.5), keep)
