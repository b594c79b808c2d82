"""V2Drop: vision tokens that a layer hardly changes go; no attention needed (arXiv 2509.01552)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from adaptinfer.functional import gather_tokens
from adaptinfer.pruners.contracts import Capabilities, Pruner, published_schedules
from adaptinfer.pruners.views import StageView


@dataclasses.dataclass(frozen=True)
class V2Drop(Pruner):
    """Keep the vision tokens whose hidden states the layer moved farthest, by L2 distance.

    The authors' code drops before layers 3, 17 and 22, half, half and all but one, which is a true average of 202.8;
    other published budgets come without keeps.
    """

    name: ClassVar[str] = "v2drop"
    reference: ClassVar[str] = "arXiv 2509.01552"
    published = published_schedules({"code": {2: 0.5, 16: 0.5, 21: 1}})

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(needs=("output",))

    def score(self, view: StageView) -> Tensor:
        assert view.output is not None
        change = gather_tokens(view.output, view.vision_index, dim=1).float()
        change = change - gather_tokens(view.hidden, view.vision_index, dim=1).float()
        return change.norm(dim=-1)
