"""FasterVLM: the vision tokens that the tower's class token attends to most (arXiv 2412.01818, first version)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from adaptinfer.pruners.before import Selector
from adaptinfer.pruners.contracts import Capabilities, Selection
from adaptinfer.pruners.selecting import of_score
from adaptinfer.pruners.views import FeatureView, Read


@dataclasses.dataclass(frozen=True)
class FasterVLM(Selector):
    """The largest attention of the class token, the mean over heads; the text plays no part.

    Towers without a class token (SigLIP, Qwen-VL): the attention that a token receives, averaged over all tokens.

    Attributes:
        layer: block of the vision tower; -2 is the one whose output LLaVA reads.
    """

    name: ClassVar[str] = "fastervlm"
    reference: ClassVar[str] = "arXiv 2412.01818v1"

    layer: int = -2

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(before=True, reads=(Read("attention", self.layer),))

    def select_before(self, view: FeatureView) -> Selection:
        return of_score(view.attention(self.layer).mean(dim=1), view.keep)
