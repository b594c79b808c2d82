"""Cache layers that hold the surviving tokens and report the length of the whole prompt.

What a later forward needs to know of a pruned layer (which logical columns it holds) lives in the cache layer itself,
so that it follows the cache wherever it goes: decoding, further turns, deep copies, beams, offloading.

Every kind of cache layer of transformers that can hold fewer entries has a twin here with the same storage. *Logical*
counts the tokens that were seen, *held* those that are stored.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

from adaptinfer.engine.cache.history import History, Keys
from adaptinfer.errors import UnsupportedError

if TYPE_CHECKING:
    _Layer = DynamicLayer
    _Static = StaticLayer
else:
    _Layer = _Static = object

_QUANTIZED = getattr(cache_utils, "BaseQuantizedLayer", cache_utils.QuantizedLayer)  # pyright: ignore
# Since transformers 5.5 static layers count by themselves; before, the model passed positions, of dropped tokens too.
_NEW_STATIC = hasattr(StaticLayer(max_cache_len=1), "cumulative_length")


class Pruned(_Layer):
    """Mixed into a cache layer class: fewer entries than tokens seen. Without a history (after a reset, until it is
    pruned again) it behaves as that class does."""

    history: History | None = None
    announced: bool = False

    @property
    def dropped(self) -> int:
        return 0 if self.history is None else self.history.dropped

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.history is not None and not torch.compiler.is_compiling():
            self._heard()
        return super().update(key_states, value_states, *args, **kwargs)

    def _heard(self) -> None:
        """Refuse tokens whose mask and positions nobody has fitted to what the layer holds."""
        if not self.announced:
            raise UnsupportedError(
                "this cache was pruned, and the pruner that knows how to read it has been detached; begin with an "
                "empty cache, or keep the pruner attached (inside adaptinfer.disabled(model) it only reads)"
            )
        self.announced = False

    def hold(self, history: History) -> None:
        """Take note of what the layer is about to hold."""
        self.history = history

    def get_seq_length(self) -> int:
        """Tokens seen, dropped ones included: what positions and masks of the model go by."""
        held = super().get_seq_length()
        return held if self.history is None or not held else held + self.dropped

    def reset(self) -> None:
        super().reset()
        self.history = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._take(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        batch = 0 if self.history is None else self.history.columns.shape[0]
        super().batch_repeat_interleave(repeats)
        self._take(torch.arange(batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._take(indices)

    def _take(self, indices: Tensor) -> None:
        if self.history is not None:
            self.history = self.history.rows(indices)

    def _to_remove(self, tokens: int) -> int:
        """Newest tokens to forget (a negative count; older transformers pass the positive length to keep)."""
        tokens = int(tokens)  # a tensor in older transformers
        if not tokens:
            return 0  # static layers count on the device: reading that waits for it
        seen = int(self.get_seq_length())
        remove = max(0, seen - tokens) if tokens > 0 else -tokens
        if remove and self.history is not None and seen - remove < self.history.length:
            raise UnsupportedError(
                f"cannot crop the cache to {seen - remove} tokens: its first {self.history.length} were pruned; "
                "start from an empty cache"
            )
        return remove


class PrunedLayer(Pruned, DynamicLayer):
    """A dynamic layer."""

    def crop(self, tokens_to_remove: int) -> None:
        remove = self._to_remove(tokens_to_remove)
        if remove:
            assert self.keys is not None and self.values is not None
            self.keys, self.values = self.keys[..., :-remove, :], self.values[..., :-remove, :]


class PrunedSlidingLayer(Pruned, DynamicSlidingWindowLayer):
    """A sliding-window layer. ``cumulative_length`` is logical; the last window - 1 held entries include all that a
    window of logical positions can reach, and the mask leaves out the others."""

    def hold(self, history: History) -> None:
        self.cumulative_length += history.dropped - self.dropped
        super().hold(history)

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def crop(self, tokens_to_remove: int) -> None:
        remove = self._to_remove(tokens_to_remove)
        if self.cumulative_length >= self.sliding_window:
            DynamicSlidingWindowLayer.crop(self, -remove)
        elif remove:
            assert self.keys is not None and self.values is not None
            self.keys, self.values = self.keys[..., :-remove, :], self.values[..., :-remove, :]
            self.cumulative_length -= remove


class PrunedStaticBase(Pruned, _Static):
    """Room for the whole generation less the tokens dropped in the first prefill.

    ``capacity`` entries are allocated; ``keys`` tells what logical position each has, used or not.
    """

    total: int
    capacity: int
    columns: Keys | None = None

    def hold(self, history: History) -> None:
        super().hold(history)
        if not self.is_initialized:
            self.capacity = self.total - history.dropped
        self.columns = history.room(self.capacity)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        logical, self.max_cache_len = self.max_cache_len, self.capacity
        try:
            super().lazy_initialization(key_states, value_states)
        finally:
            self.max_cache_len = logical

    def reset(self) -> None:
        super().reset()
        self.is_initialized, self.keys, self.values = False, None, None
        self.capacity, self.columns = self.max_cache_len, None

    def _take(self, indices: Tensor) -> None:
        super()._take(indices)
        if self.history is not None:
            self.columns = self.history.room(self.capacity)


class PrunedStaticLayer(PrunedStaticBase, StaticLayer):
    """A static layer; the tensor ``cumulative_length`` counts held entries."""

    def crop(self, tokens_to_remove: int) -> None:
        StaticLayer.crop(self, -self._to_remove(tokens_to_remove))

    def get_seq_length(self) -> Any:
        return self.cumulative_length + self.dropped if self.is_initialized else 0


class PrunedStaticSlidingLayer(PrunedStaticBase, StaticSlidingWindowLayer):
    """A static sliding-window layer that keeps all it was given, so that entries never move; the mask has the window.

    The tensor ``cumulative_length`` counts held entries, ``cumulative_length_int`` is logical.
    """

    def hold(self, history: History) -> None:
        self.cumulative_length_int += history.dropped - self.dropped
        super().hold(history)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.history is None:
            return StaticSlidingWindowLayer.update(self, key_states, value_states, *args, **kwargs)
        if not torch.compiler.is_compiling():
            self._heard()
        self.cumulative_length_int += key_states.shape[-2]
        return StaticLayer.update(self, key_states, value_states, *args, **kwargs)

    def get_seq_length(self) -> int:
        return self.cumulative_length_int

    def crop(self, tokens_to_remove: int) -> None:
        StaticSlidingWindowLayer.crop(self, -self._to_remove(tokens_to_remove))


_TWINS: dict[type, type] = {
    DynamicLayer: PrunedLayer,
    DynamicSlidingWindowLayer: PrunedSlidingLayer,
    **({StaticLayer: PrunedStaticLayer, StaticSlidingWindowLayer: PrunedStaticSlidingLayer} if _NEW_STATIC else {}),
}


@functools.cache
def twin_of(kind: type) -> type | None:
    """The class with the same storage that can hold fewer entries; None if there is none."""
    if kind in _TWINS or issubclass(kind, Pruned):
        return _TWINS.get(kind, kind)
    if issubclass(kind, _QUANTIZED):
        return type(f"Pruned{kind.__name__}", (Pruned, kind), {"__module__": __name__})
    return None
