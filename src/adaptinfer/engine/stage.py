"""What a pruner sees of the layer in which it scores: queries, keys and who is who among the tokens."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from adaptinfer.functional import attention_rows, gather_tokens

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["StageView"]

_LARGEST = 2**24  # float32 entries of the attention that is held at once, 64 MiB; always at least one key/value head's


@dataclass(frozen=True)
class StageView:
    """One pruning layer during one prefill. Attention is computed on demand, for the text rows only (T x L).

    Attributes:
        layer: the decoder layer, from 0.
        query: [B, H, N, D] after rotary embedding; N tokens entered the layer. Under tensor parallelism H and K are
            this rank's heads.
        key: [B, K, P + N, D] after rotary embedding; P entries were in the layer's cache before.
        visible: what some query rows may see: int64 [B, n] -> [B, 1, n, P + N], bool (True = attend) or additive. The
            layer's own mask, whatever its kind.
        scaling: the layer's factor on the dot products.
        softcap: the layer's bound on the logits (cap · tanh(logit / cap)); None without one.
        text_index: int64 [B, T], the guiding text tokens among the N.
        text_mask: bool [B, T], False where a row of the batch has fewer; None if none has.
        vision_index: int64 [B, V], the vision tokens among the N.
        vision_mask: bool [B, V] likewise.
        total: sums a tensor over the ranks of tensor parallelism, [..] -> [..]; does nothing on one rank. A score that
            adds up heads must pass through it, or ranks would choose different tokens.
        all_heads: H over all ranks.
    """

    layer: int
    query: Tensor
    key: Tensor
    visible: Callable[[Tensor], Tensor]
    scaling: float
    softcap: float | None
    text_index: Tensor
    text_mask: Tensor | None
    vision_index: Tensor
    vision_mask: Tensor | None
    total: Callable[[Tensor], Tensor]
    all_heads: int

    @property
    def past(self) -> int:
        """P, cached entries before the layer's new tokens."""
        return self.key.shape[2] - self.query.shape[2]

    def by_heads(self) -> list[StageView]:
        """Views of a few heads each, whose text attention stays small even if the question is a long document."""
        batch, heads, _, _ = self.query.shape
        kv_heads, columns = self.key.shape[1], self.key.shape[2]
        groups = heads // kv_heads
        row_cost = batch * groups * self.text_index.shape[1] * columns
        step = max(1, min(kv_heads, _LARGEST // max(1, row_cost)))
        if step == kv_heads:
            return [self]
        return [
            dataclasses.replace(
                self,
                query=self.query[:, start * groups : (start + step) * groups],
                key=self.key[:, start : start + step],
            )
            for start in range(0, kv_heads, step)
        ]

    @cached_property
    def text_attention(self) -> Tensor:
        """Post-softmax attention of the text rows over all keys, float32 [B, H, T, P + N]."""
        rows = gather_tokens(self.query, self.text_index, dim=2)
        return attention_rows(rows, self.key, self.scaling, self.visible(self.text_index), self.softcap)

    @cached_property
    def text_to_text(self) -> Tensor:
        """Attention between the text tokens, float32 [B, H, T, T]."""
        return gather_tokens(self.text_attention, self.past + self.text_index, dim=3)

    @cached_property
    def text_to_vision(self) -> Tensor:
        """Attention of the text rows to the vision tokens, float32 [B, H, T, V]."""
        return gather_tokens(self.text_attention, self.past + self.vision_index, dim=3)
