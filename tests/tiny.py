"""Tiny random models of the real transformers classes, and prompts made by hand. No processor, no downloads."""

from __future__ import annotations

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
)

IMAGE, VIDEO, VISION_START, VISION_END, PAD, EOS = 90, 91, 92, 93, 0, 2
LLAVA_TOKENS = 49  # 28 pixels in patches of 4
LAYERS = 6

_TEXT = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": EOS,
}


def llava(attention: str = "sdpa", text: str = "llama", seed: int = 0):
    """LLaVA-1.5 with grouped-query heads."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=28,
        patch_size=4,
        projection_dim=32,
    )
    text_config = {
        "llama": lambda: LlamaConfig(**_TEXT),
        "mistral": lambda: MistralConfig(**_TEXT, sliding_window=None),
        "qwen2": lambda: Qwen2Config(**_TEXT),
    }[text]()
    config = LlavaConfig(
        vision_config=vision,
        text_config=text_config,
        image_token_id=IMAGE,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    return _ready(LlavaForConditionalGeneration._from_config(config, attn_implementation=attention))


def qwen2_5_vl(attention: str = "sdpa", seed: int = 0):
    """Qwen2.5-VL with multimodal rotary embedding."""
    torch.manual_seed(seed)
    config = Qwen2_5_VLConfig(
        text_config={
            **_TEXT,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 64,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    return _ready(Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation=attention))


FAMILIES = {"llava": llava, "qwen2_5_vl": qwen2_5_vl}


def _ready(model):
    # transformers initialises with a deviation of 0.02, which leaves attention flat and greedy tokens constant.
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.data.mul_(4.0)
    return model.eval()


class Prompt(list):
    """Token ids and images of one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[torch.Tensor] = []
        self.grids: list[tuple[int, int, int]] = []


def words(prompt: Prompt, count: int, seed: int) -> Prompt:
    """Append random text tokens."""
    generator = torch.Generator().manual_seed(seed)
    prompt.extend(torch.randint(3, 80, (count,), generator=generator).tolist())
    return prompt


def llava_image(prompt: Prompt, seed: int) -> Prompt:
    """Append an image of 49 vision tokens."""
    prompt.images.append(torch.randn(3, 28, 28, generator=torch.Generator().manual_seed(seed)))
    prompt.extend([IMAGE] * LLAVA_TOKENS)
    return prompt


def qwen_image(prompt: Prompt, seed: int, grid: tuple[int, int, int] = (1, 12, 16)) -> Prompt:
    """Append an image of grid/4 vision tokens between its markers."""
    patches = grid[0] * grid[1] * grid[2]
    prompt.images.append(torch.randn(patches, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(seed)))
    prompt.grids.append(grid)
    prompt.extend([VISION_START] + [IMAGE] * (patches // 4) + [VISION_END])
    return prompt


def simple(family: str, before: int = 5, after: int = 9, seed: int = 0, images: int = 1, between: int = 4, **image):
    """A prompt: text, image(s) with text between them, question."""
    prompt = words(Prompt(), before, seed)
    add = llava_image if family == "llava" else qwen_image
    for number in range(images):
        if number:
            words(prompt, between, seed + 50 + number)
        add(prompt, seed + 100 + number, **image)
    return words(prompt, after, seed + 1000)


def batch(family: str, prompts: list[Prompt], side: str = "left") -> dict[str, torch.Tensor]:
    """Model inputs of several prompts, padded to one length."""
    longest = max(map(len, prompts))
    padded, masks = [], []
    for prompt in prompts:
        fill = [PAD] * (longest - len(prompt))
        ones, zeros = [1] * len(prompt), [0] * len(fill)
        padded.append(fill + list(prompt) if side == "left" else list(prompt) + fill)
        masks.append(zeros + ones if side == "left" else ones + zeros)
    inputs = {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(masks)}
    images = [image for prompt in prompts for image in prompt.images]
    if family == "llava":
        if images:
            inputs["pixel_values"] = torch.stack(images)
        return inputs
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    if images:
        inputs["pixel_values"] = torch.cat(images)
        inputs["image_grid_thw"] = torch.tensor([grid for prompt in prompts for grid in prompt.grids])
    return inputs
