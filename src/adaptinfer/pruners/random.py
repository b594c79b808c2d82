"""The control that every method must beat: vision tokens chosen at random."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from adaptinfer.functional import counter_uniform
from adaptinfer.pruners.contracts import Pruner, PrunerError
from adaptinfer.pruners.views import StageView


@dataclasses.dataclass(frozen=True)
class Random(Pruner):
    """Keep vision tokens at random: the same ones for the same seed, alone or in a batch, on every device.

    Attributes:
        seed: change it from sample to sample when measuring, for the choice depends on nothing else.
    """

    name: ClassVar[str] = "random"
    reference: ClassVar[str] = "control"

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise PrunerError(f"seed: must be an integer, not {self.seed!r}")

    def score(self, view: StageView) -> Tensor:
        batch, count = view.vision_index.shape
        return counter_uniform(count, self.seed, view.layer, view.vision_index.device).expand(batch, count)
