"""VisPruner: important vision tokens by class-token attention, and diverse ones among the rest (arXiv 2412.01818)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from adaptinfer.functional import gather_tokens
from adaptinfer.pruners.before import Selector
from adaptinfer.pruners.contracts import Capabilities, Selection, check_setting
from adaptinfer.pruners.selecting import unit
from adaptinfer.pruners.views import FeatureView, Read


@dataclasses.dataclass(frozen=True)
class VisPruner(Selector):
    """Tokens that the class token attends to most, and of the others those that are no near-duplicates.

    A share of the budget goes by attention, the rest to what is left after near-duplicates have been dropped a few at a
    time. Similarity is the cosine of features in front of the projector, where a model projects token by token (LLaVA).
    Line ends of crops, which the authors' code always keeps beyond the budget, are duplicates of one another here.

    Attributes:
        important_share: of the budget, that goes by attention; parts of a token are cut off.
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
    def capabilities(self) -> Capabilities:
        return Capabilities(before=True, reads=(Read("attention", self.layer), Read("projector")))

    def select_before(self, view: FeatureView) -> Selection:
        attention = view.attention(self.layer).mean(dim=1)
        important = int(view.keep * self.important_share)
        order = attention.sort(dim=1, descending=True, stable=True).indices
        picked, rest = order[:, :important], order[:, important:]
        features = torch.cat([unit(view.unprojected()[0]), view.line_ends()[..., None]], dim=2)
        left = without_duplicates(gather_tokens(features, rest, dim=1), view.keep - important, self.step)
        kept = torch.zeros_like(attention, dtype=torch.bool)
        return Selection(kept.scatter(1, torch.cat([picked, rest.gather(1, left)], dim=1), True), attention)


def without_duplicates(features: Tensor, count: int, step: int) -> Tensor:
    """Drop near-duplicates until ``count`` tokens are left.

    Each round pairs the tokens at even places with those at odd places and drops, of the even ones, the ``step`` whose
    nearest odd one is most similar. The next round's places: first the other even ones, the most similar first, then
    the odd ones in their order.

    Args:
        features: [B, n, d].
        count: at most n.
        step: most that one round drops.

    Returns:
        int64 [B, count], places among the n, in the order of the last round.
    """
    points = unit(features)
    left = torch.arange(points.shape[1], device=points.device).expand(points.shape[0], -1)
    while left.shape[1] > count:
        if left.shape[1] == 1:
            return left[:, :0]  # no other to resemble
        now = gather_tokens(points, left, dim=1)
        likeness = (now[:, ::2] @ now[:, 1::2].transpose(1, 2)).amax(dim=2)
        stay = likeness.sort(dim=1, descending=True, stable=True).indices[:, min(step, left.shape[1] - count) :]
        left = torch.cat([left[:, ::2].gather(1, stay), left[:, 1::2]], dim=1)
    return left
