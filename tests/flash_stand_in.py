"""A FlashAttention 2 for the CPU, so that transformers' own flash path runs: masks, unpadding, packed sequences.

Only the two kernels are ours, in plain PyTorch and with the rules of flash_attn 2.1 and later: causal masks are aligned
to the bottom right, a window counts the keys that are there. The choice between them stays transformers'.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import modeling_flash_attention_utils as utils

__all__ = ["Call", "flash_stand_in", "with_flash"]


@dataclass(frozen=True)
class Call:
    """One call of a kernel.

    Attributes:
        path: "dense"; "unpadded", sequences cut out by a mask; "packed", sequences guessed from position ids.
        queries: how many each sequence has.
        keys: the same.
        window: keys back, itself not counted; None without a window.
    """

    path: str
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    window: int | None


def with_flash(model):
    """A loaded model whose text layers ask for FlashAttention 2; its vision tower stays as it was."""
    for config in (model.config, model.config.get_text_config()):
        config._attn_implementation_internal = "flash_attention_2"
    return model


@contextmanager
def flash_stand_in() -> Iterator[list[Call]]:
    """transformers finds the stand-in where it looks for flash_attn; yields the log of its calls."""
    calls: list[Call] = []
    packed = False

    def dense(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):
        calls.append(Call("dense", (q.shape[1],) * len(q), (k.shape[1],) * len(k), _window(window_size)))
        return _attend(q, k, v, softmax_scale, causal, window_size, softcap)

    def varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
    ):
        nonlocal packed
        queries, keys = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        assert sum(queries) == len(q) and sum(keys) == len(k), "sequences and tokens do not add up"
        assert max_seqlen_q >= max(queries) and max_seqlen_k >= max(keys)
        calls.append(Call("packed" if packed else "unpadded", tuple(queries), tuple(keys), _window(window_size)))
        packed = False
        parts = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
        options = (softmax_scale, causal, window_size, softcap)
        return torch.cat([_attend(*(part[None] for part in three), *options)[0] for three in parts])

    def prepare_packed(*args, **kwargs):
        nonlocal packed
        packed = True
        return prepare(*args, **kwargs)

    def imports(*args, **kwargs):
        kernels = [dense, varlen]
        if hasattr(utils, "_flash_with_kvcache_fn"):  # newer transformers also ask for paged attention
            kernels.append(None)
        return (*kernels, utils._pad_input, utils._unpad_input)

    names = ("_lazy_imports", "_prepare_from_posids", "_loaded_implementation")
    before = {name: getattr(utils, name) for name in names if hasattr(utils, name)}
    prepare = before["_prepare_from_posids"]
    utils._lazy_imports, utils._prepare_from_posids = imports, prepare_packed
    utils._loaded_implementation = None
    try:
        yield calls
    finally:
        for name, value in before.items():
            setattr(utils, name, value)
        utils._loaded_implementation = None


def _window(window_size: tuple[int, int]) -> int | None:
    return None if window_size[0] < 0 else window_size[0]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
) -> Tensor:
    """Attention of [B, n, H, D] to [B, m, K, D]."""
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (scale or q.shape[3] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = (torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]) - torch.arange(k.shape[1])
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if causal:
        hidden |= distance < 0
    if window[0] >= 0:
        hidden |= distance > window[0]
    if window[1] >= 0:
        hidden |= -distance > window[1]
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1).nan_to_num(0.0)  # a row may see nothing
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)
