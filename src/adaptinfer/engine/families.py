"""What the engine must be told of a model family; a new family is an entry in `FAMILIES`.

Everything else (decoder, layers, caches, masks) is found by the names that transformers uses for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adaptinfer.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["FAMILIES", "Family", "check_backend", "family_of"]


@dataclass(frozen=True)
class Family:
    """One architecture on transformers.

    Attributes:
        model_type: ``config.model_type`` of the vision-language model.
        placeholders: config attributes that hold the token ids standing for vision tokens.
        text_types: ``model_type`` of the text models that the tests cover.
        compact: whether rotary positions are one-dimensional, so that survivors can be renumbered.
    """

    model_type: str
    placeholders: tuple[str, ...]
    text_types: tuple[str, ...]
    compact: bool


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llava", ("image_token_id",), ("llama", "mistral", "qwen2"), compact=True),
        Family("qwen2_5_vl", ("image_token_id", "video_token_id"), ("qwen2_5_vl_text",), compact=False),
    )
}

_ATTENTION_BACKENDS = ("sdpa", "eager")


def family_of(model: nn.Module) -> Family:
    """The family of a loaded model.

    Raises:
        UnsupportedError: not a vision-language model of a supported family, or configured in a way (attention backend,
            sliding windows) that pruning does not support.
    """
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    supported = ", ".join(FAMILIES)
    if config is None or model_type is None:
        raise UnsupportedError(
            f"{type(model).__name__} is not a transformers model; AdaptInfer supports the families {supported}"
        )
    family = FAMILIES.get(model_type)
    if family is None:
        vision = hasattr(config, "vision_config")
        what = "a vision-language model of a family not supported yet" if vision else "not a vision-language model"
        raise UnsupportedError(f"model type {model_type!r} is {what}; AdaptInfer supports {supported}")
    text = config.get_text_config()
    if text.model_type not in family.text_types:
        raise UnsupportedError(
            f"{model_type} with the text model {text.model_type!r} is not supported; use one of {family.text_types}"
        )
    check_backend(text)
    layer_types = getattr(text, "layer_types", None) or []
    windowed = any("sliding" in kind or "chunked" in kind for kind in layer_types)
    if windowed or (not layer_types and getattr(text, "sliding_window", None)):
        raise UnsupportedError("sliding-window attention layers are not supported yet; disable them in the text config")
    return family


def check_backend(text_config: Any) -> None:
    """Refuse attention backends that the engine does not serve.

    Raises:
        UnsupportedError: naming the backend.
    """
    if text_config._attn_implementation not in _ATTENTION_BACKENDS:
        raise UnsupportedError(
            f"attention backend {text_config._attn_implementation!r} is not supported yet; load the model with "
            "attn_implementation='sdpa' (fast) or 'eager'"
        )
