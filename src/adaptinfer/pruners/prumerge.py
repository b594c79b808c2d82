"""PruMerge and PruMerge+: outliers of class-token attention, with what resembles them merged in (arXiv 2403.15388)."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from adaptinfer.functional import gather_tokens, marked_first
from adaptinfer.pruners.before import Selector
from adaptinfer.pruners.contracts import Capabilities, Selection, check_setting, published_schedules
from adaptinfer.pruners.selecting import top, unit, with_merged
from adaptinfer.pruners.views import FeatureView, Read
from adaptinfer.schedule import BEFORE


@dataclasses.dataclass(frozen=True)
class PruMerge(Selector):
    """Tokens that the class token attends to most, each with those of similar keys added, and one for the rest.

    Attention is that of all heads joined into one: the softmax of products of whole queries and keys over the root of
    their width. Similar is the cosine of whole keys; what is added is weighed by attention. So is the sum of all that
    were not picked, which goes on as the last token of the budget, in the place of the last of them. The authors' code
    puts it after the picked ones, which are ordered by falling attention.

    As published the number of tokens is that of the outliers of each picture, about 32 of 576; here it is the budget's,
    so that shapes are known beforehand. Merging happens in front of the projector where a model projects token by token
    (LLaVA), else after it.

    Attributes:
        neighbours: tokens that are added to each; with 0 nothing is merged at all.
        layer: block of the vision tower; the authors take the last.
    """

    name: ClassVar[str] = "prumerge"
    reference: ClassVar[str] = "arXiv 2403.15388"
    published = published_schedules({32: {BEFORE: 32}})

    neighbours: int = 32
    layer: int = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_setting("neighbours", self.neighbours, 0, 2**20, whole=True)

    @property
    def capabilities(self) -> Capabilities:
        reads = Read("joined", self.layer), Read("keys", self.layer), Read("projector")
        return Capabilities(before=True, reads=reads)

    def select_before(self, view: FeatureView) -> Selection:
        attention = view.joined_attention(self.layer)
        if not self.neighbours:
            return Selection(self._choose(attention, view.keep), attention)
        picks = max(1, view.keep - 1)
        picked = self._choose(attention, picks)
        centres = marked_first(picked, picks)
        keys = unit(view.keys(self.layer).flatten(2))
        likeness = gather_tokens(keys, centres, dim=1) @ keys.transpose(1, 2)
        likeness = likeness.scatter(2, centres[..., None], float("-inf"))  # no token is its own neighbour
        count = min(self.neighbours, view.count - 1)
        near = likeness.sort(dim=2, descending=True, stable=True).indices[:, :, :count]
        weight = torch.zeros_like(likeness).scatter(2, near, 1.0) * attention[:, None, :]
        tokens, project = view.unprojected()
        own = gather_tokens(tokens, centres, dim=1)
        merged, changed = own + weight @ tokens, (own != 0).any(dim=2)  # line ends are no tokens of the tower
        if picks < view.keep:
            rest = (attention * ~picked)[:, None, :] @ tokens
            place = torch.arange(view.count, device=picked.device)
            place = torch.where(picked, -1, place).amax(dim=1, keepdim=True)
            centres, merged = torch.cat([centres, place], dim=1), torch.cat([merged, rest], dim=1)
            changed = torch.nn.functional.pad(changed, (0, 1), value=True)
        kept = picked.scatter(1, centres, True)
        return Selection(kept, attention, with_merged(view, centres, changed, project(merged)))

    def _choose(self, attention: Tensor, keep: int) -> Tensor:
        return top(attention, keep)


@dataclasses.dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge of the outliers of the class token's attention and a uniform sample of the others.

    Outliers lie above the third quartile by 1.5 times the distance of the quartiles; evenly spaced tokens fill up the
    budget. The authors' code has no budget: it adds every n-th token of the picture, n a third of all tokens per
    outlier, so about three for each outlier.

    Attributes:
        neighbours: tokens that are added to each.
        layer: block of the vision tower.
    """

    name: ClassVar[str] = "prumerge+"
    published = published_schedules({144: {BEFORE: 144}})

    def _choose(self, attention: Tensor, keep: int) -> Tensor:
        return outliers_and_uniform(attention, keep)


def outliers_and_uniform(score: Tensor, keep: int) -> Tensor:
    """Mark the outliers among scores, the largest if there are too many, and evenly spaced others up to ``keep``.

    With R tokens that are no outliers and m places left, the r-th of them (from 0) is taken where (r + 1) m / R passes
    a whole number. Quartiles are interpolated between neighbours.

    Args:
        score: float [B, V].
        keep: at most V.

    Returns:
        bool [B, V], ``keep`` in each row.
    """
    ascending = score.sort(dim=1).values
    low, high = _quantile(ascending, 0.25), _quantile(ascending, 0.75)
    outlier = score > high + 1.5 * (high - low)
    chosen = outlier & top(score.masked_fill(~outlier, float("-inf")), keep)
    others = ~outlier
    place = others.cumsum(dim=1) - 1
    count, left = others.sum(dim=1, keepdim=True).clamp(min=1), keep - chosen.sum(dim=1, keepdim=True)
    return chosen | (others & ((place + 1) * left // count > place * left // count))


def _quantile(ascending: Tensor, share: float) -> Tensor:
    """[B, 1]; torch.quantile would look at the device from the host."""
    place = share * (ascending.shape[1] - 1)
    below, above = math.floor(place), math.ceil(place)
    return torch.lerp(ascending[:, below : below + 1], ascending[:, above : above + 1], place - below)
