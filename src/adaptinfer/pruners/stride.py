"""The control that needs no model: every n-th vision token."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from adaptinfer.functional import evenly_spaced
from adaptinfer.pruners.contracts import Pruner, Selection
from adaptinfer.pruners.views import StageView


@dataclasses.dataclass(frozen=True)
class Stride(Pruner):
    """Keep vision tokens evenly spaced in the prompt; a later stage takes them evenly from those."""

    name: ClassVar[str] = "stride"
    reference: ClassVar[str] = "control"

    def select(self, view: StageView, keeps: tuple[int, ...]) -> Selection:
        kept = evenly_spaced(view.vision_counts, keeps, view.vision_index.device)
        return Selection(kept, kept.float())
