"""Makes the report of each prefill and keeps the latest."""

from __future__ import annotations

import operator
import threading

from adaptinfer.engine.cache.access import kv_bytes
from adaptinfer.engine.forward import Forward
from adaptinfer.engine.layout import PromptLayout
from adaptinfer.engine.planner import Planner
from adaptinfer.engine.report import Report
from adaptinfer.schedule import ModelShape, Schedule, Stage


class Reporter:
    """Reports of one attached model, per thread.

    Args:
        shape: of the text model.
        planner: of the pruner's schedules.
        early_drop: as of the attachment.
        varies: whether the pruner settles while it runs how many tokens stay.
    """

    def __init__(self, shape: ModelShape, planner: Planner, early_drop: bool, varies: bool) -> None:
        self._shape, self._planner, self._early_drop, self._varies = shape, planner, early_drop, varies
        self._thread = threading.local()
        self._latest: Report | None = None

    @property
    def report(self) -> Report | None:
        """The last prefill of this thread or, if it ran none, of any thread; None before the first."""
        return getattr(self._thread, "report", self._latest)

    def take(self, forward: Forward, layout: PromptLayout) -> None:
        """Report a prefill that has just ended."""
        assert forward.past is not None
        held, whole = kv_bytes(forward.cache)
        vision = tuple(map(operator.add, layout.vision_counts, layout.unguided_counts))
        self._thread.report = self._latest = Report(
            shape=self._shape,
            schedules=self._schedules(forward, layout),
            vision_tokens=vision,
            text_tokens=tuple(map(operator.sub, layout.real_counts, vision)),
            cached_tokens=forward.past,
            early_drop=self._early_drop,
            kv_bytes=held,
            vanilla_kv_bytes=whole,
            stages=tuple(forward.stages.records),
        )

    def _schedules(self, forward: Forward, layout: PromptLayout) -> tuple[Schedule, ...]:
        """Of each sample; what really happened where counts vary, else the plan."""
        depth = self._shape.num_layers
        if not self._varies:
            return tuple(self._planner.plan(count) if count else Schedule((), depth) for count in layout.vision_counts)
        stages = forward.stages.keeps.items()
        return tuple(
            Schedule(tuple(Stage(layer, keeps[row]) for layer, keeps in stages) if count else (), depth)
            for row, count in enumerate(layout.vision_counts)
        )
