"""One forward of vLLM's batch: which tokens go on, chosen inside the layers where the plan drops some.

Tokens of all requests are concatenated in one row; those of one request are contiguous. Nothing here
reads the device on the host: counts come from the plan.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaptinfer.functional import positions_of
from adaptinfer.pruners import Pruner
from adaptinfer.pruners.views import StageView
from adaptinfer.serving.vllm_plugin.plan import Row, Segment


@dataclass(frozen=True)
class Heads:
    """What a score must know of a layer's attention.

    Attributes:
        scaling: the layer's factor on the dot products.
        softcap: its bound on the logits; None without one.
        all_heads: heads over all ranks.
        total: sums a tensor over the ranks.
    """

    scaling: float
    softcap: float | None
    all_heads: int
    total: Callable[[Tensor], Tensor]


class Step:
    """State of one forward. ``tokens`` are the places, in the step's own row, of what the present layer is given."""

    def __init__(
        self, rows: Sequence[Row], segments: Sequence[Segment], device: torch.device, clock: ScoringClock
    ) -> None:
        self.tokens: Tensor | None = None  # None: all of them
        self.survivors: Tensor | None = None  # places, among the present layer's tokens, of those that go on
        self._rows, self._clock, self._device = rows, clock, device
        self._starts = {segment.layers[0] for segment in segments}
        self._stages = {segment.layers[1] - 1: segment for segment in segments if segment.stage}
        self._vision: dict[int, Tensor] = {}
        self._inputs: dict[str, Any] = {}

    def stage(self, layer: int) -> Segment | None:
        """The segment that ends in this layer by dropping tokens."""
        return self._stages.get(layer)

    def choose(self, layer: int, query: Tensor, key: Tensor, hidden: Tensor, heads: Heads, pruner: Pruner) -> None:
        """Score the vision tokens of each row that drops some in this layer, and decide which tokens go on.

        Args:
            layer: the stage's.
            query: [H, N, D] after rotary embedding, the N tokens of the whole step; H and K are this rank's.
            key: [K, N, D].
            hidden: [N, d], hidden states that entered the layer.
            heads: of the layer.
            pruner: scores.
        """
        segment = self._stages[layer]
        with self._clock:
            parts, start = [], 0
            for number, given in enumerate(segment.given):
                places = torch.arange(start, start + given, device=self._device)
                if number in segment.stage:
                    part = slice(start, start + given)
                    view = self._view(
                        number, layer, query[:, part], key[:, part], hidden[part], segment.missing[number], heads
                    )
                    if reason := pruner.capabilities.all_heads:
                        view.need_all_heads(f"{pruner.name} {reason}")
                    keep = segment.stage[number]
                    places = places[self._keep(number, view, pruner.select(view, (keep,)).kept, keep)]
                parts.append(places)
                start += given
            self.survivors = torch.cat(parts)

    def _view(
        self, number: int, layer: int, query: Tensor, key: Tensor, hidden: Tensor, dropped: int, heads: Heads
    ) -> StageView:
        """A stage's view of one row; ``dropped`` of its vision tokens, all before its text, are gone already."""
        device = self._device
        columns = torch.arange(query.shape[1], device=device)
        start, stop = self._rows[number].prompt.text
        vision = self._vision_of(number)
        return StageView(
            layer=layer,
            query=query[None],
            key=key[None],
            visible=lambda rows: rows[:, None, :, None] >= columns,
            scaling=heads.scaling,
            softcap=heads.softcap,
            text_index=torch.arange(start - dropped, stop - dropped, device=device)[None],
            text_mask=None,
            vision_index=vision,
            vision_mask=None,
            vision_counts=(vision.shape[1],),
            valid=None,
            first=dropped == 0,
            hidden=hidden[None],
            total=heads.total,
            all_heads=heads.all_heads,
        )

    def _vision_of(self, number: int) -> Tensor:
        """Places of a row's surviving vision tokens among its surviving tokens, int64 [1, V]."""
        if number not in self._vision:
            spans = self._rows[number].prompt.spans
            self._vision[number] = torch.cat([torch.arange(*span, device=self._device) for span in spans])[None]
        return self._vision[number]

    def _keep(self, number: int, view: StageView, chosen: Tensor, keep: int) -> Tensor:
        """Places of what survives in one row, int64 [n], ascending; notes where its vision tokens then stand."""
        vision, length = view.vision_index, view.query.shape[2]
        alive = torch.ones(1, length, dtype=torch.bool, device=self._device).scatter(1, vision, chosen)
        kept = vision.gather(1, positions_of(chosen, keep))
        self._vision[number] = (alive.cumsum(dim=1) - 1).gather(1, kept)
        return positions_of(alive, length - vision.shape[1] + keep)[0]

    def go_on(self) -> Tensor | None:
        """Move on from the stage's layer; returns where the survivors stand among the tokens it was given."""
        survivors, self.survivors = self.survivors, None
        if survivors is not None:
            self.tokens = survivors if self.tokens is None else self.tokens[survivors]
        return survivors

    def inputs(self, layer: int, kwargs: dict[str, Any], positions: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A layer's positional inputs for the tokens it is given, made once a segment.

        Args:
            layer: its number.
            kwargs: those of the whole step.
            positions: makes other ones instead, of compact positions; may return nothing.
        """
        if layer in self._starts:
            self._inputs = positions()
            if not self._inputs and self.tokens is not None:
                self._inputs = {
                    name: _picked(kwargs[name], self.tokens, dim)
                    for name, dim in (("position_embeddings", -2), ("position_ids", -1))
                    if kwargs.get(name) is not None
                }
        return self._inputs

    def restore(self, hidden: Tensor, length: int) -> Tensor:
        """The survivors' hidden states [1, n, d] at their places in the whole step, zeros elsewhere: [1, length, d]."""
        if self.tokens is None:
            return hidden
        full = hidden.new_zeros(1, length, hidden.shape[-1])
        return full.index_copy(1, self.tokens, hidden)


def _picked(value: Any, tokens: Tensor, dim: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_picked(part, tokens, dim) for part in value)
    return value.index_select(dim, tokens)


class ScoringClock:
    """Time spent in scoring. On a CUDA device events measure it, read when they have passed and never waited for."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds, self._started = 0.0, 0.0
        self._pending: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        if self._cuda:
            self._pending.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._pending[-1][0].record()
        else:
            self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self._cuda:
            self._pending[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._started

    def take(self) -> float:
        """Seconds measured since the last call."""
        while self._pending and self._pending[0][1].query():
            begin, end = self._pending.pop(0)
            self._seconds += begin.elapsed_time(end) / 1000
        seconds, self._seconds = self._seconds, 0.0
        return seconds
