"""The pruned prefill as captured work: one graph for all prompts of a bucket.

A bucket is a length to which prompts are padded on their left, and the counts of vision tokens. In it every shape is
settled before the first layer: a `Forward` over bounds in place of counts runs once, and its choices, keys and hidden
states are cut down afterwards to what the same call would have made uncompiled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from adaptinfer.engine.attachment import Attachment
from adaptinfer.engine.cache.access import announce, hold
from adaptinfer.engine.cache.layers import PrunedLayer
from adaptinfer.engine.forward import ACTIVE, Forward
from adaptinfer.engine.graphs.capture import Captured, Graphs, round_up
from adaptinfer.engine.layout import PromptLayout
from adaptinfer.engine.masks import additive_mask
from adaptinfer.engine.report import StageRecord
from adaptinfer.engine.segment import CallPlan, Segment

CACHE_NAMES = ("cache", "past_key_values")  # in newer and older transformers


@dataclass(frozen=True)
class Bucket:
    """What must be alike for two prefills to share a graph.

    Attributes:
        batch: B.
        length: tokens of a row, padding included.
        text: guiding tokens of a row at most.
        padded: whether any row has padding; without, attention stays plainly causal.
        vision: vision tokens of each row.
        stages: layers and what each row keeps after them.
    """

    batch: int
    length: int
    text: int
    padded: bool
    vision: tuple[int, ...]
    stages: tuple[tuple[int, tuple[int, ...]], ...]


def bucket_of(layout: PromptLayout, stages: dict[int, tuple[int, ...]], step: int) -> Bucket:
    """The bucket of a prompt; lengths are rounded up to multiples of ``step``."""
    rows, length = len(layout.vision_counts), round_up(layout.length, step)
    text = min(length, round_up(max(layout.text_counts), step))
    padded = length > min(layout.real_counts)
    return Bucket(rows, length, text, padded, layout.vision_counts, tuple(stages.items()))


class _Fresh(PrunedLayer):
    """A cache layer of one prefill: it takes what it is given as it is."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.announced, self.is_initialized = False, True
        self.keys, self.values = key_states, value_states
        return key_states, value_states


@dataclass
class _Made:
    """What one run of a bucket makes, on the graph's own buffers; tokens counted in the bucket's length."""

    hidden: Tensor
    layers: list[tuple[Tensor, Tensor]]
    records: list[StageRecord]
    segments: list[Segment]
    output: type
    cache_field: str


class PrefillGraph:
    """One captured prefill.

    Args:
        bucket: the prompts that it fits.
        graphs: how work is captured.
        decoder: the decoder's own forward.
        cache_name: what that calls its cache.
        like: arguments of a call of this bucket: ``inputs_embeds`` [B, N, d] and ``position_ids`` [.., N].
        options: further arguments, no tensors.
        owner: the attached model.
        eager: whether masks are added to the logits.
    """

    busy = False

    def __init__(
        self,
        bucket: Bucket,
        graphs: Graphs,
        decoder: Callable[..., Any],
        cache_name: str,
        like: tuple[Tensor, Tensor],
        options: dict[str, Any],
        owner: Attachment,
        eager: bool,
        num_layers: int,
    ) -> None:
        self._bucket = bucket
        rows, length = bucket.batch, bucket.length
        embeddings, positions = like
        self._embeddings = embeddings.new_zeros(rows, length, embeddings.shape[2])
        self._positions = positions.new_zeros(*positions.shape[:-1], length)
        marks = [torch.zeros(rows, length, dtype=torch.bool, device=embeddings.device) for _ in range(3)]
        self._vision, self._text, self._real = marks
        self._pretend()
        layout = PromptLayout(
            vision=self._vision,
            text=self._text,
            real=self._real if bucket.padded else None,
            vision_counts=bucket.vision,
            unguided_counts=(0,) * rows,
            text_counts=(bucket.text,) * rows,
            real_counts=(length,) * rows,
            tail=length,
            right_padded=False,
            bounds=True,
        )

        stages = dict(bucket.stages)
        plan = CallPlan(past=0, length=length, tail=length, layout=layout, stages=stages, flash=False)

        def run() -> _Made:
            state = Forward(owner, plan)
            layers: list[Any] = [_Fresh() for _ in range(num_layers)]
            mask = _causal_mask(self._real, self._embeddings.dtype if eager else None) if bucket.padded else None
            token = ACTIVE.set(state)
            try:
                out = decoder(
                    inputs_embeds=self._embeddings,
                    attention_mask=mask,
                    position_ids=self._positions,
                    **{cache_name: Cache(layers=layers), "use_cache": True, **options},
                )
            finally:
                ACTIVE.reset(token)
            state.stages.check()
            field = next(name for name in CACHE_NAMES if name in out)
            if set(out) != {"last_hidden_state", field}:
                raise RuntimeError(f"the decoder returns more than hidden states and a cache: {', '.join(out)}")
            pairs: Any = [(layer.keys, layer.values) for layer in layers]
            return _Made(
                out.last_hidden_state,
                pairs,
                state.stages.records,
                list(state.stages.segments.values()),
                type(out),
                field,
            )

        inputs = [self._embeddings, self._positions, *marks]
        self._captured: Captured = graphs.capture(run, inputs)
        made: _Made = self._captured.outputs
        self.bytes = sum(part.numel() * part.element_size() for part in [*inputs, made.hidden, *sum(made.layers, ())])

    def release(self) -> None:
        """Nothing of it is needed any more: every call has taken its results with it."""

    def run(self, embeddings: Tensor, positions: Tensor, state: Forward, cache: Any) -> Any:
        """Prefill one prompt.

        Args:
            embeddings: [B, N, d], N at most the bucket's length.
            positions: [.., N].
            state: of the call; afterwards it is as if its layers had run.
            cache: to be filled, or None.

        Returns:
            The decoder's output: hidden states [B, n, d] of the last segment, and the cache.
        """
        layout = state.layout
        assert layout is not None
        _fill(self._embeddings, embeddings, 1)
        _fill(self._positions, positions, self._positions.ndim - 1)
        _fill(self._vision, layout.vision, 1)
        _fill(self._text, layout.text, 1)
        if self._bucket.padded:
            _fill(self._real, torch.ones_like(layout.vision) if layout.real is None else layout.real, 1)
        self._captured.replay()
        made: _Made = self._captured.outputs
        segments = self._take_choices(made, state, layout)
        state.cache, count, segment = cache, layout.length, None
        for layer, (keys, values) in enumerate(made.layers):
            if layer - 1 in segments:
                segment = state.stages.segment = segments[layer - 1]
                count = segment.index.shape[1]
            if cache is None:
                continue
            if segment is not None:
                hold(cache, layer, state.inputs.history_after(segment, None))
                announce(cache, layer)
            cache.update(keys[:, :, -count:], values[:, :, -count:], layer)  # which copies them
        return made.output(**{"last_hidden_state": _last(made.hidden, count), made.cache_field: cache})

    def _pretend(self) -> None:
        """Marks that any prompt of the bucket could have: warm-up and capture read them."""
        text = max(1, self._bucket.text)
        for row, count in enumerate(self._bucket.vision):
            end = self._bucket.length - text
            self._vision[row, max(0, end - count) : max(count, end)] = True
            self._text[row, max(count, end) :] = count > 0
        self._real.fill_(True)

    def _take_choices(self, made: _Made, state: Forward, layout: PromptLayout) -> dict[int, Segment]:
        """Write a call's records, and return its segments by layer of their stage, tokens counted in its own length."""
        left, keeps, segments = self._bucket.length - layout.length, dict(self._bucket.stages), {}
        for record, wide in zip(made.records, made.segments, strict=True):
            totals = [
                real - entered + keep
                for real, entered, keep in zip(
                    layout.real_counts, layout.vision_counts, keeps[record.layer], strict=True
                )
            ]
            # Fillers stand on the left, and the last of them are those that this call would have had anyway.
            count = max(totals)
            index = _last(wide.index, count) - left
            vision, text = _last(wide.vision, count), _last(wide.text, count)
            valid = None if wide.valid is None or layout.all_real(totals) else _last(wide.valid, count)
            segments[record.layer] = Segment(record.layer, index, index, valid, vision, text)
            state.stages.records.append(
                StageRecord(
                    layer=record.layer,
                    entered=record.entered - left,
                    entered_mask=record.entered_mask.clone(),
                    scores=record.scores.clone(),
                    kept=index,
                    kept_mask=vision,
                    tokens=count,
                )
            )
        return segments


def _fill(buffer: Tensor, value: Tensor, dim: int) -> None:
    """Copy to the right end of a buffer; what is left over is nothing."""
    left = buffer.shape[dim] - value.shape[dim]
    if left:
        buffer.narrow(dim, 0, left).zero_()
    buffer.narrow(dim, left, value.shape[dim]).copy_(value)


def _last(tensor: Tensor, count: int) -> Tensor:
    """A copy of the last tokens, [B, n, ...] -> [B, count, ...]."""
    return tensor[:, tensor.shape[1] - count :].clone(memory_format=torch.contiguous_format)


def _causal_mask(real: Tensor, additive: torch.dtype | None) -> Tensor:
    """What tokens see in a prompt with padding, [B, 1, N, N]: bool, or 0 and the least number of a dtype."""
    place = torch.arange(real.shape[1], device=real.device)
    seen = (place[:, None] >= place[None, :]) & real[:, None, None, :]
    return seen if additive is None else additive_mask(seen, additive)
