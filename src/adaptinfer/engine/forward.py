"""One forward call of an attached model: its stages, the segments of tokens between them, and the layer inputs.

A `Forward` lives in a context variable for the length of one call of the multimodal model: two threads on one model, or
two models in one thread, never see each other's.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adaptinfer.engine.cache import History, hold
from adaptinfer.engine.layout import PromptLayout, rectangle
from adaptinfer.engine.report import StageRecord
from adaptinfer.engine.stage import StageView
from adaptinfer.functional import gather_tokens, positions_of, scatter_tokens, top_k_mask

if TYPE_CHECKING:
    from collections.abc import Callable

    from adaptinfer.pruners.base import Pruner

__all__ = ["ACTIVE", "Forward", "Segment"]

ACTIVE: ContextVar[Forward | None] = ContextVar("adaptinfer_forward", default=None)


@dataclass(frozen=True)
class Segment:
    """The tokens that the layers behind one stage see, [B, n].

    Attributes:
        layer: the stage's layer; this segment is given to the layers after it.
        index: int64, positions among the call's N tokens, ascending.
        relative: int64, positions among the tokens of the segment before.
        valid: bool or None; False marks a filler: a token that was dropped (or padding) and only completes the
            rectangle of a batch whose samples keep different numbers. It is never attended.
        vision: bool, the surviving vision tokens.
        text: bool, the guiding text tokens.
    """

    layer: int
    index: Tensor
    relative: Tensor
    valid: Tensor | None
    vision: Tensor
    text: Tensor


class Forward:
    """State of one call. ``stages`` maps a layer to the vision tokens that each sample keeps behind it."""

    def __init__(
        self,
        owner: object,
        pruner: Pruner,
        past: int,
        length: int,
        layout: PromptLayout | None,
        stages: dict[int, tuple[int, ...]],
        early_drop: bool,
        rotary: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> None:
        self.owner = owner
        self.past, self.length, self.layout = past, length, layout
        self.records: list[StageRecord] = []
        self.cache: Any = None
        self.segment: Segment | None = None
        self.upcoming: Segment | None = None
        self._pruner, self._early_drop, self._rotary = pruner, early_drop, rotary
        self._stages = stages
        self._counts = layout.vision_counts if layout else ()
        self._memo: dict[Any, Any] = {}

    # -- inside a pruning layer -------------------------------------------------------------------------------------

    def scores_in(self, layer: int) -> bool:
        """Whether a stage sits in this layer."""
        return layer in self._stages

    def dropping(self, layer: int) -> Tensor | None:
        """Rows that go on, if this layer need not compute the others' outputs; None for every other layer."""
        upcoming = self.upcoming
        return upcoming.relative if self._early_drop and upcoming is not None and upcoming.layer == layer else None

    @torch.no_grad()
    def choose(self, layer: int, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> None:
        """Score the vision tokens inside the stage's layer and settle which tokens the next layer is given."""
        layout = self.layout
        assert layout is not None
        segment = self.segment
        device = query.device
        if segment is None:
            vision, text, valid = layout.vision.to(device), layout.text.to(device), layout.real
            valid = None if valid is None else valid.to(device)
        else:
            vision, text, valid = segment.vision, segment.text, segment.valid
        keeps = self._stages[layer]
        text_index, text_mask = rectangle(text, layout.text_counts)
        vision_index, vision_mask = rectangle(vision, self._counts)
        view = StageView(layer, query, key, mask, scaling, text_index, text_mask, vision_index, vision_mask)
        score = self._pruner.score(view)
        candidates = torch.ones_like(vision_index, dtype=torch.bool) if vision_mask is None else vision_mask
        k = keeps[0] if min(keeps) == max(keeps) else torch.tensor(keeps).to(device, non_blocking=True)[:, None]
        kept_vision = torch.zeros_like(vision).scatter(1, vision_index, top_k_mask(score, candidates, k))

        survivors = kept_vision | ~vision if valid is None else kept_vision | (valid & ~vision)
        totals = [
            real - entered + keep
            for real, entered, keep in zip(layout.real_counts, layout.vision_counts, keeps, strict=True)
        ]
        relative = positions_of(survivors, max(totals))
        self.upcoming = Segment(
            layer=layer,
            index=relative if segment is None else segment.index.gather(1, relative),
            relative=relative,
            valid=None if min(totals) == max(totals) else survivors.gather(1, relative),
            vision=kept_vision.gather(1, relative),
            text=text.gather(1, relative),
        )
        entered = vision_index if segment is None else segment.index.gather(1, vision_index)
        self.records.append(
            StageRecord(
                layer=layer,
                entered=self.past + entered,
                entered_mask=candidates,
                scores=score,
                kept=self.past + self.upcoming.index,
                kept_mask=self.upcoming.vision,
                tokens=relative.shape[1],
            )
        )
        self._counts = keeps

    # -- at the input of every layer --------------------------------------------------------------------------------

    def advance(self, layer: int, hidden: Tensor) -> Tensor:
        """Drop what the stage before this layer decided to drop; hidden states [B, n, d] in and out."""
        upcoming = self.upcoming
        if upcoming is None or upcoming.layer + 1 != layer:
            return hidden
        self.segment, self.upcoming = upcoming, None
        return gather_tokens(hidden, upcoming.relative, dim=1)

    def layer_inputs(self, history: History | None, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Mask, rotary embeddings and positions for the present segment; made once for all layers that share them."""
        key = (id(self.segment), id(history), id(kwargs.get("attention_mask")))
        if key not in self._memo:
            # The operands are kept beside the result: an id is unique only while its object lives.
            self._memo[key] = (self._make_inputs(history, hidden, kwargs), self.segment, history, kwargs)
        return self._memo[key][0]

    def remember(self, cache: Any, layer: int, history: History | None) -> None:
        """Tell a layer's cache which tokens it is about to hold."""
        self.cache = cache
        segment = self.segment
        if segment is None or cache is None:
            return
        key = ("history", id(segment), id(history))
        if key not in self._memo:
            columns, valid = self._columns(history, segment.index.device, segment.index.shape[0])
            shift = None
            if self._pruner.positions == "compact":
                shift = self._dropped_before()[:, -1:] + (0 if history is None else _shift(history))
            self._memo[key] = (History(columns, valid, self.past + self.length, shift), segment, history)
        hold(cache, layer, self._memo[key][0])

    def restore_length(self, hidden: Tensor) -> Tensor:
        """Hidden states of the survivors at their own places in the full prompt, zeros elsewhere: [B, N, d]."""
        segment = self.segment
        if segment is None:
            return hidden
        return scatter_tokens(hidden, segment.index, self.length, segment.valid)

    # -- helpers ----------------------------------------------------------------------------------------------------

    def _make_inputs(self, history: History | None, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        index = None if self.segment is None else self.segment.index
        inputs: dict[str, Any] = {}
        if "attention_mask" in kwargs:
            inputs["attention_mask"] = self._mask(kwargs["attention_mask"], history, hidden)
        positions = kwargs.get("position_ids")
        if positions is not None and index is not None:
            positions = gather_tokens(positions, index, dim=positions.ndim - 1, batch_dim=positions.ndim - 2)
        shift = self._position_shift(history)
        if shift is not None and positions is not None:
            inputs["position_ids"] = positions - shift.to(positions.device)
            inputs["position_embeddings"] = self._rotary(hidden, inputs["position_ids"])
        elif index is not None:
            inputs["position_ids"] = positions
            rotary = kwargs.get("position_embeddings")
            if rotary is not None:
                inputs["position_embeddings"] = tuple(
                    gather_tokens(part, index, dim=part.ndim - 2, batch_dim=part.ndim - 3) for part in rotary
                )
        return inputs

    def _mask(self, mask: Tensor | None, history: History | None, hidden: Tensor) -> Tensor | None:
        segment = self.segment
        batch, device = hidden.shape[0], hidden.device
        fillers = (segment is not None and segment.valid is not None) or (history and history.valid is not None)
        if mask is None and not fillers:
            return None  # plainly causal stays plainly causal: survivors are in their old order
        columns, valid = self._columns(history, device, batch)
        if mask is None:
            rows = torch.arange(self.length, device=device).expand(batch, -1) if segment is None else segment.index
            mask = (columns[:, None, :] <= self.past + rows[:, :, None])[:, None]
        else:
            if segment is not None:
                mask = gather_tokens(mask, segment.index, dim=2)
            mask = gather_tokens(mask, columns, dim=3)
        if valid is None:
            return mask
        allowed = valid.to(mask.device)[:, None, None, :]
        return mask & allowed if mask.dtype == torch.bool else mask.masked_fill(~allowed, torch.finfo(mask.dtype).min)

    def _columns(self, history: History | None, device: torch.device, batch: int) -> tuple[Tensor, Tensor | None]:
        """Logical positions of the key columns of a layer in this call, and which of them are no fillers."""
        segment = self.segment
        start = 0 if history is None else history.length
        stop = self.past + (self.length if segment is None else 0)
        parts = [torch.arange(start, stop, device=device).expand(batch, -1)]
        valid: list[Tensor | None] = [None]
        if history is not None:
            parts.insert(0, history.columns.to(device))
            valid.insert(0, history.valid)
        if segment is not None:
            parts.append(self.past + segment.index.to(device))
            valid.append(segment.valid)
        columns = torch.cat(parts, dim=1)
        if all(part is None for part in valid):
            return columns, None
        masks = [
            torch.ones_like(part, dtype=torch.bool) if ok is None else ok.to(device)
            for part, ok in zip(parts, valid, strict=True)
        ]
        return columns, torch.cat(masks, dim=1)

    def _position_shift(self, history: History | None) -> Tensor | None:
        """How far compact positions lie below the original ones, [B, n] or [B, 1]; None to keep positions."""
        shift = None if history is None else history.shift
        if self.segment is not None and self._pruner.positions == "compact":
            within = self._dropped_before().gather(1, self.segment.index)
            shift = within if shift is None else within + shift
        return shift

    def _dropped_before(self) -> Tensor:
        """Tokens dropped up to and including each of the N positions, int64 [B, N]."""
        assert self.layout is not None and self.segment is not None
        segment, vision = self.segment, self.layout.vision.to(self.segment.index.device)
        alive = torch.zeros_like(vision).scatter(1, segment.index, segment.vision)
        return (vision & ~alive).cumsum(dim=1)


def _shift(history: History) -> Tensor | int:
    return 0 if history.shift is None else history.shift
