"""What a pruner sees: of the layer in which it scores, of the prompt, and of the features before the language model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

from adaptinfer.errors import UnsupportedError
from adaptinfer.functional import attention_rows, gather_tokens
from adaptinfer.schedule import BEFORE

_LARGEST = 2**24  # float32 entries of the attention that is held at once, 64 MiB; always at least one key/value head's

Grids = tuple[tuple[int, int], ...]
"""Grids that a picture's vision tokens fill one after the other, rows x columns."""


class Rotation(Protocol):
    """Rotary embedding R of a layer's tokens, float32: puts it on, and takes it off again."""

    def of(self, tensor: Tensor) -> Tensor:
        """R x of x [B, H, N, D]."""
        ...

    def undo(self, tensor: Tensor) -> Tensor:
        """x of R x."""
        ...


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
            this rank's heads. For methods that need "next" these are the queries and keys that the next layer would
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


class Read(NamedTuple):
    """Something of the vision tower that a method needs, taken while the tower runs.

    Attributes:
        what: ``attention`` that a token receives (from the class token; averaged over all tokens in towers without
            one), the same with all heads ``joined`` into one, or ``keys`` of a block; ``hidden`` states after it; what
            goes into the ``projector``; the sizes of ``groups`` that merged in the tower, at the tokens that stand for
            them, zeros elsewhere.
        layer: the tower's block; from the end if negative. The projector has none.
        of: depth of the tower that ``layer`` counts in, where a method is defined for one; in another tower the block
            at the same share of the depth is meant.
    """

    what: Literal["attention", "joined", "keys", "hidden", "projector", "groups"]
    layer: int = 0
    of: int = 0


class Images(Protocol):
    """What a `FeatureView` asks of the engine about a call's images; ``encoded`` is one encoding, F features."""

    projector: Any

    @property
    def cropped(self) -> bool: ...

    def at(self, positions: Tensor, rows: Tensor | None, values: Callable[[Any], Tensor]) -> Tensor:
        """Values [F, ...] of the features at some placeholders, [R, V, ...]."""
        ...

    def taken(self, read: Read) -> Callable[[Any], Tensor]: ...

    def line_ends(self, encoded: Any) -> Tensor: ...

    def crops(self, encoded: Any) -> Tensor: ...


@dataclass(frozen=True)
class FeatureView:
    """Vision tokens of some rows of a prompt before layer 0, all rows alike: B rows, V vision tokens, T text tokens.

    Attributes:
        features: [B, V, d], the projected features as they stand in the input of layer 0.
        text: [B, T, d], embeddings of the text after the last image.
        keep: how many vision tokens of each row stay, 0 < keep < V.
        pictures: for each picture of a row the grids that its vision tokens fill one after the other, rows x columns:
            one, as a rule; one a frame of a video; two for an any-resolution picture, its overview and its crops put
            together (a column of line ends counts). None where the model does not say.
        rows: int64 [B], which rows of the call's batch these are; None for all.
    """

    features: Tensor
    text: Tensor
    keep: int
    pictures: tuple[Grids, ...] | None
    rows: Tensor | None
    _images: Images
    _places: Tensor
    layer: int = BEFORE

    @property
    def count(self) -> int:
        """V."""
        return self.features.shape[1]

    def attention(self, layer: int, of: int = 0) -> Tensor:
        """Attention that each vision token receives in a block of the tower, head by head, float32 [B, H, V].

        The class token's; the mean over all tokens in towers without one. Line ends receive none.
        """
        return self._taken(Read("attention", layer, of)).transpose(1, 2)

    def joined_attention(self, layer: int) -> Tensor:
        """The same of one head that all heads are joined into, float32 [B, V]: logits are the mean times √H."""
        return self._taken(Read("joined", layer))[..., 0]

    def keys(self, layer: int, of: int = 0) -> Tensor:
        """Keys of a block of the tower, [B, V, K, D]."""
        return self._taken(Read("keys", layer, of))

    def hidden(self, layer: int, of: int = 0) -> Tensor:
        """Hidden states after a block of the tower, [B, V, w]."""
        return self._taken(Read("hidden", layer, of))

    @property
    def cropped(self) -> bool:
        """Whether pictures come as an overview and crops that the model puts together."""
        return self._images.cropped

    def crops(self) -> Tensor:
        """Which crop each vision token comes from, int64 [B, V]; 0 for a picture's overview. Line ends follow a row.

        Raises:
            UnsupportedError: the model does not say.
        """
        return self._images.at(self._places, self.rows, self._images.crops)

    def line_ends(self) -> Tensor:
        """Which tokens mark the end of a line of crops and come from no picture, bool [B, V]."""
        return self._images.at(self._places, self.rows, self._images.line_ends)

    def groups(self) -> Tensor:
        """Sizes of the groups that merged in the tower, at the tokens that stand for them, [B, V, 1]; else zeros."""
        return self._taken(Read("groups"))

    def unprojected(self) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The features in front of the projector, [B, V, w], and the projector: [..., w] -> [..., d].

        Where the model does not project token by token, the projected features and nothing.
        """
        projector = self._images.projector
        if projector is None:
            return self.features.float(), lambda features: features
        return self._taken(Read("projector")), lambda features: projector(features.to(self.features.dtype)).float()

    def _taken(self, read: Read) -> Tensor:
        return self._images.at(self._places, self.rows, self._images.taken(read)).float()

    def need_pictures(self, method: str) -> tuple[Grids, ...]:
        """``pictures``. Raises UnsupportedError, in the name of a method, where they are not known."""
        if self.pictures is None:
            raise UnsupportedError(
                f"{method} needs to know where in its picture a vision token stands, which this prompt does not tell; "
                "take a method that needs features alone, such as divprune"
            )
        return self.pictures
