"""VScan: a local and a global scan before the language model, and one stage half-way inside it (arXiv 2505.22654)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from adaptinfer.functional import gather_tokens, marked_first
from adaptinfer.pruners.before import Selector, TwoPart
from adaptinfer.pruners.contracts import Capabilities, Pruner, Selection, check_setting, published_schedules
from adaptinfer.pruners.pyramiddrop import PyramidDrop
from adaptinfer.pruners.selecting import nearest, rank_within, top, with_merged
from adaptinfer.pruners.views import FeatureView, Grids, Read
from adaptinfer.schedule import BEFORE, Budget, Schedule, Stage, solve

_TOWER = 24  # blocks of the tower that the published layers belong to


@dataclasses.dataclass(frozen=True)
class Scans(Selector):
    """VScan's part before the language model: the most attended tokens of each window, and of the whole picture.

    Half of the budget goes to the tokens that the class token attends to most within each window, in an early block of
    the tower, the best of every window before the second-best of any; the other half to the most attended of all the
    rest in a late block. Every other token joins the kept one that it resembles most (cosine), which becomes the mean,
    of projected features both. Where windows cannot have equally many, the authors' code keeps fewer tokens.

    Attributes:
        local_share: of the budget, that goes to windows; parts of a token are cut off.
        window: their height and width in tokens.
        local_layer: block of a tower of 24, or the one at the same depth of another.
        layer: block for the global scan.
        merge: whether dropped tokens are merged into kept ones.
    """

    name: ClassVar[str] = "scans"
    reference: ClassVar[str] = "arXiv 2505.22654"

    local_share: float = 0.5
    window: int = 6
    local_layer: int = 5
    layer: int = -2
    merge: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_setting("local_share", self.local_share, 0, 1)
        check_setting("window", self.window, 1, 2**20, whole=True)
        check_setting("local_layer", self.local_layer, 0, _TOWER - 1, whole=True)

    @property
    def capabilities(self) -> Capabilities:
        reads = Read("attention", self.local_layer, _TOWER), Read("attention", self.layer)
        return Capabilities(before=True, reads=reads)

    def select_before(self, view: FeatureView) -> Selection:
        windows = _windows(sum(view.need_pictures(self.name), ()), self.window).to(view.features.device)
        early = view.attention(self.local_layer, _TOWER).mean(dim=1)
        late = view.attention(self.layer).mean(dim=1)
        local = int(view.keep * self.local_share)
        place = rank_within(windows.expand_as(early), early)
        best_first = early.sort(dim=1, descending=True, stable=True).indices
        order = best_first.gather(1, place.gather(1, best_first).sort(dim=1, stable=True).indices)
        kept = torch.zeros_like(early, dtype=torch.bool).scatter(1, order[:, :local], True)
        kept = kept | top(late.masked_fill(kept, float("-inf")), view.keep - local)
        if not self.merge:
            return Selection(kept, late)
        centres, features = marked_first(kept, view.keep), view.features.float()
        line_ends = view.line_ends()[..., None]
        joins = nearest(features.masked_fill(line_ends, 0), centres, kept).float()
        count = joins.sum(dim=2, keepdim=True)
        merged = (gather_tokens(features, centres, dim=1) + joins @ features) / (count + 1)
        return Selection(kept, late, with_merged(view, centres, count[..., 0] > 0, merged))


@functools.lru_cache(maxsize=64)
def _windows(grids: Grids, size: int) -> Tensor:
    """The window in which each token stands, int64 [V], on the CPU."""
    parts, start = [], 0
    for rows, columns in grids:
        across = -(-columns // size)
        window = torch.arange(rows)[:, None] // size * across + torch.arange(columns) // size
        parts.append(start + window.flatten())
        start += -(-rows // size) * across
    return torch.cat(parts)


@dataclasses.dataclass(frozen=True)
class VScan(TwoPart):
    """A local and a global scan before the language model, and the last token's attention half-way through it.

    `Scans` keep 1.5 times the budget. `PyramidDrop`'s score, the last token's attention in the layer after the stage,
    then keeps as many as make the budget the true average of all layers: half of it, with an even number of layers.

    Attributes:
        scans: 1.5 as published: what enters the language model, in budgets.
        merge: whether tokens dropped before the language model are merged into kept ones.
    """

    name: ClassVar[str] = "vscan"
    reference: ClassVar[str] = "arXiv 2505.22654"
    published = published_schedules({label: {BEFORE: label * 3 // 2, 15: label // 2} for label in (192, 128, 64)})
    published_positions = "compact"

    scans: float = 1.5
    merge: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_setting("scans", self.scans, 1, 1000)

    @property
    def parts(self) -> tuple[Any, Pruner]:
        return Scans(budget=1, merge=self.merge), PyramidDrop(budget=1)

    def plan(self, num_layers: int, vision_tokens: int, scoring: Sequence[int] | None = None) -> Schedule:
        if self.budget is None:
            return super().plan(num_layers, vision_tokens, scoring)
        return staged(self.budget, num_layers, vision_tokens, scoring, self.scans, {num_layers // 2 - 1: 1})


def staged(
    budget: float,
    num_layers: int,
    vision_tokens: int,
    scoring: Sequence[int] | None,
    entering: float,
    shape: Mapping[int, float],
) -> Schedule:
    """A selection of ``entering`` times the budget, and stages inside that make the budget the true average.

    Args:
        budget: tokens, or a share below 1.
        num_layers: depth of the model.
        vision_tokens: in the prompt.
        scoring: layers in which a stage may sit; None for all.
        entering: in budgets.
        shape: wanted layer -> proportion of its keep.
    """
    wanted = Budget(budget)
    first = wanted.whole_tokens(vision_tokens, entering)
    within = wanted.within(vision_tokens, first)
    before = (Stage(BEFORE, first),) if first < vision_tokens else ()
    if within.amount >= first:
        stages = (Stage(BEFORE, wanted.whole_tokens(vision_tokens)),) if before else ()
        return Schedule(stages, num_layers, vision_tokens)
    possible = [layer for layer in range(num_layers - 1) if scoring is None or layer in scoring]
    layers = sorted({min(possible, key=lambda each: (abs(each - layer), each)) for layer in shape}) if possible else []
    inside = solve(within, num_layers, first, layers, [*shape.values()][: len(layers)])
    return Schedule((*before, *inside.stages), num_layers, vision_tokens)
