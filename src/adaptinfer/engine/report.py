"""What the last prefill did: tokens per layer, kept positions and scores per stage, FLOPs, KV bytes.

Tensors stay on the device until somebody reads them, so that reporting costs a prefill nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from adaptinfer.schedule import BEFORE, ModelShape, Schedule


@dataclass(frozen=True)
class StageRecord:
    """One stage of one prefill, as tensors on the device.

    Attributes:
        layer: the pruning layer.
        entered: int64 [B, V], prompt positions of the vision tokens that entered.
        entered_mask: bool [B, V], False where a sample has fewer.
        scores: float [B, V], aligned with ``entered``.
        kept: int64 [B, n], prompt positions of all tokens that went on.
        kept_mask: bool [B, n], which of them are vision tokens.
        tokens: n, tokens (vision, text and filling) given to each layer after this one.
    """

    layer: int
    entered: Tensor
    entered_mask: Tensor
    scores: Tensor
    kept: Tensor
    kept_mask: Tensor
    tokens: int

    @property
    def place(self) -> str:
        """Where it sits, in words."""
        return "before layer 0" if self.layer == BEFORE else f"after layer {self.layer}"


@dataclass(frozen=True)
class Report:
    """The last prefill of an attached model.

    Attributes:
        shape: sizes of the text model.
        schedules: the resolved schedule of each sample.
        vision_tokens: vision tokens of each sample.
        text_tokens: its other tokens, padding excluded.
        cached_tokens: tokens that the cache held before this prefill.
        early_drop: whether pruning layers skipped the outputs of tokens they dropped.
        kv_bytes: bytes of keys and values that the cache really holds after the prefill, with the padding and the
            fillers of a batch; 0 without a cache.
        vanilla_kv_bytes: the same had nothing been pruned.
        stages: one record per stage that dropped something.
    """

    shape: ModelShape
    schedules: tuple[Schedule, ...]
    vision_tokens: tuple[int, ...]
    text_tokens: tuple[int, ...]
    cached_tokens: int
    early_drop: bool
    kv_bytes: int
    vanilla_kv_bytes: int
    stages: tuple[StageRecord, ...] = field(repr=False)

    @cached_property
    def kept(self) -> list[list[Tensor]]:
        """``kept[s][b]``: ascending positions of sample b's surviving vision tokens in its own row of ``input_ids``."""
        return [_ragged(stage.kept, stage.kept_mask) for stage in self.stages]

    @cached_property
    def entered(self) -> list[list[Tensor]]:
        """``entered[s][b]``: positions of the vision tokens that stage s scored, ascending."""
        return [_ragged(stage.entered, stage.entered_mask) for stage in self.stages]

    @cached_property
    def scores(self) -> list[list[Tensor]]:
        """``scores[s][b]``: their scores, aligned with ``entered[s][b]``."""
        return [_ragged(stage.scores, stage.entered_mask) for stage in self.stages]

    @property
    def tokens_per_layer(self) -> list[tuple[int, ...]]:
        """Vision tokens given to each layer, one tuple per sample."""
        return [
            schedule.tokens_per_layer(count) for schedule, count in zip(self.schedules, self.vision_tokens, strict=True)
        ]

    @property
    def true_average(self) -> list[float]:
        """Vision tokens given to a layer, averaged over layers; one number per sample."""
        return [sum(tokens) / len(tokens) for tokens in self.tokens_per_layer]

    @property
    def flops(self) -> float:
        """FLOPs of the decoder layers in this prefill (2 x multiply-adds), all samples, computed from the counts.

        Counted are the samples' own tokens: the padding of a batch, the fillers that make uneven samples a rectangle,
        and attention to tokens cached before this prefill come on top.
        """
        return sum(
            schedule.prefill_flops(self.shape, text, vision, early_drop=self.early_drop)
            for schedule, text, vision in zip(self.schedules, self.text_tokens, self.vision_tokens, strict=True)
        )

    @property
    def vanilla_flops(self) -> float:
        """The same without pruning."""
        from adaptinfer.schedule import Schedule

        keep_all = Schedule((), self.shape.num_layers)
        return sum(
            keep_all.prefill_flops(self.shape, text, vision)
            for text, vision in zip(self.text_tokens, self.vision_tokens, strict=True)
        )


def _ragged(values: Tensor, mask: Tensor) -> list[Tensor]:
    values, mask = values.cpu(), mask.cpu()
    return [row[chosen] for row, chosen in zip(values, mask, strict=True)]
