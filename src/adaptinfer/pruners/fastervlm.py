"""FasterVLM: the vision tokens that the tower's class token attends to most (arXiv 2412.01818, first version)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from adaptinfer.pruners.before import Read, Selector, of_score

if TYPE_CHECKING:
    from adaptinfer.engine.selection import FeatureView
    from adaptinfer.pruners.base import Selection

__all__ = ["FasterVLM"]


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
    def reads(self) -> tuple[Read, ...]:
        return (Read("attention", self.layer),)

    def select_before(self, view: FeatureView) -> Selection:
        return of_score(view.attention(self.layer).mean(dim=1), view.keep)
