"""Where a call of an attached model begins and ends: its own `forward` and `generate`, wrapped."""

from __future__ import annotations

import functools
from typing import Any, Protocol

import torch

from adaptinfer.engine.attachment import Attachment
from adaptinfer.engine.cache.access import cache_argument, seen_by
from adaptinfer.engine.cache.checks import check_cache
from adaptinfer.engine.calls import Generation
from adaptinfer.engine.families import is_flash
from adaptinfer.engine.forward import ACTIVE, Forward, active_on, outside_graphs
from adaptinfer.engine.guards import (
    arguments_of,
    check_counts,
    check_flash,
    check_forward,
    check_generate,
    check_ids,
    check_labels,
    check_mask,
    check_padding,
    check_past,
    most_new_tokens,
    prompt_length,
    refuse_continuous_batching,
)
from adaptinfer.engine.hooks import DecoderHooks
from adaptinfer.engine.layout import read_layout
from adaptinfer.engine.masks import real_tokens
from adaptinfer.engine.patches import Patches
from adaptinfer.engine.planner import Planner
from adaptinfer.engine.reporter import Reporter
from adaptinfer.engine.segment import CallPlan
from adaptinfer.engine.vision.recorder import Recorder
from adaptinfer.engine.vision.tower import Encoded
from adaptinfer.schedule import BEFORE


class DecoderRunner(Protocol):
    """What may run the decoder in place of its own forward."""

    def forward(self, run: Any, state: Forward, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run the decoder for one call."""
        ...

    def clear(self) -> None:
        """Drop all that it holds."""
        ...


class Entry:
    """The wrapped methods of one attached model.

    Args:
        attachment: the model and its pruner.
        planner: the pruner's schedules.
        hooks: on the decoder.
        recorder: of encoded images, for a pruner that selects before the language model; else None.
        reporter: keeps the reports.
    """

    def __init__(
        self,
        attachment: Attachment,
        planner: Planner,
        hooks: DecoderHooks,
        recorder: Recorder | None,
        reporter: Reporter,
    ) -> None:
        self._attachment, self._calls = attachment, attachment.calls
        self._planner, self._hooks, self._recorder, self._reporter = planner, hooks, recorder, reporter
        self.runner: DecoderRunner | None = None

    def install(self, patches: Patches) -> None:
        """Wrap the methods."""
        model, base = self._attachment.model, self._attachment.base
        patches.before(model, self._check_call)
        if self._recorder is not None:
            self._recorder.install(patches, self._encodings)
        # Not a pair of hooks: those are skipped when a user interrupts the call.
        patches.before(base, self._expect_forward)
        patches.override(base, "forward", self._within_forward(base.forward))
        if hasattr(model, "generate"):
            patches.override(model, "generate", self._guarded(model.generate))
        for name in ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager"):
            if hasattr(model, name):
                patches.override(model, name, functools.partial(refuse_continuous_batching, name))

    def through_runner(self, run: Any) -> Any:
        """The decoder's forward, which leaves attached calls to ``runner``."""

        @functools.wraps(run)
        def forward(*args: Any, **kwargs: Any) -> Any:
            state, runner = active_on(self._attachment), self.runner
            if runner is None or state is None or self._calls.is_paused:
                return run(*args, **kwargs)
            return runner.forward(run, state, args, kwargs)

        return forward

    def _check_call(self, module: Any, args: Any, kwargs: Any) -> None:
        if not torch.compiler.is_compiling() and not self._calls.is_paused:
            check_labels(arguments_of(self._attachment.model.forward, args, kwargs))

    def _expect_forward(self, module: Any, args: Any, kwargs: Any) -> None:
        if not torch.compiler.is_compiling():
            self._calls.expects_forward = True

    def _within_forward(self, run: Any) -> Any:
        @functools.wraps(run)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() and _is_one_token(arguments_of(run, args, kwargs)):
                return run(*args, **kwargs)  # a compiled decoding step: the cache layers know all that is needed
            return eagerly(*args, **kwargs)

        @outside_graphs
        def eagerly(*args: Any, **kwargs: Any) -> Any:
            with self._calls.running() as attached:
                if not attached:  # somebody kept this function beyond detach
                    return run(*args, **kwargs)
                self._calls.expects_forward = False
                state = self._begin(arguments_of(run, args, kwargs))
                if state is not None and state.plan.stages and "logits_to_keep" in kwargs and self._cuts_early():
                    kwargs["logits_to_keep"] = 0
                token = ACTIVE.set(state)
                try:
                    output = run(*args, **kwargs)
                finally:
                    ACTIVE.reset(token)
                if state is not None:
                    self._finish(state)
                return output

        return forward

    def _cuts_early(self) -> bool:
        """Whether the model would go on with the last `logits_to_keep` survivors, and these may not be the last tokens.

        Layers without keys of their own (Gemma 4) are given no more than these. `generate` asks for the newest token,
        and for guesses, none of which are ever dropped; a plain forward may ask for any. The head cuts once more.
        """
        return bool(self._attachment.family.sources) and self._calls.generation is None

    def _guarded(self, generate: Any) -> Any:
        @functools.wraps(generate)
        def checked(*args: Any, **kwargs: Any) -> Any:
            with self._calls.running() as attached:
                if not attached or self._calls.is_paused:
                    return generate(*args, **kwargs)
                model, arguments = self._attachment.model, arguments_of(generate, args, kwargs)
                check_generate(model, arguments)
                length = prompt_length(arguments)
                most = most_new_tokens(model, arguments, length or 0)
                with self._calls.generating(None if length is None else Generation(length, most)):
                    return generate(*args, **kwargs)

        return checked

    def _begin(self, arguments: dict[str, Any]) -> Forward | None:
        """Read the prompt, settle the stages, refuse what would go wrong; all before any work."""
        attachment, call, off = self._attachment, self._calls.generation, self._calls.is_paused
        ids = arguments.get("input_ids") if off else check_ids(arguments)
        new = arguments.get("inputs_embeds") if ids is None else ids
        if new is None:
            return None  # the model itself says what is missing
        cache = cache_argument(arguments)
        if cache is not None and not hasattr(cache, "get_seq_length"):
            check_cache(cache)  # refuses it by name
        seen, length = seen_by(cache), new.shape[1]
        # Static caches count on the device; reading that waits for it, and one new token can do without.
        past: int | None = seen if isinstance(seen, int) else None if length == 1 else int(seen)
        if call is not None and past is not None:
            call.begin(past, length)
        decoding = past is None or (past > 0 and (length == 1 or (call is not None and past >= call.prompt)))
        flash = is_flash(attachment.model.config.get_text_config()._attn_implementation)
        layout, stages = None, {}
        if ids is not None and not off and not decoding:
            assert past is not None
            prompt = length if call is None else min(length, call.prompt - past)
            mask = arguments.get("attention_mask")
            if call is None:
                check_mask(mask)  # inside generate it may come prepared
            layout = read_layout(ids, real_tokens(mask, past, length), attachment.family.placeholders, prompt)
            stages = self._planner.stages(layout)
            if stages:
                check_forward(attachment.model, arguments)
                if call is not None:
                    check_padding(layout.right_padded)
                if flash:
                    check_flash(attachment.family.sources, stages)
                if cache is not None:
                    check_cache(cache)
                    check_past(attachment.pruner, cache, past)
                    check_counts(attachment.pruner, cache)
                if attachment.early_drop:
                    self._hooks.hook_stages(stages)
        tail = length if layout is None else layout.tail
        plan = CallPlan(past=past, length=length, tail=tail, layout=layout, stages=stages, flash=flash)
        forward = Forward(attachment, plan)
        if BEFORE in stages and self._recorder is not None:
            earlier = [] if call is None else call.encoded
            forward.stages.images = lambda own: self._recorder.images(own or earlier, ids, layout)  # pyright: ignore
        return forward

    def _encodings(self) -> list[Encoded] | None:
        """Where the images that the model is about to encode are noted; None if nobody would ask for them."""
        forward, call = active_on(self._attachment), self._calls.generation
        if self._calls.is_paused or (forward is None and call is None):
            return None
        return call.encoded if forward is None else forward.stages.encoded  # pyright: ignore

    def _finish(self, forward: Forward) -> None:
        layout, call = forward.layout, self._calls.generation
        if layout is None or (forward.past and not any(layout.vision_counts) and not any(layout.unguided_counts)):
            return  # it was no prefill
        forward.stages.check()
        if call is not None:
            if call.reported and not any(layout.vision_counts):
                return  # the text alone, for classifier-free guidance
            call.reported = True
        self._reporter.take(forward, layout)


def _is_one_token(arguments: dict[str, Any]) -> bool:
    new = arguments.get("input_ids")
    new = arguments.get("inputs_embeds") if new is None else new
    return new is not None and new.shape[1] == 1
