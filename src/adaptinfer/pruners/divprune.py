"""DivPrune: the subset of vision tokens whose members lie furthest apart (arXiv 2503.02175)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from adaptinfer.functional import gather_tokens
from adaptinfer.pruners.before import Selector
from adaptinfer.pruners.contracts import Selection
from adaptinfer.pruners.selecting import of_order, unit
from adaptinfer.pruners.views import FeatureView

_LARGEST = 2**24  # entries of the similarity matrix held at once


@dataclasses.dataclass(frozen=True)
class DivPrune(Selector):
    """Greedy max-min diversity of the projected features, with the distance 1 - cosine; the text plays no part."""

    name: ClassVar[str] = "divprune"
    reference: ClassVar[str] = "arXiv 2503.02175"

    def select_before(self, view: FeatureView) -> Selection:
        return of_order(farthest_first(view.features, view.keep), view.count)


def farthest_first(features: Tensor, count: int) -> Tensor:
    """Pick tokens one by one, each the one whose nearest picked token is furthest away.

    The first is the token whose nearest neighbour is furthest away. Of equal ones the earlier is picked.

    Args:
        features: [B, V, d].
        count: 1 <= count <= V.

    Returns:
        int64 [B, count], in the order of picking.
    """
    points = unit(features)
    batch, total, _ = points.shape
    step = max(1, _LARGEST // (batch * total))
    lonely = []
    for start in range(0, total, step):
        similar = points[:, start : start + step] @ points.transpose(1, 2)
        own = torch.arange(start, start + similar.shape[1], device=points.device)
        similar.scatter_(2, own.expand(batch, -1)[..., None], float("-inf"))
        lonely.append(1 - similar.amax(dim=2))
    distance = torch.cat(lonely, dim=1)
    picked = [distance.argmax(dim=1, keepdim=True)]
    nearest = torch.full_like(distance, float("inf"))
    for _ in range(count - 1):
        last = gather_tokens(points, picked[-1], dim=1)
        nearest = torch.minimum(nearest, 1 - (points @ last.transpose(1, 2))[..., 0])
        nearest = nearest.scatter(1, picked[-1], float("-inf"))
        picked.append(nearest.argmax(dim=1, keepdim=True))
    return torch.cat(picked, dim=1)
