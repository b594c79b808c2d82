"""One forward call of an attached model: what each layer is given, and at which layers a stage looks.

A `Forward` lives in a context variable for the length of one call of the multimodal model: two threads on one model, or
two models in one thread, never see each other's. `Stages` chooses the tokens, `LayerInputs` makes the layers' inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from adaptinfer.engine.attachment import Attachment
from adaptinfer.engine.cache.access import announce, cache_argument, history_of, hold, keys_of, mask_offset
from adaptinfer.engine.cache.checks import check_cache
from adaptinfer.engine.cache.history import whole_history
from adaptinfer.engine.choosing import Stages
from adaptinfer.engine.layer_inputs import LayerInputs, Stored
from adaptinfer.engine.segment import CallPlan, Segment
from adaptinfer.errors import UnsupportedError
from adaptinfer.functional import gather_tokens, scatter_tokens
from adaptinfer.pruners.views import StageView
from adaptinfer.schedule import BEFORE

outside_graphs: Any = torch.compiler.disable
"""Decorator for functions that read state of the call, which a compiled graph would take for a constant."""
ACTIVE: ContextVar[Forward | None] = ContextVar("adaptinfer_forward", default=None)


def active_on(owner: Attachment) -> Forward | None:
    """The call of an attached model that is going on in this context."""
    forward = None if torch.compiler.is_compiling() else ACTIVE.get()
    return forward if forward is not None and forward.owner is owner else None


class _Asked(Exception):
    """Ends a layer that was only asked for its queries and keys, and carries them."""

    def __init__(self, query: Tensor, key: Tensor, mask: Any, options: dict[str, Any]) -> None:
        self.query, self.key, self.mask, self.options = query, key, mask, options


class Forward:
    """State of one call."""

    def __init__(self, owner: Attachment, plan: CallPlan) -> None:
        self.owner, self.plan = owner, plan
        self.past, self.length, self.layout = plan.past, plan.length, plan.layout
        self.cache: Any = None
        self.stages = Stages(owner, plan)
        self.inputs = LayerInputs(owner.family, owner.pruner.positions == "compact", plan)
        self._asking = False
        self._stored: dict[int, Stored] = {}

    @property
    def segment(self) -> Segment | None:
        """The tokens that the present layer is given; None for all."""
        return self.stages.segment

    # -- inside a stage's layer -------------------------------------------------------------------------------------

    def answer(self, query: Tensor, key: Tensor, mask: Any, options: dict[str, Any]) -> None:
        """End the layer here, if it was only asked for its queries and keys."""
        if self._asking:
            raise _Asked(query, key, mask, options)

    def scores_in(self, layer: int) -> bool:
        """Whether this layer's attention is where a stage looks; some look at the layer after theirs."""
        return layer in self.plan.stages and "next" not in self.owner.pruner.capabilities.needs

    def dropping(self, layer: int) -> Tensor | None:
        """Rows that go on, if this layer need not compute the others' outputs; None for every other layer."""
        upcoming = self.stages.upcoming
        return upcoming.relative if self.owner.early_drop and upcoming is not None and upcoming.layer == layer else None

    def choose(
        self, layer: int, query: Tensor, key: Tensor, mask: Any, options: dict[str, Any]
    ) -> tuple[int, Callable[[Tensor], Tensor]]:
        """Score the vision tokens inside the stage's layer and settle which tokens the next layer is given.

        Args:
            layer: the stage's.
            query: [B, H, n, D].
            key: [B, K, L, D].
            mask: the layer's own, of any kind.
            options: the other arguments of the layer's attention function.

        Returns:
            How many of the key columns are in use, and what query rows may see of them, as `StageView.visible`.
        """
        used = self._entries_in_use(layer, key.shape[2])  # a static cache has room after them
        return used, self.stages.look(layer, query, key[:, :, :used], mask, options)

    def _entries_in_use(self, layer: int, columns: int) -> int:
        """How many of a layer's key columns hold something; the last of them are those of this call."""
        assert self.past is not None
        history = history_of(self.cache, layer)
        dropped = 0 if history is None else history.dropped
        return min(columns, self.past + self.length - dropped)

    # -- a stage that acts after its layer --------------------------------------------------------------------------

    @torch.no_grad()
    def _choose_after(self, layer: int, hidden: Tensor, kwargs: dict[str, Any], run: Callable[..., Any]) -> Tensor:
        """Choose after a stage's layer, at the entry of the next.

        Args:
            layer: the stage's.
            hidden: [B, n, d], its output.
            kwargs: keyword arguments of the next layer.
            run: that layer's forward.

        Returns:
            ``hidden``, with merged tokens in it if the pruner merged any.
        """
        view = self.stages.waiting
        if "next" in self.owner.pruner.capabilities.needs:
            view = self._ask(layer, hidden, kwargs, run)
        if view is None:
            return hidden  # the layer's attention went another way; `Stages.check` tells
        selection = self.stages.select(dataclasses.replace(view, output=hidden.to(view.query.device)))
        if selection.hidden is None:
            return hidden
        index = view.vision_index.to(hidden.device)[..., None].expand_as(selection.hidden)
        return hidden.scatter(1, index, selection.hidden.to(hidden))

    def _ask(self, layer: int, hidden: Tensor, kwargs: dict[str, Any], run: Callable[..., Any]) -> StageView:
        """The view of a stage that looks at the queries and keys which the next layer would make of all tokens.

        The layer runs up to its attention and no further, and its cache takes up nothing.
        """
        cache, segment, following = cache_argument(kwargs), self.segment, layer + 1
        before = history_of(cache, following)
        changed: dict[str, Any] = {}
        if segment is not None or before is not None:
            after = before if segment is None else self.inputs.history_after(segment, before)
            assert after is not None and self.past is not None
            stored = Stored(after, 0, (0, self.past + self.length - after.dropped), segment)
            changed = self.inputs.of_layer(following, segment, before, stored, hidden, kwargs)
        given = {**kwargs, **changed}
        without_cache = {name: None for name, value in given.items() if value is cache and cache is not None}
        self._asking = True
        try:
            run(hidden_states=hidden, **{**given, **without_cache})
        except _Asked as asked:
            query, key, mask, options = asked.query, asked.key, asked.mask, asked.options
        else:
            raise UnsupportedError(
                f"layer {following} was to tell its queries and keys, but its attention did not pass through "
                "transformers' attention interface; please report this model"
            )
        finally:
            self._asking = False
        if cache is not None and self.past:
            key = torch.cat([cache.layers[following].keys.to(key), key], dim=2)
        self.stages.rotary = given.get("position_embeddings")
        return self.stages.view(layer, query, key, mask, options)

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
        stages = self.plan.stages
        if layer == 0 and stages and "embeddings" in self.owner.pruner.capabilities.needs:
            self.stages.embeddings = hidden
        if layer == 0 and BEFORE in stages:
            hidden = self.stages.choose_before(hidden)
        if layer - 1 in self.stages.acting_after:
            hidden = self._choose_after(layer - 1, hidden, kwargs, run)
        hidden, changed = self._given(layer, hidden, kwargs)
        if layer in stages:
            self.stages.entered = hidden
            self.stages.rotary = {**kwargs, **changed}.get("position_embeddings")
        return hidden, changed

    def _given(self, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """`enter`, once it is settled which tokens the layer is given."""
        upcoming = self.stages.upcoming
        if upcoming is not None and upcoming.layer + 1 == layer:
            entered = self.length if self.segment is None else self.segment.index.shape[1]
            self.stages.segment, self.stages.upcoming = upcoming, None
            if hidden.shape[1] == entered:  # else the model went on with the last tokens alone, see `GivenRows`
                hidden = gather_tokens(hidden, upcoming.relative, dim=1)
        cache = self.cache = cache_argument(kwargs)
        if layer == 0 and self.plan.stages and cache is not None:
            check_cache(cache)  # one that the model made itself; a caller's was checked before
        segment, family = self.segment, self.owner.family
        if layer in family.recurrent:
            return hidden, self.inputs.of_recurrent_layer(segment, kwargs)
        source = family.key_source(layer)
        before = history_of(cache, source)
        if segment is None and before is None:
            if not self.plan.stages or layer not in family.sources.values():
                return hidden, {}
            before = whole_history(hidden)  # later layers read its keys, and may then be given fewer tokens
            if cache is not None:
                hold(cache, layer, before)
        if source == layer:  # else it reads the keys of an earlier layer, which may have been given more
            offset = mask_offset(cache, layer)
            after = before if segment is None else self.inputs.history_after(segment, before)
            assert after is not None
            if segment is not None and cache is not None:
                hold(cache, layer, after)
            held = self.length if segment is None else segment.index.shape[1]
            keys = keys_of(cache, layer, after, self.past, self.length, held)
            self._stored[layer] = Stored(after, offset, keys, segment)
            announce(cache, layer)
        return hidden, self.inputs.of_layer(layer, segment, before, self._stored[source], hidden, kwargs)

    def restore_length(self, hidden: Tensor) -> Tensor:
        """Hidden states of the survivors at their own places in the full prompt, zeros elsewhere: [B, N, d]."""
        segment = self.segment
        if segment is None or hidden.shape[1] != segment.index.shape[1]:
            return hidden  # nothing dropped, or the model itself went on with the last tokens alone
        return scatter_tokens(hidden, segment.index, self.length, segment.valid)

    def spread(self, tokens: Tensor) -> Tensor:
        """Per-token values of the whole call [B, N, d] for the tokens that the present layer was given."""
        return tokens if self.segment is None else gather_tokens(tokens, self.segment.index, dim=1)
