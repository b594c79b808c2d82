"""Hooks on the decoder of an attached model: what its layers are given, and early drop in those that prune.

A decoding step that is compiled as a whole (`torch.compile` with a static cache) must not leave its graph. Each hook
therefore asks first whether such a step is being traced; everything else runs outside of graphs, because it reads state
of the call, which a graph would take for a constant.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from adaptinfer.engine import attention
from adaptinfer.engine.attachment import Attachment
from adaptinfer.engine.families import attention_of, is_flash, skippable_modules
from adaptinfer.engine.forward import active_on, outside_graphs
from adaptinfer.engine.layer_inputs import decoding_inputs
from adaptinfer.engine.patches import Patches
from adaptinfer.errors import AdaptInferError, UnsupportedError
from adaptinfer.functional import gather_tokens, scatter_tokens
from adaptinfer.schedule import BEFORE


class DecoderHooks:
    """The hooks of one attached model."""

    def __init__(self, attachment: Attachment, patches: Patches) -> None:
        self._attachment, self._patches = attachment, patches
        self._layers = attachment.decoder.layers
        self._layer_arguments = list(inspect.signature(self._layers[0].forward).parameters)
        self._lock = threading.Lock()
        self._hooked_stages: set[int] = set()

    def install(self) -> None:
        """Put on the hooks that every call needs."""
        decoder, patches = self._attachment.decoder, self._patches
        patches.after(decoder, self._leave_decoder)
        AttentionInterface.register(attention.ATTENTION, attention.attention_in_stage)
        for number, layer in enumerate(self._layers):
            patches.before(layer, functools.partial(self._enter_layer, number))
        for module in filter(None, map(attention_of, self._layers)):
            # Only this module reads the copy, so masks, flags and every other module still see the model's own config.
            tapped = copy.copy(module.config)
            tapped._attn_implementation_internal = attention.ATTENTION
            tapped.adaptinfer_original, tapped.adaptinfer_owner = module.config, self._attachment
            patches.config(module, tapped)
        if hasattr(decoder, "_deepstack_process"):
            patches.override(decoder, "_deepstack_process", self._deepstack(decoder._deepstack_process))

    def hook_stages(self, layers: Iterable[int]) -> None:
        """Early drop in the projection and MLP of pruning layers; other layers are spared the hooks."""
        with self._lock:
            for number in set(layers) - self._hooked_stages - {BEFORE}:
                for module in skippable_modules(self._layers[number]):
                    # Around all other hooks: those of tensor parallelism turn tensors into distributed ones and back.
                    self._patches.before(module, functools.partial(self._enter_part, number), first=True)
                    self._patches.after(module, functools.partial(self._leave_part, number))
                self._hooked_stages.add(number)

    # -- in the order in which a forward meets them -----------------------------------------------------------------

    def _enter_layer(self, layer: int, module: Any, args: Any, kwargs: Any) -> Any:
        named = {**dict(zip(self._layer_arguments[: len(args)], args, strict=True)), **kwargs}
        hidden = named.pop("hidden_states")
        if _traces_a_step(hidden):
            changed = self._decoding_inputs(layer, hidden, named)
        else:
            hidden, changed = self.layer_inputs(layer, hidden, named)
        return ((hidden,), {**named, **changed}) if args else (args, {**named, **changed, "hidden_states": hidden})

    def _decoding_inputs(self, layer: int, hidden: Tensor, named: dict[str, Any]) -> dict[str, Any]:
        """Of a call without a `Forward`: a decoding step in a compiled graph, or the decoder called by itself."""
        backend = self._attachment.model.config.get_text_config()._attn_implementation
        return decoding_inputs(self._attachment.family, layer, hidden, named, is_flash(backend))

    @outside_graphs
    def layer_inputs(self, layer: int, hidden: Tensor, named: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """What a layer is given: hidden states, and the arguments that change."""
        forward, calls = active_on(self._attachment), self._attachment.calls
        if forward is None:
            if hidden.shape[1] > 1 and calls.expects_forward:
                calls.expects_forward = False
                raise AdaptInferError(
                    f"{type(self._attachment.base).__name__}.forward was replaced while a pruner is attached, so "
                    "nothing would be pruned; detach before you change it, and attach again"
                )
            return hidden, self._decoding_inputs(layer, hidden, named)
        if forward.length != hidden.shape[1] and layer == 0:
            raise UnsupportedError(
                f"{hidden.shape[1]} tokens reach the decoder where the prompt has {forward.length}: the model does not "
                "put its vision tokens in place of as many placeholder ids, so they cannot be told from text"
            )
        return forward.enter(layer, hidden, named, self._layers[layer].forward)

    def _enter_part(self, layer: int, module: Any, args: Any, kwargs: Any) -> Any:
        return None if _traces_a_step(args[0]) else self.drop_rows(layer, args, kwargs)

    @outside_graphs
    def drop_rows(self, layer: int, args: Any, kwargs: Any) -> Any:
        """The arguments of a part of a pruning layer, without the tokens that it drops."""
        rows = self._rows_going_on(layer)
        if rows is None:
            return None
        entered = args[0].shape[:2]

        def pick(value: Any) -> Any:
            per_token = isinstance(value, torch.Tensor) and value.shape[:2] == entered
            return gather_tokens(value, rows, dim=1) if per_token else value

        return tuple(map(pick, args)), {name: pick(value) for name, value in kwargs.items()}

    def _leave_part(self, layer: int, module: Any, args: Any, output: Any) -> Any:
        return None if _traces_a_step(args[0]) else self.restore_rows(layer, output)

    @outside_graphs
    def restore_rows(self, layer: int, output: Any) -> Any:
        """The output of a part of a pruning layer, with zeros for the tokens that it drops."""
        rows = self._rows_going_on(layer)
        forward = active_on(self._attachment)
        if rows is None or forward is None:
            return None
        entered = forward.length if forward.segment is None else forward.segment.index.shape[1]
        batch, given = rows.shape

        def restore(part: Tensor) -> Tensor:
            if part.shape[:2] == (batch, given):
                return scatter_tokens(part, rows, entered)
            # Some mixtures of experts return [B * n, d].
            return scatter_tokens(part.view(batch, given, -1), rows, entered).flatten(0, 1)

        return (restore(output[0]), *output[1:]) if isinstance(output, tuple) else restore(output)

    def _rows_going_on(self, layer: int) -> Tensor | None:
        forward = active_on(self._attachment)
        return None if forward is None else forward.dropping(layer)

    def _deepstack(self, process: Any) -> Any:
        """Qwen3-VL adds vision features after its first layers, by a mask of the whole prompt."""

        @functools.wraps(process)
        @outside_graphs
        def add(hidden: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor) -> Tensor:
            forward = active_on(self._attachment)
            if forward is None or forward.segment is None:
                return process(hidden, visual_pos_masks, visual_embeds)
            features = hidden.new_zeros(*visual_pos_masks.shape, hidden.shape[-1])
            places = visual_pos_masks[..., None].to(hidden.device)
            features = features.masked_scatter(places, visual_embeds.to(hidden.device, hidden.dtype))
            return hidden + forward.spread(features)

        return add

    def _leave_decoder(self, module: Any, args: Any, output: Any) -> Any:
        return None if _traces_a_step(output[0]) else self._restore_length(output)

    @outside_graphs
    def _restore_length(self, output: Any) -> Any:
        forward = active_on(self._attachment)
        if forward is None or forward.segment is None:
            return None
        if isinstance(output, tuple):
            return (forward.restore_length(output[0]), *output[1:])
        output.last_hidden_state = forward.restore_length(output.last_hidden_state)
        return output


STAGE_WORK: tuple[tuple[Any, str], ...] = (
    (DecoderHooks, "layer_inputs"),
    (DecoderHooks, "drop_rows"),
    (DecoderHooks, "restore_rows"),
    (attention, "attention_of_call"),
)
"""What the engine adds to a prefill, for whoever measures it. The attention function is the outermost: within it lie
scoring and the model's own attention."""


def _traces_a_step(tokens: Tensor) -> bool:
    """Whether a decoding step is being compiled; ``tokens`` [.., n, d]."""
    return torch.compiler.is_compiling() and tokens.shape[-2] == 1
