"""What a pruner sees of the layer in which it scores: queries, keys, hidden states and who is who among the tokens."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from adaptinfer.errors import UnsupportedError
from adaptinfer.functional import attention_rows, gather_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from adaptinfer.engine.rotary import Rotation

__all__ = ["PromptView", "StageView"]

_LARGEST = 2**24  # float32 entries of the attention that is held at once, 64 MiB; always at least one key/value head's


@dataclass(frozen=True)
class PromptView:
    """The call's tokens as they entered the language model, before any was dropped.

    Attributes:
        embeddings: [B, N, d], the input of layer 0.
        text_index: int64 [B, T], the guiding text tokens.
        text_mask: bool [B, T], False where a row of the batch has fewer; None if none has.
        vision_index: int64 [B, V], all vision tokens.
        vision_mask: bool [B, V] likewise.
    """

    embeddings: Tensor
    text_index: Tensor
    text_mask: Tensor | None
    vision_index: Tensor
    vision_mask: Tensor | None


@dataclass(frozen=True)
class StageView:
    """One pruning layer during one prefill. Attention is computed on demand, for a few rows only (never L x L).

    What a method must name in `Pruner.needs` is marked so; it is None for all others, and costs them nothing.

    Attributes:
        layer: the decoder layer, from 0.
        query: [B, H, N, D] after rotary embedding; N tokens entered the layer. Under tensor parallelism H and K are
            this rank's heads. For methods that need "next" these are the queries and keys that the layer behind would
            make of all N tokens.
        key: [B, K, P + N, D] after rotary embedding; P entries were in the layer's cache before.
        visible: what some query rows may see: int64 [B, n] -> [B, 1, n, P + N], bool (True = attend) or additive. The
            layer's own mask, whatever its kind.
        scaling: the layer's factor on the dot products.
        softcap: the layer's bound on the logits (cap · tanh(logit / cap)); None without one.
        text_index: int64 [B, T], the guiding text tokens among the N.
        text_mask: bool [B, T], False where a row of the batch has fewer; None if none has.
        vision_index: int64 [B, V], the vision tokens among the N, each row's own first and in order.
        vision_mask: bool [B, V] likewise.
        vision_counts: how many vision tokens of each sample entered.
        valid: bool [B, N], False for padding and fillers; None if there are none.
        first: whether no stage inside the model came before.
        total: sums a tensor over the ranks of tensor parallelism, [..] -> [..]; does nothing on one rank. A score that
            adds up heads must pass through it, or ranks would choose different tokens.
        all_heads: H over all ranks.
        hidden: [B, N, d], hidden states that entered the layer.
        output: [B, N, d], hidden states that left it; needs "output" or "next".
        prompt: the tokens as they entered the model; needs "embeddings".
        rotation: rotary embedding of the N tokens; needs "rotary".
        final_norm: the model's last normalisation, [.., d] -> [.., d]; needs "norm".
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
    vision_counts: tuple[int, ...]
    valid: Tensor | None
    first: bool
    total: Callable[[Tensor], Tensor]
    all_heads: int
    hidden: Tensor
    output: Tensor | None = None
    prompt: PromptView | None = None
    rotation: Rotation | None = None
    final_norm: Callable[[Tensor], Tensor] | None = None

    @property
    def past(self) -> int:
        """P, cached entries before the layer's new tokens."""
        return self.key.shape[2] - self.query.shape[2]

    # -- attention of some rows -------------------------------------------------------------------------------------

    def by_heads(self, rows: int | None = None) -> list[StageView]:
        """Views of a few heads each, whose attention stays small even if the question is a long document.

        Args:
            rows: how many query rows are wanted; None for those of the text.
        """
        batch, heads, _, _ = self.query.shape
        kv_heads, columns = self.key.shape[1], self.key.shape[2]
        groups = heads // kv_heads
        row_cost = batch * groups * (self.text_index.shape[1] if rows is None else rows) * columns
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

    def in_steps(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Many rows a few at a time: (which of ``rows``, their attention over all keys, float32 [B, H, n, P + N])."""
        batch, heads = self.query.shape[:2]
        step = max(1, _LARGEST // max(1, batch * heads * self.key.shape[2]))
        for start in range(0, rows.shape[1], step):
            some = slice(start, start + step)
            yield some, self.attention(rows[:, some])

    def attention(self, rows: Tensor) -> Tensor:
        """Post-softmax attention of some rows, int64 [B, n], over all keys, float32 [B, H, n, P + N]."""
        query = gather_tokens(self.query, rows, dim=2)
        return attention_rows(query, self.key, self.scaling, self.visible(rows), self.softcap)

    def to_vision(self, attention: Tensor) -> Tensor:
        """Columns of the vision tokens: [B, H, n, P + N] -> [B, H, n, V]."""
        return gather_tokens(attention, self.past + self.vision_index, dim=3)

    @cached_property
    def text_attention(self) -> Tensor:
        """Post-softmax attention of the text rows over all keys, float32 [B, H, T, P + N]."""
        return self.attention(self.text_index)

    @cached_property
    def text_to_text(self) -> Tensor:
        """Attention between the text tokens, float32 [B, H, T, T]."""
        return gather_tokens(self.text_attention, self.past + self.text_index, dim=3)

    @cached_property
    def text_to_vision(self) -> Tensor:
        """Attention of the text rows to the vision tokens, float32 [B, H, T, V]."""
        return self.to_vision(self.text_attention)

    @cached_property
    def last_text(self) -> Tensor:
        """The last guiding text token of each sample, int64 [B, 1]."""
        if self.text_mask is None:
            return self.text_index[:, -1:]
        return self.text_index.gather(1, (self.text_mask.sum(dim=1, keepdim=True) - 1).clamp(min=0))

    @cached_property
    def last_to_vision(self) -> Tensor:
        """Attention of the last text token to the vision tokens, the mean over all heads, float32 [B, V]."""
        return self.total(self.to_vision(self.attention(self.last_text)).sum(dim=1)[:, 0]) / self.all_heads

    def need_all_heads(self, reason: str) -> None:
        """Refuse tensor parallelism for a score that is no sum over heads.

        Args:
            reason: which method, and what it does.

        Raises:
            UnsupportedError: this rank holds some of the heads only.
        """
        if self.query.shape[1] != self.all_heads:
            raise UnsupportedError(
                f"{reason}, but each rank of tensor parallelism holds some of the heads only; run it on one device, or "
                "use a method whose score adds up heads, such as adaptinfer or fastv"
            )

    # -- rotary embedding -------------------------------------------------------------------------------------------

    @cached_property
    def without_rotary(self) -> StageView:
        """This view with queries and keys as they were before rotary embedding; keys of this call's tokens alone."""
        assert self.rotation is not None, 'a method that takes rotary embedding off must need "rotary"'
        query, key = (self.rotation.undo(tensor) for tensor in (self.query, self.key[:, :, self.past :]))
        return self._of_this_call(query, key)

    @cached_property
    def of_ones(self) -> StageView:
        """This view as if all queries and keys were ones before rotary embedding, one head for all: pure position."""
        assert self.rotation is not None, 'a method that looks at rotary embedding must need "rotary"'
        batch, _, tokens, dim = self.query.shape
        ones = self.rotation.of(self.query.new_ones(batch, 1, tokens, dim))
        return self._of_this_call(ones, ones)

    def _of_this_call(self, query: Tensor, key: Tensor) -> StageView:
        past, visible = self.past, self.visible
        return dataclasses.replace(self, query=query, key=key, visible=lambda rows: visible(rows)[..., past:])
