"""What one layer is given in place of the model's own inputs: its mask, its positions, its rotary embedding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaptinfer.engine.cache.access import announce, cache_argument, history_of, keys_of, mask_offset
from adaptinfer.engine.cache.history import History, Keys, whole_history
from adaptinfer.engine.families import Family
from adaptinfer.engine.masks import layer_mask, recurrent_mask
from adaptinfer.engine.segment import CallPlan, GivenRows, Segment
from adaptinfer.functional import gather_tokens


@dataclass(frozen=True)
class Stored:
    """What a layer with keys of its own is about to have stored, and what its attention meets.

    Attributes:
        history: of the layer after this call.
        offset: logical position of the first column of the model's own mask.
        keys: the columns that attention meets, or the number of the first entry and how many.
        segment: that the layer was given.
    """

    history: History
    offset: int
    keys: tuple[int, int] | Keys
    segment: Segment | None


class LayerInputs:
    """Makes the inputs of the layers of one call, each set once for all layers that share it."""

    def __init__(self, family: Family, compact: bool, plan: CallPlan) -> None:
        """Args:
        family: of the model.
        compact: whether survivors are renumbered.
        plan: of the call.
        """
        self._family, self._compact, self._plan = family, compact, plan
        self._memo: dict[Any, Any] = {}

    def remembered(self, key: tuple[Any, ...], make: Callable[[], Any], *operands: Any) -> Any:
        """Made once for all layers that share its operands, which are kept: an id is unique only while they live."""
        key = (*key, *map(id, operands))
        if key not in self._memo:
            self._memo[key] = (make(), operands)
        return self._memo[key][0]

    def history_after(self, segment: Segment, before: History | None) -> History:
        """What a layer that is given a segment will have been given of all tokens so far."""
        return self.remembered(("history",), lambda: self._history_after(segment, before), segment, before)

    def _history_after(self, segment: Segment, before: History | None) -> History:
        past, length, tail = self._plan.past, self._plan.length, self._plan.tail
        assert past is not None
        index = segment.index[:, : segment.index.shape[1] - (length - tail)]
        valid = None if segment.valid is None else segment.valid[:, : index.shape[1]]
        columns = past + index
        if before is not None or past:
            device, batch = index.device, index.shape[0]
            whole = whole_history(index) if before is None else before
            held = Keys(whole.columns.to(device), None if whole.valid is None else whole.valid.to(device))
            between = torch.arange(whole.length, past, device=device).expand(batch, -1)
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
        if self._compact:
            shift = self._dropped_before(segment)[:, tail - 1 : tail]
            shift = shift if before is None or before.shift is None else shift + before.shift.to(shift.device)
        return History(columns, valid, past + tail, shift)

    def of_layer(
        self,
        layer: int,
        segment: Segment | None,
        before: History | None,
        stored: Stored,
        hidden: Tensor,
        kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        """Keyword arguments that change for a layer with attention.

        Args:
            layer: its number.
            segment: that it is given; None for all tokens.
            before: its history before the call.
            stored: by the layer whose keys it reads, as a rule itself.
            hidden: [B, n, d], its hidden states.
            kwargs: its keyword arguments as the model made them.
        """
        mask, after, offset, keys = kwargs.get("attention_mask"), stored.history, stored.offset, stored.keys
        newest = stored.segment is segment  # else its queries are some of its newest keys only
        given = GivenRows.of(segment, self._plan.length, hidden.shape[1])

        def make() -> dict[str, Any]:
            inputs: dict[str, Any] = {}
            # Plainly causal stays so, as `layer_mask` would say; then there is no need to lay out the columns.
            plain = mask is None and newest and after.valid is None and not isinstance(keys, Keys)
            if "attention_mask" in kwargs and not plain:
                columns = keys if isinstance(keys, Keys) else after.entries(*keys)
                if self._plan.flash and columns.room and self._plan.past is not None:
                    # FlashAttention reads from the last columns whether its queries are padding: no room after them.
                    columns = columns.first(self._plan.past + self._plan.length - after.dropped)
                positions = self._positions(layer, given, hidden, cache_argument(kwargs)) if mask is None else None
                inputs["attention_mask"] = layer_mask(
                    mask, given.rows, columns, offset, positions, self._plan.flash, newest
                )
            numbers = _picked_numbers(kwargs, given.index)
            shift = self._position_shift(segment, before)
            if shift is not None and numbers is not None and self._family.rotary is not None:
                inputs["position_ids"] = numbers - shift.to(numbers.device)
                inputs["position_embeddings"] = self._family.rotary(hidden, inputs["position_ids"])
            elif given.rows is not None:
                if numbers is not None:
                    inputs["position_ids"] = numbers
                inputs.update(_picked_rotary(kwargs, given.rows))
            return inputs

        operands = (segment, before, after, mask, kwargs.get("position_embeddings"))
        entries, shared = (None, keys) if isinstance(keys, Keys) else (keys, None)
        inputs = self.remembered(("inputs", entries, offset, given.cut, newest), make, *operands, shared)
        return {**inputs, **self._token_inputs(given, kwargs)}

    def of_recurrent_layer(self, segment: Segment | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments that change for a layer without attention."""
        if segment is None:
            return {}
        mask = kwargs.get("attention_mask")
        made = self.remembered(
            ("recurrent",), lambda: (recurrent_mask(mask, segment.index, segment.valid),), segment, mask
        )
        inputs = {"attention_mask": made[0], **_picked_rotary(kwargs, segment.index)}
        numbers = _picked_numbers(kwargs, segment.index)
        return inputs if numbers is None else {**inputs, "position_ids": numbers}

    def _token_inputs(self, given: GivenRows, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Further inputs of a layer that have a row per token (Gemma 4's per-layer embeddings)."""
        rows = given.rows
        if rows is None:
            return {}
        named = {name: kwargs[name] for name in self._family.token_inputs if kwargs.get(name) is not None}
        return {
            name: gather_tokens(value, rows, dim=1) for name, value in named.items() if value.shape[1] != given.given
        }

    def _positions(self, layer: int, given: GivenRows, hidden: Tensor, cache: Any) -> Tensor:
        """Logical positions of the tokens given to a layer, int64 [B or 1, n]."""
        if self._plan.past is None:
            return _seen_before(cache, layer, self._family.key_source(layer), 1).view(1, 1)
        return given.positions(self._plan.past, hidden.device)

    def _position_shift(self, segment: Segment | None, before: History | None) -> Tensor | None:
        """How far compact positions lie below the original ones, [B, n] or [B, 1]; None to keep positions."""
        shift = None if before is None else before.shift
        if segment is not None and self._compact:
            within = self._dropped_before(segment).gather(1, segment.index)
            shift = within if shift is None else within + shift.to(within.device)
        return shift

    def _dropped_before(self, segment: Segment) -> Tensor:
        """Tokens dropped up to and including each of the N positions, int64 [B, N]."""
        assert self._plan.layout is not None
        vision = self._plan.layout.vision.to(segment.index.device)
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


def _picked_numbers(kwargs: dict[str, Any], index: Tensor | None) -> Tensor | None:
    """A layer's position ids, those of some tokens if ``index`` is given; None if it has none."""
    numbers = kwargs.get("position_ids")
    if numbers is None or index is None:
        return numbers
    return gather_tokens(numbers, index, dim=numbers.ndim - 1, batch_dim=numbers.ndim - 2)


def _picked_rotary(kwargs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """Some rows of the rotary embedding that the model computed for the whole call."""
    rotary = kwargs.get("position_embeddings")
    if rotary is None:
        return {}

    def pick(part: Tensor) -> Tensor:
        return gather_tokens(part, rows, dim=part.ndim - 2, batch_dim=part.ndim - 3)

    return {"position_embeddings": pick(rotary) if isinstance(rotary, Tensor) else tuple(map(pick, rotary))}
