"""One pass of one variant. What is timed is said here; everything else, synchronising included, happens outside of it.

A pass yields figures by name:

- ``ttft_ms``: from tensors as a processor makes them to the first token: vision tower, all of the prefill, lm_head and
  argmax. Host clock, from before the call to the token being ready (on a GPU: to the end of a synchronisation).
  ``ttft_cuda_ms`` is the same between two events in the stream.
- ``decoder_prefill_ms``: of the same pass the decoder layers alone, which is the paper's definition: from a hook before
  the first layer to a hook after the last, scoring, selection and gathers included; not the embeddings, the vision
  tower, the reading of the prompt's layout, the last norm and lm_head. On a GPU between CUDA events.
- ``decoder_prefill_wall_ms``: on a GPU, in a pass of its own, the host's clock between the same two hooks, which wait
  for the GPU: so it does not disturb the figures above, and includes the launches of the first kernels.
- ``generate_ms/n``: from the call of ``generate`` to its n-th new token, in one pass for all n; on a GPU the tokens are
  events in the stream.
- ``decode_ms_per_token/n``: of the same pass, the mean over the tokens from the second to the n-th.
- ``scorer_ms``: in passes of their own, the time inside the method: ``pruner.select`` summed over stages, and
  ``pruner.select_before`` of methods that choose before the language model.

What does not depend on the clock is taken from one more pass: counts of tokens, FLOPs, bytes of the cache's own
tensors, and peak memory up to the first token (`memory.PeakMemory`).
"""

from __future__ import annotations

import copy
import gc
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from adaptinfer.bench.memory import PeakMemory
from adaptinfer.bench.prompts import PromptTensors
from adaptinfer.bench.timing import Clock, Mark
from adaptinfer.bench.variants import Variant
from adaptinfer.engine.attach import attach
from adaptinfer.engine.cache.access import kv_bytes
from adaptinfer.engine.graphs.compiled import compile
from adaptinfer.engine.handle import Handle
from adaptinfer.errors import InputError

Figures = dict[str, float]


class Bench:
    """A model and a prompt to be measured together.

    Args:
        model: on its device, in evaluation mode, with no pruner attached.
        prompt: on the same device.
        device: its name.
    """

    def __init__(self, model: Any, prompt: PromptTensors, device: str) -> None:
        self.model, self.prompt = model, prompt
        self.clock, self.memory = Clock(device), PeakMemory(device)
        takes = inspect.signature(model.forward).parameters
        self._options = {"use_cache": True, **({"logits_to_keep": 1} if "logits_to_keep" in takes else {})}

    def attached(self, variant: Variant, pruner: Any = None) -> AbstractContextManager[Handle | None]:
        """The variant on the model, as it is in steady use: its schedule solved. Vanilla is a model never attached."""
        if variant.pruner is None:
            return nullcontext()
        handle = attach(self.model, pruner or variant.pruner, early_drop=variant.early_drop)
        handle.plan(self.prompt.vision_tokens)
        if variant.compiled:
            try:
                compile(self.model)
            except UserWarning:  # see `_captured`
                handle.detach()
                raise
        return handle

    def run(self, variant: Variant, new_tokens: Sequence[int]) -> Figures:
        """Every figure of one variant but ``scorer_ms``, once.

        Args:
            variant: what to attach.
            new_tokens: how many tokens ``generate`` is measured at; none leaves it out.
        """
        with _captured(variant), self.attached(variant):
            if self.clock.on_gpu:
                self.first_token()  # fills the allocator's cache with blocks of this variant's sizes
            figures = self._time_first_token(variant.compiled)
            if self.clock.on_gpu:
                figures |= self._time_decoder_alone(variant.compiled)
            if new_tokens:
                if variant.compiled:
                    self._time_generation(new_tokens)  # captures
                figures |= self._time_generation(new_tokens)
        return figures

    def scorer(self, variant: Variant) -> Figures:
        """``scorer_ms`` of one pass: what the pruner does itself is wrapped in two marks."""
        spans: list[tuple[Mark, Mark]] = []
        timed: Any = copy.copy(variant.pruner)

        def wrapped(choose: Callable[..., Any]) -> Callable[..., Any]:
            def between_marks(*args: Any) -> Any:
                start = self.clock.mark()
                selection = choose(*args)
                spans.append((start, self.clock.mark()))
                return selection

            return between_marks

        for name in ("select", "select_before"):
            object.__setattr__(timed, name, wrapped(getattr(variant.pruner, name)))  # the dataclass is frozen
        with self.attached(variant, timed):
            self.first_token()
        self.clock.synchronise()
        return {"scorer_ms": sum(self.clock.device_ms(start, end) for start, end in spans)}

    def facts(self, variant: Variant) -> dict[str, Any]:
        """What does not depend on the clock, from one pass: tokens, FLOPs, bytes of the cache, peak memory."""
        gc.collect()
        with _captured(variant), self.attached(variant) as handle:
            if variant.compiled:
                self.first_token()  # memory for capturing is not a prefill's
            self.clock.synchronise()
            self.memory.start()
            out, _ = self.first_token()
            self.clock.synchronise()
            peak = self.memory.read()
            held, _ = kv_bytes(out.past_key_values)
            report = None if handle is None else handle.report
        facts: dict[str, Any] = {"kv_bytes": held}
        if peak is not None:
            facts["peak_memory_bytes"], facts["peak_above_idle_bytes"] = peak
        if report is not None:
            averages = {*report.true_average}
            assert len(averages) == 1, "samples of one length are pruned alike"
            facts |= {
                "true_average": report.true_average[0],
                "tokens_per_layer": list(report.tokens_per_layer[0]),
                "prefill_flops": report.flops,
                "stages": [
                    {"layer": stage.layer, "kept": len(kept[0])}
                    for stage, kept in zip(report.stages, report.kept, strict=True)
                ],
            }
        return facts

    # -- passes -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def first_token(self) -> tuple[Any, torch.Tensor]:
        """The model's output, and the first new token of each sample, [B]."""
        out = self.model(**self.prompt.inputs, **self._options)
        return out, out.logits[:, -1].argmax(dim=-1)

    def _time_first_token(self, compiled: bool) -> Figures:
        layers: list[Mark] = []
        gc.collect()
        self.clock.synchronise()
        with self.around_layers(lambda: layers.append(self.clock.mark()), compiled):
            start = self.clock.mark()
            out = self.first_token()
            end = self.clock.mark()
            self.clock.synchronise()
            ready = self.clock.mark()
        del out
        figures = {
            "ttft_ms": self.clock.host_ms(start, ready if self.clock.on_gpu else end),
            "decoder_prefill_ms": self.clock.device_ms(*layers),
        }
        if self.clock.on_gpu:
            figures["ttft_cuda_ms"] = self.clock.device_ms(start, end)
        return figures

    def _time_decoder_alone(self, compiled: bool) -> Figures:
        layers: list[Mark] = []

        def mark() -> None:
            self.clock.synchronise()
            layers.append(self.clock.mark())

        with self.around_layers(mark, compiled):
            self.first_token()
        return {"decoder_prefill_wall_ms": self.clock.host_ms(*layers)}

    def _time_generation(self, new_tokens: Sequence[int]) -> Figures:
        most = max(new_tokens)
        watched = {1, *new_tokens}
        marks: dict[int, Mark] = {}
        clock, length = self.clock, self.prompt.inputs["input_ids"].shape[1]

        class Watch(StoppingCriteria):
            """Asked after every token whether to stop; never does, but looks at its watch."""

            def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
                made = input_ids.shape[1] - length
                if made in watched and made < most:
                    marks[made] = clock.mark()
                return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

        gc.collect()
        clock.synchronise()
        start = clock.mark()
        self.model.generate(
            **self.prompt.inputs,
            do_sample=False,
            num_beams=1,
            min_new_tokens=most,
            max_new_tokens=most,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([Watch()]),
        )
        marks[most] = clock.mark()
        clock.synchronise()
        figures = {}
        for count in new_tokens:
            figures[f"generate_ms/{count}"] = clock.device_ms(start, marks[count])
            if count > 1:
                figures[f"decode_ms_per_token/{count}"] = clock.device_ms(marks[1], marks[count]) / (count - 1)
        return figures

    @contextmanager
    def around_layers(self, mark: Callable[[], None], compiled: bool) -> Iterator[None]:
        """Call `mark` before the first decoder layer, ahead of the engine's own hooks, and after the last.

        A graph calls no hook of a layer, so of a compiled variant all of the decoder lies between the two.
        """
        decoder = self.model.get_decoder()
        first, last = (decoder, decoder) if compiled else (decoder.layers[0], decoder.layers[-1])
        hooks = [
            first.register_forward_pre_hook(lambda *_: mark(), prepend=True),
            last.register_forward_hook(lambda *_: mark()),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@contextmanager
def _captured(variant: Variant) -> Iterator[None]:
    """Refuse to measure as compiled what runs uncompiled.

    Raises:
        InputError: with the reason.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="adaptinfer.compile")
        try:
            yield
        except UserWarning as warning:
            raise InputError(f"variant {variant.name!r}: {warning}") from None
