"""Models of real shapes with random weights: speed depends on shapes, not on weights, so nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from adaptinfer.errors import InputError
from adaptinfer.schedule import MODEL_SHAPES

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["SHAPES", "Shape", "build", "fill", "outline", "shape_named"]


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
    import torch
    from transformers import AutoModelForImageTextToText

    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(
                config, dtype=getattr(torch, dtype), attn_implementation=attention
            )
    except (ImportError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise InputError(f"{config.model_type} with attention {attention!r}: cannot be made here ({why})") from None
    return model.eval()


def fill(model: Any, device: str, seed: int = 0) -> Any:
    """Make an outlined model real: memory on the device, random weights, and buffers as transformers computes them.

    A matrix is uniform with a variance of 1 / fan-in, which hands on activations at the scale at which they come, so
    that they stay finite in every dtype at every depth and attention is not flat. Norms are 1 and biases 0.
    """
    import torch

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
    import torch

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

_CLIP_LARGE: dict[str, Any] = {  # openai/clip-vit-large-patch14-336
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}
_VICUNA = {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_IMAGE = 32000
_QWEN_TOWER: dict[str, Any] = {  # Qwen2.5-VL's of every size, but for the width of what comes out
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
_NARROW_TOWER = {"depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "fullatt_block_indexes": []}


def _llava(text: dict[str, Any], tower: dict[str, Any] = _CLIP_LARGE, image: int = _IMAGE) -> Any:
    from transformers import CLIPVisionConfig, LlavaConfig

    return _named(LlavaConfig, image, text_config=text, vision_config=CLIPVisionConfig(**tower))


def _named(kind: Any, image: int, **parts: Any) -> Any:
    """A config that knows its placeholder by both names that transformers has had for it."""
    return kind(image_token_index=image, image_token_id=image, **parts)


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


def _llava_next() -> Any:
    from transformers import CLIPVisionConfig, LlavaNextConfig

    text = {
        "model_type": "mistral",
        "vocab_size": 32064,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_window": None,
        **_sizes(4096, 32, 32, 8, 14336),
    }
    return _named(
        LlavaNextConfig,
        _IMAGE,
        text_config=text,
        vision_config=CLIPVisionConfig(**_CLIP_LARGE),
        image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    )


def _qwen2_5_vl(sizes: dict[str, int], tower: dict[str, Any]) -> Any:
    from transformers import Qwen2_5_VLConfig

    text = {
        "vocab_size": 152064,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
        "tie_word_embeddings": False,
        **sizes,
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config={**_QWEN_TOWER, **tower},
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        tie_word_embeddings=False,
    )


def _tiny() -> Any:
    tower: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 4,
        "projection_dim": 32,
    }
    text = {"model_type": "llama", "vocab_size": 100, "max_position_embeddings": 2048, **_sizes(64, 12, 4, 2, 96)}
    return _llava(text, tower, image=90)


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
            _llava_next,
        ),
        "qwen2.5-vl-7b": Shape(
            "Qwen2.5-VL-7B, 1008 x 1008 pixels unless --image-size says otherwise: 1296 vision tokens",
            8_290_000_000,
            lambda: _qwen2_5_vl(_sizes(3584, 28, 28, 4, 18944), {"out_hidden_size": 3584}),
        ),
        "qwen2.5-vl-narrow": Shape(
            "a Qwen2.5-VL of 8 layers of width 896 with next to no tower: for prompts of many thousand tokens on CPUs",
            0,
            lambda: _qwen2_5_vl(_sizes(896, 8, 7, 1, 4864), {"out_hidden_size": 896, **_NARROW_TOWER}),
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
