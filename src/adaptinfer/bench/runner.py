"""All rounds of all variants, interleaved: whatever else the machine does meets every variant alike."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adaptinfer.bench.prompts import PromptTensors
from adaptinfer.bench.roofline import Rates, measure_rates
from adaptinfer.bench.timing import order_of_round
from adaptinfer.bench.variants import Variant
from adaptinfer.errors import InputError
from adaptinfer.schedule import ModelShape, Schedule

SCORER_PASSES = 3


@dataclass(frozen=True)
class Plan:
    """How often to measure what.

    Attributes:
        rounds: measured rounds; in each every variant runs once.
        warmup: rounds before them whose figures are thrown away.
        new_tokens: how many tokens ``generate`` is measured at; none leaves generation out.
    """

    rounds: int
    warmup: int
    new_tokens: tuple[int, ...]


@dataclass
class BatchResult:
    """Everything measured at one batch size.

    Attributes:
        prompt: what was run.
        shape: of the language model.
        rates: of the device.
        schedules: by variant.
        facts: by variant, see `measure.Bench.facts`.
        figures: by variant and then by figure, one value per round (``scorer_ms``: per pass of its own).
    """

    prompt: PromptTensors
    shape: ModelShape
    rates: Rates
    schedules: dict[str, Schedule]
    facts: dict[str, dict[str, Any]]
    figures: dict[str, dict[str, list[float]]]


def run_batch(
    model: Any,
    prompt: PromptTensors,
    device: str,
    dtype: str,
    variants: Sequence[Variant],
    schedules: dict[str, Schedule],
    plan: Plan,
    progress: Callable[[str], None],
) -> BatchResult:
    """Measure every variant on one prompt.

    Raises:
        InputError: the GPU's memory does not suffice for this batch.
    """
    from adaptinfer.bench.measure import Bench

    where = f"batch {prompt.batch}"
    gc.collect()
    gc.freeze()  # collecting between passes then looks at what these left, not at everything that was imported
    try:
        progress(f"{where}, measuring the machine")
        shape = ModelShape.from_config(model.config)
        tokens = prompt.batch * (prompt.vision_tokens + prompt.text_tokens)
        bench, rates = Bench(model, prompt, device), measure_rates(shape, tokens, dtype, device)
        figures: dict[str, dict[str, list[float]]] = {variant.name: {} for variant in variants}
        for number in range(-plan.warmup, plan.rounds):
            name = f"warm-up {number + plan.warmup + 1}" if number < 0 else f"round {number + 1} of {plan.rounds}"
            for variant in order_of_round(variants, number):
                progress(f"{where}, {name}, {variant.name}")
                measured = bench.run(variant, plan.new_tokens)
                if number >= 0:
                    for figure, value in measured.items():
                        figures[variant.name].setdefault(figure, []).append(value)
        progress(f"{where}, memory")
        facts = {variant.name: bench.facts(variant) for variant in variants}
        for _ in range(SCORER_PASSES):
            for variant in variants:
                if schedules[variant.name].stages and not variant.compiled:
                    progress(f"{where}, scorer of {variant.name}")
                    for figure, value in bench.scorer(variant).items():
                        figures[variant.name].setdefault(figure, []).append(value)
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"--batch {prompt.batch}: the memory of {device} does not suffice; take a smaller batch or shape"
        ) from error
    finally:
        gc.unfreeze()
    return BatchResult(prompt, shape, rates, schedules, facts, figures)
