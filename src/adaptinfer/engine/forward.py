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

from adaptinfer.engine.cache import (
    History,
    Keys,
    announce,
    cache_argument,
    check_cache,
    history_of,
    hold,
    keys_of,
    mask_offset,
    whole_history,
)
from adaptinfer.engine.layout import PromptLayout, rectangle
from adaptinfer.engine.masks import layer_mask, recurrent_mask, visible_keys
from adaptinfer.engine.report import StageRecord
from adaptinfer.engine.stage import StageView
from adaptinfer.errors import UnsupportedError
from adaptinfer.functional import gather_tokens, positions_of, scatter_tokens, top_k_mask

if TYPE_CHECKING:
    from collections.abc import Callable

    from adaptinfer.engine.families import Family
    from adaptinfer.engine.parallel import Ranks
    from adaptinfer.pruners.base import Pruner

__all__ = ["ACTIVE", "Forward", "Segment"]

ACTIVE: ContextVar[Forward | None] = ContextVar("adaptinfer_forward", default=None)


@dataclass(frozen=True)
class Segment:
    """The tokens that the layers behind one stage see, [B, n].

    Attributes:
        layer: the stage's layer; this segment is given to the layers after it.
        index: int64, positions among the call's N tokens, ascending but for fillers, which stand first.
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

    def to(self, device: torch.device) -> Segment:
        """The same on the device of a later layer, should accelerate have put that elsewhere."""
        if self.index.device == device:
            return self
        parts = (self.index, self.relative, self.valid, self.vision, self.text)
        return Segment(self.layer, *(part if part is None else part.to(device) for part in parts))  # pyright: ignore


class Forward:
    """State of one call. ``stages`` maps a layer to the vision tokens that each sample keeps behind it."""

    def __init__(
        self,
        owner: object,
        family: Family,
        pruner: Pruner,
        past: int | None,
        length: int,
        tail: int,
        layout: PromptLayout | None,
        stages: dict[int, tuple[int, ...]],
        early_drop: bool,
        ranks: Ranks,
        flash: bool,
    ) -> None:
        """Args:
        past: logical tokens cached before the call; None for one new token on a static cache, which nobody needs.
        length: N, new tokens.
        tail: from this of them on all are text, which stays whole and may be forgotten again (guesses of assisted
            decoding).
        """
        self.owner = owner
        self.past, self.length, self.layout = past, length, layout
        self.records: list[StageRecord] = []
        self._met: set[int] = set()
        self.cache: Any = None
        self.segment: Segment | None = None
        self.upcoming: Segment | None = None
        self._family, self._pruner, self._early_drop, self._ranks = family, pruner, early_drop, ranks
        self._stages, self._tail, self._flash = stages, tail, flash
        self._counts = layout.vision_counts if layout else ()
        self._memo: dict[Any, Any] = {}
        self._read_by: dict[int, tuple[History, Any, Segment | None]] = {}

    @property
    def prunes(self) -> bool:
        """Whether any stage drops a token."""
        return bool(self._stages)

    # -- inside a pruning layer -------------------------------------------------------------------------------------

    def scores_in(self, layer: int) -> bool:
        """Whether a stage sits in this layer."""
        return layer in self._stages

    def check_stages(self) -> None:
        """Raise unless every stage was met: a layer whose attention went another way would go on unpruned."""
        missed = set(self._stages) - self._met
        if missed:
            raise UnsupportedError(
                f"layers {sorted(missed)} were to prune, but their attention did not pass through transformers' "
                "attention interface, so the answer is not a pruned one; please report this model"
            )

    def dropping(self, layer: int) -> Tensor | None:
        """Rows that go on, if this layer need not compute the others' outputs; None for every other layer."""
        upcoming = self.upcoming
        return upcoming.relative if self._early_drop and upcoming is not None and upcoming.layer == layer else None

    @torch.no_grad()
    def choose(
        self, layer: int, query: Tensor, key: Tensor, mask: Any, options: dict[str, Any]
    ) -> tuple[int, Callable[[Tensor], Tensor]]:
        """Score the vision tokens inside the stage's layer and settle which tokens the next layer is given.

        Args:
            layer: the stage's.
            query: [B, H, n, D].
            key: [B, K, L, D].
            mask: the layer's own, of any kind.
            options: the other arguments of the layer's attention function.

        Returns:
            How many of the key columns are in use, and what query rows may see of them, as `StageView.visible`.
        """
        layout, segment = self.layout, self.segment
        assert layout is not None and self.past is not None
        device = query.device
        if segment is None:
            vision, text, valid = layout.vision.to(device), layout.text.to(device), layout.real
            valid = None if valid is None else valid.to(device)
        else:
            segment = segment.to(device)
            vision, text, valid = segment.vision, segment.text, segment.valid
        keeps = self._stages[layer]
        text_index, text_mask = rectangle(text, layout.text_counts)
        vision_index, vision_mask = rectangle(vision, self._counts)
        used = self._entries_in_use(layer, key.shape[2])
        past, key = used - query.shape[2], key[:, :, :used]  # a static cache has room behind

        def visible(rows: Tensor) -> Tensor:
            return visible_keys(mask, rows, past, used, options.get("sliding_window"))

        view = StageView(
            layer=layer,
            query=query,
            key=key,
            visible=visible,
            scaling=options.get("scaling") or query.shape[3] ** -0.5,
            softcap=options.get("softcap"),
            text_index=text_index,
            text_mask=text_mask,
            vision_index=vision_index,
            vision_mask=vision_mask,
            total=self._ranks.total(query.shape[1], self._family.heads),
            all_heads=self._family.heads,
        )
        score = self._pruner.score(view)
        self._met.add(layer)
        if keeps == self._counts:  # an observer's stage: no segment, and so no gathers and no masks of its own
            return used, visible
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
        return used, visible

    def _entries_in_use(self, layer: int, columns: int) -> int:
        """How many of a layer's key columns hold something; the last of them are those of this call."""
        assert self.past is not None
        history = history_of(self.cache, layer)
        dropped = 0 if history is None else history.dropped
        return min(columns, self.past + self.length - dropped)

    # -- at the input of every layer --------------------------------------------------------------------------------

    def enter(self, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """What a layer is given instead of the model's own inputs.

        Args:
            layer: its number.
            hidden: [B, n, d], the output of the layer before.
            kwargs: the layer's keyword arguments.

        Returns:
            Hidden states, and the keyword arguments that change.
        """
        upcoming = self.upcoming
        if upcoming is not None and upcoming.layer + 1 == layer:
            entered = self.length if self.segment is None else self.segment.index.shape[1]
            self.segment, self.upcoming = upcoming, None
            if hidden.shape[1] == entered:  # else the model went on with the last tokens alone, see _inputs
                hidden = gather_tokens(hidden, upcoming.relative, dim=1)
        cache = self.cache = cache_argument(kwargs)
        if layer == 0 and self._stages and cache is not None:
            check_cache(cache)  # one that the model made itself; a caller's was checked before
        segment = self.segment
        if layer in self._family.recurrent:
            return hidden, {} if segment is None else self._recurrent_inputs(segment, kwargs)
        source = self._family.key_source(layer)
        before = history_of(cache, source)
        if segment is None and before is None:
            if not self._stages or layer not in self._family.sources.values():
                return hidden, {}
            before = whole_history(hidden)  # later layers read its keys, and may then be given fewer tokens
            if cache is not None:
                hold(cache, layer, before)
        if source != layer:  # it reads the keys of an earlier layer, which may have been given more
            after, span, given_to_source = self._read_by[source]
        else:
            offset = mask_offset(cache, layer)
            after = before if segment is None else self._history_after(segment, before)
            assert after is not None
            if segment is not None and cache is not None:
                hold(cache, layer, after)
            held = self.length if segment is None else segment.index.shape[1]
            span = (offset, keys_of(cache, layer, after, self.past, self.length, held))
            self._read_by[layer] = after, span, segment
            announce(cache, layer)
            given_to_source = segment
        newest = given_to_source is segment  # else its queries are some of its newest keys only
        return hidden, self._inputs(layer, before, after, span, newest, hidden, kwargs)

    def restore_length(self, hidden: Tensor) -> Tensor:
        """Hidden states of the survivors at their own places in the full prompt, zeros elsewhere: [B, N, d]."""
        segment = self.segment
        if segment is None or hidden.shape[1] != segment.index.shape[1]:
            return hidden  # nothing dropped, or the model itself went on with the last tokens alone
        return scatter_tokens(hidden, segment.index, self.length, segment.valid)

    def spread(self, tokens: Tensor) -> Tensor:
        """Per-token values of the whole call [B, N, d] for the tokens that the present layer was given."""
        return tokens if self.segment is None else gather_tokens(tokens, self.segment.index, dim=1)

    # -- helpers ----------------------------------------------------------------------------------------------------

    def _remembered(self, key: tuple[Any, ...], make: Callable[[], Any], *operands: Any) -> Any:
        """Made once for all layers that share its operands, which are kept: an id is unique only while they live."""
        key = (*key, *map(id, operands))
        if key not in self._memo:
            self._memo[key] = (make(), operands)
        return self._memo[key][0]

    def _history_after(self, segment: Segment, before: History | None) -> History:
        def make() -> History:
            assert self.past is not None
            end = self.past + self._tail
            index = segment.index[:, : segment.index.shape[1] - (self.length - self._tail)]
            valid = None if segment.valid is None else segment.valid[:, : index.shape[1]]
            columns = self.past + index
            if before is not None or self.past:
                device, batch = index.device, index.shape[0]
                whole = whole_history(index) if before is None else before
                held = Keys(whole.columns.to(device), None if whole.valid is None else whole.valid.to(device))
                between = torch.arange(whole.length, self.past, device=device).expand(batch, -1)
                parts = [held.columns.expand(batch, -1), between, columns]
                if held.valid is not None or valid is not None:
                    flags = [held.valid, None, valid]
                    valid = torch.cat(
                        [
                            torch.ones_like(part, dtype=torch.bool) if flag is None else flag
                            for part, flag in zip(parts, flags, strict=True)
                        ],
                        dim=1,
                    )
                columns = torch.cat(parts, dim=1)
            shift = None
            if self._pruner.positions == "compact":
                shift = self._dropped_before(segment)[:, self._tail - 1 : self._tail]
                shift = shift if before is None or before.shift is None else shift + before.shift.to(shift.device)
            return History(columns, valid, end, shift)

        return self._remembered(("history",), make, segment, before)

    def _inputs(
        self,
        layer: int,
        before: History | None,
        after: History,
        span: tuple[int, Any],
        newest: bool,
        hidden: Tensor,
        kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        offset, keys = span
        segment, mask = self.segment, kwargs.get("attention_mask")
        given = hidden.shape[1]
        # Gemma 4 goes on with the last tokens alone where no later layer needs the others' keys, and cuts its inputs.
        cut = (self.length if segment is None else segment.index.shape[1]) - given
        index = None if segment is None else segment.index[:, cut:]
        rows = index if index is None or not cut else index - (self.length - given)

        def make() -> dict[str, Any]:
            inputs: dict[str, Any] = {}
            # Plainly causal stays so, as `layer_mask` would say; then there is no need to lay out the columns.
            plain = mask is None and newest and after.valid is None and not isinstance(keys, Keys)
            if "attention_mask" in kwargs and not plain:
                columns = keys if isinstance(keys, Keys) else after.entries(*keys)
                if self._flash and columns.room and self.past is not None:
                    # Whether its queries are padding, FlashAttention reads from the last columns: no room behind them.
                    columns = columns.first(self.past + self.length - after.dropped)
                positions = self._positions(layer, index, given, hidden) if mask is None else None
                inputs["attention_mask"] = layer_mask(mask, rows, columns, offset, positions, self._flash, newest)
            numbers = kwargs.get("position_ids")
            if numbers is not None and index is not None:
                numbers = gather_tokens(numbers, index, dim=numbers.ndim - 1, batch_dim=numbers.ndim - 2)
            shift = self._position_shift(before)
            if shift is not None and numbers is not None and self._family.rotary is not None:
                inputs["position_ids"] = numbers - shift.to(numbers.device)
                inputs["position_embeddings"] = self._family.rotary(hidden, inputs["position_ids"])
            elif rows is not None:
                if numbers is not None:
                    inputs["position_ids"] = numbers
                inputs.update(self._rotated(rows, kwargs))
            return inputs

        operands = (segment, before, after, mask, kwargs.get("position_embeddings"))
        entries, shared = (None, keys) if isinstance(keys, Keys) else (keys, None)
        inputs = self._remembered(("inputs", entries, offset, cut, newest), make, *operands, shared)
        return {**inputs, **self._token_inputs(rows, given, kwargs)}

    def _rotated(self, rows: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        rotary = kwargs.get("position_embeddings")
        if rotary is None:
            return {}

        def pick(part: Tensor) -> Tensor:
            return gather_tokens(part, rows, dim=part.ndim - 2, batch_dim=part.ndim - 3)

        return {"position_embeddings": pick(rotary) if isinstance(rotary, Tensor) else tuple(map(pick, rotary))}

    def _token_inputs(self, rows: Tensor | None, given: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Further inputs of a layer that have a row per token (Gemma 4's per-layer embeddings)."""
        if rows is None:
            return {}
        named = {name: kwargs[name] for name in self._family.token_inputs if kwargs.get(name) is not None}
        return {name: gather_tokens(value, rows, dim=1) for name, value in named.items() if value.shape[1] != given}

    def _recurrent_inputs(self, segment: Segment, kwargs: dict[str, Any]) -> dict[str, Any]:
        mask = kwargs.get("attention_mask")
        made = self._remembered(
            ("recurrent",), lambda: (recurrent_mask(mask, segment.index, segment.valid),), segment, mask
        )
        numbers = kwargs.get("position_ids")
        inputs = {"attention_mask": made[0], **self._rotated(segment.index, kwargs)}
        if numbers is not None:
            inputs["position_ids"] = gather_tokens(
                numbers, segment.index, dim=numbers.ndim - 1, batch_dim=numbers.ndim - 2
            )
        return inputs

    def _positions(self, layer: int, index: Tensor | None, given: int, hidden: Tensor) -> Tensor:
        """Logical positions of the tokens given to a layer, int64 [B or 1, n]."""
        if self.past is None:
            return _seen_before(self.cache, layer, self._family.key_source(layer), 1).view(1, 1)
        if index is not None:
            return self.past + index
        return torch.arange(self.past + self.length - given, self.past + self.length, device=hidden.device)[None]

    def _position_shift(self, before: History | None) -> Tensor | None:
        """How far compact positions lie below the original ones, [B, n] or [B, 1]; None to keep positions."""
        shift = None if before is None else before.shift
        segment = self.segment
        if segment is not None and self._pruner.positions == "compact":
            within = self._dropped_before(segment).gather(1, segment.index)
            shift = within if shift is None else within + shift.to(within.device)
        return shift

    def _dropped_before(self, segment: Segment) -> Tensor:
        """Tokens dropped up to and including each of the N positions, int64 [B, N]."""
        assert self.layout is not None
        vision = self.layout.vision.to(segment.index.device)
        alive = torch.zeros_like(vision).scatter(1, segment.index, segment.vision)
        return (vision & ~alive).cumsum(dim=1)


def decoding_inputs(family: Family, layer: int, hidden: Tensor, kwargs: dict[str, Any], flash: bool) -> dict[str, Any]:
    """What changes for a layer that is given all new tokens, told from its cache layer alone, so that it can be traced.

    Args:
        family: of the model.
        layer: its number.
        hidden: [B, n, d].
        kwargs: the layer's keyword arguments.
        flash: whether FlashAttention reads the mask.
    """
    cache = cache_argument(kwargs)
    source = family.key_source(layer)
    history = None if layer in family.recurrent else history_of(cache, source)
    if history is None:
        return {}
    changed: dict[str, Any] = {}
    if source == layer and not torch.compiler.is_compiling():
        announce(cache, layer)
    new = hidden.shape[1]
    past = _seen_before(cache, layer, source, new)
    keys = keys_of(cache, source, history, past, new, new)
    keys = keys if isinstance(keys, Keys) else history.entries(*keys)
    if "attention_mask" in kwargs:
        at = past + torch.arange(new, device=past.device if isinstance(past, Tensor) else hidden.device)[None]
        offset = mask_offset(cache, source, taken_up=0 if source == layer else new)
        changed["attention_mask"] = layer_mask(kwargs["attention_mask"], None, keys, offset, at, flash)
    positions = kwargs.get("position_ids")
    if history.shift is not None and positions is not None and family.rotary is not None:
        changed["position_ids"] = positions - history.shift.to(positions.device)
        changed["position_embeddings"] = family.rotary(hidden, changed["position_ids"])
    return changed


def _seen_before(cache: Any, layer: int, source: int, new: int) -> Any:
    """Logical tokens cached before the new ones that a layer is given: an int, or a tensor for static caches."""
    seen = cache.layers[source].get_seq_length()
    return seen if source == layer else seen - new  # the source has taken up the new ones already
