"""DART: keep what is least like a few pivot tokens; no attention needed (arXiv 2502.11494)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from adaptinfer.functional import gather_tokens, per_sample, top_k_mask
from adaptinfer.pruners.contracts import Capabilities, Pruner, PrunerError, Selection, published_schedules
from adaptinfer.pruners.views import StageView


@dataclasses.dataclass(frozen=True)
class DART(Pruner):
    """Keep pivots, and for each pivot in turn the vision tokens that are least similar to it.

    Pivots are the vision and the text tokens whose keys have the largest L1 norm (after rotary embedding, over all
    heads), vision first, larger norms first (the authors' code takes them in the order of a hash set). Similarity is
    the cosine of the hidden states that leave the layer, after the model's last normalisation; each pivot takes an
    equal share of what is to be kept from the tokens that are left, a share larger by one if it comes early. Of 64 that
    is 4 + 8 · 8: labels 192, 128 and 64 keep 8 ⌊T / 8⌋ + 4 after layer 1, true averages of 219.8, 159.8 and 99.8.

    Attributes:
        pivots: of each kind.
    """

    name: ClassVar[str] = "dart"
    reference: ClassVar[str] = "arXiv 2502.11494"
    published = published_schedules({label: {1: label // 8 * 8 + 4} for label in (192, 128, 64)})

    pivots: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.pivots, bool) or not isinstance(self.pivots, int) or self.pivots < 1:
            raise PrunerError(f"pivots: must be a whole number of at least 1, not {self.pivots!r}")

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(needs=("output", "norm"))

    def select(self, view: StageView, keeps: tuple[int, ...]) -> Selection:
        assert view.output is not None and view.final_norm is not None
        states = normalize(view.final_norm(view.output).to(view.output.device).float(), dim=-1)
        norms = view.total(view.key[:, :, view.past :].float().abs().sum(dim=(1, 3)))

        # Pivots of both kinds [B, P] and which of them there are; a sample that keeps fewer has fewer of vision.
        own, own_there = self._largest(norms, view.vision_index, view.vision_mask, per_sample(keeps, norms.device))
        text, text_there = self._largest(norms, view.text_index, view.text_mask, self.pivots)
        pivots, there = torch.cat([own, text], dim=1), torch.cat([own_there, text_there], dim=1)

        # What is left to keep is shared out among them.
        rest = per_sample(keeps, norms.device) - own_there.sum(dim=1, keepdim=True)
        count = there.sum(dim=1, keepdim=True).clamp(min=1)
        shares = (rest // count + (there.cumsum(dim=1) <= rest % count)) * there

        vision = gather_tokens(states, view.vision_index, dim=1)
        left = torch.ones_like(view.vision_index, dtype=torch.bool) if view.vision_mask is None else view.vision_mask
        is_pivot = (view.vision_index[:, :, None] == own[:, None, :]) & own_there[:, None, :]
        kept = is_pivot.any(dim=2) & left
        for pivot, share in zip(pivots.split(1, dim=1), shares.split(1, dim=1), strict=True):
            likeness = (vision * gather_tokens(states, pivot, dim=1)).sum(dim=-1)
            kept = kept | top_k_mask(-likeness, left & ~kept, share)
        return Selection(kept, kept.float())

    def _largest(self, norms: Tensor, index: Tensor, mask: Tensor | None, most: int | Tensor) -> tuple[Tensor, Tensor]:
        """Tokens with the largest norms, at most ``pivots``, int64 [B, P]; which are real and among the ``most``."""
        values = norms.gather(1, index)
        values = values if mask is None else values.masked_fill(~mask, -1.0)
        order = values.sort(dim=1, descending=True, stable=True).indices[:, : self.pivots]
        there = (torch.arange(order.shape[1], device=order.device) < most).expand_as(order)
        return index.gather(1, order), there if mask is None else there & mask.gather(1, order)
