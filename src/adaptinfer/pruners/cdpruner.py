"""CDPruner: the most diverse set of vision tokens given the question (arXiv 2506.10967)."""

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


@dataclasses.dataclass(frozen=True)
class CDPruner(Selector):
    """Greedy most likely set of a determinantal point process with the kernel diag(r) S diag(r).

    S is the cosine similarity of projected features. The authors' r comes from CLIP's text tower, which checkpoints of
    vision-language models do not carry; here it is the form of the OpenVINO port: the mean cosine between a vision
    token and the language model's own embeddings of the text after the image, scaled to 0..1 within each sample.
    """

    name: ClassVar[str] = "cdpruner"
    reference: ClassVar[str] = "arXiv 2506.10967"

    def select_before(self, view: FeatureView) -> Selection:
        return of_order(likely_set(view.features, relevance(view.features, view.text), view.keep), view.count)


def relevance(features: Tensor, text: Tensor) -> Tensor:
    """Mean cosine of each vision token [B, V, d] with the text tokens [B, T, d], scaled to 0..1 in each row: [B, V]."""
    mean = (unit(features) @ unit(text).mean(dim=1)[..., None])[..., 0]
    least, most = mean.amin(dim=1, keepdim=True), mean.amax(dim=1, keepdim=True)
    return (mean - least) / (most - least).clamp(min=1e-6)


def likely_set(features: Tensor, weight: Tensor, count: int) -> Tensor:
    """Greedy MAP inference of a determinantal point process, by updating a Cholesky factor (arXiv 1709.05135).

    Each step picks the token that multiplies the determinant of the picked tokens' kernel most. Once all that are
    left would make it 0 (more tokens than dimensions), the earliest of them follow.

    Args:
        features: [B, V, d]; the kernel is diag(weight) cosine diag(weight).
        weight: float [B, V], not negative.
        count: 1 <= count <= V.

    Returns:
        int64 [B, count], in the order of picking.
    """
    points = unit(features) * weight[..., None].float()  # their products are the kernel
    gain = points.square().sum(dim=2)
    factor = points.new_zeros(points.shape[0], points.shape[1], count)
    picked = []
    for step in range(count):
        best = gain.argmax(dim=1, keepdim=True)
        picked.append(best)
        own = gather_tokens(points, best, dim=1)
        row = (points @ own.transpose(1, 2))[..., 0]
        before = gather_tokens(factor, best, dim=1)
        row = row - (factor @ before.transpose(1, 2))[..., 0]
        row = row / gain.gather(1, best).clamp(min=1e-12).sqrt()
        factor[:, :, step] = row
        gain = (gain - row.square()).clamp(min=0).scatter(1, torch.cat(picked, dim=1), -1)
    return torch.cat(picked, dim=1)
