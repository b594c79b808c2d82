"""One forward call of an attached model: what each layer is given, and at which layers a stage looks.

A `Forward` lives in a context variable for the length of one call of the multimodal model: two threads on one model, or
two models in one thread, never see each other's.
"""

from __future__ import annotations

import dataclasses
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adaptinfer.engine.cache.access import announce, cache_argument, history_of, hold, keys_of, mask_offset
from adaptinfer.engine.cache.checks import check_cache
from adaptinfer.engine.cache.history import History, Keys, whole_history
from adaptinfer.engine.choosing import Segment, Stages
from adaptinfer.engine.masks import layer_mask, recurrent_mask
from adaptinfer.errors import UnsupportedError
from adaptinfer.functional import gather_tokens, scatter_tokens
from adaptinfer.schedule import BEFORE

if TYPE_CHECKING:
    from collections.abc import Callable

    from adaptinfer.engine.families import Family
    from adaptinfer.engine.layout import PromptLayout
    from adaptinfer.engine.parallel import Ranks
    from adaptinfer.pruners.contracts import Pruner
    from adaptinfer.pruners.views import StageView

__all__ = ["ACTIVE", "Forward"]

ACTIVE: ContextVar[Forward | None] = ContextVar("adaptinfer_forward", default=None)


class _Asked(Exception):
    """Ends a layer that was only asked for its queries and keys, and carries them."""

    def __init__(self, query: Tensor, key: Tensor, mask: Any, options: dict[str, Any]) -> None:
        self.query, self.key, self.mask, self.options = query, key, mask, options


class Forward(Stages):
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
        super().__init__(family, pruner, past, length, layout, stages, early_drop, ranks)
        self.owner = owner
        self._tail, self._flash = tail, flash
        self._asking = False
        self._memo: dict[Any, Any] = {}
        self._read_by: dict[int, tuple[History, Any, Segment | None]] = {}

    # -- a stage behind its layer -----------------------------------------------------------------------------------

    def answer(self, query: Tensor, key: Tensor, mask: Any, options: dict[str, Any]) -> None:
        """End the layer here, if it was only asked for its queries and keys."""
        if self._asking:
            raise _Asked(query, key, mask, options)

    @torch.no_grad()
    def _choose_behind(self, layer: int, hidden: Tensor, kwargs: dict[str, Any], run: Callable[..., Any]) -> Tensor:
        """Choose behind a stage's layer, at the entry of the next.

        Args:
            layer: the stage's.
            hidden: [B, n, d], its output.
            kwargs: keyword arguments of the next layer.
            run: that layer's forward.

        Returns:
            ``hidden``, with merged tokens in it if the pruner merged any.
        """
        view = self._waiting
        if "next" in self._pruner.needs:
            view = self._ask(layer, hidden, kwargs, run)
        if view is None:
            return hidden  # the layer's attention went another way; `check_stages` tells
        selection = self._select(dataclasses.replace(view, output=hidden.to(view.query.device)))
        if selection.hidden is None:
            return hidden
        index = view.vision_index.to(hidden.device)[..., None].expand_as(selection.hidden)
        return hidden.scatter(1, index, selection.hidden.to(hidden))

    def _ask(self, layer: int, hidden: Tensor, kwargs: dict[str, Any], run: Callable[..., Any]) -> StageView:
        """The view of a stage that looks at the queries and keys which the next layer would make of all tokens.

        The layer runs up to its attention and no further, and its cache takes up nothing.
        """
        cache, segment, behind = cache_argument(kwargs), self.segment, layer + 1
        before = history_of(cache, behind)
        changed: dict[str, Any] = {}
        if segment is not None or before is not None:
            after = before if segment is None else self.history_after(segment, before)
            assert after is not None and self.past is not None
            entries = 0, self.past + self.length - after.dropped
            changed = self._inputs(behind, before, after, (0, entries), True, hidden, kwargs)
        given = {**kwargs, **changed}
        without_cache = {name: None for name, value in given.items() if value is cache and cache is not None}
        self._asking = True
        try:
            run(hidden_states=hidden, **{**given, **without_cache})
        except _Asked as asked:
            query, key, mask, options = asked.query, asked.key, asked.mask, asked.options
        else:
            raise UnsupportedError(
                f"layer {behind} was to tell its queries and keys, but its attention did not pass through "
                "transformers' attention interface; please report this model"
            )
        finally:
            self._asking = False
        if cache is not None and self.past:
            key = torch.cat([cache.layers[behind].keys.to(key), key], dim=2)
        assert self._entered is not None
        self._entered = self._entered[0], given.get("position_embeddings")
        return self._view(layer, query, key, mask, options)

    # -- at the input of every layer --------------------------------------------------------------------------------

    def enter(
        self, layer: int, hidden: Tensor, kwargs: dict[str, Any], run: Callable[..., Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """What a layer is given instead of the model's own inputs.

        Args:
            layer: its number.
            hidden: [B, n, d], the output of the layer before.
            kwargs: the layer's keyword arguments.
            run: the layer's forward, for a stage that asks it for its queries and keys.

        Returns:
            Hidden states, and the keyword arguments that change.
        """
        if layer == 0 and self.stages and "embeddings" in self._pruner.needs:
            self._embeddings = hidden
        if layer == 0 and BEFORE in self.stages:
            hidden = self._choose_before(hidden)
        if layer - 1 in self._behind:
            hidden = self._choose_behind(layer - 1, hidden, kwargs, run)
        hidden, changed = self._given(layer, hidden, kwargs)
        if layer in self.stages:
            self._entered = hidden, {**kwargs, **changed}.get("position_embeddings")
        return hidden, changed

    def _given(self, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """`enter`, once it is settled which tokens the layer is given."""
        upcoming = self.upcoming
        if upcoming is not None and upcoming.layer + 1 == layer:
            entered = self.length if self.segment is None else self.segment.index.shape[1]
            self.segment, self.upcoming = upcoming, None
            if hidden.shape[1] == entered:  # else the model went on with the last tokens alone, see _inputs
                hidden = gather_tokens(hidden, upcoming.relative, dim=1)
        cache = self.cache = cache_argument(kwargs)
        if layer == 0 and self.stages and cache is not None:
            check_cache(cache)  # one that the model made itself; a caller's was checked before
        segment = self.segment
        if layer in self._family.recurrent:
            return hidden, {} if segment is None else self._recurrent_inputs(segment, kwargs)
        source = self._family.key_source(layer)
        before = history_of(cache, source)
        if segment is None and before is None:
            if not self.stages or layer not in self._family.sources.values():
                return hidden, {}
            before = whole_history(hidden)  # later layers read its keys, and may then be given fewer tokens
            if cache is not None:
                hold(cache, layer, before)
        if source != layer:  # it reads the keys of an earlier layer, which may have been given more
            after, span, given_to_source = self._read_by[source]
        else:
            offset = mask_offset(cache, layer)
            after = before if segment is None else self.history_after(segment, before)
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

    def history_after(self, segment: Segment, before: History | None) -> History:
        """What a layer that is given a segment will have been given of all tokens so far."""

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
