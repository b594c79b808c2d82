"""SparseVLM and SparseVLM+: the words that the picture is about rate its tokens (arXiv 2410.04417)."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from adaptinfer.functional import gather_tokens, per_sample, top_k_mask
from adaptinfer.pruners.contracts import Capabilities, Pruner, PrunerError, Selection, published_schedules
from adaptinfer.pruners.views import PromptView, StageView

_TOKENS_A_CLUSTER = 10
_LEAST = 0.01  # of a dot product at distance 0


def choose_raters(prompt: PromptView) -> Tensor:
    """The text tokens that rate: those to which vision tokens are alike more than to the average one.

    Every vision token shares out 1 among the text tokens, by the softmax of the dot products of input embeddings; a
    text token rates if it receives more than the mean. If none does (one word alone), all rate.

    Returns:
        bool [B, T], aligned with ``prompt.text_index``.
    """
    vision = gather_tokens(prompt.embeddings, prompt.vision_index, dim=1).float()
    text = gather_tokens(prompt.embeddings, prompt.text_index, dim=1).float()
    likeness = torch.matmul(vision, text.transpose(1, 2))  # [B, V, T]
    words = torch.ones_like(prompt.text_index, dtype=torch.bool) if prompt.text_mask is None else prompt.text_mask
    shares = likeness.masked_fill(~words[:, None, :], torch.finfo(torch.float32).min).softmax(dim=-1)
    if prompt.vision_mask is not None:
        shares = shares * prompt.vision_mask[:, :, None]
    received = shares.sum(dim=1) * words
    raters = words & (received > received.sum(dim=1, keepdim=True) / words.sum(dim=1, keepdim=True).clamp(min=1))
    return torch.where(raters.any(dim=1, keepdim=True), raters, words)


@dataclasses.dataclass(frozen=True)
class SparseVLM(Pruner):
    """Keep the vision tokens that raters attend to most, and recycle some of the others into a few merged ones.

    The score is the mean attention over heads and raters. Of the tokens that do not make it, the best 30 % and one more
    form ⌊n / 10⌋ + 1 clusters by density peaks, on the hidden states that leave the layer; each goes on as the mean of
    its members, in the place of its centre (the authors' code puts it after the picture). A stage's keep counts these
    merged tokens too: 300 + 9 of 576 are a keep of 309.

    Labels 192, 128 and 64 are true averages of 206.5, 145.4 and 82.2.

    Attributes:
        recycled: share of the dropped tokens that are merged; 0 merges none, and drops early.
    """

    name: ClassVar[str] = "sparsevlm"
    reference: ClassVar[str] = "arXiv 2410.04417"
    published = published_schedules(
        {192: {2: 309, 6: 204, 15: 113}, 128: {2: 312, 6: 117, 15: 39}, 64: {2: 82, 6: 32, 15: 18}}
    )
    published_positions = "compact"

    recycled: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.recycled, bool) or not 0 <= self.recycled < 1:
            raise PrunerError(f"recycled: must be a share of at least 0 and below 1, not {self.recycled!r}")

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(needs=("embeddings", "output") if self.recycled else ("embeddings",))

    def score(self, view: StageView) -> Tensor:
        assert view.prompt is not None
        raters = choose_raters(view.prompt)
        received = [(part.text_to_vision * raters[:, None, :, None]).sum(dim=(1, 2)) for part in view.by_heads()]
        count = view.all_heads * raters.sum(dim=1, keepdim=True).clamp(min=1)
        return view.total(torch.stack(received).sum(dim=0)) / count

    def select(self, view: StageView, keeps: tuple[int, ...]) -> Selection:
        splits = [self.split(count, keep) for count, keep in zip(view.vision_counts, keeps, strict=True)]
        best, merged, clusters = (tuple(column) for column in zip(*splits, strict=True))
        if not any(clusters):
            return super().select(view, keeps)
        score, device = self.score(view), view.query.device
        batch, tokens = score.shape
        candidates = torch.ones_like(score, dtype=torch.bool) if view.vision_mask is None else view.vision_mask
        kept = top_k_mask(score, candidates, per_sample(best, device))

        # The next ones in the ranking; rows that merge fewer are filled up with a place after the last token.
        ranking = score.masked_fill(~candidates, float("-inf")).sort(dim=1, descending=True, stable=True).indices
        rank = torch.arange(max(merged), device=device)
        there = (rank < per_sample(merged, device)).expand(batch, -1)
        places = ranking.gather(1, (rank + per_sample(best, device)).clamp(max=tokens - 1).expand(batch, -1))
        assert view.output is not None
        hidden = gather_tokens(view.output, view.vision_index, dim=1)
        centres, real, means = density_clusters(gather_tokens(hidden, places, dim=1), there, clusters)
        centres = places.gather(1, centres).masked_fill(~real, tokens)
        padded = torch.cat([kept, kept[:, :1]], dim=1).scatter(1, centres, real)
        grown = torch.cat([hidden, hidden[:, :1]], dim=1)
        grown = grown.scatter(1, centres[..., None].expand_as(means), means.to(grown.dtype))
        return Selection(padded[:, :tokens], score, grown[:, :tokens])

    def split(self, entering: int, keep: int) -> tuple[int, int, int]:
        """How many tokens stay as they are, how many are merged, into how many; first and last make ``keep``."""

        def merges(best: int) -> tuple[int, int]:
            if not self.recycled:
                return 0, 0
            merged = math.floor(Fraction(repr(self.recycled)) * (entering - best)) + 1
            return merged, merged // _TOKENS_A_CLUSTER + 1

        if keep == entering:
            return keep, 0, 0
        best = bisect.bisect_left(range(entering + 1), keep, key=lambda best: best + merges(best)[1])
        merged, clusters = merges(best)
        return best, merged, min(clusters, keep - best)


@dataclasses.dataclass(frozen=True)
class SparseVLMPlus(Pruner):
    """SparseVLM without recycling, on attention freed of position, by the heads that look at the picture.

    The attention of text to vision tokens is divided by the scaled dot product that queries and keys of ones have after
    rotary embedding, with no softmax: 2 Σ cos((m - n) θ) / √D over the angles θ, for positions m and n. Then the heads
    with the largest sum over raters and vision tokens count, 14 of LLaVA-1.5's 32. The dot product falls with distance,
    below zero after some 1,700 tokens there; it is taken for at least 1 % of what it is at distance 0.

    Attributes:
        heads: share of the heads that count.
    """

    name: ClassVar[str] = "sparsevlm+"
    reference: ClassVar[str] = "SparseVLM's authors"
    published = published_schedules(
        {192: {2: 300, 6: 200, 15: 118}, 128: {2: 238, 6: 108, 15: 60}, 64: {2: 66, 6: 34, 15: 20}}
    )

    heads: float = 14 / 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.heads, bool) or not 0 < self.heads <= 1:
            raise PrunerError(f"heads: must be a share above 0 and at most 1, not {self.heads!r}")

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(needs=("embeddings", "rotary"), all_heads="chooses among heads")

    def score(self, view: StageView) -> Tensor:
        assert view.prompt is not None
        raters = choose_raters(view.prompt)
        position = _of_position(view)
        parts = [((part.text_to_vision / position) * raters[:, None, :, None]).sum(dim=2) for part in view.by_heads()]
        received = torch.cat(parts, dim=1)  # [B, H, V]
        if view.vision_mask is not None:
            received = received * view.vision_mask[:, None, :]
        mass = received.sum(dim=2)
        count = max(1, math.floor(self.heads * view.all_heads + 0.5))
        chosen = top_k_mask(mass, torch.ones_like(mass, dtype=torch.bool), count)
        return (received * chosen[:, :, None]).sum(dim=1) / (count * raters.sum(dim=1, keepdim=True).clamp(min=1))


def _of_position(view: StageView) -> Tensor:
    """Scaled dot products of text and vision tokens if all queries and keys were ones, float32 [B, 1, T, V]."""
    ones = view.of_ones
    query, key = gather_tokens(ones.query, view.text_index, dim=2), gather_tokens(ones.key, view.vision_index, dim=2)
    product = torch.matmul(query.float(), key.float().transpose(2, 3))
    return product.clamp(min=_LEAST * query.shape[3]) * view.scaling


def density_clusters(tokens: Tensor, valid: Tensor, clusters: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Cluster some tokens around density peaks and take the mean of each cluster.

    With k clusters, a token's density is exp(-mean d²) over its k nearest, itself included, where d is the Euclidean
    distance over √(dimensions). Centres are the k tokens with the largest density × distance to the nearest denser
    token (the largest distance there is for the densest; of equally dense tokens the earlier counts as denser). Every
    other token belongs to its nearest centre.

    Args:
        tokens: [B, M, d].
        valid: bool [B, M], False for fillers.
        clusters: how many in each sample, at most its valid tokens.

    Returns:
        Positions of the centres among the M, int64 [B, C], best first, C the most of any sample; which of them are
        real, bool [B, C]; means of their clusters, float32 [B, C, d].
    """
    states, device = tokens.float(), tokens.device
    batch, count, dim = states.shape
    most, k = max(clusters), per_sample(clusters, device)
    place = torch.arange(count, device=device)
    distance = torch.cdist(states, states, compute_mode="donot_use_mm_for_euclid_dist") / dim**0.5
    both = valid[:, :, None] & valid[:, None, :]
    among = (place < k).expand(batch, -1)[:, None, :]  # the k nearest, once sorted
    nearest = distance.masked_fill(~both, float("inf")).sort(dim=2).values
    nearness = nearest.square().masked_fill(~among, 0.0).sum(dim=2) / among.sum(dim=2).clamp(min=1)
    density = (-nearness).exp().masked_fill(~valid, -1.0)
    row, column = density[:, :, None], density[:, None, :]
    denser = both & ((column > row) | ((column == row) & (place[None, :] < place[:, None])))
    farthest = distance.masked_fill(~both, 0.0).amax(dim=(1, 2), keepdim=True)
    peak = torch.where(denser, distance, farthest).amin(dim=2) * density
    centres = peak.masked_fill(~valid, -1.0).sort(dim=1, descending=True, stable=True).indices[:, :most]
    real = (place[:most] < k).expand(batch, -1)

    to_centre = gather_tokens(distance, centres, dim=2).masked_fill(~real[:, None, :], float("inf"))
    member = to_centre.argmin(dim=2)
    number = place[:most]
    member = member.scatter(1, centres, torch.where(real, number, member.gather(1, centres)))  # each centre its own
    belongs = (member[:, None, :] == number[:, None]) & valid[:, None, :]
    means = torch.matmul(belongs.float(), states) / belongs.sum(dim=2, keepdim=True).clamp(min=1)
    return centres, real, means
