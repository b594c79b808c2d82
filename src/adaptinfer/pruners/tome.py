"""ToMe: similar tokens merge inside the vision tower, a few in every block (arXiv 2210.09461)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from adaptinfer.errors import UnsupportedError
from adaptinfer.functional import gather_tokens, marked_first
from adaptinfer.pruners.before import Selector
from adaptinfer.pruners.contracts import Capabilities, Merging, Selection
from adaptinfer.pruners.selecting import of_score, unit
from adaptinfer.pruners.views import FeatureView, Read
from adaptinfer.schedule import Budget


@dataclasses.dataclass(frozen=True)
class ToMe(Selector):
    """Bipartite soft matching of keys inside a CLIP or SigLIP tower; one token of each group goes on.

    Every block merges about as many: tokens at every second place into those between. A class token has the first place
    and never merges. In the next block those that might have merged and did not stand in front of the others.

    The tower is given the members of a group as so many equal tokens, which is what ToMe's proportional attention
    computes for one of that size: the same features, without its saving in the tower. Groups form within a picture, so
    several pictures need a share as the budget. A tower too shallow for a budget leaves more groups, of which the
    largest go on.
    """

    name: ClassVar[str] = "tome"
    reference: ClassVar[str] = "arXiv 2210.09461"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(before=True, reads=(Read("groups"),), merging=Merging(self.groups, merge_step))

    def groups(self, num_layers: int, tokens: int) -> int:
        """How many groups a picture of that many tokens ends with."""
        return self.plan(num_layers, tokens).tokens_per_layer(tokens)[0]

    def select_before(self, view: FeatureView) -> Selection:
        pictures = view.need_pictures(self.name)
        if len(pictures) > 1 and (self.budget is None or not Budget(self.budget).is_share):
            raise UnsupportedError(
                "tome merges each picture by itself; with several of them give a share as the budget"
            )
        return of_score(view.groups()[..., 0], view.keep)


def match(keys: Tensor, count: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """One step of bipartite soft matching: of the tokens at every second place those that resemble one between most.

    Args:
        keys: [n, m, D], the mean over heads.
        count: how many merge, at most those at every second place.
        first: the first of these places, 0 or 1; 1 after a class token.

    Returns:
        Places of the tokens that merge and of those that they merge into, int64 [n, count] each.
    """
    points = unit(keys)
    likeness, best = (points[:, first::2] @ points[:, 1 - first :: 2].transpose(1, 2)).max(dim=2)
    order = likeness.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return 2 * order + first, 2 * best.gather(1, order) + 1 - first


def merge_step(
    states: Tensor, keys: Tensor, group: Tensor, active: Tensor, count: int, first: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge ``count`` groups into others; a group's state is the mean over its members.

    Args:
        states: [n, P, d], after the block's attention; equal within a group.
        keys: [n, P, D] likewise.
        group: int64 [n, P], the token that stands for each token's group.
        active: int64 [n, m], the tokens that stand for groups, in the order in which they are matched.
        count: at most half of the groups.
        first: as in `match`.

    Returns:
        The new states, group and active: first those that might have merged and did not, then the others.
    """
    if not count:
        return states, group, active
    source, target = match(gather_tokens(keys, active, dim=1), count, first)
    source, target = active.gather(1, source), active.gather(1, target)
    batch, tokens = group.shape
    towards = torch.arange(tokens, device=group.device).expand(batch, -1).scatter(1, source, target)
    group = towards.gather(1, group)
    alive = torch.zeros_like(group, dtype=torch.bool).scatter(1, active, True).scatter(1, source, False)
    order = torch.cat([active[:, first::2], active[:, 1 - first :: 2]], dim=1)
    active = order.gather(1, marked_first(alive.gather(1, order), active.shape[1] - count))
    belongs = (group[:, None, :] == active[:, :, None]).float()
    means = belongs @ states / belongs.sum(dim=2, keepdim=True)
    whole = torch.zeros_like(states).scatter(1, active[..., None].expand_as(means), means)
    return gather_tokens(whole, group, dim=1), group, active
