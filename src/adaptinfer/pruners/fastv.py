"""FastV: one stage after an early layer, by the attention of the last token (arXiv 2403.06764)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from adaptinfer.pruners.contracts import Pruner, PrunerError, published_schedules
from adaptinfer.pruners.views import StageView

Rows = Literal["last", "all"]


@dataclasses.dataclass(frozen=True)
class FastV(Pruner):
    """Keep the vision tokens that get the most attention, the mean over heads, in layer K - 1 (K = 2 as published).

    Labels 192, 128 and 64 are true averages; "50%" is the paper's own K = 2, R = 50 %.

    Attributes:
        rows: whose attention counts: that of the ``last`` token of the prompt as in the authors' code, or the mean over
            ``all`` tokens as the paper's text has it.
    """

    name: ClassVar[str] = "fastv"
    reference: ClassVar[str] = "arXiv 2403.06764"
    published = published_schedules({"50%": {1: 0.5}, 192: {1: 166}, 128: {1: 98}, 64: {1: 30}})

    rows: Rows = "last"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows not in get_args(Rows):
            raise PrunerError(f"rows: must be one of {get_args(Rows)}, not {self.rows!r}")

    def score(self, view: StageView) -> Tensor:
        if self.rows == "last":
            return view.last_to_vision
        batch, _, tokens, _ = view.query.shape
        everyone = torch.arange(tokens, device=view.query.device).expand(batch, -1)
        real = torch.ones_like(everyone, dtype=torch.bool) if view.valid is None else view.valid
        received = torch.zeros_like(view.vision_index, dtype=torch.float32)
        for some, attention in view.in_steps(everyone):
            received += (view.to_vision(attention) * real[:, None, some, None]).sum(dim=(1, 2))
        return view.total(received) / (view.all_heads * real.sum(dim=1, keepdim=True))
