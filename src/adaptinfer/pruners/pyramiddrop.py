"""PyramidDrop: half of what is left goes at each of three depths, by the last token's attention (arXiv 2410.17247)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from adaptinfer.pruners.contracts import Capabilities, Pruner, published_schedules
from adaptinfer.pruners.views import StageView


@dataclasses.dataclass(frozen=True)
class PyramidDrop(Pruner):
    """Keep the vision tokens that the last instruction token attends to most, the mean over heads.

    The attention is that of the layer *after* the stage, from queries and keys made of this layer's output. So the
    stage's own layer computes the outputs of all tokens, and the next one makes queries and keys of all of them twice.

    Published are 8 layers each with 576, 288, 144 and 72 tokens, a true average of 270.
    """

    name: ClassVar[str] = "pyramiddrop"
    reference: ClassVar[str] = "arXiv 2410.17247"
    published = published_schedules({"270": {7: 0.5, 15: 0.5, 23: 0.5}})
    published_positions = "compact"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(needs=("next",))

    def score(self, view: StageView) -> Tensor:
        return view.last_to_vision
