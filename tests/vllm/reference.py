"""Greedy tokens by our engine on transformers, one request after the other. Imported by a process without vLLM."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import vision  # noqa: F401 - before anybody looks for torchvision

# isort: split
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import adaptinfer


@functools.cache
def _loaded(model: str, backend: str | None = None) -> tuple[Any, Any]:
    torch.set_num_threads(1)
    return (
        AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval(),
        AutoProcessor.from_pretrained(model, **({"backend": backend} if backend else {})),
    )


def reference_tokens(
    model: str, pruner: adaptinfer.Pruner | None, requests: list[tuple], backend: str | None = None
) -> list[list[int]]:
    """Answers to (text, pictures, new tokens); None as the pruner runs the model as it is."""
    loaded, processor = _loaded(model, backend)
    if hasattr(loaded.base_model, "rope_deltas"):
        loaded.base_model.rope_deltas = None
    answers = []
    with adaptinfer.attach(loaded, pruner) if pruner is not None else contextlib.nullcontext():
        for text, images, new in requests:
            given = processor(text=text, images=images or None, return_tensors="pt")
            out = loaded.generate(
                **given, max_new_tokens=new, min_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            answers.append(out[0, given["input_ids"].shape[1] :].tolist())
    return answers


def chat_answers(model: str, pruner: adaptinfer.Pruner, questions: list[tuple], new: int) -> list[str]:
    """Answers in words to (text, pictures), each a user's message with that many new tokens.

    The server does not see torchvision (`vision.py`), so it resizes pictures with Pillow, and so does this: the two
    round pixels differently, which moves logits by 1e-3. On the same pixels vLLM's CPU kernels and ours agree in
    float32 to 1e-5, so that greedy tokens are compared exactly.
    """
    _, processor = _loaded(model, "pil")
    requests = []
    for text, images in questions:
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        requests.append((prompt, images, new))
    answers = reference_tokens(model, pruner, requests, "pil")
    return [processor.decode(tokens, skip_special_tokens=True) for tokens in answers]
