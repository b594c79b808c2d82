"""Tiny random models of the real transformers classes for the common families of vision-language models.

``SETUPS`` holds a builder and hand-made inputs per family; ``BUILD_ONLY`` holds builders without inputs.
``python tests/zoo.py [NAME ...]`` checks the set-ups against transformers itself.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tiny
import torch
import transformers
from tiny import EOS, IMAGE, LAYERS, PAD, VIDEO, VISION_END, VISION_START, words
from torch import Tensor

ROW_END, VIDEO_START, VIDEO_END = 94, 95, 96
PLACEHOLDERS = (IMAGE, VIDEO)
WINDOW = 24


class Prompt(tiny.Prompt):
    """Token ids, images and videos of one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, int]] = []
        self.videos: list[Tensor] = []
        self.video_grids: list[tuple[int, int, int]] = []


@dataclass(frozen=True)
class Setup:
    """One family: how to build its model, how to write its prompts, how to make a batch of them."""

    name: str
    build: Callable[[str], Any]
    add_image: Callable[..., Prompt]
    collate: Callable[[list[Prompt], str], dict[str, Tensor]]
    add_video: Callable[..., Prompt] | None = None
    sizes: tuple[dict, ...] = ({},)
    tolerance: float = 1e-5  # to which logits of equal float32 computations agree
    notes: str = ""


SETUPS: dict[str, Setup] = {}
BUILD_ONLY: dict[str, Callable[[str], Any]] = {}


def simple(
    name: str,
    before: int = 5,
    after: int = 9,
    seed: int = 0,
    images: int = 1,
    between: int = 4,
    video: bool = False,
    **size,
) -> Prompt:
    """A prompt: text, image(s) or videos with text between them, question."""
    setup = SETUPS[name]
    add = setup.add_video if video else setup.add_image
    if add is None:
        raise ValueError(f"{name} takes no video")
    prompt = words(Prompt(), before, seed)
    for number in range(images):
        if number:
            words(prompt, between, seed + 50 + number)
        add(prompt, seed + 100 + number, **size)
    return words(prompt, after, seed + 1000)


def batch(name: str, prompts: list[Prompt], side: str = "left") -> dict[str, Tensor]:
    """Model inputs of several prompts, padded to one length."""
    return SETUPS[name].collate(prompts, side)


def vision_tokens(name: str, prompt: Prompt) -> int:
    """How many tokens of the prompt are placeholders of vision features."""
    assert name in SETUPS
    return sum(token in PLACEHOLDERS for token in prompt)


# Building


def _make(cls, config, attention: str | None):
    torch.manual_seed(0)
    model = cls._from_config(config, attn_implementation=attention)
    for parameter in model.parameters():
        if parameter.ndim >= 2 and (parameter == parameter.flatten()[0]).all():  # left constant by transformers
            torch.nn.init.normal_(parameter, std=0.02)
    return tiny._ready(model)


def _model(prefix: str, own_choice: bool = False, **config) -> Callable[[str], Any]:
    """Builder of ``{prefix}ForConditionalGeneration`` from keywords of ``{prefix}Config``.

    With ``own_choice``, "sdpa" means the choice of transformers for each part, where a part has no sdpa.
    """

    def build(attention: str | None = "sdpa"):
        attention = None if own_choice and attention == "sdpa" else attention
        settings = getattr(transformers, f"{prefix}Config")(**_copy(config))
        return _make(getattr(transformers, f"{prefix}ForConditionalGeneration"), settings, attention)

    return build


def _copy(value):
    """A config object changes the dicts it is given."""
    if isinstance(value, dict):
        return {key: _copy(part) for key, part in value.items()}
    return value


def _text(model_type: str | None = None, **more) -> dict:
    kind = {"model_type": model_type} if model_type else {}
    return {**kind, **tiny._TEXT, **more}


def _tower(model_type: str | None = None, **more) -> dict:
    kind = {"model_type": model_type} if model_type else {}
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {**kind, **shape, "patch_size": 4, **more}


def _rope(**more) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **more}}


# Inputs


def _noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _padded(prompts: list[Prompt], side: str) -> dict[str, Tensor]:
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), PAD)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        place = slice(longest - len(prompt), None) if side == "left" else slice(len(prompt))
        ids[row, place], mask[row, place] = torch.tensor(prompt), 1
    return {"input_ids": ids, "attention_mask": mask}


def _types(ids: Tensor) -> Tensor:
    return (ids == IMAGE).int() + 2 * (ids == VIDEO).int()


def _collate(*pixels: Callable[[list[Prompt]], dict[str, Tensor]], types: str | None = None):
    """A collate from parts that turn the prompts' images and videos into model inputs."""

    def collate(prompts: list[Prompt], side: str = "left") -> dict[str, Tensor]:
        inputs = _padded(prompts, side)
        if types is not None:
            inputs[types] = _types(inputs["input_ids"])
        for part in pixels:
            inputs.update(part(prompts))
        return inputs

    return collate


def _all(prompts: list[Prompt], what: str) -> list:
    return [part for prompt in prompts for part in getattr(prompt, what)]


def _stacked(prompts: list[Prompt]) -> dict[str, Tensor]:
    images = _all(prompts, "images")
    return {"pixel_values": torch.stack(images)} if images else {}


def _joined(prompts: list[Prompt]) -> dict[str, Tensor]:
    images = _all(prompts, "images")
    return {"pixel_values": torch.cat(images)} if images else {}


def _image_sizes(prompts: list[Prompt]) -> dict[str, Tensor]:
    sizes = _all(prompts, "sizes")
    return {"image_sizes": torch.tensor(sizes)} if sizes else {}


def _fill(tensor: Tensor, *shape: int, value: float = 0) -> Tensor:
    """The tensor in the first corner of a larger one."""
    full = tensor.new_full(shape, value)
    full[tuple(slice(length) for length in tensor.shape)] = tensor
    return full


def _filled(tensors: list[Tensor], value: float = 0) -> Tensor:
    """Tensors of different shapes, padded and stacked."""
    shape = [max(lengths) for lengths in zip(*(tensor.shape for tensor in tensors), strict=True)]
    return torch.stack([_fill(tensor, *shape, value=value) for tensor in tensors])


def _filled_images(prompts: list[Prompt]) -> dict[str, Tensor]:
    images = _all(prompts, "images")
    return {"pixel_values": _filled(images)} if images else {}


def _fixed(tokens: int, side: int, begin: tuple[int, ...] = (), end: tuple[int, ...] = ()) -> Callable[..., Prompt]:
    """Images of one size."""

    def add(prompt: Prompt, seed: int) -> Prompt:
        prompt.images.append(_noise(seed, 3, side, side))
        prompt.extend([*begin, *[IMAGE] * tokens, *end])
        return prompt

    return add


# LLaVA


def _llava(**text) -> Callable[[str], Any]:
    return _model(
        "Llava",
        vision_config=_tower("clip_vision_model", image_size=28, projection_dim=32),
        text_config=_text(**text),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )


def _add_llava(name: str, **text) -> None:
    SETUPS[name] = Setup(name, _llava(**text), _fixed(49, 28), _collate(_stacked))


_add_llava("llava", model_type="llama")
_add_llava("llava_mistral", model_type="mistral", sliding_window=None)
_add_llava("llava_mistral_window", model_type="mistral", sliding_window=WINDOW)
_add_llava("llava_qwen2", model_type="qwen2")


def _rows(patch: int) -> Callable[..., Prompt]:
    """Images of any size as rows of placeholders, each with a token at its end."""

    def add(prompt: Prompt, seed: int, height: int = 6, width: int = 8) -> Prompt:
        prompt.images.append(_noise(seed, 3, height * patch, width * patch))
        prompt.sizes.append((height * patch, width * patch))
        for row in range(height):
            prompt.extend([IMAGE] * width + [ROW_END if row < height - 1 else VISION_END])
        return prompt

    return add


_ROW_SIZES = ({}, {"height": 5, "width": 6}, {"height": 8, "width": 4})

SETUPS["pixtral"] = Setup(
    "pixtral",
    _model(
        "Llava",
        vision_config=_tower("pixtral", head_dim=8, image_size=64),
        text_config=_text("mistral", head_dim=16, sliding_window=None),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    ),
    _rows(4),
    _collate(_filled_images, _image_sizes),
    sizes=_ROW_SIZES,
)


def _add_mistral3(name: str, **text) -> None:
    SETUPS[name] = Setup(
        name,
        _model(
            "Mistral3",
            vision_config=_tower("pixtral", head_dim=8, image_size=64),
            text_config=_text(head_dim=16, sliding_window=None, **text),
            image_token_index=IMAGE,
            vision_feature_layer=-1,
            spatial_merge_size=2,
        ),
        _rows(8),
        _collate(_filled_images, _image_sizes),
        sizes=_ROW_SIZES,
    )


# Queries grow with the position, here every 16 positions.
_SCALED = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 128.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    }
}

_add_mistral3("mistral3", model_type="ministral3", **_SCALED)
_add_mistral3("mistral3_mistral", model_type="mistral")

_TILE = 16  # pixels of a square crop, in patches of 4
_PINPOINTS = [[16, 16], [16, 32], [32, 16], [32, 32]]


def _crops(side: int) -> Callable[..., Prompt]:
    """Images of any resolution: an overview of 16 tokens, then rows over the crops, each with a newline at its end.

    Height and width are for crops of 16 pixels and grow with the side; what pads the crops has no tokens.
    """

    def add(prompt: Prompt, seed: int, height: int = 16, width: int = 32) -> Prompt:
        down, across = (1 if length <= 16 else 2 for length in (height, width))
        rows, columns = 4 * down, 4 * across
        if width * rows > height * columns:
            rows -= (rows - height * columns // width) // 2 * 2
        else:
            columns -= (columns - width * rows // height) // 2 * 2
        prompt.images.append(_noise(seed, 1 + down * across, 3, side, side))
        prompt.sizes.append((height * side // 16, width * side // 16))
        prompt.extend([IMAGE] * (16 + rows * (columns + 1)))
        return prompt

    return add


_any_resolution = _crops(_TILE)
_ANY_SIZES = ({}, {"height": 16, "width": 16}, {"height": 8, "width": 32}, {"height": 32, "width": 8})

SETUPS["llava_next"] = Setup(
    "llava_next",
    _model(
        "LlavaNext",
        vision_config=_tower("clip_vision_model", image_size=_TILE, projection_dim=32),
        text_config=_text("llama"),
        image_token_index=IMAGE,
        image_grid_pinpoints=_PINPOINTS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    ),
    _any_resolution,
    _collate(_filled_images, _image_sizes),
    sizes=_ANY_SIZES,
)


def _frames(prompt: Prompt, seed: int, frames: int = 8) -> Prompt:
    """Frames of 16 tokens pooled to 4, and one newline."""
    prompt.videos.append(_noise(seed, frames, 3, _TILE, _TILE))
    prompt.extend([VIDEO] * (4 * frames + 1))
    return prompt


def _stacked_videos(prompts: list[Prompt]) -> dict[str, Tensor]:
    videos = _all(prompts, "videos")
    return {"pixel_values_videos": torch.stack(videos)} if videos else {}


SETUPS["llava_onevision"] = Setup(
    "llava_onevision",
    _model(
        "LlavaOnevision",
        vision_config=_tower("siglip_vision_model", image_size=_TILE, vision_use_head=False),
        text_config=_text("qwen2"),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=_PINPOINTS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    ),
    _any_resolution,
    _collate(_filled_images, _image_sizes, _stacked_videos),
    add_video=_frames,
    sizes=_ANY_SIZES,
)


# Qwen and GLM: native resolution, three-dimensional rotary positions


def _patches(seed: int, grid: tuple[int, int, int]) -> Tensor:
    return _noise(seed, grid[0] * grid[1] * grid[2], 3 * 2 * 4 * 4)


def _native(prompt: Prompt, seed: int, grid: tuple[int, int, int] = (1, 12, 16)) -> Prompt:
    """An image of grid/4 tokens between its markers."""
    prompt.images.append(_patches(seed, grid))
    prompt.grids.append(grid)
    prompt.extend([VISION_START, *[IMAGE] * (grid[1] * grid[2] // 4), VISION_END])
    return prompt


def _native_video(prompt: Prompt, seed: int, grid: tuple[int, int, int] = (3, 8, 8)) -> Prompt:
    """A video in one piece."""
    prompt.videos.append(_patches(seed, grid))
    prompt.video_grids.append(grid)
    prompt.extend([VISION_START, *[VIDEO] * (grid[0] * grid[1] * grid[2] // 4), VISION_END])
    return prompt


def _timed_video(prompt: Prompt, seed: int, grid: tuple[int, int, int] = (3, 8, 8)) -> Prompt:
    """A video of frames, each after its time written as text."""
    prompt.videos.append(_patches(seed, grid))
    prompt.video_grids.append(grid)
    for frame in range(grid[0]):
        words(prompt, 3, seed + frame)
        prompt.extend([VISION_START, *[VIDEO] * (grid[1] * grid[2] // 4), VISION_END])
    return prompt


def _grids(prompts: list[Prompt]) -> dict[str, Tensor]:
    inputs = {}
    for pixels, images, grids, field in (
        ("pixel_values", "images", "image_grid_thw", "grids"),
        ("pixel_values_videos", "videos", "video_grid_thw", "video_grids"),
    ):
        if _all(prompts, images):
            inputs[pixels] = torch.cat(_all(prompts, images))
            inputs[grids] = torch.tensor(_all(prompts, field))
    return inputs


_GRID_SIZES = ({}, {"grid": (1, 8, 16)}, {"grid": (1, 12, 10)})
_QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
_MROPE = _rope(mrope_section=[2, 3, 3])


def _qwen_tower(**more) -> dict:
    return {"depth": 2, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, **more}


def _add_qwen(
    name: str, prefix: str, text: dict, vision: dict, video: Callable[..., Prompt], tolerance: float = 1e-5
) -> None:
    SETUPS[name] = Setup(
        name,
        _model(prefix, text_config=text, vision_config=vision, **_QWEN_IDS),
        _native,
        _collate(_grids, types="mm_token_type_ids"),
        add_video=video,
        sizes=_GRID_SIZES,
        tolerance=tolerance,
    )


_add_qwen("qwen2_vl", "Qwen2VL", _text(**_MROPE), _qwen_tower(embed_dim=32, hidden_size=64, mlp_ratio=2), _native_video)
_add_qwen(
    "qwen2_5_vl",
    "Qwen2_5_VL",
    _text(**_MROPE),
    _qwen_tower(hidden_size=32, intermediate_size=48, out_hidden_size=64, window_size=16, fullatt_block_indexes=[1]),
    _native_video,
)

_QWEN3_TOWER = _qwen_tower(hidden_size=32, intermediate_size=48, out_hidden_size=64, num_position_embeddings=64)
_DEEP_TOWER = {**_QWEN3_TOWER, "depth": 4, "deepstack_visual_indexes": [0, 1, 2]}
_INTERLEAVED = _rope(mrope_section=[2, 3, 3], mrope_interleaved=True)
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

_add_qwen("qwen3_vl", "Qwen3VL", _text(head_dim=16, **_INTERLEAVED), _DEEP_TOWER, _timed_video)
_add_qwen("qwen3_vl_moe", "Qwen3VLMoe", _text(head_dim=16, **_EXPERTS, **_INTERLEAVED), _DEEP_TOWER, _timed_video)

_LINEAR = {
    "num_hidden_layers": 8,
    "head_dim": 16,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    **_rope(mrope_section=[2, 1, 1], mrope_interleaved=True, partial_rotary_factor=0.5),
}

_add_qwen("qwen3_5", "Qwen3_5", _text(**_LINEAR), _QWEN3_TOWER, _timed_video, 1e-4)
_add_qwen(
    "qwen3_5_moe",
    "Qwen3_5Moe",
    _text(shared_expert_intermediate_size=32, **_EXPERTS, **_LINEAR),
    _QWEN3_TOWER,
    _timed_video,
    1e-4,
)

_GLM_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_start_token_id": VISION_START,
    "image_end_token_id": VISION_END,
    "video_start_token_id": VIDEO_START,
    "video_end_token_id": VIDEO_END,
}
_GLM_TOWER = _qwen_tower(hidden_size=32, intermediate_size=48, out_hidden_size=64, image_size=64)


def _glm_video(prompt: Prompt, seed: int, grid: tuple[int, int, int] = (3, 8, 8)) -> Prompt:
    """A video of frames, each an image between markers and then its time written as text."""
    prompt.videos.append(_patches(seed, grid))
    prompt.video_grids.append(grid)
    prompt.append(VIDEO_START)
    for frame in range(grid[0]):
        prompt.extend([VISION_START, *[IMAGE] * (grid[1] * grid[2] // 4), VISION_END])
        words(prompt, 2, seed + frame)
    prompt.append(VIDEO_END)
    return prompt


def _glm_types(prompts: list[Prompt], side: str = "left") -> dict[str, Tensor]:
    inputs = _collate(_grids, types="mm_token_type_ids")(prompts, side)
    ids, types = inputs["input_ids"], inputs["mm_token_type_ids"]
    in_video = (ids == VIDEO_START).cumsum(1) > (ids == VIDEO_END).cumsum(1)
    inputs["mm_token_type_ids"] = torch.where(in_video, 2 * types, types)
    return inputs


def _add_glm(name: str, prefix: str, **text) -> None:
    SETUPS[name] = Setup(
        name,
        _model(
            prefix,
            text_config=_text(**_rope(mrope_section=[2, 1, 1], partial_rotary_factor=0.5), **text),
            vision_config=_GLM_TOWER,
            **_GLM_IDS,
        ),
        _native,
        _glm_types,
        add_video=_glm_video,
        sizes=_GRID_SIZES,
        notes="The frames of a video are image placeholders; images and videos do not go in one batch.",
    )


_add_glm("glm4v", "Glm4v")
_add_glm(
    "glm4v_moe",
    "Glm4vMoe",
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    first_k_dense_replace=1,
)


# Tiles of one size


def _tiles(begin: int, end: int, default: int) -> Callable[..., Prompt]:
    """Tiles of 16 tokens in one run of placeholders."""

    def add(prompt: Prompt, seed: int, tiles: int = default) -> Prompt:
        prompt.images.append(_noise(seed, tiles, 3, 32, 32))
        prompt.extend([begin, *[IMAGE] * (16 * tiles), end])
        return prompt

    return add


SETUPS["internvl"] = Setup(
    "internvl",
    _model(
        "InternVL",
        vision_config={**_tower(image_size=[32, 32]), "patch_size": [4, 4]},
        text_config=_text("qwen2"),
        image_token_id=IMAGE,
        downsample_ratio=0.5,
    ),
    _tiles(VISION_START, VISION_END, 3),
    _collate(_joined),
    sizes=({}, {"tiles": 1}, {"tiles": 4}),
)


def _split(prompt: Prompt, seed: int, rows: int = 1, columns: int = 2) -> Prompt:
    """A grid of tiles and the whole image, 16 tokens each between markers."""
    prompt.images.extend(_noise(seed, rows * columns + 1, 3, 32, 32))
    for row in range(rows):
        for _ in range(columns):
            prompt.extend([VISION_START, 80 + row, *[IMAGE] * 16])
        prompt.append(ROW_END)
    prompt.extend([VISION_START, 89, *[IMAGE] * 16, VISION_START])
    return prompt


def _per_sample(prompts: list[Prompt]) -> dict[str, Tensor]:
    """The tiles of every sample, filled up with black ones."""
    if not _all(prompts, "images"):
        return {}
    most = max(len(prompt.images) for prompt in prompts)
    pixels = torch.zeros(len(prompts), most, 3, 32, 32)
    mask = torch.zeros(len(prompts), most, 32, 32, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        for tile, image in enumerate(prompt.images):
            pixels[row, tile], mask[row, tile] = image, True
    return {"pixel_values": pixels, "pixel_attention_mask": mask}


def _add_idefics(name: str, prefix: str) -> None:
    SETUPS[name] = Setup(
        name,
        _model(
            prefix,
            text_config=_text("llama"),
            vision_config=_tower(image_size=32),
            image_token_id=IMAGE,
            scale_factor=2,
            pad_token_id=PAD,
        ),
        _split,
        _collate(_per_sample),
        sizes=({}, {"rows": 0, "columns": 0}, {"rows": 2, "columns": 2}),
    )


_add_idefics("idefics3", "Idefics3")
_add_idefics("smolvlm", "SmolVLM")

# Its forward with images reads an output that its text model does not give (transformers 5.24).
BUILD_ONLY["llama4"] = _model(
    "Llama4",
    vision_config=_tower(
        image_size=32,
        intermediate_size=128,
        vision_output_dim=64,
        projector_input_dim=64,
        projector_output_dim=64,
        pixel_shuffle_ratio=0.5,
    ),
    text_config=_text(
        head_dim=16,
        intermediate_size_mlp=96,
        num_local_experts=4,
        interleave_moe_layer_step=2,
        no_rope_layer_interval=3,
        attention_chunk_size=32,
        **_rope(),
    ),
    boi_token_index=VISION_START,
    eoi_token_index=VISION_END,
    image_token_index=IMAGE,
)


# Gemma

_SIGLIP = _tower("siglip_vision_model", image_size=28, vision_use_head=False)
_HYBRID = ["sliding_attention", "sliding_attention", "full_attention"] * (LAYERS // 3)


def _prefix_types(prompts: list[Prompt], side: str = "left") -> dict[str, Tensor]:
    """Every token of the prompt is of the prefix, which is read in both directions."""
    inputs = _collate(_stacked)(prompts, side)
    return {**inputs, "token_type_ids": torch.zeros_like(inputs["input_ids"])}


def _add_paligemma(name: str, notes: str = "", own_choice: bool = False, **text) -> None:
    SETUPS[name] = Setup(
        name,
        _model(
            "PaliGemma",
            own_choice,
            vision_config=_SIGLIP,
            text_config=_text(head_dim=16, **text),
            image_token_index=IMAGE,
            projection_dim=64,
            hidden_size=64,
        ),
        _fixed(49, 28),
        _prefix_types,
        notes=notes,
    )


_add_paligemma("paligemma", model_type="gemma")
_add_paligemma(
    "paligemma2",
    'Gemma 2 has no sdpa (soft-capping): "sdpa" builds the choice of transformers, an eager text model.',
    own_choice=True,
    model_type="gemma2",
    sliding_window=WINDOW,
    query_pre_attn_scalar=16,
    attn_logit_softcapping=1.0,  # so low that it matters
    final_logit_softcapping=30.0,
)

SETUPS["gemma3"] = Setup(
    "gemma3",
    _model(
        "Gemma3",
        text_config=_text(
            "gemma3_text", head_dim=16, sliding_window=WINDOW, layer_types=_HYBRID, query_pre_attn_scalar=16
        ),
        vision_config=_SIGLIP,
        mm_tokens_per_image=49,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
        image_token_index=IMAGE,
    ),
    _fixed(49, 28, (VISION_START,), (VISION_END,)),
    _collate(_stacked, types="token_type_ids"),
)


def _positions(height: int, width: int) -> Tensor:
    down, across = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([across.flatten(), down.flatten()], dim=-1)


def _pooled(prompt: Prompt, seed: int, height: int = 12, width: int = 16) -> Prompt:
    """An image of any size in patches, pooled two by two."""
    prompt.images.append(_noise(seed, height * width, 48).sigmoid())
    prompt.sizes.append((height, width))
    prompt.extend([VISION_START, *[IMAGE] * (height * width // 4), VISION_END])
    return prompt


def _pooled_video(prompt: Prompt, seed: int, frames: int = 3, height: int = 8, width: int = 8) -> Prompt:
    """Frames, each after its time written as text."""
    prompt.videos.append(_noise(seed, frames, height * width, 48).sigmoid())
    prompt.video_grids.append((frames, height, width))
    for frame in range(frames):
        words(prompt, 2, seed + frame)
        prompt.extend([VISION_START, *[VIDEO] * (height * width // 4), VISION_END])
    return prompt


def _placed(prompts: list[Prompt]) -> dict[str, Tensor]:
    inputs = {}
    if images := _all(prompts, "images"):
        inputs["pixel_values"] = _filled(images)
        inputs["image_position_ids"] = _filled([_positions(*size) for size in _all(prompts, "sizes")], value=-1)
    if videos := _all(prompts, "videos"):
        grids = _all(prompts, "video_grids")
        inputs["pixel_values_videos"] = _filled([frame for video in videos for frame in video])
        inputs["video_position_ids"] = _filled([_positions(*g[1:]) for g in grids for _ in range(g[0])], value=-1)
        inputs["num_frames_per_video"] = torch.tensor([grid[0] for grid in grids])
    return inputs


def _add_gemma4(name: str, **text) -> None:
    SETUPS[name] = Setup(
        name,
        _model(
            "Gemma4",
            text_config=_text(
                "gemma4_text",
                head_dim=16,
                global_head_dim=32,
                sliding_window=WINDOW,
                vocab_size_per_layer_input=100,
                final_logit_softcapping=30.0,
                **text,
            ),
            vision_config={
                **_tower(num_key_value_heads=4, head_dim=8),
                "pooling_kernel_size": 2,
                "position_embedding_size": 64,
            },
            boi_token_id=VISION_START,
            eoi_token_id=VISION_END,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            audio_token_id=97,
            boa_token_id=98,
            eoa_token_index=99,
        ),
        _pooled,
        _collate(_placed, types="mm_token_type_ids"),
        add_video=_pooled_video,
        sizes=({}, {"height": 8, "width": 16}, {"height": 12, "width": 10}),
        tolerance=2e-4,
        notes="Attention is sharp (normalised queries and keys, no scaling), which amplifies rounding.",
    )


_GLOBAL_HEADS = {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "use_bidirectional_attention": "vision"}

_add_gemma4(
    "gemma4",
    num_kv_shared_layers=2,
    hidden_size_per_layer_input=8,
    layer_types=["sliding_attention", "full_attention"] * (LAYERS // 2),
)
_add_gemma4("gemma4_dense", hidden_size_per_layer_input=0, layer_types=_HYBRID, **_GLOBAL_HEADS)
_add_gemma4(
    "gemma4_moe",
    hidden_size_per_layer_input=0,
    layer_types=_HYBRID,
    enable_moe_block=True,
    num_experts=4,
    top_k_experts=2,
    moe_intermediate_size=32,
    **_GLOBAL_HEADS,
)


# Further families

SETUPS["vipllava"] = Setup(
    "vipllava",
    _model(
        "VipLlava",
        vision_config=_tower("clip_vision_model", image_size=28, projection_dim=32),
        text_config=_text("llama"),
        image_token_index=IMAGE,
        vision_feature_layer=[-1, -2],
    ),
    _fixed(49, 28),
    _collate(_stacked),
)


def _whole_frames(prompt: Prompt, seed: int, frames: int = 2) -> Prompt:
    """Frames of 25 tokens and one of the class token."""
    prompt.videos.append(_noise(seed, frames, 3, 20, 20))
    prompt.extend([VIDEO] * (26 * frames))
    return prompt


def _renamed_images(prompts: list[Prompt]) -> dict[str, Tensor]:
    images = _all(prompts, "images")
    return {"pixel_values_images": torch.stack(images)} if images else {}


SETUPS["video_llava"] = Setup(
    "video_llava",
    _model(
        "VideoLlava",
        vision_config=_tower("clip_vision_model", image_size=20, projection_dim=32),
        text_config=_text("llama"),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    ),
    _fixed(25, 20),
    _collate(_renamed_images, _stacked_videos),
    add_video=_whole_frames,
)


def _pooled_frames(prompt: Prompt, seed: int, frames: int = 8) -> Prompt:
    """Frames of 16 tokens pooled to 4."""
    prompt.videos.append(_noise(seed, frames, 3, _TILE, _TILE))
    prompt.extend([VIDEO] * (4 * frames))
    return prompt


SETUPS["llava_next_video"] = Setup(
    "llava_next_video",
    _model(
        "LlavaNextVideo",
        vision_config=_tower("clip_vision_model", image_size=_TILE, projection_dim=32),
        text_config=_text("llama"),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=_PINPOINTS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    ),
    _any_resolution,
    _collate(_filled_images, _image_sizes, _stacked_videos),
    add_video=_pooled_frames,
    sizes=_ANY_SIZES,
)

_COHERE2 = _text("cohere2", head_dim=16, sliding_window=WINDOW, layer_types=_HYBRID, logit_scale=1.0)
_SQUARE = _tower("siglip_vision_model", image_size=32, vision_use_head=False)

SETUPS["aya_vision"] = Setup(
    "aya_vision",
    _model(
        "AyaVision",
        vision_config=_SQUARE,
        text_config=_COHERE2,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        alignment_intermediate_size=64,
    ),
    _tiles(VISION_START, VISION_END, 3),
    _collate(_joined),
    sizes=({}, {"tiles": 1}),
)
SETUPS["cohere2_vision"] = Setup(
    "cohere2_vision",
    _model(
        "Cohere2Vision",
        vision_config=_SQUARE,
        text_config=_COHERE2,
        image_token_id=IMAGE,
        alignment_intermediate_size=64,
    ),
    _tiles(VISION_START, VISION_END, 3),
    _collate(_joined),
    sizes=({}, {"tiles": 1}),
)


def _shaped(prompts: list[Prompt]) -> dict[str, Tensor]:
    images = _all(prompts, "images")
    if not images:
        return {}
    return {
        "pixel_values": _filled(images),
        "pixel_attention_mask": _filled([torch.ones(len(image), dtype=torch.long) for image in images]),
        "spatial_shapes": torch.tensor(_all(prompts, "sizes")),
    }


SETUPS["lfm2_vl"] = Setup(
    "lfm2_vl",
    _model(
        "Lfm2Vl",
        vision_config=_tower("siglip2_vision_model", num_patches=64, vision_use_head=False),
        text_config=_text("lfm2", layer_types=["conv", "conv", "full_attention"] * (LAYERS // 3), tie_embedding=False),
        image_token_id=IMAGE,
        projector_hidden_size=64,
        downsample_factor=2,
    ),
    _pooled,
    _collate(_shaped),
    sizes=({}, {"height": 8, "width": 16}, {"height": 12, "width": 10}),
)
SETUPS["deepseek_vl"] = Setup(
    "deepseek_vl",
    _model("DeepseekVL", vision_config=_SIGLIP, text_config=_text("llama"), image_token_id=IMAGE),
    _fixed(49, 28),
    _collate(_stacked),
)

_add_glm("glm46v", "Glm46V", model_type="glm4v_text")
_add_glm("glm_ocr", "GlmOcr", head_dim=16)

SETUPS["lighton_ocr"] = Setup(
    "lighton_ocr",
    _model(
        "LightOnOcr",
        vision_config=_tower("pixtral", head_dim=8, image_size=64),
        text_config=_text("qwen3", head_dim=16),
        image_token_id=IMAGE,
        spatial_merge_size=2,
    ),
    _rows(8),
    _collate(_filled_images, _image_sizes),
    sizes=_ROW_SIZES,
)
SETUPS["qianfan_ocr"] = Setup(
    "qianfan_ocr",
    _model(
        "QianfanOCR",
        vision_config={**_tower(image_size=[32, 32]), "patch_size": [4, 4]},
        text_config=_text("qwen3", head_dim=16),
        image_token_id=IMAGE,
        downsample_ratio=0.5,
    ),
    _tiles(VISION_START, VISION_END, 3),
    _collate(_joined),
    sizes=({}, {"tiles": 1}),
)
SETUPS["exaone4_5"] = Setup(
    "exaone4_5",
    _model(
        "Exaone4_5_",
        text_config=_text("exaone4", sliding_window=WINDOW, layer_types=_HYBRID, **_rope()),
        vision_config=_qwen_tower(
            hidden_size=32,
            intermediate_size=48,
            out_hidden_size=64,
            window_size=16,
            fullatt_block_indexes=[1],
            num_key_value_heads=2,
        ),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    ),
    _native,
    _collate(_grids),
    sizes=_GRID_SIZES,
)


def _flat_patches(prompt: Prompt, seed: int, grid: tuple[int, int, int] = (1, 12, 16)) -> Prompt:
    """As for Qwen, in patches of one image."""
    _native(prompt, seed, grid)
    prompt.images[-1] = _noise(seed, grid[1] * grid[2], 3 * 4 * 4)
    return prompt


def _ernie_types(prompts: list[Prompt], side: str = "left") -> dict[str, Tensor]:
    """A second kind of types sends the markers of an image to the vision experts too."""
    inputs = _collate(_grids, types="mm_token_type_ids")(prompts, side)
    ids = inputs["input_ids"]
    vision = (ids == IMAGE) | (ids == VISION_START) | (ids == VISION_END)
    return {**inputs, "moe_mm_token_type_ids": vision.int()}


SETUPS["ernie4_5_vl_moe"] = Setup(
    "ernie4_5_vl_moe",
    _model(
        "Ernie4_5_VLMoe",
        text_config=_text(
            moe_intermediate_size=[32, 16],
            moe_k=2,
            moe_num_experts=4,
            moe_num_shared_experts=1,
            mlp_layer_types=["dense", *["sparse"] * (LAYERS - 1)],
            **_rope(mrope_section=[3, 3, 2]),
        ),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_merge_size": 2,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=VISION_START,
        image_end_token_id=VISION_END,
        video_start_token_id=VIDEO_START,
        video_end_token_id=VIDEO_END,
    ),
    _flat_patches,
    _ernie_types,
    sizes=_GRID_SIZES,
    notes="generate with use_cache=False fails: moe_mm_token_type_ids do not grow with the new tokens.",
)

SETUPS["granite4_vision"] = Setup(
    "granite4_vision",
    _model(
        "Granite4Vision",
        vision_config={**_SQUARE, "hidden_size": 64},
        text_config=_text("granite4_vision_text", **_rope()),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[2 * height, 2 * width] for height, width in _PINPOINTS],
        vision_feature_select_strategy="full",
        downsample_rate="4/8",
        deepstack_layer_map=[[-1, 0], [-2, 2]],
        spatial_target_layers=[1, 3, 4, 5],
    ),
    _crops(32),
    _collate(_filled_images, _image_sizes),
    sizes=_ANY_SIZES,
)

# Builders without inputs

_QFORMER = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "encoder_hidden_size": 32,
}
_OPT = {
    "model_type": "opt",
    "vocab_size": 100,
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "ffn_dim": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": EOS,
}
for _name, _prefix in (("blip2", "Blip2"), ("instructblip", "InstructBlip")):
    BUILD_ONLY[_name] = _model(
        _prefix,
        vision_config=_tower(image_size=28),
        qformer_config=_QFORMER,
        text_config=_OPT,
        num_query_tokens=32,
        image_token_index=IMAGE,
    )
BUILD_ONLY["mllama"] = _model(
    "Mllama",
    vision_config={
        **_tower(image_size=28),
        "num_global_layers": 1,
        "attention_heads": 4,
        "vision_output_dim": 64,
        "intermediate_layers_indices": [0],
        "max_num_tiles": 2,
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    },
    text_config=_text(cross_attention_layers=[1, 4], **_rope()),
    image_token_index=IMAGE,
)
BUILD_ONLY["idefics2"] = _model(
    "Idefics2",
    vision_config=_tower(image_size=28),
    perceiver_config={
        "hidden_size": 64,
        "resampler_n_latents": 16,
        "resampler_depth": 1,
        "resampler_n_heads": 4,
        "resampler_head_dim": 16,
        "num_key_value_heads": 2,
    },
    text_config=_text("mistral", sliding_window=None),
    image_token_id=IMAGE,
)
BUILD_ONLY["chameleon"] = _model(
    "Chameleon",
    **_text(**_rope()),
    vq_config={
        "embed_dim": 8,
        "num_embeddings": 16,
        "latent_channels": 8,
        "resolution": 32,
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
    },
    vocabulary_map={"<image>": IMAGE, **{f"IMGIMGBS{chr(65 + number)}Z": 80 + number for number in range(8)}},
)
BUILD_ONLY["qwen2_5_omni_thinker"] = _model(
    "Qwen2_5OmniThinker",
    text_config=_text(**_MROPE),
    vision_config=_qwen_tower(
        hidden_size=32, intermediate_size=48, out_hidden_size=64, window_size=16, fullatt_block_indexes=[1]
    ),
    audio_config={
        "d_model": 32,
        "encoder_layers": 1,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "output_dim": 64,
        "num_mel_bins": 8,
    },
    image_token_id=IMAGE,
    video_token_id=VIDEO,
    audio_token_id=97,
)

BUILD_ONLY["gemma4_unified"] = _model(
    "Gemma4Unified",
    text_config=_text(
        "gemma4_unified_text", head_dim=16, global_head_dim=32, sliding_window=WINDOW, layer_types=_HYBRID
    ),
    vision_config={
        "patch_size": 4,
        "pooling_kernel_size": 2,
        "mm_embed_dim": 32,
        "mm_posemb_size": 64,
        "output_proj_dims": 32,
    },
    image_token_id=IMAGE,
    video_token_id=VIDEO,
)
BUILD_ONLY["minicpmv4_6"] = _model(
    "MiniCPMV4_6",
    text_config=_text("qwen3_5_text", **_LINEAR),
    vision_config=_tower(image_size=28),
    image_token_id=IMAGE,
)
BUILD_ONLY["aria"] = _model(
    "Aria",
    text_config=_text("aria_text", moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
    vision_config=_tower("idefics3_vision", image_size=28),
    image_token_index=IMAGE,
)
BUILD_ONLY["kimi_k25"] = _model(
    "Kimi_K25",
    text_config=_text(
        "deepseek_v3",
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
    ),
    vision_config=_tower(pos_emb_height=8, pos_emb_width=8),
    projection_hidden_size=32,
    image_token_id=IMAGE,
    video_token_id=VIDEO,
)
BUILD_ONLY["molmo2"] = _model(
    "Molmo2",
    text_config=_text(head_dim=16, additional_vocab_size=28),
    vision_config=_tower(image_size=[28, 28], num_key_value_heads=4, head_dim=8),
    adapter_config={
        "vision_feature_layer": [-1],
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "intermediate_size": 48,
        "text_hidden_size": 64,
    },
    image_patch_id=IMAGE,
)


def _fuyu(attention: str | None = "sdpa"):
    """Persimmon text, no vision tower."""
    config = transformers.FuyuConfig(
        text_config=_text("persimmon", **_rope()), image_size=28, patch_size=4, image_token_id=IMAGE
    )
    return _make(transformers.FuyuForCausalLM, config, attention)


BUILD_ONLY["fuyu"] = _fuyu

# The self-check

CHECKS = ("backends", "cache", "batch", "two images", "sizes", "video", "image matters")


def _generate(model, inputs: dict, **options) -> tuple[Tensor, Tensor]:
    output = model.generate(
        **inputs,
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=PAD,
        suppress_tokens=list(range(80, 100)),
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return output.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(output.logits, dim=1)


def _close(name: str, one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    difference = (one[1] - other[1]).abs().max().item()
    assert difference < SETUPS[name].tolerance, f"logits differ by {difference:.2g}"
    assert torch.equal(one[0], other[0]), f"tokens differ: {one[0].tolist()} {other[0].tolist()}"


def _together(model, name: str, prompts: list[Prompt]) -> None:
    tokens, logits = _generate(model, batch(name, prompts))
    for row, prompt in enumerate(prompts):
        _close(name, (tokens[[row]], logits[[row]]), _generate(model, batch(name, [prompt])))


def _check(name: str, check: str, model) -> None:
    setup = SETUPS[name]
    one = simple(name)
    if check == "backends":
        inputs = batch(name, [one, simple(name, after=5, seed=1)])
        real = inputs["attention_mask"].bool()
        logits = [model(**inputs).logits[real], setup.build("eager")(**inputs).logits[real]]
        difference = (logits[0] - logits[1]).abs().max().item()
        assert difference < setup.tolerance, f"logits differ by {difference:.2g}"
    elif check == "cache":
        inputs = batch(name, [one])
        _close(name, _generate(model, inputs), _generate(model, inputs, use_cache=False))
    elif check == "batch":
        _together(model, name, [one, simple(name, after=5, seed=1)])
    elif check == "two images":
        _together(model, name, [simple(name, images=2), simple(name, after=5, seed=1)])
    elif check == "sizes":
        _together(model, name, [simple(name, seed=number, **size) for number, size in enumerate(setup.sizes)])
    elif check == "video":
        _together(model, name, [simple(name, video=True, images=2), simple(name, video=True, after=5, seed=1)])
    elif check == "image matters":
        tokens = [_generate(model, batch(name, [simple(name, seed=seed)]))[0][0].tolist() for seed in range(8)]
        assert len({token for row in tokens for token in row}) > 2, f"greedy tokens hardly vary: {tokens}"
        inputs = batch(name, [one])
        before = model(**inputs).logits[:, -1]
        pixels = "pixel_values_images" if name == "video_llava" else "pixel_values"
        inputs[pixels] = -inputs[pixels]
        change = (model(**inputs).logits[:, -1] - before).abs().max().item()
        assert change > 1e-2, f"logits change by {change:.2g} with the image"
        attentions = setup.build("eager")(**inputs, output_attentions=True).attentions
        sharpest = max(layer[..., -1, :].max().item() for layer in attentions if layer is not None)
        assert sharpest > 2 / len(one), f"attention is flat: {sharpest:.2g}"


def _main(names: list[str]) -> None:
    transformers.logging.set_verbosity_error()
    for name in names or SETUPS:
        setup, failures = SETUPS[name], []
        start = time.perf_counter()
        try:
            model = setup.build("sdpa")
        except Exception as error:
            print(f"{name}: cannot build: {type(error).__name__}: {error}", flush=True)
            continue
        took = time.perf_counter() - start
        for check in CHECKS:
            if (check == "video" and setup.add_video is None) or (check == "sizes" and len(setup.sizes) == 1):
                continue
            try:
                with torch.no_grad():
                    _check(name, check, model)
            except Exception as error:
                failures.append(f"{check}: {type(error).__name__}: {str(error)[:300]}")
        tokens = [vision_tokens(name, simple(name, **size)) for size in setup.sizes]
        notes = f" (notes: {setup.notes})" if setup.notes else ""
        print(f"{name}: built in {took:.2f} s, tokens {tokens}: {'; '.join(failures) or 'all pass'}{notes}", flush=True)
    for name in () if names else BUILD_ONLY:
        try:
            BUILD_ONLY[name]("sdpa")
            print(f"{name}: built")
        except Exception as error:
            print(f"{name}: cannot build: {type(error).__name__}: {str(error)[:300]}", flush=True)


if __name__ == "__main__":
    _main(sys.argv[1:])
