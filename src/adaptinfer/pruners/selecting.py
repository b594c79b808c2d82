"""What methods before the language model have in common: whole parts of a budget, and choices on tensors."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from adaptinfer.functional import gather_tokens, top_k_mask
from adaptinfer.pruners.contracts import Selection
from adaptinfer.pruners.views import FeatureView


def shared_out(keep: int, sizes: Sequence[int]) -> list[int]:
    """Whole parts of a budget in proportion to sizes, by largest remainder; of equal ones the earlier gets more."""
    total = sum(sizes)
    parts = [keep * size // total for size in sizes]
    order = sorted(range(len(sizes)), key=lambda i: (-(keep * sizes[i] % total), i))
    for i in order[: keep - sum(parts)]:
        parts[i] += 1
    return parts


# -- what selections have in common, on tensors ---------------------------------------------------------------------


def unit(features: Tensor) -> Tensor:
    """Vectors of length 1, float32; a vector of zeros stays one. Any shape, along the last dimension."""
    return torch.nn.functional.normalize(features.float(), dim=-1)


def of_order(picked: Tensor, count: int) -> Selection:
    """The selection of a method that picks one token after the other.

    Args:
        picked: int64 [B, k], positions in the order of picking.
        count: V.
    """
    order = torch.arange(picked.shape[1], 0, -1, device=picked.device, dtype=torch.float32).expand(picked.shape)
    score = torch.zeros(picked.shape[0], count, device=picked.device).scatter_(1, picked, order)
    return Selection(score > 0, score)


def of_score(score: Tensor, keep: int) -> Selection:
    """The selection of the ``keep`` largest scores, [B, V]; of equal ones the earlier."""
    return Selection(top(score, keep), score)


def top(score: Tensor, keep: int) -> Tensor:
    """Marks the ``keep`` largest of each row, bool [B, V]; of equal scores the earlier wins."""
    return top_k_mask(score, torch.ones_like(score, dtype=torch.bool), keep)


def split(keep: int, share: float) -> tuple[int, int]:
    """Whole parts of a budget, the first one ``share`` of it with halves rounded up."""
    first = int(keep * Fraction(repr(float(share))) + Fraction(1, 2))
    return first, keep - first


def rank_within(group: Tensor, score: Tensor) -> Tensor:
    """The place of each token in its group, 0 for the largest score; of equal scores the earlier comes first.

    Args:
        group: int64 [B, V].
        score: [B, V].

    Returns:
        int64 [B, V].
    """
    best_first = score.sort(dim=1, descending=True, stable=True).indices
    order = best_first.gather(1, group.gather(1, best_first).sort(dim=1, stable=True).indices)
    groups, place = group.gather(1, order), torch.arange(group.shape[1], device=group.device).expand_as(group)
    begins = torch.ones_like(groups, dtype=torch.bool)
    begins[:, 1:] = groups[:, 1:] != groups[:, :-1]
    first = torch.where(begins, place, 0).cummax(dim=1).values
    return torch.zeros_like(group).scatter(1, order, place - first)


def nearest(tokens: Tensor, centres: Tensor, kept: Tensor) -> Tensor:
    """Which centre each token joins, by cosine: bool [B, C, V]; centres themselves and empty vectors join none.

    Args:
        tokens: [B, V, w]; zeros for tokens that the vision tower did not make (line ends).
        centres: int64 [B, C], positions of the centres.
        kept: bool [B, V], tokens that stay what they are, the centres among them.
    """
    points = unit(tokens)
    likeness = gather_tokens(points, centres, dim=1) @ points.transpose(1, 2)  # [B, C, V]
    joins = torch.zeros_like(likeness, dtype=torch.bool).scatter(1, likeness.argmax(dim=1, keepdim=True), True)
    return joins & ~(kept | (points == 0).all(dim=2))[:, None, :]


def with_merged(view: FeatureView, centres: Tensor, changed: Tensor, merged: Tensor) -> Tensor:
    """The features of a row with merged ones at the centres, [B, V, d]; centres that nothing joined stay as they were.

    Args:
        view: the row's.
        centres: int64 [B, C].
        changed: bool [B, C], centres that something joined.
        merged: [B, C, d], outputs of the projector.
    """
    features = view.features.float()
    new = torch.where(changed[..., None], merged, gather_tokens(features, centres, dim=1))
    return features.scatter(1, centres[..., None].expand_as(new), new)
