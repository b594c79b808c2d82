"""Cache layers that hold the surviving tokens and report the length of the whole prompt.

What a later forward needs to know of a pruned layer (which logical columns it holds) lives in the cache layer itself,
so that it follows the cache wherever it goes: decoding, further turns, deep copies, beams, offloading.

Every kind of cache layer of transformers that can hold fewer entries has a twin here with the same storage. *Logical*
counts the tokens that were seen, *held* those that are stored.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

from adaptinfer.errors import UnsupportedError

if TYPE_CHECKING:
    _Layer = DynamicLayer
    _Static = StaticLayer
else:
    _Layer = _Static = object

__all__ = [
    "History",
    "Keys",
    "announce",
    "cache_argument",
    "check_cache",
    "check_cache_kind",
    "history_of",
    "hold",
    "keys_of",
    "kv_bytes",
    "mask_offset",
    "seen_by",
    "whole_history",
]

_QUANTIZED = getattr(cache_utils, "BaseQuantizedLayer", cache_utils.QuantizedLayer)  # pyright: ignore
# Since transformers 5.5 static layers count by themselves; before, the model passed positions, of dropped tokens too.
_NEW_STATIC = hasattr(StaticLayer(max_cache_len=1), "cumulative_length")


@dataclass(frozen=True)
class History:
    """What a pruned layer was given of the first ``length`` tokens; of everything after them it is given all.

    Attributes:
        columns: int64 [B, M], the logical positions of the M entries, real ones ascending.
        valid: bool [B, M] or None; False marks a filler that must never be attended (None: there is none).
        length: logical tokens seen when the layer was last pruned.
        shift: int64 [B, 1], how far later positions move down when survivors are renumbered; None to keep positions.
    """

    columns: Tensor
    valid: Tensor | None
    length: int
    shift: Tensor | None
    _memo: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def dropped(self) -> int:
        """Tokens seen and not held."""
        return self.length - self.columns.shape[1]

    def rows(self, indices: Tensor) -> History:
        """The history of a re-ordered, repeated or cut batch; one object for all layers that share this one."""
        if self._memo.get("indices") is not indices or self._memo["version"] != indices._version:
            at = indices.to(self.columns.device)
            moved = replace(
                self,
                columns=self.columns[at],
                valid=None if self.valid is None else self.valid[at],
                shift=None if self.shift is None else self.shift[at],
                _memo={},
            )
            self._memo.update(indices=indices, version=indices._version, history=moved)
        return self._memo["history"]

    def entries(self, first: int, count: int) -> Keys:
        """Logical positions of ``count`` entries from number ``first`` on, those after the history included."""
        held, device = self.columns.shape[1], self.columns.device
        ahead = max(0, held - first)
        pruned = self.columns[:, first : first + count] if ahead else self.columns[:, :0]
        after = torch.arange(count - pruned.shape[1], device=device) + (self.length + max(0, first - held))
        columns = torch.cat([pruned, after.expand(pruned.shape[0], -1)], dim=1)
        valid = None
        if self.valid is not None and ahead:
            real = self.valid[:, first : first + count]
            valid = torch.cat([real, torch.ones_like(columns[:, real.shape[1] :], dtype=torch.bool)], dim=1)
        return Keys(columns, valid)

    def room(self, capacity: int) -> Keys:
        """Logical positions of a static layer's ``capacity`` entries, used or not; one object for layers that share it.

        After a second pruning there is more room than tokens to come; the mask ends before those columns.
        """
        if capacity not in self._memo:
            entries = self.entries(0, capacity)
            self._memo[capacity] = replace(entries, room=True)
        return self._memo[capacity]


def whole_history(batch: Tensor) -> History:
    """The history of a layer that dropped nothing so far, for the rows of a tensor [B, ...]."""
    return History(torch.zeros(batch.shape[0], 0, dtype=torch.long, device=batch.device), None, 0, None)


@dataclass(frozen=True)
class Keys:
    """The key columns that a layer's attention meets in one call.

    Attributes:
        columns: int64 [B, L], the logical position of each.
        valid: bool [B, L]; False for fillers; None if there are none.
        room: whether columns of later tokens stand among them, as in a static cache.
    """

    columns: Tensor
    valid: Tensor | None
    room: bool = False

    def first(self, count: int) -> Keys:
        """The first ``count`` columns."""
        return replace(
            self, columns=self.columns[:, :count], valid=None if self.valid is None else self.valid[:, :count]
        )


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


class _PrunedStatic(Pruned, _Static):
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


class PrunedStaticLayer(_PrunedStatic, StaticLayer):
    """A static layer; the tensor ``cumulative_length`` counts held entries."""

    def crop(self, tokens_to_remove: int) -> None:
        StaticLayer.crop(self, -self._to_remove(tokens_to_remove))

    def get_seq_length(self) -> Any:
        return self.cumulative_length + self.dropped if self.is_initialized else 0


class PrunedStaticSlidingLayer(_PrunedStatic, StaticSlidingWindowLayer):
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
def _twin(kind: type) -> type | None:
    """The class with the same storage that can hold fewer entries; None if there is none."""
    if kind in _TWINS or issubclass(kind, Pruned):
        return _TWINS.get(kind, kind)
    if issubclass(kind, _QUANTIZED):
        return type(f"Pruned{kind.__name__}", (Pruned, kind), {"__module__": __name__})
    return None


def cache_argument(kwargs: dict[str, Any]) -> Any:
    """The cache among the keyword arguments of a forward call, under its new or its old name."""
    cache = kwargs.get("cache")
    return kwargs.get("past_key_values") if cache is None else cache


def check_cache(cache: Any, pruning: bool = True) -> None:
    """Refuse caches whose layers cannot hold different lengths.

    Args:
        cache: of transformers.
        pruning: whether the call is about to prune (a full window of a static cache can then not be rearranged).

    Raises:
        UnsupportedError: an encoder-decoder or foreign cache, or a kind of layer without a twin.
    """
    layers = getattr(cache, "layers", None)
    bad = None
    if layers is None or getattr(cache, "is_encoder_decoder", False):
        bad = type(cache).__name__
    else:
        kinds = [type(layer) for layer in layers if isinstance(layer, cache_utils.CacheLayerMixin)]
        replicate = getattr(cache, "layer_class_to_replicate", None)
        odd = [kind for kind in [*kinds, *([replicate] if replicate else [])] if _twin(kind) is None]
        if odd and odd[0] in (StaticLayer, StaticSlidingWindowLayer):
            raise UnsupportedError(
                "static caches need transformers 5.5 or newer; leave cache_implementation unset, or update transformers"
            )
        bad = f"a cache with {odd[0].__name__}s" if odd else None
        rigid = [layer for layer in layers if isinstance(layer, StaticSlidingWindowLayer)]
        if not bad and rigid and pruning:
            _check_static_windows(layers, rigid)
    if bad:
        raise UnsupportedError(
            f"pruning needs a cache whose layers may hold different lengths (dynamic, static, quantised or offloaded); "
            f"got {bad}. Leave cache_implementation unset, pass a fresh DynamicCache, or use adaptinfer.disabled(model)"
        )


def check_cache_kind(model: Any) -> None:
    """Refuse a model whose own cache, as `generate` makes it, cannot hold layers of different length.

    Raises:
        UnsupportedError: naming the class.
    """
    config = model.config.get_text_config()
    if getattr(model, "_supports_default_dynamic_cache", lambda: True)() is False:
        raise UnsupportedError(
            f"{model.config.model_type} brings a cache class of its own in this version of transformers, whose layers "
            "cannot hold different lengths; it needs a newer transformers"
        )
    kinds = [type(layer) for layer in cache_utils.DynamicCache(config=config).layers]
    odd = [kind for kind in kinds if issubclass(kind, cache_utils.CacheLayerMixin) and _twin(kind) is None]
    if odd:
        raise UnsupportedError(
            f"{model.config.model_type} keeps its keys in {odd[0].__name__}s, of which the engine does not know how to "
            "leave tokens out; please open an issue that names the model"
        )


def _check_static_windows(layers: list[Any], windows: list[Any]) -> None:
    if len(windows) == len(layers) and not all(getattr(layer, "_is_croppable", False) for layer in windows):
        raise UnsupportedError(
            "a static cache of a model with a sliding window in every layer does not say how long the answer may get; "
            "leave cache_implementation unset (a dynamic cache holds no more than the window), or use "
            "adaptinfer.disabled(model)"
        )
    if any(getattr(layer, "history", None) is None and layer.cumulative_length_int for layer in windows):
        raise UnsupportedError(
            "an image in a later turn on a static cache with sliding windows is not supported; use a DynamicCache, or "
            "put the image into the first turn"
        )


def history_of(cache: Any, layer: int) -> History | None:
    """What a layer of a cache knows of an earlier pruning; None if it holds every token."""
    layers = getattr(cache, "layers", ())
    return getattr(layers[layer], "history", None) if layer < len(layers) else None


def hold(cache: Any, layer: int, history: History) -> None:
    """Make a layer of the cache a pruned one, just before it takes up its surviving tokens."""
    layers = cache.layers
    if layer == len(layers):  # caches made without a config grow layer by layer
        layers.append(PrunedLayer())
    old = layers[layer]
    if not isinstance(old, Pruned):
        twin: Any = _twin(type(old))
        new = twin.__new__(twin)
        vars(new).update(vars(old))
        if isinstance(new, _PrunedStatic):
            new.total = max(getattr(each, "total", 0) or getattr(each, "max_cache_len", 0) for each in layers)
            new.capacity = new.total if old.keys is None else old.keys.shape[2]
        layers[layer] = new
    layers[layer].hold(history)


def announce(cache: Any, layer: int) -> None:
    """Tell a pruned layer that the tokens it is about to take up come with the right mask."""
    layers = getattr(cache, "layers", ())
    if layer < len(layers) and isinstance(layers[layer], Pruned):
        layers[layer].announced = True


def seen_by(cache: Any) -> Any:
    """Logical tokens that a cache has seen: an int, or a tensor for static caches (reading it waits for the device)."""
    if cache is None:
        return 0
    seen = cache.get_seq_length()
    # Older transformers crop by a tensor, and sliding windows count in one from then on.
    counted = isinstance(seen, Tensor) and not any(isinstance(each, StaticLayer) for each in cache.layers)
    return int(seen) if counted else seen


def mask_offset(cache: Any, layer: int, taken_up: int = 0) -> int:
    """Logical position of the first column of the mask that the model makes for a layer, before its update.

    Args:
        cache: None without one.
        layer: its number.
        taken_up: how many of the call's tokens the layer has stored already.
    """
    layers = getattr(cache, "layers", ())
    held = layers[layer] if layer < len(layers) else None
    if held is None or not getattr(held, "is_sliding", False):
        return 0
    if isinstance(held, StaticSlidingWindowLayer):
        seen, window = held.cumulative_length_int, held.max_cache_len
    else:
        seen, window = held.cumulative_length, held.sliding_window
    return max(int(seen) - taken_up - window + 1, 0)


def keys_of(cache: Any, layer: int, history: History, seen: int | None, new: int, held: int) -> tuple[int, int] | Keys:
    """Which entries a layer's attention is about to meet: the number of the first and how many, or the columns.

    Args:
        cache: None without one.
        layer: its number.
        history: of the layer after this call.
        seen: logical tokens before this call; static layers do without.
        new: logical tokens of this call.
        held: of these the layer is given so many.
    """
    if cache is None:
        return 0, held
    storage = cache.layers[layer]
    if isinstance(storage, _PrunedStatic):
        assert storage.columns is not None
        return storage.columns
    assert seen is not None
    total = seen + new - history.dropped
    if not isinstance(storage, PrunedSlidingLayer):
        return 0, total
    count = min(total - held, storage.sliding_window - 1) + held
    return total - count, count


def kv_bytes(cache: Any) -> tuple[int, int]:
    """Bytes of keys and values that a cache holds, and what it would hold had nothing been dropped."""
    held_bytes = vanilla_bytes = 0
    for layer in getattr(cache, "layers", ()):
        if not isinstance(layer, cache_utils.CacheLayerMixin) or not layer.is_initialized:
            continue
        parts = ("keys", "values", "_quantized_keys", "_quantized_values")
        size = sum(_bytes_of(getattr(layer, part, None)) for part in parts)
        if isinstance(layer, StaticLayer):
            held, whole = getattr(layer, "capacity", layer.max_cache_len), layer.max_cache_len
        else:
            seen = layer.get_seq_length()
            held = seen - getattr(layer, "dropped", 0)
            whole = seen
            if getattr(layer, "is_sliding", False):
                held = 0 if layer.keys is None else layer.keys.shape[-2]
                whole = min(seen, layer.sliding_window - 1)  # pyright: ignore
        held_bytes += size
        vanilla_bytes += size * whole // held if held else 0
    return held_bytes, vanilla_bytes


def _bytes_of(stored: Any) -> int:
    if isinstance(stored, (tuple, list)):
        return sum(map(_bytes_of, stored))
    if isinstance(stored, dict):
        return sum(map(_bytes_of, stored.values()))
    if not isinstance(stored, Tensor):
        return 0
    if hasattr(stored, "__tensor_flatten__"):  # quantised: the tensors inside
        return sum(_bytes_of(getattr(stored, name)) for name in stored.__tensor_flatten__()[0])  # pyright: ignore
    return stored.numel() * stored.element_size()
