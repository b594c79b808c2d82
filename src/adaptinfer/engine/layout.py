"""Where the vision and the guiding text tokens stand in a prompt, read from its token ids."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adaptinfer.functional import marked_first


@dataclass(frozen=True)
class PromptLayout:
    """The new tokens of one forward call, [B, N]; counts are known on the host, so that all shapes are.

    Attributes:
        vision: bool [B, N], the vision tokens that may be pruned: neither masked nor without text after them.
        text: bool [B, N], the tokens after the last vision token of each row (they guide); never padding, and none in
            a row without vision tokens.
        real: bool [B, N] or None; False is padding, None means that there is none.
        vision_counts: of these, how many each row has.
        unguided_counts: vision tokens of rows without text after them; nothing guides, so all of them stay.
        text_counts: guiding tokens of each row.
        real_counts: tokens of each row without padding.
        tail: from this position on all tokens of all rows are real text; N if there is no such position.
        right_padded: whether a row ends with padding.
        bounds: whether ``text_counts`` and, with padding, ``real_counts`` are no counts but the most that there can be,
            so that one shape fits many prompts; masks then tell which tokens are there.
    """

    vision: Tensor
    text: Tensor
    real: Tensor | None
    vision_counts: tuple[int, ...]
    unguided_counts: tuple[int, ...]
    text_counts: tuple[int, ...]
    real_counts: tuple[int, ...]
    tail: int
    right_padded: bool
    bounds: bool = False

    @property
    def length(self) -> int:
        """N, padding included."""
        return self.vision.shape[1]

    def text_rectangle(self, text: Tensor) -> tuple[Tensor, Tensor | None]:
        """`rectangle` of the guiding tokens, given as bool [B, n] among those that a layer was given."""
        index, mask = rectangle(text, self.text_counts)
        return index, text.gather(1, index) if self.bounds else mask

    def all_real(self, totals: list[int]) -> bool:
        """Whether rows with so many tokens each fill a rectangle, without a token that is none of a sample's."""
        return min(totals) == max(totals) and not (self.bounds and self.real is not None)


def read_layout(
    input_ids: Tensor, attention_mask: Tensor | None, placeholders: tuple[int, ...], prompt: int | None = None
) -> PromptLayout:
    """Find vision and guiding text tokens by the placeholder ids; several images and text between them are fine.

    This is the one place of a pruned forward that reads a tensor on the host: seven integers a row, before the first
    decoder layer. Everything after it has static shapes.

    Args:
        input_ids: int64 [B, N], the new tokens of this call.
        attention_mask: [B, N], 0 is padding; None means no padding.
        placeholders: token ids that stand for vision tokens.
        prompt: tokens that belong to the prompt; later ones are guesses of assisted decoding and never guide.
    """
    vision = input_ids == placeholders[0]
    for token in placeholders[1:]:
        vision = vision | (input_ids == token)
    length = input_ids.shape[1]
    positions = torch.arange(length, device=input_ids.device)
    real = None
    if attention_mask is not None:
        real = attention_mask.to(device=input_ids.device, dtype=torch.bool)
        vision = vision & real  # a masked image is padding: nothing attends to it
    if prompt is not None:
        vision = vision & (positions < prompt)  # a guessed placeholder is a word like any other
    last = torch.where(vision, positions, -1).amax(dim=1, keepdim=True)
    text = (positions > last) & (last >= 0)
    if real is not None:
        text = text & real
    if prompt is not None:
        text = text & (positions < prompt)
    guided = text.any(dim=1, keepdim=True)
    found, vision = vision, vision & guided
    text_from = last.max() + 1
    if real is None:
        real_count, closed = torch.full_like(last[:, 0], length), torch.ones_like(last[:, 0])
        whole = torch.ones_like(text_from)
    else:
        real_count, closed = real.sum(dim=1), real[:, -1]
        whole = (real | (positions < text_from)).all()
    per_row = [vision.sum(dim=1), (found & ~guided).sum(dim=1), text.sum(dim=1), real_count, closed.long()]
    once = torch.stack([text_from, whole.long()])[:, None].expand(-1, input_ids.shape[0])
    *counts, ends, text_from_all, whole_all = torch.cat([torch.stack(per_row), once]).tolist()
    tail = text_from_all[0] if whole_all[0] else length
    return PromptLayout(vision, text, real, *map(tuple, counts), tail=tail, right_padded=not all(ends))


def rectangle(mask: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """Positions of the marked tokens, [B, max(counts)], real ones first, and which of them are real (None: all).

    Fillers come last, so that a token's place among its own sample's tokens does not depend on the batch.
    """
    index = marked_first(mask, max(counts))
    return index, None if min(counts) == max(counts) else mask.gather(1, index)
