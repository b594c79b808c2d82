"""The attainable floor of a pruned prefill: the same layers, without a pruner, on as many tokens as each is given.

FLOPs fall in proportion to the tokens, but matrix kernels lose on short matrices, on any machine and whoever dropped
the tokens. Floor over measured time is therefore what the engine itself is to be judged by: scoring, choosing, gathers,
scatters, masks and hooks are all that separates the two.

In the layer that drops, queries, keys and values are made for all tokens that entered, as the FLOPs bound counts them:
without its queries no token can be chosen. The rest, from attention's outputs on, is for those that stay. Their rows
are slices here, and their mask stands ready: none of that is charged to the floor.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from adaptinfer.engine.cache.access import cache_argument
from adaptinfer.engine.families import attention_of
from adaptinfer.errors import InputError

_FUNCTION = ("apply_rotary_pos_emb",)  # in transformers' file of the language model
_IN_LAYER = ("input_layernorm", "post_attention_layernorm", "mlp")
_IN_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


class _Seen(Exception):
    """Ends a decoder at its first layer, and carries what that was given."""

    def __init__(self, kwargs: dict[str, Any]) -> None:
        self.kwargs = kwargs


class Floor:
    """The decoder layers of a model, to be run on few tokens.

    Args:
        model: of the Llama kind (LLaVA on Llama, Mistral or Qwen2; Qwen2.5-VL), without a pruner.
        batch: samples.

    Raises:
        InputError: its layers are built another way.
    """

    def __init__(self, model: Any, batch: int) -> None:
        self._decoder, self._batch = model.get_decoder(), batch
        self._config = model.config.get_text_config()
        layer = self._decoder.layers[0]
        attention = attention_of(layer)
        self._code: Any = sys.modules[type(attention).__module__]
        needed = ((self._code, _FUNCTION), (layer, _IN_LAYER), (attention, _IN_ATTENTION))
        if not all(hasattr(owner, name) for owner, names in needed for name in names):
            raise InputError(f"{type(layer).__name__}: the floor is known for layers of the Llama kind only")

    @torch.inference_mode()
    def prepared(self, tokens: Sequence[tuple[int, int]]) -> Callable[[], Tensor]:
        """One pass, ready to be timed again and again: hidden states after the last layer, [B, n, d].

        Args:
            tokens: per layer how many tokens enter and how many it hands on, see `layer_tokens`.
        """
        inputs = {entered: self._inputs_of_layers(entered) for entered, _ in tokens}
        masks = {pair: _mask(*pair, self._decoder.device) for pair in tokens if pair[0] != pair[1]}
        weight = next(self._decoder.parameters())
        generator = torch.Generator(device=weight.device).manual_seed(0)
        shape = (self._batch, tokens[0][0], self._config.hidden_size)
        hidden = torch.randn(shape, generator=generator, device=weight.device, dtype=weight.dtype)

        @torch.inference_mode()
        def run() -> Tensor:
            state, cache = hidden, DynamicCache(config=self._config)
            for layer, (entered, kept) in zip(self._decoder.layers, tokens, strict=True):
                state = state[:, -entered:]
                given = {name: cache if value is _CACHE else value for name, value in inputs[entered].items()}
                if kept == entered:
                    out = layer(state, **given)
                    state = out[0] if isinstance(out, tuple) else out
                else:
                    state = self._layer_that_drops(layer, state, cache, given, kept, masks[entered, kept])
            return state

        return run

    def _layer_that_drops(
        self, layer: Any, hidden: Tensor, cache: Any, given: dict[str, Any], kept: int, mask: Tensor | None
    ) -> Tensor:
        """A layer all of whose inputs become keys, and only whose last `kept` tokens have outputs."""
        attention: Any = attention_of(layer)
        normed = layer.input_layernorm(hidden)
        query, key, value = (
            projection(normed).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = self._code.apply_rotary_pos_emb(query, key, *given["position_embeddings"])
        key, value = cache.update(key, value, attention.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS[self._config._attn_implementation]
        rows = query if mask is None else query[:, :, -kept:]
        attended, _ = attend(attention, rows, key, value, mask, dropout=0.0, scaling=attention.scaling)
        hidden = hidden[:, -kept:] + attention.o_proj(attended[:, -kept:].flatten(2))
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    def _inputs_of_layers(self, tokens: int) -> dict[str, Any]:
        """What the decoder gives its layers for so many tokens, with `_CACHE` in place of the cache."""

        def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            raise _Seen(kwargs)

        weight = next(self._decoder.parameters())
        hidden = torch.zeros(self._batch, tokens, self._config.hidden_size, dtype=weight.dtype, device=weight.device)
        hook = self._decoder.layers[0].register_forward_pre_hook(look, with_kwargs=True)
        try:
            self._decoder(inputs_embeds=hidden, use_cache=True)
        except _Seen as seen:
            cache = cache_argument(seen.kwargs)
            return {
                name: _CACHE if value is cache and cache is not None else value
                for name, value in seen.kwargs.items()
                if name != "hidden_states"
            }
        finally:
            hook.remove()
        raise AssertionError("the decoder called none of its layers")


_CACHE = object()


def _mask(entered: int, kept: int, device: Any) -> Tensor | None:
    """Of the last `kept` rows, bool [1, 1, kept, entered]; None where all rows under the causal kernel cost less."""
    if 2 * kept > entered:
        return None
    return torch.ones(kept, entered, dtype=torch.bool, device=device).tril(entered - kept)[None, None]
