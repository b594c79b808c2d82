"""A stand-in for the embedded model where no right answer is needed: its tokenizer, its processor, as many vision
tokens and layers, but narrow and with random weights."""

from __future__ import annotations

import functools
import shutil
import tempfile

import torch
from transformers import AutoConfig, LlavaForConditionalGeneration

from adaptinfer import embedded


@functools.cache
def folder() -> str:
    """The checkpoint folder, made once a process and the same in each; removed with the process."""
    made = _TEMPORARY.name
    config = AutoConfig.from_pretrained(embedded.path())
    for part, changes in (
        (config.vision_config, {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}),
        (config.text_config, {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}),
    ):
        part.update(changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)  # or attention is flat, and pruning changes no answer
    model.save_pretrained(made)
    for file in embedded.path().iterdir():
        if file.suffix in (".json", ".jinja") and not file.name.startswith(("config", "model")):
            shutil.copy(file, made)
    return made


_TEMPORARY = tempfile.TemporaryDirectory(prefix="adaptinfer-stand-in-")  # goes when the process ends
