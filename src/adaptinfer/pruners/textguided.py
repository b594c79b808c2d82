"""AdaptInfer's text guidance with its choices as settings: which words, which heads, position or not, coverage."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from adaptinfer.functional import evenly_spaced, gather_tokens, per_sample, soft_prior, top_k_mask
from adaptinfer.pruners.contracts import Capabilities, Pruner, PrunerError, Selection, check_setting
from adaptinfer.pruners.selecting import unit
from adaptinfer.pruners.views import StageView

Words = Literal["soft", "uniform", "last", "max", "union"]
Covers = Literal["hidden", "keys", "even"]

_LARGEST = 2**24  # entries of the similarity matrix held at once


@dataclasses.dataclass(frozen=True)
class TextGuided(Pruner):
    """Keep what the text attends to. As it stands this is AdaptInfer; each setting changes one thing about it.

    A text token j gives a vision token v, in head h, the vote A[h, j, v] (post-softmax attention). Votes are added up
    over heads and brought together over text tokens:

    - ``soft``: their sum, weighed per head by AdaptInfer's prior w[h, j] over text tokens;
    - ``uniform``: their plain sum, which ranks as AdaptInfer with λ = 0 does;
    - ``last``: those of the last text token alone;
    - ``max``: the largest that any text token gives, so that a token that matters to one word need not matter to all;
    - ``union``: each text token's best vision tokens in turn, so that each word gets its share of what is kept.

    Attributes:
        words: how votes of different text tokens are brought together.
        heads: share of the heads that count, those with the largest sum of votes; 1 for all. SparseVLM+ has 14 / 32.
        normalised: each head's votes, weighed or not, are divided by their sum, so that a head that hardly looks at the
            picture, and one that looks at nothing else, weigh the same.
        rotary: False takes the votes of queries and keys without rotary embedding (and without cached ones), which
            frees them of the preference for tokens that stand near the text.
        coverage: share of what a stage keeps, rounded down, that is not chosen by votes but to cover the rest.
        covers: in which sense: each next token is the one least like everything kept, by cosine of the ``hidden``
            states that entered the layer or of its ``keys`` (all heads', with position); or ``even``, spread evenly
            over what votes left.
        mass: a stage keeps no more of a sample's best tokens than hold this share of all votes that it sees, at least
            one. The budget, or the schedule, is then the most that a sample keeps, and what it kept is in the report.
            It costs one host read a stage, and a batch is filled up to its longest sample. None keeps counts fixed.
    """

    name: ClassVar[str] = "textguided"
    reference: ClassVar[str] = "arXiv 2508.06084, with options"

    words: Words = "soft"
    heads: float = 1.0
    normalised: bool = False
    rotary: bool = True
    coverage: float = 0.0
    covers: Covers = "hidden"
    mass: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, values in (("words", get_args(Words)), ("covers", get_args(Covers))):
            if getattr(self, name) not in values:
                raise PrunerError(f"{name}: must be one of {values}, not {getattr(self, name)!r}")
        for name in ("normalised", "rotary"):
            if not isinstance(getattr(self, name), bool):
                raise PrunerError(f"{name}: must be True or False, not {getattr(self, name)!r}")
        check_setting("heads", self.heads, 0, 1)
        check_setting("coverage", self.coverage, 0, 1)
        if self.heads == 0:
            raise PrunerError("heads: must be a share above 0, or no head would count")
        if self.coverage == 1:
            raise PrunerError("coverage: must be a share below 1; for coverage alone take DivPrune or Stride")
        if self.mass is not None:
            check_setting("mass", self.mass, 0, 1)
            if self.words == "union":
                raise PrunerError(
                    "mass: the union of words only ranks tokens, so there are no votes to add up; take another"
                )

    @property
    def capabilities(self) -> Capabilities:
        all_heads = ""
        if self.heads < 1:
            all_heads = f"with heads={self.heads} chooses among heads"
        elif self.coverage and self.covers == "keys":
            all_heads = "with covers='keys' compares keys of all heads"
        needs = () if self.rotary else ("rotary",)
        return Capabilities(needs=needs, all_heads=all_heads, varies=self.mass is not None)

    def score(self, view: StageView) -> Tensor:
        seen = view if self.rotary else view.without_rotary
        rows = 1 if self.words == "last" else None
        counted = self._counted(seen, rows)
        parts, start = [], 0
        for part in seen.by_heads(rows):
            votes, stop = self._votes(part), start + part.query.shape[1]
            if counted is not None:
                votes = votes * counted[:, start:stop, None, None]
            parts.append(votes.sum(dim=1))
            start = stop
        votes = view.total(torch.stack(parts).sum(dim=0))
        if self.words == "union":
            return in_turn(votes, view.text_mask, view.vision_mask)
        return votes.amax(dim=1)  # over one row, but for "max"

    def select(self, view: StageView, keeps: tuple[int, ...]) -> Selection:
        if not self.coverage and self.mass is None:
            return super().select(view, keeps)
        score, device = self.score(view), view.query.device
        candidates = torch.ones_like(score, dtype=torch.bool) if view.vision_mask is None else view.vision_mask
        if self.mass is not None:
            needed = holding(score.masked_fill(~candidates, 0.0), self.mass).tolist()  # the host waits for the device
            keeps = tuple(map(min, keeps, needed))
        more = [int(Fraction(repr(float(self.coverage))) * keep) for keep in keeps]
        by_votes = [keep - covering for keep, covering in zip(keeps, more, strict=True)]
        kept = top_k_mask(score, candidates, per_sample(by_votes, device))
        if not self.coverage:
            return Selection(kept, score, keeps=keeps)
        left = candidates & ~kept
        if self.covers == "even":
            rest = [count - voted for count, voted in zip(view.vision_counts, by_votes, strict=True)]
            even = evenly_spaced(rest, more, device)
            place = (left.cumsum(dim=1) - 1).clamp(min=0, max=even.shape[1] - 1)
            return Selection(kept | (even.gather(1, place) & left), score, keeps=keeps)
        return Selection(kept | farthest_added(self._points(view), kept, left, more), score, keeps=keeps)

    def _votes(self, view: StageView) -> Tensor:
        """Votes per head [B, H, R, V], added up over text tokens (R = 1) where that does not wait for all heads."""
        attention = _to_vision(view, self.words == "last")
        if self.words == "soft":
            between = view.text_to_text
            if view.text_mask is not None:
                between = between * (view.text_mask[:, None, :, None] & view.text_mask[:, None, None, :])
            # A product and a sum, as in `text_guided_sums`
            attention = soft_prior(between)[..., None] * attention
        if self.words in ("soft", "uniform"):
            attention = attention.sum(dim=2, keepdim=True)
        if self.normalised:
            mass = attention.sum(dim=(2, 3), keepdim=True)
            attention = attention / mass.clamp(min=torch.finfo(torch.float32).tiny)
        return attention

    def _counted(self, view: StageView, rows: int | None) -> Tensor | None:
        """Which heads count, bool [B, H]; None if all do."""
        if self.heads == 1:
            return None
        votes = (_to_vision(part, rows == 1) for part in view.by_heads(rows))
        mass = torch.cat([some.sum(dim=(2, 3)) for some in votes], dim=1)
        count = max(1, math.floor(self.heads * view.all_heads + 0.5))
        return top_k_mask(mass, torch.ones_like(mass, dtype=torch.bool), count)

    def _points(self, view: StageView) -> Tensor:
        """What coverage compares, [B, V, ..]."""
        if self.covers == "hidden":
            return gather_tokens(view.hidden, view.vision_index, dim=1)
        return gather_tokens(view.key, view.past + view.vision_index, dim=2).transpose(1, 2).flatten(2)


def _to_vision(view: StageView, last: bool) -> Tensor:
    """Attention of the text rows, or of the last one, to vision tokens, [B, H, T or 1, V]; none to or from fillers."""
    if last:
        attention = view.to_vision(view.attention(view.last_text))
    else:
        attention = view.text_to_vision
        if view.text_mask is not None:
            attention = attention * view.text_mask[:, None, :, None]
    return attention if view.vision_mask is None else attention * view.vision_mask[:, None, None, :]


def holding(score: Tensor, share: float) -> Tensor:
    """How many of the largest scores it takes to hold a share of their sum: at least one.

    Args:
        score: [B, V], none negative.
        share: from 0 to 1.

    Returns:
        int64 [B].
    """
    held = score.double().sort(dim=1, descending=True).values.cumsum(dim=1)
    return (held < share * held[:, -1:]).sum(dim=1).clamp(max=score.shape[1] - 1) + 1


def in_turn(votes: Tensor, words: Tensor | None = None, candidates: Tensor | None = None) -> Tensor:
    """A score by which each text token's best vision tokens come in turn.

    In round r every text token puts forward the vision token that it ranks r-th. Whoever was put forward in an earlier
    round comes first; within a round, whoever has the largest vote of any text token; of equal ones the earlier.

    Args:
        votes: [B, T, V], none negative.
        words: bool [B, T], False where a row is padding; None if none is.
        candidates: bool [B, V] likewise.

    Returns:
        float32 [B, V], 0 for the first in line, then -1, -2, ...
    """
    batch, _, count = votes.shape
    if words is not None:
        votes = votes.masked_fill(~words[:, :, None], -1.0)
    if candidates is not None:
        votes = votes.masked_fill(~candidates[:, None, :], -1.0)
    numbers = torch.arange(count, device=votes.device)
    order = votes.sort(dim=2, descending=True, stable=True).indices
    rank = torch.zeros_like(order).scatter(2, order, numbers.expand_as(order))
    if words is not None:
        rank = rank.masked_fill(~words[:, :, None], count)
    called = rank.amin(dim=1)
    line = votes.amax(dim=1).sort(dim=1, descending=True, stable=True).indices
    line = line.gather(1, called.gather(1, line).sort(dim=1, stable=True).indices)
    return torch.zeros(batch, count, device=votes.device).scatter(1, line, -numbers.float().expand(batch, -1))


def farthest_added(points: Tensor, kept: Tensor, left: Tensor, counts: Sequence[int]) -> Tensor:
    """Add tokens one by one, each the one whose most similar kept or added token is least similar, by cosine.

    Args:
        points: [B, V, d].
        kept: bool [B, V], tokens that are in already.
        left: bool [B, V], tokens that can be added; of equally far ones the earlier is.
        counts: how many to add in each sample, at most as many as are left.

    Returns:
        bool [B, V], the added ones.
    """
    points = unit(points)
    batch, total, _ = points.shape
    step = max(1, _LARGEST // (batch * total))
    nearest = []
    for start in range(0, total, step):
        similar = points[:, start : start + step] @ points.transpose(1, 2)
        nearest.append(similar.masked_fill(~kept[:, None, :], float("-inf")).amax(dim=2))
    likeness, added = torch.cat(nearest, dim=1), torch.zeros_like(kept)
    wanted = per_sample(counts, points.device)
    for number in range(max(counts)):
        best = likeness.masked_fill(~left | added, float("inf")).argmin(dim=1, keepdim=True)
        added = added | (torch.zeros_like(kept).scatter(1, best, True) & (number < wanted))
        new = gather_tokens(points, best, dim=1)
        likeness = torch.maximum(likeness, (points @ new.transpose(1, 2))[..., 0])
    return added
