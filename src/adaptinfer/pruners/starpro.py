"""STAR-Pro: coverage before the language model, two stages of rater attention inside it (arXiv 2609.05916)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from adaptinfer.functional import gather_tokens
from adaptinfer.pruners.before import Selector, TwoPart
from adaptinfer.pruners.contracts import Pruner, Selection, published_schedules
from adaptinfer.pruners.selecting import of_order
from adaptinfer.pruners.sparsevlm import SparseVLM
from adaptinfer.pruners.views import FeatureView
from adaptinfer.pruners.vscan import staged
from adaptinfer.schedule import BEFORE, Schedule


@dataclasses.dataclass(frozen=True)
class Coverage(Selector):
    """STAR-Pro's part before the language model: the tokens that span the projected features best."""

    name: ClassVar[str] = "coverage"
    reference: ClassVar[str] = "arXiv 2609.05916"

    def select_before(self, view: FeatureView) -> Selection:
        return of_order(pivots(view.features, view.keep), view.count)


def pivots(features: Tensor, count: int) -> Tensor:
    """The pivots of a QR decomposition with column pivoting, a token's features being a column.

    Each step picks the token with the largest part that the picked ones do not span yet; of equal ones, and once they
    span everything, the earlier.

    Args:
        features: [B, V, d].
        count: 1 <= count <= V.

    Returns:
        int64 [B, count], in the order of picking.
    """
    rest = features.float()
    taken = torch.zeros(rest.shape[:2], dtype=torch.bool, device=rest.device)
    whole = rest.square().sum(dim=2).amax(dim=1, keepdim=True)
    picked = []
    for _ in range(count):
        left = rest.square().sum(dim=2)
        left = torch.where(left > 1e-10 * whole, left, 0).masked_fill(taken, -1)  # below is rounding
        best = left.argmax(dim=1, keepdim=True)
        picked.append(best)
        taken = taken.scatter(1, best, True)
        direction = torch.nn.functional.normalize(gather_tokens(rest, best, dim=1), dim=2)
        rest = rest - (rest @ direction.transpose(1, 2)) * direction
    return torch.cat(picked, dim=1)


@dataclasses.dataclass(frozen=True)
class STARPro(TwoPart):
    """Coverage of the features before the language model, and two stages of rater attention inside it.

    `Coverage` keeps twice the budget T; after 3/8 and 3/4 of the layers the attention of SparseVLM's raters keeps T / 2
    and T / 4, which is a true average of T.
    """

    name: ClassVar[str] = "starpro"
    reference: ClassVar[str] = "arXiv 2609.05916"
    published = published_schedules(
        {label: {BEFORE: 2 * label, 11: label // 2, 23: label // 4} for label in (192, 128, 64)}
    )

    @property
    def parts(self) -> tuple[Any, Pruner]:
        return Coverage(budget=1), SparseVLM(budget=1, recycled=0)

    def plan(self, num_layers: int, vision_tokens: int, scoring: Sequence[int] | None = None) -> Schedule:
        if self.budget is None:
            return super().plan(num_layers, vision_tokens, scoring)
        shape = {num_layers * 3 // 8 - 1: 2, num_layers * 3 // 4 - 1: 1}
        return staged(self.budget, num_layers, vision_tokens, scoring, 2, shape)
