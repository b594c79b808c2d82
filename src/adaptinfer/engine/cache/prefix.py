"""Reuse of the tokens before the first image: the system prompt is the same in every request, and so are its keys."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from adaptinfer.errors import InputError, UnsupportedError, check_whole

_BOTH_DIRECTIONS = ("paligemma",)


class PrefixCache:
    """Keys and values of prompts' beginnings, computed once and given to every request that begins alike.

    Exact: the tokens before the first image see nothing after them, so what a decoder layer keeps of them does not
    depend on the request::

        prefixes = adaptinfer.PrefixCache(model)
        out = model.generate(**inputs, past_key_values=prefixes.start(inputs))

    Works with and without a pruner; pruning begins after the prefix. Threads may share one. What is kept belongs to
    the weights that computed it: after changing them in place, or adding an adapter, call `clear`.

    Args:
        model: the model that generates.
        max_tokens: prefix tokens kept over all entries; the entries used longest ago go first.

    Raises:
        InputError: ``max_tokens`` is no whole number from 1.
        UnsupportedError: the model is none whose vision tokens stand among the text, or its prompts are read in both
            directions.
    """

    def __init__(self, model: Any, max_tokens: int = 4096) -> None:
        from adaptinfer.engine.families import placeholders_of

        check_whole("max_tokens", max_tokens)
        if model.config.model_type in _BOTH_DIRECTIONS:
            raise UnsupportedError(
                f"{model.config.model_type} reads its prompt in both directions: what stands before an image depends "
                "on what follows it and cannot be reused"
            )
        self._model = model
        self._placeholders = torch.tensor(placeholders_of(model.config))
        self._max_tokens = max_tokens
        self._entries: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        self._place = self._place_now()
        self._lock = threading.Lock()

    @property
    def tokens(self) -> int:
        """Prefix tokens held."""
        return sum(map(len, self._entries))

    def clear(self) -> None:
        """Forget all prefixes; they are computed again as prompts come."""
        with self._lock:
            self._entries.clear()

    @torch.no_grad()
    def start(self, inputs: Any, copies: int = 1) -> Any:
        """A cache that holds the prompt's tokens before its first image, to be passed to `generate`.

        Args:
            inputs: what `generate` is called with; ``input_ids`` [B, N] and, if there is padding, ``attention_mask``.
            copies: rows that `generate` makes of each sample: ``num_beams`` in a beam search, ``num_return_sequences``
                when sampling.

        Returns:
            A fresh DynamicCache of the request's own. It is empty where there is nothing to reuse: an image stands
            first, the prompt has no image, samples begin differently or with padding, or the prefix is longer than
            ``max_tokens``.

        Raises:
            InputError: no ``input_ids``, or ``copies`` is no whole number from 1.
        """
        from transformers import DynamicCache

        check_whole("copies", copies)
        if "input_ids" not in inputs:
            raise InputError("inputs: there are no input_ids; give what the processor made")
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        prefix = self._shared_prefix(ids, mask)
        if not 0 < len(prefix) <= self._max_tokens:
            return DynamicCache(config=self._model.config.get_text_config())
        with self._lock:
            place = self._place_now()
            if place != self._place:  # the model was moved, or cast: keys of before do not fit
                self._entries.clear()
                self._place = place
            if prefix not in self._entries:
                self._entries[prefix] = self._computed(ids[:1, : len(prefix)])
                while self.tokens > self._max_tokens:
                    self._entries.popitem(last=False)
            self._entries.move_to_end(prefix)
            cache = copy.deepcopy(self._entries[prefix])
        rows = ids.shape[0] * copies
        if rows > 1:
            cache.reorder_cache(torch.zeros(rows, dtype=torch.long, device=ids.device))
        return cache

    def _place_now(self) -> tuple[Any, Any]:
        weight = next(self._model.parameters())
        return weight.device, weight.dtype

    def _shared_prefix(self, ids: Tensor, mask: Tensor | None) -> tuple[int, ...]:
        vision = torch.isin(ids, self._placeholders.to(ids.device))
        end = int(torch.where(vision.any(dim=1), vision.int().argmax(dim=1), 0).min())
        begins = ids[:, :end]
        if mask is not None and not bool(mask[:, :end].all()):
            return ()
        return tuple(begins[0].tolist()) if bool((begins == begins[0]).all()) else ()

    def _computed(self, ids: Tensor) -> Any:
        from adaptinfer.engine.attach import disabled
        from adaptinfer.engine.handle import is_attached

        with disabled(self._model) if is_attached(self._model) else nullcontext():
            return self._model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
