"""What the engine must know of a model, found out from the model itself.

A family of models costs nothing as long as it keeps to transformers' conventions: a decoder with a list of layers, one
attention module a layer that calls the attention interface, placeholder ids in the config. The tables below hold what
cannot be seen from outside; `family_of` refuses what does not fit, before any work.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from adaptinfer.engine.rotary import rotary_function
from adaptinfer.errors import UnsupportedError

TESTED: dict[str, str] = {
    "gemma3": "Gemma 3",
    "gemma4": "Gemma 4",
    "glm4v": "GLM-4.1V, GLM-4.6V-Flash",
    "glm4v_moe": "GLM-4.5V, GLM-4.6V",
    "idefics3": "Idefics3",
    "internvl": "InternVL 3, InternVL 3.5",
    "llava": "LLaVA-1.5, Pixtral",
    "llava_next": "LLaVA-NeXT (1.6)",
    "llava_onevision": "LLaVA-OneVision",
    "mistral3": "Mistral Small 3.1, Ministral 3",
    "paligemma": "PaliGemma, PaliGemma 2",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen2_vl": "Qwen2-VL",
    "qwen3_5": "Qwen3.5",
    "qwen3_5_moe": "Qwen3.5 MoE",
    "qwen3_vl": "Qwen3-VL",
    "qwen3_vl_moe": "Qwen3-VL MoE",
    "smolvlm": "SmolVLM, SmolVLM2",
}
"""Model types that the tests run against the masked oracle, with the models they stand for. Others are probed when a
pruner is attached."""

_PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
_COMPACT = frozenset({"llama", "mistral", "qwen2", "qwen3"})  # one rotary embedding of one-dimensional positions
# Layer inputs with a row per token, besides hidden states, positions and masks: Gemma 4, Ernie 4.5.
_TOKEN_INPUTS = ("per_layer_input", "moe_mm_token_type_ids")
_ATTENTION = ("self_attn", "attn", "attention")
_OUTPUT = ("o_proj", "out_proj", "dense", "wo")
_MLP = ("mlp", "feed_forward", "block_sparse_moe")
_REFUSED = {
    "llama4": "its attention counts positions from the number of tokens it is given, so survivors would be taken for "
    "the first tokens of the prompt",
    "mllama": "it reads its image by cross-attention; there are no vision tokens among the text that could be pruned",
}
_SCALED = ("Ministral3", "Llama4")  # attention classes that scale queries by their positions
_RECURRENT = ("linear_attn", "conv", "mamba")
_USUAL_INPUTS = ("hidden_states", "position_embeddings", "position_ids", "attention_mask")
_FINAL_NORMS = ("norm", "embedding_norm")
_BACKENDS = ("sdpa", "eager", "flex_attention")
_WAY_OUT = "; please open an issue that names the model"


@dataclass(frozen=True)
class Family:
    """A model as the engine sees it.

    Attributes:
        model_type: ``config.model_type`` of the vision-language model.
        placeholders: token ids that stand for vision tokens.
        heads: attention heads of the whole text model, over all ranks of tensor parallelism.
        scoring: layers in which a stage may sit: those with keys of their own.
        recurrent: layers without attention (linear attention, convolution), which a dropped token simply never enters.
        sources: for layers that read the keys of an earlier layer, which one (Gemma 4).
        token_inputs: names of further layer inputs that have a row per token.
        rotary: rotary embedding of renumbered positions; None where survivors cannot be renumbered.
        rotate: for each scoring layer that shows it, how it puts rotary embedding on queries and keys.
        final_norm: what the decoder puts its last hidden states through; None if it has none under a known name.
    """

    model_type: str
    placeholders: tuple[int, ...]
    heads: int
    scoring: tuple[int, ...]
    recurrent: frozenset[int]
    sources: dict[int, int]
    token_inputs: tuple[str, ...]
    rotary: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None
    rotate: dict[int, Callable[[Tensor, Tensor, Tensor], Tensor]]
    final_norm: Callable[[Tensor], Tensor] | None = None

    def stage_layers(self, needs: Collection[str]) -> tuple[int, ...]:
        """Layers in which a stage of a method with these `Capabilities.needs` may sit."""
        if "next" in needs:  # whose keys are scored
            return tuple(layer - 1 for layer in self.scoring if layer)
        if "output" in needs:  # layers that share keys may be given the last tokens alone, the others' outputs are gone
            return tuple(layer for layer in self.scoring if layer + 1 not in self.sources)
        return self.scoring

    def key_source(self, layer: int) -> int:
        """The layer whose keys a layer reads: its own, as a rule."""
        return self.sources.get(layer, layer)


def family_of(model: nn.Module) -> Family:
    """Look at a loaded model.

    Raises:
        UnsupportedError: not a vision-language model, or one that pruning inside the decoder does not fit; says why.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) is None or not hasattr(model, "get_decoder"):
        raise UnsupportedError(f"{type(model).__name__} is not a transformers model; load one with from_pretrained")
    placeholders, model_type = placeholders_of(config), config.model_type
    if model_type in _REFUSED:
        raise UnsupportedError(f"{model_type}: {_REFUSED[model_type]}")
    layers = _layers_of(model, model_type)
    text = config.get_text_config()
    check_backend(text)
    recurrent = _checked_layers(layers, model_type)
    sources = _key_sources(text, len(layers))
    scoring = tuple(i for i in range(len(layers)) if i not in recurrent and i not in sources)
    rotate = {i: rotary_function(attention_of(layers[i])) for i in scoring}
    decoder: Any = model.get_decoder()  # pyright: ignore
    family = Family(
        model_type=model_type,
        placeholders=placeholders,
        heads=text.num_attention_heads,
        scoring=scoring,
        recurrent=recurrent,
        sources=sources,
        token_inputs=_TOKEN_INPUTS,
        rotary=decoder.rotary_emb if text.model_type in _COMPACT else None,
        rotate={i: function for i, function in rotate.items() if function is not None},
        final_norm=next((getattr(decoder, name).forward for name in _FINAL_NORMS if hasattr(decoder, name)), None),
    )
    if model_type not in TESTED:
        _probe(model, family)
    return family


def placeholders_of(config: Any) -> tuple[int, ...]:
    """The token ids that stand for vision tokens, from a model's config alone.

    Raises:
        UnsupportedError: it is no config of a vision-language model whose vision tokens stand among the text.
    """
    model_type = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{model_type} is an encoder-decoder: its image never enters the decoder as tokens, so there is nothing to "
            "prune inside it"
        )
    found = (getattr(config, name, None) for name in _PLACEHOLDERS)
    placeholders = tuple(dict.fromkeys(token for token in found if isinstance(token, int)))
    if placeholders:
        return placeholders
    if hasattr(config, "vision_config"):
        raise UnsupportedError(
            f"{model_type} names no image_token_id in its config, so vision tokens cannot be told from text{_WAY_OUT}"
        )
    raise UnsupportedError(
        f"{model_type} is not a vision-language model (its config names no image_token_id), and AdaptInfer prunes "
        "vision tokens"
    )


def attention_of(layer: Any) -> Any:
    """The attention module of a decoder layer; None if it has none."""
    for name in _ATTENTION:
        module = getattr(layer, name, None)
        if module is not None and hasattr(module, "config") and hasattr(module, "layer_idx"):
            return module
    return None


def skippable_modules(layer: Any) -> list[Any]:
    """The parts of a decoder layer that treat each token by itself: the attention's output projection and the MLP."""
    parts = [getattr(attention_of(layer), name, None) for name in _OUTPUT]
    parts += [getattr(layer, name, None) for name in _MLP]
    return [part for part in parts if part is not None]


class _Untapped:
    """An attention module as it was before its config was tapped, for backends that look into the config."""

    def __init__(self, module: Any) -> None:
        self._module, self.config = module, module.config.adaptinfer_original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def own_attention(module: Any) -> tuple[Any, Any, str]:
    """Of a module whose config was tapped: its own attention function, what to call that with, and its name."""
    backend = module.config.adaptinfer_original._attn_implementation
    if backend == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward, module, backend  # pyright: ignore
    return ALL_ATTENTION_FUNCTIONS[backend], module if backend == "sdpa" else _Untapped(module), backend


def is_flash(implementation: str) -> bool:
    """Whether an attention implementation takes FlashAttention's two-dimensional masks."""
    return "flash" in implementation and not implementation.startswith("paged")


def check_backend(text_config: Any) -> None:
    """Refuse attention backends that the engine does not serve.

    Raises:
        UnsupportedError: naming the backend.
    """
    name = text_config._attn_implementation
    if name not in _BACKENDS and not is_flash(name):
        raise UnsupportedError(
            f"attention backend {name!r} is not supported; load the model with attn_implementation='sdpa', "
            "'flash_attention_2', 'flex_attention' or 'eager'"
        )


# -- looking at a model ---------------------------------------------------------------------------------------------


def _layers_of(model: Any, model_type: str) -> Any:
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    odd = next((name for name in _parameters(decoder) if "deepstack" in name), None)
    if odd and not hasattr(decoder, "_deepstack_process"):
        raise UnsupportedError(
            f"{model_type}: {type(decoder).__name__} adds vision features between its layers ({odd}) in an unknown "
            f"way{_WAY_OUT}"
        )
    if layers is None or not len(layers):
        raise UnsupportedError(f"{model_type}: no list of decoder layers found in {type(decoder).__name__}{_WAY_OUT}")
    return layers


def _parameters(layer: Any) -> list[str]:
    return list(inspect.signature(layer.forward).parameters)


def _checked_layers(layers: Any, model_type: str) -> frozenset[int]:
    """The layers without attention. Raises UnsupportedError for layers that pruning does not fit."""
    recurrent = set()
    for number, layer in enumerate(layers):
        kind = type(layer).__name__
        if any("cross_attn" in name for name, _ in layer.named_children()):
            raise UnsupportedError(
                f"{model_type} reads its image by cross-attention ({kind}): there are no vision tokens among the text "
                "tokens that could be pruned"
            )
        if "hidden_states" not in _parameters(layer):
            raise UnsupportedError(f"{model_type}: {kind}.forward takes no hidden_states{_WAY_OUT}")
        attention = attention_of(layer)
        if attention is None:
            if not any(hasattr(layer, name) for name in _RECURRENT):
                raise UnsupportedError(f"{model_type}: no attention module found in {kind}{_WAY_OUT}")
            recurrent.add(number)
        elif not hasattr(sys.modules[type(attention).__module__], "ALL_ATTENTION_FUNCTIONS"):
            raise UnsupportedError(
                f"{model_type}: {type(attention).__name__} does not use transformers' attention interface, where the "
                f"scores are taken{_WAY_OUT}"
            )
        elif type(attention).__name__.startswith(_SCALED) and "cache_position" in _parameters(attention):
            raise UnsupportedError(
                f"{model_type}: {type(attention).__name__} scales queries by one position for the whole batch, but "
                "survivors of different samples stand at different ones; it needs a newer transformers (5.8 will do)"
            )
        elif getattr(attention, "sinks", None) is not None:
            raise UnsupportedError(f"{model_type}: attention sinks ({type(attention).__name__}) are not supported yet")
    if len(recurrent) == len(layers):
        raise UnsupportedError(f"{model_type} has no layer with attention, so nothing could be scored")
    return frozenset(recurrent)


def _key_sources(text_config: Any, num_layers: int) -> dict[int, int]:
    """Gemma 4's last layers read the keys of the last layer of their kind that has any."""
    shared = getattr(text_config, "num_kv_shared_layers", 0) or 0
    own = range(num_layers - shared)
    kinds = getattr(text_config, "layer_types", None) or ["full_attention"] * num_layers
    return {
        layer: max(earlier for earlier in own if kinds[earlier] == kinds[layer])
        for layer in range(num_layers - shared, num_layers)
    }


@torch.no_grad()
def _probe(model: Any, family: Family) -> None:
    """Send four embeddings through the decoder of a model that no test knows, and watch the layers being called."""
    decoder, layers = model.get_decoder(), model.get_decoder().layers
    weight = next(decoder.parameters())
    width = model.config.get_text_config().hidden_size
    # Offloaded weights are away until their layer runs; accelerate takes the embeddings to wherever that is.
    here = next((part.device for part in decoder.parameters() if part.device.type != "meta"), torch.device("cpu"))
    embeddings = torch.zeros(1, 4, width, dtype=weight.dtype, device=here)
    seen: list[str] = []

    def watch(number: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            kwargs = {**dict(zip(_parameters(module), args, strict=False)), **kwargs}
            hidden = kwargs.get("hidden_states")
            shape = tuple(getattr(hidden, "shape", ()))
            if shape != (1, 4, width):
                seen.append(f"layer {number} is given hidden states of shape {shape} for four tokens")
            if number != len(seen):
                seen.append(f"layer {number} is not called once and in order")
            odd = [
                name
                for name, value in kwargs.items()
                if isinstance(value, torch.Tensor)
                and value.shape[:2] == (1, 4)
                and name not in (*_USUAL_INPUTS, *family.token_inputs)
            ]
            seen.append(f"its layers take a further input per token ({odd[0]})" if odd else "")

        return hook

    hooks = [layer.register_forward_pre_hook(watch(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        decoder(inputs_embeds=embeddings, use_cache=False)
    except Exception as error:
        raise UnsupportedError(
            f"{family.model_type}: its decoder did not run on embeddings alone ({type(error).__name__}: {error})"
            + _WAY_OUT
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    trouble = next((line for line in seen if line), None)
    if trouble is None and len(seen) != len(layers):
        trouble = f"{len(seen)} of its {len(layers)} layers were called"
    if trouble:
        raise UnsupportedError(f"{family.model_type}: {trouble}{_WAY_OUT}")
