# pyright: reportMissingImports=false
"""vLLM's scheduler with two more rules: a prompt with vision tokens is computed in one step, and what pruned layers
hold of it is never shared as a prefix. It also counts vision tokens, since counts follow from the prompts."""

from __future__ import annotations

import hashlib
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from adaptinfer.serving.vllm_plugin.configuration import SCORING, planner_of, vision_spans
from adaptinfer.serving.vllm_plugin.counts import Counts
from adaptinfer.serving.vllm_plugin.plan import Prompt


class _Prunes:
    """Mixed into a scheduler of vLLM."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._planner = planner_of(self.vllm_config)  # pyright: ignore[reportAttributeAccessIssue]
        self._counts = Counts()

    def add_request(self, request: Any) -> None:
        prompt = self._planner.prompt(request.num_prompt_tokens, vision_spans(request.mm_features))
        request.adaptinfer_prompt = prompt
        if prompt.prunes:
            # Scores need the keys of the whole prompt, which a paged cache keeps in a layout of its backend's own.
            request.skip_reading_prefix_cache = True
            _hide_blocks(request, prompt.first // self.hash_block_size)  # pyright: ignore[reportAttributeAccessIssue]
        super().add_request(request)  # pyright: ignore[reportAttributeAccessIssue]

    def _try_schedule_encoder_inputs(
        self, request: Any, num_computed_tokens: int, num_new_tokens: int, encoder_compute_budget: int, **kwargs: Any
    ) -> tuple[list[int], int, int, list[int], list[int]]:
        found = super()._try_schedule_encoder_inputs(  # pyright: ignore[reportAttributeAccessIssue]
            request, num_computed_tokens, num_new_tokens, encoder_compute_budget, **kwargs
        )
        prompt: Prompt = request.adaptinfer_prompt
        if prompt.prunes and num_computed_tokens < prompt.length and num_computed_tokens + found[1] < prompt.length:
            return [], 0, encoder_compute_budget, [], []  # not this step: what is left of it does not take the prompt
        return found

    def _update_after_schedule(self, scheduler_output: Any) -> None:
        requests = self.requests  # pyright: ignore[reportAttributeAccessIssue]
        for name in scheduler_output.num_scheduled_tokens:
            request = requests[name]
            if request.num_computed_tokens == 0:
                self._counts.add(request.adaptinfer_prompt)
        super()._update_after_schedule(scheduler_output)  # pyright: ignore[reportAttributeAccessIssue]

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        self._counts.scoring_seconds += getattr(model_runner_output, SCORING, 0.0)
        return super().update_from_output(  # pyright: ignore[reportAttributeAccessIssue]
            scheduler_output, model_runner_output
        )

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        stats = super().make_stats(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        if stats is not None:
            # The one field that takes numbers by name; LoRA, whose field it is, is refused beside pruning.
            stats.waiting_lora_adapters.update(self._counts.take())
        return stats


def _hide_blocks(request: Any, first: int) -> None:
    """Give a request's blocks from number ``first`` on hashes that no other prompt has.

    Earlier blocks are text only, which every layer holds in full: they serve any request with the same beginning.
    """
    hash_blocks = request._block_hasher

    def hashes(own: Any) -> list[bytes]:
        known = len(own.block_hashes)
        return [_salted(digest) if number >= first else digest for number, digest in enumerate(hash_blocks(own), known)]

    if hash_blocks is not None:
        request._block_hasher = hashes
        request.block_hashes[first:] = map(_salted, request.block_hashes[first:])


def _salted(digest: bytes) -> bytes:
    return hashlib.sha256(b"adaptinfer" + digest).digest()


class PruningScheduler(_Prunes, Scheduler):
    """For engines without asynchronous scheduling."""


class PruningAsyncScheduler(_Prunes, AsyncScheduler):
    """For engines with it."""
