"""Clocks and arithmetic of a benchmark: marks on a time line, the order of rounds, medians, ratios within a round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Summary:
    """Median and spread of repeated measurements, in their own unit."""

    median: float
    least: float
    lower_quartile: float
    upper_quartile: float
    most: float


def summarise(values: Sequence[float]) -> Summary:
    """Median, least, quartiles (linear between the two nearest values) and most of at least one value."""
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return Summary(median, min(values), lower, upper, max(values))


def paired_ratios(vanilla: Sequence[float], pruned: Sequence[float]) -> list[float]:
    """Speed-ups, vanilla over pruned, each within its own round: what slows a round down cancels out."""
    return [whole / part for whole, part in zip(vanilla, pruned, strict=True)]


def bound_share(speed_up: float, vanilla_flops: float, flops: float) -> float:
    """How much of the speed-up that the saved FLOPs would allow was reached: 1 is all of it."""
    return speed_up / (vanilla_flops / flops)


def order_of_round(variants: Sequence[_Item], number: int) -> list[_Item]:
    """As given in even rounds, backwards in odd ones, so that a drift of the machine favours no variant."""
    return list(reversed(variants)) if number % 2 else list(variants)


@dataclass(frozen=True)
class Mark:
    """A point in time: on the host's clock, in seconds, and, on a GPU, in its stream."""

    host_s: float
    event: Any = None


class Clock:
    """Marks points in time on a CPU, or in the current stream of a GPU.

    A mark on a GPU is an event in its stream and never waits. To read one, call `synchronise` first, which belongs
    outside of what is measured.
    """

    def __init__(self, device: str) -> None:
        self.on_gpu = device.startswith("cuda")
        self._device = device

    def synchronise(self) -> None:
        """Wait until the GPU has done all that it was given."""
        if self.on_gpu:
            torch.cuda.synchronize(self._device)

    def mark(self) -> Mark:
        """This point in time."""
        event = None
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
        return Mark(time.perf_counter(), event)

    @staticmethod
    def host_ms(start: Mark, end: Mark) -> float:
        """Milliseconds on the host's clock. On a GPU both marks must have been made right after `synchronise`."""
        return 1000 * (end.host_s - start.host_s)

    @staticmethod
    def device_ms(start: Mark, end: Mark) -> float:
        """Milliseconds between two points of a GPU's stream; on a CPU, where nothing runs on, on the host's clock."""
        return Clock.host_ms(start, end) if start.event is None else start.event.elapsed_time(end.event)
