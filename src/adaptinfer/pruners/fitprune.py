"""FitPrune: a few vision tokens go in every layer, by a list fitted to attention statistics (arXiv 2409.10197)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from adaptinfer.pruners.contracts import Capabilities, Pruner, published_schedules
from adaptinfer.pruners.views import StageView

# Tokens deleted in layers 0, 1, ... of LLaVA-1.5-7B, by the FLOPs that are saved; none in later layers.
_DELETED = {
    "60%": (14, 33, 89, 36, 36, 20, 55, 21, 18, 4, 7, 5, 2, 5, 7, 4, 26, 5, 11, 24, 4, 18, 2, 1, 0, 0, 1, 0, 1),
    "70%": (48, 79, 118, 41, 33, 17, 36, 9, 9, 2, 3, 2, 1, 3, 4, 8, 18, 7, 8, 20, 4, 13, 2, 1, 0, 0, 1, 0, 1),
    "80%": (128, 127, 118, 35, 26, 8, 13, 3, 2, 1, 0, 0, 0, 2, 1, 8, 7, 8, 5, 11, 2, 6, 1, 1, 0, 0, 0, 1),
    "90%": (262, 153, 80, 19, 13, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 1, 2, 0, 1, 0, 0, 0, 0, 0, 1),
}


def _keeps(deleted: tuple[int, ...]) -> dict[int, int]:
    return {layer: 576 - sum(deleted[: layer + 1]) for layer, count in enumerate(deleted) if count}


@dataclasses.dataclass(frozen=True)
class FitPrune(Pruner):
    """Keep vision tokens with a large product of cross- and self-attention.

    Both are means of the attention that a token receives, from text and from vision tokens; of each row the largest
    over heads counts. How many go in which layer is a list made offline, so that attention changes least for what is
    saved. A budget stretches the nearest published list; labels are the FLOPs saved on LLaVA-1.5-7B.
    """

    name: ClassVar[str] = "fitprune"
    reference: ClassVar[str] = "arXiv 2409.10197"
    published = published_schedules({label: _keeps(deleted) for label, deleted in _DELETED.items()})

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(all_heads="takes the largest attention over heads")

    def score(self, view: StageView) -> Tensor:
        cross = self._received(view, view.text_index, view.text_mask)
        return cross * self._received(view, view.vision_index, view.vision_mask)

    def _received(self, view: StageView, rows: Tensor, mask: Tensor | None) -> Tensor:
        """Attention that vision tokens receive from some rows, the largest over heads, [B, V]; the mean over rows."""
        received = torch.zeros_like(view.vision_index, dtype=torch.float32)
        for some, attention in view.in_steps(rows):
            largest = view.to_vision(attention).amax(dim=1)
            received += (largest if mask is None else largest * mask[:, some, None]).sum(dim=1)
        return received / (rows.shape[1] if mask is None else mask.sum(dim=1, keepdim=True).clamp(min=1))
