"""Models of real shapes with random weights: speed depends on shapes, not on weights, so nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import transformers
from torch import nn

from adaptinfer.errors import InputError, first_line
from adaptinfer.schedule import MODEL_SHAPES


@dataclass(frozen=True)
class Shape:
    """The sizes of a published model.

    Attributes:
        stands_for: which model, in words.
        parameters: weights of the published checkpoint, vision tower included, to the nearest 10 million; 0 for a shape
            of our own.
        config: makes its transformers config.
    """

    stands_for: str
    parameters: int
    config: Callable[[], Any]


def outline(config: Any, dtype: str, attention: str) -> Any:
    """The model on the meta device: every shape, no memory. Its parameters can be counted, and `fill` makes it real.

    Args:
        config: a transformers config of a vision-language model; it takes on dtype and attention backend.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        attention: backend of language model and vision tower, as transformers names it.

    Raises:
        InputError: the model or its attention backend cannot be used here.
    """
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForImageTextToText.from_config(
                config, dtype=getattr(torch, dtype), attn_implementation=attention
            )
    except (ImportError, ValueError) as error:
        raise InputError(
            f"{config.model_type} with attention {attention!r}: cannot be made here ({first_line(error)})"
        ) from None
    return model.eval()


def fill(model: Any, device: str, seed: int = 0) -> Any:
    """Make an outlined model real: memory on the device, random weights, and buffers as transformers computes them.

    A matrix is uniform with a variance of 1 / fan-in, which hands on activations at the scale at which they come, so
    that they stay finite in every dtype at every depth and attention is not flat. Norms are 1 and biases 0.
    """
    model.to_empty(device=device)
    _compute_buffers(model)
    generator = torch.Generator(device=device).manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            is_norm = "norm" in type(module).__name__.lower()
            for name, parameter in module.named_parameters(recurse=False):
                if name == "bias":
                    parameter.zero_()
                elif is_norm:
                    parameter.fill_(1.0)
                else:
                    reach = _reach(module, parameter)
                    parameter.uniform_(-reach, reach, generator=generator)
    model.tie_weights()
    return model


def build(name: str, dtype: str, device: str, attention: str = "sdpa", seed: int = 0) -> Any:
    """A model of a shape in `SHAPES` with random weights, in evaluation mode: the same weights for the same seed.

    Raises:
        InputError: there is no such shape.
    """
    return fill(outline(shape_named(name).config(), dtype, attention), device, seed)


def shape_named(name: str) -> Shape:
    """A shape by its name. Raises InputError that lists the names."""
    if name not in SHAPES:
        raise InputError(f"shape: there is no shape {name!r}; there are {', '.join(SHAPES)}")
    return SHAPES[name]


def _reach(module: nn.Module, parameter: torch.Tensor) -> float:
    """Half the width of a uniform distribution."""
    is_matrix = parameter.ndim >= 2 and not isinstance(module, torch.nn.Embedding)
    deviation = parameter[0].numel() ** -0.5 if is_matrix else 0.02
    return 3**0.5 * deviation


def _compute_buffers(model: Any) -> None:
    """Rotary frequencies and the like by transformers' own initialisation, which passes over what is marked as done."""
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    model.initialize_weights()
    for parameter in model.parameters():
        del parameter._is_hf_initialized


# -- configs --------------------------------------------------------------------------------------------------------

# What a published model shares with the defaults of transformers' configs is left to them: the towers, which are CLIP
# ViT-L/14 at 336 pixels and Qwen2.5-VL's, and LLaVA-NeXT's grids.
_VICUNA = {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_MISTRAL = {
    "model_type": "mistral",
    "vocab_size": 32064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_window": None,
}
_NARROW_TOWER = {"depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "fullatt_block_indexes": []}
_TINY_TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 4,
    "projection_dim": 32,
}


def _llava(text: dict[str, Any], kind: str = "LlavaConfig", image: int = 32000, **parts: Any) -> Any:
    """A config that knows its placeholder by both names that transformers has had for it."""
    return getattr(transformers, kind)(image_token_index=image, image_token_id=image, text_config=text, **parts)


def _sizes(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
    }


def _sizes_of(name: str) -> dict[str, int]:
    shape = MODEL_SHAPES[name]
    return _sizes(shape.hidden_size, shape.num_layers, shape.num_heads, shape.num_kv_heads, shape.intermediate_size)


def _qwen2_5_vl(sizes: dict[str, int], tower: dict[str, Any]) -> Any:
    text = {
        "vocab_size": 152064,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
        "tie_word_embeddings": False,
        **sizes,
    }
    return transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config={"hidden_size": 1280, "out_hidden_size": sizes["hidden_size"], **tower},
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        tie_word_embeddings=False,
    )


def _tiny() -> Any:
    text = {"model_type": "llama", "vocab_size": 100, "max_position_embeddings": 2048, **_sizes(64, 12, 4, 2, 96)}
    return _llava(text, image=90, vision_config=_TINY_TOWER)


SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "llava-1.5-7b": Shape(
            "LLaVA-1.5-7B: Vicuna-7B, CLIP ViT-L/14 at 336 pixels, 576 vision tokens",
            7_060_000_000,
            lambda: _llava({**_VICUNA, **_sizes_of("llava-1.5-7b")}),
        ),
        "llava-1.5-13b": Shape(
            "LLaVA-1.5-13B: Vicuna-13B, the same tower, 576 vision tokens",
            13_350_000_000,
            lambda: _llava({**_VICUNA, **_sizes_of("llava-1.5-13b")}),
        ),
        "llava-next-7b": Shape(
            "LLaVA-NeXT (v1.6) on Mistral-7B, 672 x 672 pixels: 5 crops of 576 and 48 row ends, 2928 vision tokens",
            7_570_000_000,
            lambda: _llava({**_MISTRAL, **_sizes(4096, 32, 32, 8, 14336)}, "LlavaNextConfig"),
        ),
        "qwen2.5-vl-7b": Shape(
            "Qwen2.5-VL-7B, 1008 x 1008 pixels unless --image-size says otherwise: 1296 vision tokens",
            8_290_000_000,
            lambda: _qwen2_5_vl(_sizes(3584, 28, 28, 4, 18944), {}),
        ),
        "qwen2.5-vl-narrow": Shape(
            "a Qwen2.5-VL of 8 layers of width 896 with next to no tower: for prompts of many thousand tokens on CPUs",
            0,
            lambda: _qwen2_5_vl(_sizes(896, 8, 7, 1, 4864), _NARROW_TOWER),
        ),
        "llava-1b": Shape(
            "a LLaVA-1.5 on a language model of the shape of TinyLlama-1.1B, 576 vision tokens: for CPUs",
            0,
            lambda: _llava({**_VICUNA, **_sizes(2048, 22, 32, 4, 5632)}),
        ),
        "tiny": Shape("12 layers of width 64 and 64 vision tokens: to try the command, not to measure", 0, _tiny),
    }
)
"""Shapes that can be built by name."""
