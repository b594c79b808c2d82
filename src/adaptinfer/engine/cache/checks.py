"""Which caches are refused, before any work."""

from __future__ import annotations

from typing import Any

from transformers import cache_utils
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from adaptinfer.engine.cache.layers import twin_of
from adaptinfer.errors import UnsupportedError


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
        odd = [kind for kind in [*kinds, *([replicate] if replicate else [])] if twin_of(kind) is None]
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
    odd = [kind for kind in kinds if issubclass(kind, cache_utils.CacheLayerMixin) and twin_of(kind) is None]
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
