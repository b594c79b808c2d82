"""Controls before the language model: tokens at random, and every n-th. Inside it `Random` and `Stride` do the same."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from adaptinfer.functional import counter_uniform, evenly_spaced
from adaptinfer.pruners.before import Selector
from adaptinfer.pruners.contracts import Selection, check_setting
from adaptinfer.pruners.selecting import of_score
from adaptinfer.pruners.views import FeatureView


@dataclasses.dataclass(frozen=True)
class RandomBefore(Selector):
    """Keep vision tokens at random, before the language model; the same ones for the same seed.

    Attributes:
        seed: change it from sample to sample when measuring, for the choice depends on nothing else.
    """

    name: ClassVar[str] = "random-before"
    reference: ClassVar[str] = "control"

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_setting("seed", self.seed, 0, 2**63 - 1, whole=True)

    def select_before(self, view: FeatureView) -> Selection:
        numbers = counter_uniform(view.count, self.seed, view.layer, view.features.device)
        return of_score(numbers.expand(len(view.features), -1), view.keep)


@dataclasses.dataclass(frozen=True)
class StrideBefore(Selector):
    """Keep vision tokens evenly spaced in the prompt, before the language model."""

    name: ClassVar[str] = "stride-before"
    reference: ClassVar[str] = "control"

    def select_before(self, view: FeatureView) -> Selection:
        rows = len(view.features)
        kept = evenly_spaced([view.count] * rows, [view.keep] * rows, view.features.device)
        return Selection(kept, kept.float())
