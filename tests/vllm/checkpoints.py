"""Checkpoint folders of tiny random models with the tokenizer and the processor that a server needs.

Head dimension 32 is the least that vLLM's CPU attention takes. Weights are four times as large as transformers makes
them, or attention is flat and all answers are alike.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import vision  # noqa: F401 - before anybody looks for torchvision

# isort: split
import torch
import transformers
from transformers import CLIPVisionConfig, LlamaConfig

from adaptinfer import embedded

LAYERS = 6
_TEXT = {
    "vocab_size": len(json.loads((embedded.path() / "tokenizer.json").read_text())["model"]["vocab"]),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 4,
    "projection_dim": 32,
}
_IMAGES = {
    "do_resize": True,
    "do_center_crop": False,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.25, 0.25, 0.25],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "crop_size": {"height": 28, "width": 28},
}


def llava(folder: Path) -> Path:
    """LLaVA-1.5: 49 vision tokens a picture."""
    config = transformers.LlavaConfig(
        vision_config=CLIPVisionConfig(**_VISION),
        text_config=LlamaConfig(**_TEXT),
        image_token_index=4,
        image_seq_length=49,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    size = {"height": 28, "width": 28}
    images = {**_IMAGES, "image_processor_type": "CLIPImageProcessor", "size": size}
    return _save(transformers.LlavaForConditionalGeneration, config, folder, _processor("Llava", images))


def llava_next(folder: Path) -> Path:
    """LLaVA-NeXT: crops by the picture's shape, so that pictures differ in vision tokens."""
    grid = [[28, 56], [56, 28], [56, 56], [28, 84], [84, 28]]
    config = transformers.LlavaNextConfig(
        vision_config=CLIPVisionConfig(**_VISION),
        text_config=LlamaConfig(**_TEXT),
        image_token_index=4,
        image_grid_pinpoints=grid,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    images = {
        **_IMAGES,
        "image_processor_type": "LlavaNextImageProcessor",
        "size": {"shortest_edge": 28},
        "image_grid_pinpoints": grid,
        "do_pad": True,
    }
    return _save(transformers.LlavaNextForConditionalGeneration, config, folder, _processor("LlavaNext", images))


def qwen2_5_vl(folder: Path) -> Path:
    """Qwen2.5-VL: multimodal rotary embedding, pictures of any size; its processor needs torchvision."""
    tokenizer = json.loads((embedded.path() / "tokenizer.json").read_text())
    first = len(tokenizer["model"]["vocab"])
    names = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    start, end, image, video = range(first, first + 4)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"] += [
        {"id": number, "content": name, "special": True, **flags} for number, name in enumerate(names, first)
    ]
    rotary = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**_TEXT, "vocab_size": first + 4, "hidden_size": 128, "rope_parameters": rotary},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 128,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        vision_start_token_id=start,
        vision_end_token_id=end,
        image_token_id=image,
        video_token_id=video,
    )
    patches = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
    sizes = {**_IMAGES, **patches, "size": {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}}
    del sizes["crop_size"], sizes["do_center_crop"]
    processor = {
        "image_processor": {**sizes, "image_processor_type": "Qwen2VLImageProcessor"},
        "video_processor": {**sizes, "video_processor_type": "Qwen2VLVideoProcessor"},
        "processor_class": "Qwen2_5_VLProcessor",
    }
    _save(transformers.Qwen2_5_VLForConditionalGeneration, config, folder, processor)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def _processor(name: str, images: dict) -> dict:
    return {
        "image_processor": images,
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": 4,
        "processor_class": f"{name}Processor",
        "vision_feature_select_strategy": "default",
    }


def _save(cls, config, folder: Path, processor: dict) -> Path:
    torch.manual_seed(0)
    model = cls._from_config(config)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.data.mul_(4.0)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(embedded.path() / name, folder / name)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"processor_class": processor["processor_class"], "model_max_length": 4096}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder
