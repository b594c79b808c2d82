"""Ask a model about pictures, and measure what pruning changes: all of ``adaptinfer ask`` except the terminal.

    checkpoint = Checkpoint("embedded")                                  # reads config and processor, no weights yet
    prompt = checkpoint.prompt(read_pictures(["photo.png"]), "What colour is the star?")
    answer = ask(checkpoint, prompt, AdaptInfer(budget=0.22), compare=True)
    answer.text, answer.report, answer.comparison

Whatever can be wrong is found before the weights are read. Input that cannot be used raises `InputError`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from adaptinfer.checkpoints import Checkpoint, Prompt
from adaptinfer.engine.attach import disabled
from adaptinfer.engine.report import Report
from adaptinfer.pruners.contracts import Pruner

WARM_UPS, REPEATS, LEAST_REPEATS = 2, 10, 3
DECODED_TOKENS = 16  # beyond the first
MEASURING_SECONDS = 60.0  # after which no further repeat is begun


def _nothing(_: str) -> None:
    """The default progress callback."""


@dataclass(frozen=True)
class Latency:
    """Repeated measurements of one way to run a prompt.

    Attributes:
        ttft_ms: processor-ready inputs to first token: vision tower, prefill, lm_head.
        decode_ms_per_token: mean over the tokens after the first, one number per repeat.
    """

    ttft_ms: tuple[float, ...]
    decode_ms_per_token: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """The same prompt without pruning, and both ways measured in turn: repeat i of one beside repeat i of the other."""

    vanilla_text: str
    vanilla: Latency
    pruned: Latency

    def ratio(self, measure: Literal["ttft_ms", "decode_ms_per_token"]) -> tuple[float, float, float]:
        """Pruned over vanilla, repeat by repeat: median, least, most."""
        pairs = zip(getattr(self.pruned, measure), getattr(self.vanilla, measure), strict=True)
        ratios = [pruned / vanilla for pruned, vanilla in pairs]
        return statistics.median(ratios), min(ratios), max(ratios)


@dataclass(frozen=True)
class Answer:
    """What the model said with pruning, how it was pruned and, if wanted, the comparison with vanilla."""

    text: str
    report: Report
    comparison: Comparison | None


def ask(
    checkpoint: Checkpoint,
    prompt: Prompt,
    pruner: Pruner,
    *,
    max_new_tokens: int = 64,
    compare: bool = False,
    progress: Callable[[str], None] = _nothing,
) -> Answer:
    """Load the model, answer greedily with pruning and, to compare, without.

    Args:
        checkpoint: whose model.
        prompt: made by the same checkpoint.
        pruner: what to keep.
        max_new_tokens: longest answer.
        compare: also answer without pruning, and measure the latency of both.
        progress: called with a few words for each step.

    Raises:
        InputError, ScheduleError, UnsupportedError: before any weight is read, for what can be known by then.
    """
    checkpoint.check(pruner, prompt)
    progress(f"loading {checkpoint.name}")
    model = checkpoint.load()
    inputs = {name: value.to(checkpoint.device) for name, value in prompt.inputs.items()}

    def answer() -> str:
        tokens = _generate(model, inputs, max_new_tokens=max_new_tokens)[0, inputs["input_ids"].shape[1] :]
        return checkpoint.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    with pruner(model) as handle:
        progress("answering")
        text, report = answer(), handle.report
        assert report is not None
        if not compare:
            return Answer(text, report, None)
        progress("answering without pruning")
        with disabled(model):
            vanilla_text = answer()
        vanilla, pruned = _measure(model, inputs, checkpoint.device, progress)
        return Answer(text, report, Comparison(vanilla_text, vanilla, pruned))


def _generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    return model.generate(**inputs, do_sample=False, num_beams=1, **options)


def _measure(
    model: Any, inputs: dict[str, Tensor], device: str, progress: Callable[[str], None]
) -> tuple[Latency, Latency]:
    """Latency without and with pruning, in turn, so that whatever else the machine does meets both alike."""
    runs: dict[str, list[tuple[float, float]]] = {"vanilla": [], "pruned": []}
    started = time.perf_counter()
    for repeat in range(-WARM_UPS, REPEATS):
        if repeat >= LEAST_REPEATS and time.perf_counter() - started > MEASURING_SECONDS:
            break
        progress("warming up" if repeat < 0 else f"measuring {repeat + 1} of {REPEATS}")
        for way in sorted(runs, reverse=bool(repeat % 2)):  # each goes first every other time
            if way == "vanilla":
                with disabled(model):
                    run = timed(model, inputs, device)
            else:
                run = timed(model, inputs, device)
            if repeat >= 0:
                runs[way].append(run)
    first, second = (Latency(*map(tuple, zip(*runs[way], strict=True))) for way in ("vanilla", "pruned"))
    return first, second


def timed(model: Any, inputs: dict[str, Tensor], device: str) -> tuple[float, float]:
    """Milliseconds to the first token, and per token after it."""

    def now() -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return time.perf_counter()

    class Clock(StoppingCriteria):
        """Notes the time after every token, and never stops."""

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            times.append(now())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    times = [now()]
    count = DECODED_TOKENS + 1
    _generate(
        model, inputs, min_new_tokens=count, max_new_tokens=count, stopping_criteria=StoppingCriteriaList([Clock()])
    )
    return 1000 * (times[1] - times[0]), 1000 * (times[-1] - times[1]) / DECODED_TOKENS
