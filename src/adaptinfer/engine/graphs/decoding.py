"""Decoding as captured work: one new token a row, on caches whose layers have just the room that an answer needs.

Entries never move, so a graph can write and read them at fixed addresses. A generation borrows a graph's buffers for as
long as it lasts (a `Lease`); whoever else asks for its keys, the user after `generate` for example, is given copies.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from adaptinfer.engine.attachment import Attachment
from adaptinfer.engine.cache.history import History
from adaptinfer.engine.cache.layers import PrunedLayer
from adaptinfer.engine.calls import Generation
from adaptinfer.engine.forward import ACTIVE
from adaptinfer.engine.graphs.capture import Captured, Graphs, round_up
from adaptinfer.engine.masks import additive_mask


@dataclass(frozen=True)
class Group:
    """Layers that hold the same tokens.

    Attributes:
        layers: their numbers.
        capacity: entries that a graph has room for in each.
        compact: whether their positions are renumbered.
    """

    layers: tuple[int, ...]
    capacity: int
    compact: bool


def groups_of(cache: Any, room: int, step: int) -> dict[Group, History | None]:
    """The groups of a cache whose rows are to grow by ``room`` tokens, and what each was pruned to."""
    members: dict[int, list[int]] = {}
    histories = [getattr(layer, "history", None) for layer in cache.layers]
    for number, history in enumerate(histories):
        members.setdefault(id(history), []).append(number)
    found: dict[Group, History | None] = {}
    for layers in members.values():
        history = histories[layers[0]]
        capacity = round_up(cache.layers[layers[0]].keys.shape[2] + room, step)
        found[Group(tuple(layers), capacity, history is not None and history.shift is not None)] = history
    return found


class _Room(DynamicLayer):
    """A cache layer that writes new entries into room that is there, at a place that only the device knows."""

    def __init__(self, keys: Tensor, values: Tensor, place: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self._place = place

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = self.keys, self.values
        assert keys is not None and values is not None
        keys.index_copy_(2, self._place, key_states)
        values.index_copy_(2, self._place, value_states)
        return keys, values


@dataclass(frozen=True)
class _Shared:
    """What the layers of a group have in common: which entries are seen, where the next one goes, and positions."""

    seen: Tensor  # bool [B, 1, 1, C]
    place: Tensor  # int64 [1]
    shift: Tensor  # int64 [B, 1]


class _Step:
    """The state of a captured step, in place of a `Forward`: all layers are given the new token."""

    segment = None
    length = 1

    def __init__(self, owner: object, changes: Callable[[int, Tensor, dict[str, Any]], dict[str, Any]]) -> None:
        self.owner, self._changes = owner, changes

    def enter(self, layer: int, hidden: Tensor, kwargs: dict[str, Any], run: Any) -> tuple[Tensor, dict[str, Any]]:
        return hidden, self._changes(layer, hidden, kwargs)

    def answer(self, *args: Any) -> None:
        """Nobody asks a layer for its queries here."""

    def scores_in(self, layer: int) -> bool:
        return False

    def dropping(self, layer: int) -> None:
        return None


class DecodingGraph:
    """One captured decoding step.

    Args:
        groups: of all layers.
        graphs: how work is captured.
        decoder: the decoder's own forward.
        cache_name: what that calls its cache.
        like: arguments of a call: ``inputs_embeds`` [B, 1, d] and ``position_ids`` [.., 1].
        keys, values: of each layer, [B, K, n, D], for their shapes.
        options: further arguments, no tensors.
        owner: the attached model.
        eager: whether masks are added to the logits.
    """

    def __init__(
        self,
        groups: tuple[Group, ...],
        graphs: Graphs,
        decoder: Callable[..., Any],
        cache_name: str,
        like: tuple[Tensor, Tensor],
        stored: list[tuple[Tensor, Tensor]],
        options: dict[str, Any],
        owner: Attachment,
        eager: bool,
    ) -> None:
        embeddings = like[0]
        batch, device = embeddings.shape[0], embeddings.device
        self.groups = groups
        self._embeddings, self._positions = (part.new_zeros(part.shape) for part in like)
        self._shared = {
            group: _Shared(
                seen=torch.zeros(batch, 1, 1, group.capacity, dtype=torch.bool, device=device),
                place=torch.zeros(1, dtype=torch.long, device=device),
                shift=torch.zeros(batch, 1, dtype=torch.long, device=device),
            )
            for group in groups
        }
        group_of = {layer: group for group in groups for layer in group.layers}
        self._stored: list[tuple[Tensor, Tensor]] = []
        for layer, pair in enumerate(stored):
            keys, values = (part.new_zeros(*part.shape[:2], group_of[layer].capacity, part.shape[3]) for part in pair)
            self._stored.append((keys, values))
        self.lease: Lease | None = None

        def changes(masks: dict[Group, Tensor], layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
            group = group_of[layer]
            changed: dict[str, Any] = {"attention_mask": masks[group]}
            if group.compact:
                assert owner.family.rotary is not None
                changed["position_ids"] = self._positions - self._shared[group].shift
                changed["position_embeddings"] = owner.family.rotary(hidden, changed["position_ids"])
            return changed

        def run() -> tuple[Tensor, type]:
            masks = {}
            for group, shared in self._shared.items():
                shared.seen.index_fill_(3, shared.place, True)
                masks[group] = additive_mask(shared.seen, embeddings.dtype) if eager else shared.seen
            layers: list[Any] = [
                _Room(keys, values, self._shared[group_of[layer]].place)
                for layer, (keys, values) in enumerate(self._stored)
            ]
            token = ACTIVE.set(_Step(owner, lambda *given: changes(masks, *given)))  # pyright: ignore
            try:
                out = decoder(
                    inputs_embeds=self._embeddings,
                    attention_mask=masks[group_of[0]],
                    position_ids=self._positions,
                    **{cache_name: Cache(layers=layers), "use_cache": True, **options},
                )
            finally:
                ACTIVE.reset(token)
            for shared in self._shared.values():
                shared.place.add_(1)
            return out.last_hidden_state, type(out)

        inputs = [self._embeddings, self._positions]
        self._captured: Captured = graphs.capture(run, inputs)
        buffers = [*inputs, *(shared.seen for shared in self._shared.values()), *sum(self._stored, ())]
        self.bytes = sum(part.numel() * part.element_size() for part in buffers)

    @property
    def output(self) -> type:
        """What the decoder returns."""
        return self._captured.outputs[1]

    @property
    def busy(self) -> bool:
        """Whether a generation that goes on has borrowed it."""
        return self.lease is not None and self.lease.goes_on

    def release(self) -> None:
        """Give keys and values back to the cache that they belong to."""
        if self.lease is not None:
            self.lease.settle()

    def begin(self, cache: Any, histories: dict[Group, History | None], mask: Tensor | None) -> None:
        """Take up what a cache holds.

        Args:
            cache: dynamic.
            histories: by group.
            mask: [B, >= tokens seen], 0 is padding; None without padding.
        """
        for group, history in histories.items():
            shared, held = self._shared[group], cache.layers[group.layers[0]].keys.shape[2]
            shared.seen.zero_()
            shared.seen[:, 0, 0, :held] = _entries_seen(history, held, mask)
            shared.place.fill_(held)
            if group.compact:
                assert history is not None and history.shift is not None
                shared.shift.copy_(history.shift)
            for layer in group.layers:
                for buffer, part in zip(self._stored[layer], _pair(cache.layers[layer]), strict=True):
                    buffer[:, :, :held].copy_(part)
                    buffer[:, :, held:].zero_()  # masked, but not a number times nothing would be one

    def step(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        """The hidden states of one new token a row, [B, 1, d]."""
        self._embeddings.copy_(embeddings)
        self._positions.copy_(positions)
        self._captured.replay()
        return self._captured.outputs[0].clone()

    def entries(self, layer: int, count: int) -> tuple[Tensor, Tensor]:
        """Copies of the first keys and values of a layer."""
        keys, values = self._stored[layer]
        return keys[:, :, :count].clone(), values[:, :, :count].clone()


class Lease:
    """A generation's hold on a graph's buffers.

    Args:
        graph: which has taken up the cache.
        cache: whose layers are replaced by `LentLayer`s.
        seen: logical tokens in it.
        call: the generation; when it has ended the graph is free again.
        turn: a context for reading the graph's buffers.
    """

    def __init__(
        self, graph: DecodingGraph, cache: Any, seen: int, call: Generation, turn: Callable[[], AbstractContextManager]
    ) -> None:
        self.graph, self.seen = graph, seen
        self._call, self._turn = weakref.ref(call), turn
        self._taken = 0
        self._held = [layer.keys.shape[2] for layer in cache.layers]
        self._room = min(group.capacity - self._held[group.layers[0]] for group in graph.groups)
        self._settled = False
        lent = [LentLayer.of(layer, self) for layer in cache.layers]
        self._layers = [weakref.ref(layer) for layer in lent]
        cache.layers[:] = lent
        graph.lease = self

    @property
    def goes_on(self) -> bool:
        return self._call() is not None

    @property
    def full(self) -> bool:
        """Whether there is no room for another token."""
        return self._taken == self._room

    def step(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        """As `DecodingGraph.step`."""
        hidden = self.graph.step(embeddings, positions)
        self._taken, self.seen = self._taken + 1, self.seen + 1
        return hidden

    def settle(self) -> None:
        """End it: layers that are alive still are given their keys and values for good."""
        with self._turn():
            if self._settled:
                return
            for number, held in enumerate(self._held):
                layer = self._layers[number]()
                if layer is not None:
                    layer.take_back(*self.graph.entries(number, held + self._taken))
            self._settled, self.graph.lease = True, None


class LentLayer(PrunedLayer):
    """A dynamic layer, pruned or not, whose keys and values lie in a graph's buffers until somebody asks for them."""

    lease: Lease | None = None

    @classmethod
    def of(cls, layer: DynamicLayer, lease: Lease) -> LentLayer:
        """A layer in place of another, which has been copied into the lease's graph."""
        lent = cls.__new__(cls)
        vars(lent).update({name: value for name, value in vars(layer).items() if name not in ("keys", "values")})
        lent._parts, lent.lease = (None, None), lease
        return lent

    def take_back(self, keys: Tensor, values: Tensor) -> None:
        """Hold keys and values for itself again."""
        self._parts, self.lease = (keys, values), None

    def _own(self) -> tuple[Any, Any]:
        if self.lease is not None:
            self.lease.settle()
        return self._parts

    @property
    def keys(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._own()[0]

    @keys.setter
    def keys(self, value: Any) -> None:
        self._parts = (value, self._own()[1])

    @property
    def values(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._own()[1]

    @values.setter
    def values(self, value: Any) -> None:
        self._parts = (self._own()[0], value)

    def get_seq_length(self) -> int:
        return super().get_seq_length() if self.lease is None else self.lease.seen

    def __reduce_ex__(self, protocol: Any) -> Any:
        self._own()
        return super().__reduce_ex__(protocol)


def _pair(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.keys, layer.values


def _entries_seen(history: History | None, held: int, mask: Tensor | None) -> Tensor | bool:
    """Which of a layer's entries new tokens see, bool [B or 1, held]."""
    entries = None if history is None else history.entries(0, held)
    valid = True if entries is None or entries.valid is None else entries.valid
    if mask is None:
        return valid
    padding = mask[:, :held] if entries is None else mask.gather(1, entries.columns.expand(mask.shape[0], -1))
    return padding.bool() & valid
