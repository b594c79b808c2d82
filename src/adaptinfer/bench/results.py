"""Measurements as one document: every raw value, and what is worked out from them. Tables and plots read it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from adaptinfer.bench.roofline import prefill_bound_ms
from adaptinfer.bench.runner import BatchResult
from adaptinfer.bench.timing import bound_share, paired_ratios, summarise
from adaptinfer.bench.variants import VANILLA, Variant
from adaptinfer.schedule import Schedule, ScheduleError, solve

FORMAT, VERSION = "adaptinfer.bench", 1
_BOUND_POINTS = 40
_PUBLISHED = {
    "llava-1.5-7b/64": {
        "figure": "decoder prefill, CUDA time",
        "change": -0.613,
        "of": "LLaVA-1.5-7B, nominal 64 tokens, batch 1",
        "source": "arXiv 2508.06084",
    }
}


def published_figures(variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """What papers claim for the schedules among the variants. Nothing of it was measured here."""
    presets = dict.fromkeys(variant.preset for variant in variants)
    return [{"preset": name, **_PUBLISHED[name]} for name in presets if name in _PUBLISHED]


def batch_document(result: BatchResult, variants: Sequence[Variant], bytes_per_value: int) -> dict[str, Any]:
    """One batch size as plain values.

    Args:
        result: of `runner.run_batch`.
        variants: in the order in which they are to stand; vanilla is one of them.
        bytes_per_value: of a weight of the model.
    """
    prompt, shape = result.prompt, result.shape
    vanilla_flops = prompt.batch * Schedule((), shape.num_layers, prompt.vision_tokens).prefill_flops(
        shape, prompt.text_tokens
    )
    entries = [_entry(result, variant, vanilla_flops, bytes_per_value) for variant in variants]
    return {
        "batch": prompt.batch,
        "vision_tokens": prompt.vision_tokens,
        "text_tokens": prompt.text_tokens,
        "rates": asdict(result.rates),
        "vanilla_flops": vanilla_flops,
        "flops_bound_curve": _bound_curve(result, vanilla_flops),
        "variants": entries,
    }


def _entry(result: BatchResult, variant: Variant, vanilla_flops: float, bytes_per_value: int) -> dict[str, Any]:
    prompt, schedule, pruner = result.prompt, result.schedules[variant.name], variant.pruner
    facts, raw, vanilla = result.facts[variant.name], result.figures[variant.name], result.figures[VANILLA]
    flops = facts.get("prefill_flops", vanilla_flops)
    roofline_ms = prefill_bound_ms(result.rates, schedule, result.shape, prompt, variant.early_drop, bytes_per_value)
    summaries = {figure: asdict(summarise(values)) for figure, values in raw.items()}
    speed_ups = {
        figure: asdict(summarise(paired_ratios(vanilla[figure], values)))
        for figure, values in raw.items()
        if "_ms" in figure and figure in vanilla
    }
    prefill_ms = summaries["decoder_prefill_ms"]["median"]
    scorer = summaries.get("scorer_ms")
    vanilla_prefill_ms = summarise(vanilla["decoder_prefill_ms"]).median
    return {
        "name": variant.name,
        "method": None if pruner is None else pruner.name,
        "budget": None if pruner is None else pruner.budget,
        "preset": variant.preset,
        "positions": None if pruner is None else pruner.positions,
        "early_drop": None if pruner is None else variant.early_drop,
        "compiled": variant.compiled,
        "schedule": json.loads(schedule.to_json()),
        "true_average": schedule.true_average(prompt.vision_tokens),
        "tokens_per_layer": list(schedule.tokens_per_layer(prompt.vision_tokens)),
        **facts,
        "prefill_flops": flops,
        "flops_bound": vanilla_flops / flops,
        "share_of_flops_bound": bound_share(speed_ups["decoder_prefill_ms"]["median"], vanilla_flops, flops),
        "roofline_ms": roofline_ms,
        "share_of_roofline": roofline_ms / prefill_ms,
        "scorer_share_of_vanilla_prefill": None if scorer is None else scorer["median"] / vanilla_prefill_ms,
        "raw": raw,
        "summary": summaries,
        "speed_up": speed_ups,
    }


def _bound_curve(result: BatchResult, vanilla_flops: float) -> list[tuple[float, float]]:
    """(true average, FLOPs as a share of vanilla's) of schedules as the solver makes them, budgets from low to high."""
    prompt, shape = result.prompt, result.shape
    curve = []
    for step in range(1, _BOUND_POINTS + 1):
        try:
            schedule = solve(prompt.vision_tokens * step / _BOUND_POINTS, shape.num_layers, prompt.vision_tokens)
        except ScheduleError:  # a budget below what the first layers are given in any case
            continue
        flops = prompt.batch * schedule.prefill_flops(shape, prompt.text_tokens, prompt.vision_tokens)
        curve.append((schedule.true_average(prompt.vision_tokens), flops / vanilla_flops))
    return curve
