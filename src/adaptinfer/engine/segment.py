"""The tokens of one call: what is known of them before the first layer, and which of them go on after each stage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adaptinfer.engine.layout import PromptLayout


@dataclass(frozen=True, kw_only=True)
class CallPlan:
    """What is known of a call before its first layer.

    Attributes:
        past: logical tokens cached before the call; None for one new token on a static cache, which nobody needs.
        length: N, new tokens.
        tail: from this of them on all are text, which stays whole and may be forgotten again (guesses of assisted
            decoding).
        layout: of the new tokens; None where nothing is pruned.
        stages: from the layer of each stage to the vision tokens that each sample keeps after it.
        flash: whether FlashAttention reads the masks.
    """

    past: int | None
    length: int
    tail: int
    layout: PromptLayout | None
    stages: dict[int, tuple[int, ...]]
    flash: bool


@dataclass(frozen=True)
class Segment:
    """The tokens that the layers after one stage see, [B, n].

    Attributes:
        layer: the stage's layer; this segment is given to the layers after it.
        index: int64, positions among the call's N tokens, ascending but for fillers, which stand first.
        relative: int64, positions among the tokens of the segment before.
        valid: bool or None; False marks a filler: a token that was dropped (or padding) and only completes the
            rectangle of a batch whose samples keep different numbers. It is never attended.
        vision: bool, the surviving vision tokens.
        text: bool, the guiding text tokens.
    """

    layer: int
    index: Tensor
    relative: Tensor
    valid: Tensor | None
    vision: Tensor
    text: Tensor

    def to(self, device: torch.device) -> Segment:
        """The same on the device of a later layer, should accelerate have put that elsewhere."""
        if self.index.device == device:
            return self
        parts = (self.index, self.relative, self.valid, self.vision, self.text)
        return Segment(self.layer, *(part if part is None else part.to(device) for part in parts))  # pyright: ignore


@dataclass(frozen=True)
class GivenRows:
    """Which of a call's N tokens a layer is given: n in each row of the batch.

    Some models go on with the last tokens alone where no later layer needs the others' keys (Gemma 4). They then cut
    masks and positions to those tokens, too, and a row of these inputs no longer has the number of its token.

    Attributes:
        length: N.
        given: n.
        index: int64 [B, n], their positions among the N tokens; None if nothing was dropped: the last n of all.
        rows: int64 [B, n], their rows in the inputs that the model made for the whole call; None likewise.
        cut: how many tokens at the front the model left out by itself.
    """

    length: int
    given: int
    index: Tensor | None
    rows: Tensor | None
    cut: int

    @classmethod
    def of(cls, segment: Segment | None, length: int, given: int) -> GivenRows:
        """The rows of a layer that is given ``given`` tokens of a segment, or of all ``length`` tokens."""
        if segment is None:
            return cls(length, given, None, None, length - given)
        cut = segment.index.shape[1] - given
        index = segment.index[:, cut:]
        return cls(length, given, index, index - (length - given) if cut else index, cut)

    def positions(self, past: int, device: torch.device) -> Tensor:
        """Logical positions of the given tokens, int64 [B or 1, n].

        Args:
            past: tokens cached before the call.
            device: of the result if nothing was dropped.
        """
        if self.index is not None:
            return past + self.index
        return torch.arange(past + self.length - self.given, past + self.length, device=device)[None]
