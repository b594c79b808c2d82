"""VisPruner: important vision tokens by class-token attention, and diverse ones among the rest (arXiv 2412.01818)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import torch

from adaptinfer.functional import gather_tokens, marked_first
from adaptinfer.pruners.base import Selection
from adaptinfer.pruners.before import Read, Selector, check_setting, split, top, unit

if TYPE_CHECKING:
    from torch import Tensor

    from adaptinfer.engine.selection import FeatureView

__all__ = ["VisPruner", "without_duplicates"]


@dataclasses.dataclass(frozen=True)
class VisPruner(Selector):
    """Tokens that the class token attends to most, and of the others those that are no near-duplicates.

    A share of the budget goes by attention, the rest to what is left after near-duplicates have been dropped a few at a
    time. Similarity is the cosine of projected features.

    Attributes:
        important_share: of the budget, that goes by attention.
        layer: block of the vision tower.
        step: near-duplicates dropped at once.
    """

    name: ClassVar[str] = "vispruner"
    reference: ClassVar[str] = "arXiv 2412.01818"

    important_share: float = 0.5
    layer: int = -2
    step: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_setting("important_share", self.important_share, 0, 1)
        check_setting("step", self.step, 1, 2**20, whole=True)

    @property
    def reads(self) -> tuple[Read, ...]:
        return (Read("attention", self.layer),)

    def select_before(self, view: FeatureView) -> Selection:
        attention = view.attention(self.layer).mean(dim=1)
        important, diverse = split(view.keep, self.important_share)
        kept = top(attention, important)
        rest = marked_first(~kept, view.count - important)
        features = gather_tokens(view.features, rest, dim=1)
        distinct = rest.gather(1, without_duplicates(features, diverse, self.step))
        return Selection(kept.scatter(1, distinct, True), attention)


def without_duplicates(features: Tensor, count: int, step: int) -> Tensor:
    """Drop near-duplicates until ``count`` tokens are left.

    Each round pairs the tokens at even places with those at odd places and drops, of the even ones, the ``step`` whose
    nearest odd one is most similar; the others keep their order.

    Args:
        features: [B, n, d].
        count: at most n.
        step: most that one round drops.

    Returns:
        int64 [B, count], ascending.
    """
    points = unit(features)
    left = torch.arange(points.shape[1], device=points.device).expand(points.shape[0], -1)
    while left.shape[1] > count:
        if left.shape[1] == 1:
            return left[:, :0]  # no other to resemble
        now = gather_tokens(points, left, dim=1)
        likeness = (now[:, ::2] @ now[:, 1::2].transpose(1, 2)).amax(dim=2)
        dropped = min(step, left.shape[1] - count, likeness.shape[1])
        gone = torch.zeros_like(left, dtype=torch.bool)
        gone[:, ::2] = top(likeness, dropped)
        left = left.gather(1, marked_first(~gone, left.shape[1] - dropped))
    return left
