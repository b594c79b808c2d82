# pyright: reportMissingImports=false
"""Vision tokens in and kept, and time in scoring, on vLLM's Prometheus endpoint and beside its log line."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from adaptinfer.serving.vllm_plugin.configuration import pruner_of
from adaptinfer.serving.vllm_plugin.counts import Counts

_log = logging.getLogger("vllm.adaptinfer")
_METRICS = {
    "prefills": ("adaptinfer:pruned_prefills", "Prompts whose vision tokens were pruned.", 1),
    "tokens_in": ("adaptinfer:vision_tokens_in", "Vision tokens of prompts.", 1),
    "token_layers": ("adaptinfer:vision_token_layers", "Vision tokens given to a decoder layer, all layers.", 1),
    "scoring_us": ("adaptinfer:scoring_seconds", "Time spent in scoring and selecting.", 1e-6),
}
_KEPT = ("adaptinfer:vision_tokens_kept", "Vision tokens kept after the stage in a decoder layer.")


class StatLogger(AggregateStatLoggerBase):
    """Entry point ``vllm.stat_logger_plugins``; keeps silent in an engine that does not prune."""

    def __init__(self, vllm_config: Any, engine_indexes: list[int]) -> None:
        self._pruner = pruner_of(vllm_config)
        self._recent: Counter[str] = Counter()
        if self._pruner is None:
            return
        from prometheus_client import REGISTRY
        from prometheus_client import Counter as Metric

        for collector in list(REGISTRY._collector_to_names):  # of an engine that was in this process before
            if getattr(collector, "_name", "").startswith("adaptinfer:"):
                REGISTRY.unregister(collector)
        self._num_layers = vllm_config.model_config.hf_text_config.num_hidden_layers
        self._labels = {"model_name": vllm_config.model_config.served_model_name}
        labels = ["model_name", "engine"]
        self._metrics = {key: Metric(name, text, labels) for key, (name, text, _) in _METRICS.items()}
        self._kept = Metric(*_KEPT, [*labels, "layer"])
        for engine in engine_indexes:
            for metric in self._metrics.values():
                metric.labels(**self._labels, engine=str(engine))

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        if self._pruner is None or scheduler_stats is None:
            return
        labels = {**self._labels, "engine": str(engine_idx)}
        for key, number in Counts.read(scheduler_stats.waiting_lora_adapters).items():
            self._recent[key] += number
            if key in self._metrics:
                self._metrics[key].labels(**labels).inc(number * _METRICS[key][2])
            else:
                self._kept.labels(**labels, layer=key.partition("/")[2]).inc(number)

    def log(self) -> None:
        recent, self._recent = self._recent, Counter()
        if not recent["tokens_in"]:
            return
        kept = ", ".join(
            f"layer {key.partition('/')[2]}: {number}"
            for key, number in sorted(recent.items(), key=lambda item: int(item[0].partition("/")[2] or -1))
            if key.startswith("kept/")
        )
        _log.info(
            "AdaptInfer: pruned prefills: %d, vision tokens in: %d, given to a layer: %.1f, kept after %s, "
            "scoring: %.1f ms",
            recent["prefills"],
            recent["tokens_in"],
            recent["token_layers"] / self._num_layers,
            kept or "no layer",
            recent["scoring_us"] / 1000,
        )

    def log_engine_initialized(self) -> None:
        if self._pruner is not None:
            _log.info("AdaptInfer: prunes vision tokens with %s", self._pruner)
