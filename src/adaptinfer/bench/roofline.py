"""The second bound of a decoder prefill: no layer is faster than its matrix work, nor than reading its weights.

Where few tokens are left, a layer waits for its weights, and the FLOPs bound is out of reach on any machine. Both rates
are measured on the machine itself, in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from adaptinfer.bench.timing import Clock
from adaptinfer.schedule import ModelShape, Schedule

_REPEATS = 5
_COPIED_BYTES = 2**28


@dataclass(frozen=True)
class Rates:
    """What a device was measured to do.

    Attributes:
        flops_per_s: best of several multiplications of a prompt's hidden states by an MLP's matrix.
        bytes_per_s: best of several copies of 256 MB, read and written bytes together.
    """

    flops_per_s: float
    bytes_per_s: float


def measure_rates(shape: ModelShape, tokens: int, dtype: str, device: str) -> Rates:
    """Measure a device.

    Args:
        shape: of the language model.
        tokens: rows of the matrix, such as all tokens of the largest batch.
        dtype: of the model.
        device: where it runs.
    """
    kind = {"dtype": getattr(torch, dtype), "device": device}
    hidden = torch.ones(tokens, shape.hidden_size, **kind)
    weight = torch.ones(shape.intermediate_size, shape.hidden_size, **kind)
    seconds = _best_seconds(lambda: torch.nn.functional.linear(hidden, weight), device)
    flops = 2 * tokens * shape.hidden_size * shape.intermediate_size / seconds
    source = torch.ones(_COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return Rates(flops, 2 * _COPIED_BYTES / _best_seconds(lambda: target.copy_(source), device))


def layer_tokens(schedule: Schedule, vision_tokens: int, text_tokens: int, early_drop: bool) -> list[tuple[int, int]]:
    """Per layer, how many tokens enter, and for how many it computes outputs: only a layer that drops early differs."""
    entered = [vision + text_tokens for vision in schedule.tokens_per_layer(vision_tokens)]
    outputs = [*entered[1:], entered[-1]] if early_drop else entered
    return list(zip(entered, outputs, strict=True))


def prefill_bound_ms(
    rates: Rates, schedule: Schedule, shape: ModelShape, prompt: Any, early_drop: bool, bytes_per_value: int
) -> float:
    """Least milliseconds of the decoder layers: per layer the larger of FLOPs over rate and weights over bandwidth.

    Args:
        rates: of the device.
        schedule: of the variant.
        shape: of the language model; a mixture of experts is counted at its active width.
        prompt: counts of tokens and samples (`prompts.PromptTensors`).
        early_drop: of the variant.
        bytes_per_value: of a weight.
    """
    weights = shape.layer_flops(1) // 2 - shape.num_heads * shape.head_dim  # a token's work without its attention
    weight_s = weights * bytes_per_value / rates.bytes_per_s
    seconds = 0.0
    for entered, outputs in layer_tokens(schedule, prompt.vision_tokens, prompt.text_tokens, early_drop):
        flops = prompt.batch * shape.layer_flops(entered, outputs)
        seconds += max(flops / rates.flops_per_s, weight_s)
    return 1000 * seconds


def _best_seconds(work: Callable[[], Any], device: str) -> float:
    clock, best = Clock(device), float("inf")
    work()
    for _ in range(_REPEATS):
        clock.synchronise()
        start = clock.mark()
        work()
        end = clock.mark()
        clock.synchronise()
        best = min(best, clock.device_ms(start, end) / 1000)
    return best
