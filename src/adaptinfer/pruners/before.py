"""Methods that select vision tokens before the language model: what they are and what they give back.

The engine calls `select_before` with rows of one shape only: the same number of vision tokens, of text tokens and of
tokens to keep in each (`engine/selection.py` groups a batch so). A method never meets a filler or a mask.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from adaptinfer.functional import gather_tokens
from adaptinfer.pruners.base import Pruner, PrunerError, Selection, published_schedules
from adaptinfer.schedule import BEFORE, Budget, Schedule, Stage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from adaptinfer.engine.selection import FeatureView
    from adaptinfer.pruners.composed import Composed

__all__ = [
    "Read",
    "Selector",
    "SelectsBefore",
    "check_setting",
    "nearest",
    "of_order",
    "of_score",
    "rank_within",
    "shared_out",
    "split",
    "top",
    "unit",
    "with_merged",
]


class Read(NamedTuple):
    """Something of the vision tower that a method needs, taken while the tower runs.

    Attributes:
        what: ``attention`` that a token receives (from the class token; averaged over all tokens in towers without
            one), the same with all heads ``joined`` into one, or ``keys`` of a block; ``hidden`` states behind it; what
            goes into the ``projector``; the sizes of ``groups`` that merged in the tower, at the tokens that stand for
            them, zeros elsewhere.
        layer: the tower's block; from the end if negative. The projector has none.
        of: depth of the tower that ``layer`` counts in, where a method is defined for one; in another tower the block
            at the same share of the depth is meant.
    """

    what: Literal["attention", "joined", "keys", "hidden", "projector", "groups"]
    layer: int = 0
    of: int = 0


class SelectsBefore(ABC):
    """What a pruner can do that may have a stage at layer -1."""

    @property
    def reads(self) -> tuple[Read, ...]:
        """What it needs of the vision tower; nothing, if projected features are enough."""
        return ()

    @abstractmethod
    def select_before(self, view: FeatureView) -> Selection:
        """Choose ``view.keep`` vision tokens of each row by their features, before the language model.

        ``hidden`` of the result are features with which kept tokens enter layer 0, for methods that merge.
        """


@dataclasses.dataclass(frozen=True)
class Selector(SelectsBefore, Pruner):
    """A method with one stage, before the language model. Every layer is given what it keeps, so a budget is met to
    half a token.

    ``selector >> pruner`` is both, one after the other, as one pruner; the budget of the second is then the true
    average of the whole.
    """

    published = published_schedules({label: {BEFORE: label} for label in (192, 128, 64)})
    published_positions = "compact"
    """Authors drop tokens before their LLaVA numbers any."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule is not None and any(stage.layer != BEFORE for stage in self.schedule.stages):
            raise PrunerError(
                f"schedule: {self.name} selects before the language model, so its only stage is at layer {BEFORE}; "
                "for stages inside, put a second method behind it: selector >> pruner"
            )

    def plan(self, num_layers: int, vision_tokens: int, scoring: Sequence[int] | None = None) -> Schedule:
        if self.schedule is not None:
            return super().plan(num_layers, vision_tokens, scoring)
        assert self.budget is not None
        keep = Budget(self.budget).whole_tokens(vision_tokens)
        return Schedule((Stage(BEFORE, keep),) if keep < vision_tokens else (), num_layers, vision_tokens)

    def __rshift__(self, inside: Pruner) -> Composed:
        from adaptinfer.pruners.composed import Composed

        return Composed(before=self, inside=inside)


def check_setting(name: str, value: Any, least: float, most: float, whole: bool = False) -> None:
    """Raise PrunerError unless a setting is a number in [least, most]."""
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
        kind = "a whole number" if whole else "a number"
        raise PrunerError(f"{name}: must be {kind} from {least} to {most}, not {value!r}")


def shared_out(keep: int, sizes: Sequence[int]) -> list[int]:
    """Whole parts of a budget in proportion to sizes, by largest remainder; of equal ones the earlier gets more."""
    total = sum(sizes)
    parts = [keep * size // total for size in sizes]
    order = sorted(range(len(sizes)), key=lambda i: (-(keep * sizes[i] % total), i))
    for i in order[: keep - sum(parts)]:
        parts[i] += 1
    return parts


# -- what selections have in common, on tensors ---------------------------------------------------------------------


def unit(features: Tensor) -> Tensor:
    """Vectors of length 1, float32; a vector of zeros stays one. Any shape, along the last dimension."""
    return torch.nn.functional.normalize(features.float(), dim=-1)


def of_order(picked: Tensor, count: int) -> Selection:
    """The selection of a method that picks one token after the other.

    Args:
        picked: int64 [B, k], positions in the order of picking.
        count: V.
    """
    order = torch.arange(picked.shape[1], 0, -1, device=picked.device, dtype=torch.float32).expand(picked.shape)
    score = torch.zeros(picked.shape[0], count, device=picked.device).scatter_(1, picked, order)
    return Selection(score > 0, score)


def of_score(score: Tensor, keep: int) -> Selection:
    """The selection of the ``keep`` largest scores, [B, V]; of equal ones the earlier."""
    return Selection(top(score, keep), score)


def top(score: Tensor, keep: int) -> Tensor:
    """Marks the ``keep`` largest of each row, bool [B, V]; of equal scores the earlier wins."""
    order = score.sort(dim=1, descending=True, stable=True).indices[:, :keep]
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, order, True)


def split(keep: int, share: float) -> tuple[int, int]:
    """Whole parts of a budget, the first one ``share`` of it with halves rounded up."""
    first = int(keep * Fraction(repr(float(share))) + Fraction(1, 2))
    return first, keep - first


def rank_within(group: Tensor, score: Tensor) -> Tensor:
    """The place of each token in its group, 0 for the largest score; of equal scores the earlier comes first.

    Args:
        group: int64 [B, V].
        score: [B, V].

    Returns:
        int64 [B, V].
    """
    best_first = score.sort(dim=1, descending=True, stable=True).indices
    order = best_first.gather(1, group.gather(1, best_first).sort(dim=1, stable=True).indices)
    groups, place = group.gather(1, order), torch.arange(group.shape[1], device=group.device).expand_as(group)
    begins = torch.ones_like(groups, dtype=torch.bool)
    begins[:, 1:] = groups[:, 1:] != groups[:, :-1]
    first = torch.where(begins, place, 0).cummax(dim=1).values
    return torch.zeros_like(group).scatter(1, order, place - first)


def nearest(tokens: Tensor, centres: Tensor, kept: Tensor) -> Tensor:
    """Which centre each token joins, by cosine: bool [B, C, V]; centres themselves and empty vectors join none.

    Args:
        tokens: [B, V, w]; zeros for tokens that the vision tower did not make (line ends).
        centres: int64 [B, C], positions of the centres.
        kept: bool [B, V], tokens that stay what they are, the centres among them.
    """
    points = unit(tokens)
    likeness = gather_tokens(points, centres, dim=1) @ points.transpose(1, 2)  # [B, C, V]
    joins = torch.zeros_like(likeness, dtype=torch.bool).scatter(1, likeness.argmax(dim=1, keepdim=True), True)
    return joins & ~(kept | (points == 0).all(dim=2))[:, None, :]


def with_merged(view: FeatureView, centres: Tensor, changed: Tensor, merged: Tensor) -> Tensor:
    """The features of a row with merged ones at the centres, [B, V, d]; centres that nothing joined stay as they were.

    Args:
        view: the row's.
        centres: int64 [B, C].
        changed: bool [B, C], centres that something joined.
        merged: [B, C, d] behind the projector.
    """
    features = view.features.float()
    new = torch.where(changed[..., None], merged, gather_tokens(features, centres, dim=1))
    return features.scatter(1, centres[..., None].expand_as(new), new)
