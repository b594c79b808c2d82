"""Masks of pruned layers, cut out of the mask that the model made for the whole prompt; one function per kind of mask.

transformers hands a layer one of these, by attention backend:

- None: plainly causal, nothing masked;
- [B or 1, 1, N, L], bool (True = attend) or additive: SDPA and eager;
- bool [B, L]: which keys are no padding; FlashAttention, and [B, N] for layers of linear attention;
- a BlockMask: flex attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from adaptinfer.engine.cache.history import Keys
from adaptinfer.functional import gather_tokens


def real_tokens(mask: Any, past: int, length: int) -> Tensor | None:
    """Which new tokens are no padding, from a mask in whatever form `generate` has prepared it.

    A token that is padding does not even see itself, so the diagonal tells, whatever else a mask forbids.

    Args:
        mask: [B, past + length] or [B, length]; [B, 1, length, L] or a BlockMask; a dict of these by kind of layer.
        past: tokens cached before.
        length: N.

    Returns:
        bool [B, N], or None if there is no padding.
    """
    if isinstance(mask, dict):
        kinds = [kind for kind in mask if kind in ("full_attention", "linear_attention")] or list(mask)
        mask = mask[kinds[0]]
    if mask is None:
        return None
    new = torch.arange(length)
    if isinstance(mask, BlockMask):
        device = mask.kv_num_blocks.device
        batch, new = torch.arange(mask.shape[0], device=device)[:, None], new.to(device)[None]
        return mask.mask_mod(batch, torch.zeros_like(batch), new, new + past).expand(batch.shape[0], length)
    if mask.ndim == 2:
        return mask[:, -length:].bool()
    new = new.to(mask.device)
    diagonal = mask[:, 0, new, new + past if mask.shape[-1] >= past + length else new + mask.shape[-1] - length]
    return diagonal if diagonal.dtype == torch.bool else diagonal == 0


def layer_mask(
    mask: Any,
    rows: Tensor | None,
    keys: Keys,
    offset: int,
    positions: Tensor | None,
    flash: bool,
    newest: bool = True,
) -> Any:
    """The mask of a layer that is given some of the tokens.

    Args:
        mask: the model's own, for all N new tokens and the logical columns from ``offset`` on.
        rows: int64 [B, n], the new tokens that the layer is given, as rows of ``mask``; None for all.
        keys: the columns that its attention meets, L of them.
        offset: logical position of the first column of ``mask``.
        positions: int64 [B or 1, n], logical positions of the given tokens; needed without a mask.
        flash: whether FlashAttention reads it, which is causal by itself.
        newest: whether the given tokens are the last of the columns, as in every layer with keys of its own.

    Returns:
        A mask of the same kind; None stays None unless it does not say enough.
    """
    columns, valid = keys.columns, keys.valid
    if isinstance(mask, BlockMask):
        return _block_mask(mask, rows, keys, offset)
    if mask is None:
        assert positions is not None
        positions = positions.to(columns.device)  # accelerate may move the layer's inputs later than this
        if flash and keys.room:
            seen = columns <= positions[:, -1:]
            return seen if valid is None else seen & valid
        if flash or (valid is None and newest):
            return valid  # survivors are in their old order, so what was plainly causal stays so
        seen = (columns[:, None, :] <= positions[..., None])[:, None]
        return seen if valid is None else seen & valid[:, None, None, :]
    reach = mask.shape[-1]
    columns = columns.to(mask.device)
    at = columns - offset if offset else columns
    if offset or valid is not None or keys.room:  # some columns lie outside
        outside = (at < 0) | (at >= reach)
        if valid is not None:
            outside = outside | ~valid.to(mask.device)
        at = at.clamp(0, reach - 1)
    else:
        outside = None
    if mask.ndim == 2:
        picked = mask.expand(at.shape[0], -1).gather(1, at)
        return picked if outside is None else picked & ~outside if picked.dtype == torch.bool else picked * ~outside
    if rows is not None:
        mask = gather_tokens(mask, rows, dim=2)
    mask = gather_tokens(mask, at, dim=3)
    if outside is None:
        return mask
    outside = outside[:, None, None, :]
    return mask & ~outside if mask.dtype == torch.bool else mask.masked_fill(outside, torch.finfo(mask.dtype).min)


def recurrent_mask(mask: Tensor | None, rows: Tensor, valid: Tensor | None) -> Tensor | None:
    """The padding mask [B, n] of a layer of linear attention, which has no columns."""
    if mask is None:
        return valid
    mask = mask.gather(1, rows.to(mask.device))
    return mask if valid is None else mask * valid.to(mask.device)


def additive_mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask (True = attend) as one that is added to logits."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def visible_keys(mask: Any, rows: Tensor, past: int, length: int, window: int | None = None) -> Tensor:
    """What some query rows of a layer may see, spelled out.

    Args:
        mask: the layer's own mask, of any kind.
        rows: int64 [B, n], the wanted rows among the layer's queries.
        past: key columns before those of the queries.
        length: key columns in use.
        window: how many keys back a row may look, itself included; for FlashAttention, whose kernel counts the keys
            that are there.

    Returns:
        [B, 1, n, length]; bool (True = attend), or as ``mask`` if that is additive.
    """
    columns = torch.arange(length, device=rows.device)
    if isinstance(mask, BlockMask):
        batch, heads = (
            torch.arange(rows.shape[0], device=rows.device)[:, None, None],
            torch.zeros_like(rows[:1, :1, None]),
        )
        return mask.mask_mod(batch, heads, rows[:, :, None], columns[None, None, :]).expand(
            rows.shape[0], rows.shape[1], length
        )[:, None]
    if mask is not None and mask.ndim == 4:
        return gather_tokens(mask, rows, dim=2)[..., :length]
    seen = columns <= rows[..., None] + past
    if window is not None:
        seen = seen & (columns > rows[..., None] + past - window)
    if mask is not None:
        seen = seen & mask[:, None, :length].to(seen.device, torch.bool)
    return seen[:, None]


def _block_mask(mask: BlockMask, rows: Tensor | None, keys: Keys, offset: int) -> BlockMask:
    columns, valid = keys.columns - offset, keys.valid
    queries, reach = mask.seq_lengths
    inner = mask.mask_mod

    def pruned(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        column = columns[b, k]
        allowed = inner(b, h, q if rows is None else rows[b, q], column.clamp(0, reach - 1))
        allowed = allowed & (column >= 0) & (column < reach)
        return allowed if valid is None else allowed & valid[b, k]

    device = columns.device
    length = queries if rows is None else rows.shape[1]
    return create_block_mask(
        pruned, B=columns.shape[0], H=None, Q_LEN=length, KV_LEN=columns.shape[1], device=str(device)
    )
