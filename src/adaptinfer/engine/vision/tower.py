"""What is taken of the vision tower while it encodes: class-token attention, keys and hidden states of single blocks.

Only what a method asked for, and only the rows it needs (the class token's; never tokens x tokens at once). Towers are
looked at from outside, as decoders are: a list of blocks whose attention goes through transformers' interface.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adaptinfer.engine.families import own_attention
from adaptinfer.errors import UnsupportedError
from adaptinfer.functional import attention_rows
from adaptinfer.pruners.views import Read

TOWER_ATTENTION = "adaptinfer_tower"
RECORDING: ContextVar[Encoded | None] = ContextVar("adaptinfer_recording", default=None)
_NAMES = ("vision_tower", "visual", "vision_model", "vision_encoder", "image_tower")
_CLASS_TOKENS = ("class_embedding", "cls_token")
_LARGEST = 2**24  # float32 entries of attention held at once


@dataclass
class Encoded:
    """One call of the model's ``get_image_features`` or ``get_video_features``: F features of some images.

    Attributes:
        kind: ``image`` or ``video``.
        counts: features of each image; F is their sum.
        grids: for each image the grids that its features fill one after the other, rows x columns (a grid per frame, or
            the overview and the crops of an any-resolution image); None where unknown.
        taken: per `Read`, pieces [n, S, ...] for n sequences of S tower tokens.
        crops: for each image how many sequences of the tower it is, where the model packs crops.
        patches: tower tokens of each of them.
        packed: int64 [F] on the CPU, where the model itself says which tower token each feature comes from (-1: none).
        mixed: whether features were interpolated between tower tokens.
        groups: while tokens merge in the tower: see `pruners.tome.merge_step`; and how many groups are left.
        patch_grid: the processor's (frames, rows, columns) of patches of each image, where a model takes them.
    """

    kind: str
    counts: list[int] = field(default_factory=list)
    grids: list[tuple[tuple[int, int], ...] | None] = field(default_factory=list)
    taken: dict[Read, list[Tensor]] = field(default_factory=dict)
    crops: list[int] = field(default_factory=list)
    patches: int = 0
    packed: Tensor | None = None
    mixed: bool = False
    groups: tuple[Tensor, Tensor, int] | None = None
    patch_grid: Any = None

    @property
    def features(self) -> int:
        """F."""
        return sum(self.counts)


def tower_of(base: Any) -> Any:
    """The vision tower of a multimodal model without its head; None if it has none under a known name."""
    return next((getattr(base, name) for name in _NAMES if hasattr(base, name)), None)


class Tower:
    """A model's vision tower, and the taps on those of its blocks that a method reads."""

    def __init__(self, base: Any, model_type: str, reads: Sequence[Read]) -> None:
        """Raises:
        UnsupportedError: the tower has no blocks that can be read, or fewer than a method needs.
        """
        self.module: Any = tower_of(base)
        self._model_type, self._base = model_type, base
        if self.module is None:
            raise UnsupportedError(f"{model_type}: no vision tower was found, which this method reads")
        lists = [module for module in self.module.modules() if isinstance(module, nn.ModuleList)]
        self.blocks: list[Any] = list(max(lists, key=len, default=nn.ModuleList()))
        self.class_tokens = int(any(name.split(".")[-1] in _CLASS_TOKENS for name, _ in self.module.named_parameters()))
        config = self.module.config
        self.heads: int = getattr(config, "num_attention_heads", None) or config.num_heads
        depth = len(self.blocks)
        inside = [read for read in reads if read.what not in ("projector", "groups")]
        self.reads = {read: read.layer * depth // read.of if read.of else read.layer for read in inside}
        for read, block in self.reads.items():
            if not -depth <= block < depth:
                raise UnsupportedError(f"{model_type}: block {block} of the vision tower is to be read, of {depth}")
            self.reads[read] = block % depth

    def attention(self, block: int) -> Any:
        """The attention module of a block.

        Raises:
            UnsupportedError: there is none that uses transformers' attention interface.
        """
        for module in self.blocks[block].modules():
            kind = type(module)
            through = hasattr(module, "config") and hasattr(sys.modules[kind.__module__], "ALL_ATTENTION_FUNCTIONS")
            if through and "attention" in kind.__name__.lower():
                return module
        raise UnsupportedError(
            f"{self._model_type}: the vision tower's attention ({type(self.blocks[block]).__name__}) does not use "
            "transformers' attention interface, where this method reads; take one that needs features alone, such as "
            "divprune"
        )

    def tapped(self) -> Iterator[tuple[Any, Any]]:
        """Attention modules to tap, each with a config that names our attention function."""
        for block in sorted({self.reads[read] for read in self.reads if read.what != "hidden"}):
            module = self.attention(block)
            config = copy.copy(module.config)
            config._attn_implementation_internal = TOWER_ATTENTION
            config.adaptinfer_original = module.config
            config.adaptinfer_tower = self, [read for read in self.reads if self.reads[read] == block]
            yield module, config

    def hidden_reads(self) -> Iterator[tuple[Read, Any]]:
        """Reads of hidden states, with the block after which each is taken."""
        for read, block in self.reads.items():
            if read.what == "hidden":
                yield read, self.blocks[block]

    def take(self, reads: Sequence[Read], query: Tensor, key: Tensor, mask: Any, scaling: float) -> None:
        """Keep what was asked for of one attention call: query [n, H, S, D], key [n, K, S, D]."""
        recording = RECORDING.get()
        if recording is None:
            return
        if query.shape[1] != self.heads:
            raise UnsupportedError(
                f"{self._model_type}: this rank holds {query.shape[1]} of {self.heads} heads of the vision tower, so "
                "ranks would choose different tokens; take a method that needs features alone, such as divprune"
            )
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            for read in reads:
                if read.what == "keys":
                    taken = key.transpose(1, 2)
                elif read.what == "attention":
                    taken = self._received(query, key, scaling, mask).transpose(1, 2)
                elif read.what == "joined":
                    taken = self._received(*_joined(query, key, scaling), mask).transpose(1, 2)
                else:
                    continue
                recording.taken.setdefault(read, []).append(taken)

    def _received(self, query: Tensor, key: Tensor, scaling: float, mask: Any) -> Tensor:
        """Attention that each token receives, float32 [n, H, S]: the class token's, or the mean over all tokens."""
        batch, heads, length, _ = query.shape
        if self.class_tokens:
            return attention_rows(query[:, :, :1], key, scaling, _rows(mask, 0, 1))[:, :, 0]
        step = max(1, _LARGEST // (batch * heads * length))
        total = query.new_zeros(batch, heads, length, dtype=torch.float32)
        for start in range(0, length, step):
            rows = query[:, :, start : start + step]
            total += attention_rows(rows, key, scaling, _rows(mask, start, start + step)).sum(dim=2)
        return total / length

    def per_feature(self, encoded: Encoded, read: Read) -> Tensor:
        """What was taken, for each feature: [F, ...]; the mean over tower tokens where several make one feature.

        Raises:
            UnsupportedError: features cannot be traced back to tower tokens.
        """
        pieces = encoded.taken.get(read)
        if not pieces:
            raise UnsupportedError(
                f"{self._model_type}: {read.what} of the vision tower did not pass by while the images were encoded; "
                "take a method that needs features alone, such as divprune"
            )
        count, length = encoded.features, pieces[0].shape[1]
        even = all(piece.shape[1] == length for piece in pieces)
        sequences = sum(piece.shape[0] for piece in pieces)
        before = 0 if read.what == "projector" else self.class_tokens
        if before and even and sequences * length != count:  # else a class token is a vision token itself
            pieces = [piece[:, before:] for piece in pieces]
        values = torch.cat([piece.flatten(0, 1) for piece in pieces])
        if encoded.packed is not None:
            index = encoded.packed.to(values.device, non_blocking=True)
            found = (index >= 0).view(-1, *[1] * (values.ndim - 1))
            return values[index.clamp(min=0)] * found
        if len(values) == count:
            return values
        groups = self._groups(encoded, len(values))
        if groups is None:
            raise UnsupportedError(
                f"{self._model_type}: its {count} vision tokens cannot be traced back to the {len(values)} tokens of "
                "its vision tower, which this method reads; take one that needs features alone, such as divprune"
            )
        return values[groups.to(values.device, non_blocking=True)].float().mean(dim=1)

    def _groups(self, encoded: Encoded, total: int) -> Tensor | None:
        """The tower tokens of which each feature is made, m x m neighbours: int64 [F, m * m]; None if nobody knows."""
        count = encoded.features
        merge = math.isqrt(total // count) if count else 0
        if encoded.mixed or merge**2 * count != total:
            return None
        if encoded.patch_grid is not None:  # these towers are given their patches in the order of the features
            order = self._window_order(encoded.patch_grid)
            place = torch.arange(count) if order is None else torch.argsort(order.cpu())
            return place[:, None] * merge**2 + torch.arange(merge**2)
        parts, start = [], 0
        if None in encoded.grids:
            return None
        for rows, columns in (grid for grids in encoded.grids for grid in grids or ()):
            width = columns * merge
            corner = torch.arange(rows)[:, None] * merge * width + torch.arange(columns) * merge
            inner = torch.arange(merge)[:, None] * width + torch.arange(merge)
            parts.append(start + corner.flatten()[:, None] + inner.flatten())
            start += rows * columns * merge**2
        return torch.cat(parts)

    def _window_order(self, grid: Tensor) -> Tensor | None:
        """How Qwen2.5-VL's tower orders its groups of patches, by windows; None for towers that leave them in place."""
        if not hasattr(self.module, "window_size"):
            return None
        if hasattr(self.module, "get_window_index"):
            return self.module.get_window_index(grid)[0]
        home: Any = sys.modules[type(self.module).__module__]
        sizes = {name: getattr(self.module, name) for name in ("spatial_merge_size", "window_size", "patch_size")}
        return home.get_vision_window_index(grid, **sizes)[0]


def _joined(query: Tensor, key: Tensor, scaling: float) -> tuple[Tensor, Tensor, float]:
    """Queries and keys of all heads end to end as those of one head, [n, 1, S, H * D], and its scaling."""
    heads = query.shape[1]
    key = key.repeat_interleave(heads // key.shape[1], dim=1)
    query, key = (tensor.transpose(1, 2).flatten(2)[:, None] for tensor in (query, key))
    return query, key, scaling * heads**-0.5


def _rows(mask: Any, start: int, end: int) -> Tensor | None:
    """Some rows of a tower's mask, of whatever kind (FlashAttention's says which tokens are no padding)."""
    if not isinstance(mask, torch.Tensor):
        return None
    if mask.ndim == 2:
        return mask[:, None, None].bool()
    return mask[:, :, start:end] if mask.shape[2] > 1 else mask


def attention_in_tower(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The tower's own attention, of which some is kept."""
    tower, reads = module.config.adaptinfer_tower
    if not torch.compiler.is_compiling():
        tower.take(reads, query, key, attention_mask, kwargs.get("scaling") or query.shape[3] ** -0.5)
    attend, caller, _ = own_attention(module)
    return attend(caller, query, key, value, attention_mask, **kwargs)
