"""Cache layers that hold the surviving tokens and report the length of the whole prompt.

What a later forward needs to know of a pruned layer (which logical columns it holds) lives in the cache layer itself,
so that it follows the cache wherever it goes: decoding, further turns, deep copies, beams.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from adaptinfer.errors import UnsupportedError

__all__ = ["History", "PrunedLayer", "cache_argument", "check_cache", "history_of", "hold"]


@dataclass(frozen=True)
class History:
    """What a pruned layer holds of the first ``length`` tokens; everything after them it holds whole.

    Attributes:
        columns: int64 [B, M], the logical positions held, ascending.
        valid: bool [B, M] or None; False marks a filler that must never be attended (None: there is none).
        length: logical tokens seen when the layer was last pruned.
        shift: int64 [B, 1], how far later positions move down when survivors are renumbered; None to keep positions.
    """

    columns: Tensor
    valid: Tensor | None
    length: int
    shift: Tensor | None
    _moved: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def rows(self, indices: Tensor) -> History:
        """The history of a re-ordered, repeated or cut batch; one object for all layers that share this one."""
        if self._moved.get("indices") is not indices or self._moved["version"] != indices._version:
            at = indices.to(self.columns.device)
            moved = replace(
                self,
                columns=self.columns[at],
                valid=None if self.valid is None else self.valid[at],
                shift=None if self.shift is None else self.shift[at],
                _moved={},
            )
            self._moved.update(indices=indices, version=indices._version, history=moved)
        return self._moved["history"]


class PrunedLayer(DynamicLayer):
    """A dynamic cache layer with fewer entries than tokens seen."""

    history: History | None = None

    def get_seq_length(self) -> int:
        """Tokens seen, dropped ones included: what positions and masks of the model go by."""
        held = super().get_seq_length()
        if self.history is None or not held:
            return held
        return held + self.history.length - self.history.columns.shape[1]

    def reset(self) -> None:
        super().reset()
        self.history = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens (negative count; older transformers pass the positive length to keep)."""
        seen = self.get_seq_length()
        remove = seen - tokens_to_remove if tokens_to_remove > 0 else -tokens_to_remove
        if remove <= 0:
            return
        if self.history is not None and seen - remove < self.history.length:
            raise UnsupportedError(
                f"cannot crop the cache to {seen - remove} tokens: its first {self.history.length} were pruned; "
                "start from an empty cache"
            )
        assert self.keys is not None and self.values is not None
        self.keys = self.keys[..., :-remove, :]
        self.values = self.values[..., :-remove, :]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._take(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        batch = 0 if self.keys is None else self.keys.shape[0]
        super().batch_repeat_interleave(repeats)
        self._take(torch.arange(batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._take(indices)

    def _take(self, indices: Tensor) -> None:
        if self.history is not None:
            self.history = self.history.rows(indices)


def cache_argument(kwargs: dict[str, Any]) -> Any:
    """The cache among the keyword arguments of a forward call, under its new or its old name."""
    cache = kwargs.get("cache")
    return kwargs.get("past_key_values") if cache is None else cache


def check_cache(cache: Any) -> None:
    """Refuse caches whose layers cannot hold different lengths.

    Raises:
        UnsupportedError: static, quantised, offloaded, sliding-window or foreign caches.
    """
    layers = getattr(cache, "layers", None)
    bad = None
    if layers is None or getattr(cache, "is_encoder_decoder", False):
        bad = type(cache).__name__
    elif getattr(cache, "offloading", False):
        bad = "an offloaded cache"
    else:
        odd = [type(layer).__name__ for layer in layers if type(layer) not in (DynamicLayer, PrunedLayer)]
        replicate = getattr(cache, "layer_class_to_replicate", None)
        if not odd and not layers and replicate is not None and replicate is not DynamicLayer:
            odd = [replicate.__name__]
        bad = f"a cache with {odd[0]}s" if odd else None
    if bad:
        raise UnsupportedError(
            f"pruning needs a DynamicCache, whose layers may hold different lengths; got {bad}. "
            "Leave cache_implementation unset (or pass a fresh DynamicCache), or use adaptinfer.disabled(model)"
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
    elif type(layers[layer]) is DynamicLayer:
        pruned = PrunedLayer()
        vars(pruned).update(vars(layers[layer]))
        layers[layer] = pruned
    layers[layer].history = history
