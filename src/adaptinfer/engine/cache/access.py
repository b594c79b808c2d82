"""What the engine asks of a cache and tells it: its history, its key columns, its bytes."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import DynamicLayer, StaticLayer, StaticSlidingWindowLayer

from adaptinfer.engine.cache.history import History, Keys
from adaptinfer.engine.cache.layers import Pruned, PrunedLayer, PrunedSlidingLayer, PrunedStaticBase, twin_of


def cache_argument(kwargs: dict[str, Any]) -> Any:
    """The cache among the keyword arguments of a forward call, under its new or its old name."""
    cache = kwargs.get("cache")
    return kwargs.get("past_key_values") if cache is None else cache


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
        twin: Any = twin_of(type(old))
        new = twin.__new__(twin)
        vars(new).update(vars(old))
        if isinstance(new, PrunedStaticBase):
            new.total = max(getattr(each, "total", 0) or getattr(each, "max_cache_len", 0) for each in layers)
            new.capacity = new.total if old.keys is None else old.keys.shape[2]
        layers[layer] = new
    layers[layer].hold(history)


def is_plain(layer: Any) -> bool:
    """Whether a cache layer is dynamic and holds its entries as tensors, one for each token that it was given."""
    return type(layer) is DynamicLayer or isinstance(layer, PrunedLayer)


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
    if isinstance(storage, PrunedStaticBase):
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
