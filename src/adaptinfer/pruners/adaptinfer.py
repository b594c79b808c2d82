"""AdaptInfer: the layer's own text-to-text attention weighs its text-to-vision attention (arXiv 2508.06084)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from adaptinfer.functional import score_of_heads
from adaptinfer.pruners.contracts import Pruner, PrunerError
from adaptinfer.pruners.views import StageView
from adaptinfer.schedule import preset


@dataclasses.dataclass(frozen=True)
class AdaptInfer(Pruner):
    """Dynamic text-guided pruning.

    Attributes:
        prior_weight: λ of the soft prior over text tokens; 1 is the paper's setting, 0 weighs all text tokens alike.
    """

    name: ClassVar[str] = "adaptinfer"
    reference: ClassVar[str] = "arXiv 2508.06084"

    prior_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.prior_weight <= 1.0:
            raise PrunerError(f"prior_weight: must lie in [0, 1], not {self.prior_weight!r}")

    @classmethod
    def paper(cls, nominal: int | str, model: str = "llava-1.5-7b") -> AdaptInfer:
        """The published configuration: schedule by the paper's own label, and positions as the authors' code has them.

        Args:
            nominal: the paper's budget label (128, 64, 48 or 32 for LLaVA-1.5-7B); the true average is larger.
            model: whose published schedule.

        Raises:
            ScheduleError: nothing of that name was published.
        """
        positions = "compact" if model.startswith("llava") else "keep"
        return cls(schedule=preset(f"{model}/{nominal}"), positions=positions)

    def score(self, view: StageView) -> Tensor:
        groups = ((part.text_to_text, part.text_to_vision) for part in view.by_heads())
        return score_of_heads(groups, view.all_heads, self.prior_weight, view.text_mask, view.total)
