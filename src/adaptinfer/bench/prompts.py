"""Prompts made by hand: text before the picture, the picture with real pixel tensors, text after it.

Lengths are what matters for speed, so text tokens are drawn at random, others in each sample of a batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaptinfer.checkpoints import Checkpoint
from adaptinfer.errors import InputError

QWEN_IMAGE_SIZE = 1008
CHECKPOINT_IMAGE_SIZE = 512


@dataclass(frozen=True)
class NoisePicture:
    """One picture as a model takes it.

    Attributes:
        span: token ids from the first to the last that belongs to the picture, its markers included.
        types: for each of them 1 if it stands for the picture and 0 for a marker.
        tensors: pixels and sizes, one picture along the first dimension; a batch repeats them.
        needs_types: whether the model wants ``mm_token_type_ids``.
    """

    span: tuple[int, ...]
    types: tuple[int, ...]
    tensors: dict[str, Tensor]
    needs_types: bool = False

    @property
    def vision_tokens(self) -> int:
        return sum(self.types)


@dataclass(frozen=True)
class PromptTensors:
    """Inputs of a model on its device, the same number of tokens in every sample.

    Attributes:
        inputs: what ``model(**inputs)`` and ``model.generate(**inputs)`` take. No attention mask: nothing is padded.
        vision_tokens: in each sample.
        text_tokens: the others in each sample.
        batch: samples.
    """

    inputs: dict[str, Tensor]
    vision_tokens: int
    text_tokens: int
    batch: int


def picture_for(config: Any, image_size: int | None = None) -> NoisePicture:
    """A picture of noise for a model of a shape of ours.

    Args:
        config: of a LLaVA, a LLaVA-NeXT or a Qwen2.5-VL.
        image_size: edge in pixels, for the models that take pictures as they are; None for the usual one.

    Raises:
        InputError: this model's pictures have a size of their own, or that size cannot be cut into whole tokens.
    """
    if config.model_type == "qwen2_5_vl":
        return _qwen_picture(config, QWEN_IMAGE_SIZE if image_size is None else image_size)
    edge = config.vision_config.image_size
    if image_size is not None:
        raise InputError(f"--image-size: this model sees every picture at its own {edge} pixels; leave it out")
    side = edge // config.vision_config.patch_size
    if config.model_type == "llava_next":  # the whole picture, and four crops of which every row gets an end
        tokens = side * side + 2 * side * (2 * side + 1)
        tensors = {"pixel_values": _noise(1, 5, 3, edge, edge), "image_sizes": _whole([[2 * edge, 2 * edge]])}
    else:
        tokens, tensors = side * side, {"pixel_values": _noise(1, 3, edge, edge)}
    return NoisePicture((config.image_token_id,) * tokens, (1,) * tokens, tensors)


def picture_by_processor(checkpoint: Checkpoint, image_size: int | None = None) -> NoisePicture:
    """A picture of noise, cut up by a checkpoint's own processor.

    Raises:
        InputError: the processor cannot be read, or refuses the picture.
    """
    import numpy as np
    from PIL import Image

    from adaptinfer.engine.families import placeholders_of
    from adaptinfer.pictures import Picture

    edge = CHECKPOINT_IMAGE_SIZE if image_size is None else image_size
    pixels = np.random.default_rng(0).integers(0, 256, (edge, edge, 3), dtype=np.uint8)
    made = checkpoint.prompt([Picture("noise", Image.fromarray(pixels))], "What is this?").inputs
    ids: list[int] = made["input_ids"][0].tolist()
    placeholders = placeholders_of(checkpoint.config)
    places = [place for place, token in enumerate(ids) if token in placeholders]
    span = ids[max(places[0] - 1, 0) : places[-1] + 2]  # with the token on each side, which may be a marker
    tensors = {name: value for name, value in made.items() if value.shape != made["input_ids"].shape}
    types = tuple(int(token in placeholders) for token in span)
    return NoisePicture(tuple(span), types, tensors, "mm_token_type_ids" in made)


def prompt(
    picture: NoisePicture, vocabulary: int, before: int, after: int, batch: int, device: str, dtype: str, seed: int = 0
) -> PromptTensors:
    """Put a picture between text tokens, once per sample.

    Args:
        picture: its markers count as text: they stand in place of as many text tokens before and after.
        vocabulary: text tokens are drawn from the ids from 3 to below this (or to 1000), the picture's own left out.
        before: text tokens before the first vision token.
        after: text tokens after the last one.
        batch: samples.
        device: where to put the tensors.
        dtype: of the pixels.
        seed: of the text.

    Raises:
        InputError: fewer text tokens than the picture has markers, or none to follow it.
    """
    first, last = picture.types.index(1), len(picture.types) - 1 - picture.types[::-1].index(1)
    markers = first, len(picture.types) - 1 - last
    if before < markers[0] or after < max(1, markers[1]):
        raise InputError(
            f"--text-before, --text-after: at least {markers[0]} and {max(1, markers[1])} tokens are needed here, not "
            f"{before} and {after}"
        )
    words = torch.tensor([token for token in range(3, min(vocabulary, 1000)) if token not in picture.span])
    generator = torch.Generator().manual_seed(seed)

    def text(length: int) -> Tensor:
        return words[torch.randint(len(words), (batch, length), generator=generator)]

    def repeated(values: tuple[int, ...]) -> Tensor:
        return torch.tensor(values).expand(batch, -1)

    ids = torch.cat([text(before - markers[0]), repeated(picture.span), text(after - markers[1])], dim=1)
    inputs = {"input_ids": ids}
    if picture.needs_types:
        types = torch.zeros_like(ids)
        start = before - markers[0]
        types[:, start : start + len(picture.types)] = repeated(picture.types)
        inputs["mm_token_type_ids"] = types.int()
    for name, value in picture.tensors.items():
        value = value.to(getattr(torch, dtype)) if value.is_floating_point() else value
        inputs[name] = value.repeat(batch, *[1] * (value.ndim - 1))
    on_device = {name: value.to(device) for name, value in inputs.items()}
    inner = len(picture.types) - picture.vision_tokens - sum(markers)  # markers among the vision tokens
    return PromptTensors(on_device, picture.vision_tokens, before + inner + after, batch)


def _qwen_picture(config: Any, edge: int) -> NoisePicture:
    vision = config.vision_config
    cell = vision.patch_size * vision.spatial_merge_size
    if edge < cell or edge % cell:
        raise InputError(f"--image-size: must be a multiple of {cell} pixels here, not {edge}")
    patches = edge // vision.patch_size
    tokens = math.prod([edge // cell] * 2)
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    tensors = {"pixel_values": _noise(patches * patches, values), "image_grid_thw": _whole([[1, patches, patches]])}
    span = (config.vision_start_token_id, *[config.image_token_id] * tokens, config.vision_end_token_id)
    return NoisePicture(span, (0, *[1] * tokens, 0), tensors, needs_types=True)


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _whole(values: list[list[int]]) -> Tensor:
    return torch.tensor(values)
