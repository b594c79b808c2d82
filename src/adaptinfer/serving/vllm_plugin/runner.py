# pyright: reportMissingImports=false
"""vLLM's model runner, as far as pruning needs it: whose tokens a step holds, attention metadata for fewer of them."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata

from adaptinfer.errors import UnsupportedError
from adaptinfer.serving.vllm_plugin.configuration import SCORING, vision_spans
from adaptinfer.serving.vllm_plugin.plan import Planner, Prompt, Row, Segment


def bind(runner: Any) -> None:
    """Let the model of a runner know each batch before it runs, and hand the time of scoring to the scheduler."""
    pruning = getattr(runner.get_model(), "pruning", None)
    if pruning is None:
        raise UnsupportedError(
            f"{type(runner.get_model()).__name__} cannot be pruned in vLLM; only vision-language models of its "
            "Transformers backend can (--model-impl transformers)"
        )
    forward, sample = runner._model_forward, runner.sample_tokens

    @functools.wraps(forward)
    def pruned_forward(*args: Any, **kwargs: Any) -> Any:
        pruning.begin(Batch(runner, pruning.planner))
        try:
            return forward(*args, **kwargs)
        finally:
            pruning.end()

    @functools.wraps(sample)
    def sample_tokens(*args: Any, **kwargs: Any) -> Any:
        output = sample(*args, **kwargs)
        setattr(getattr(output, "_model_runner_output", output), SCORING, pruning.clock.take())
        return output

    # Not on the class: dummy runs go past both, as they must, and another runner in this process stays as it is.
    runner._model_forward, runner.sample_tokens = pruned_forward, sample_tokens


class Batch:
    """The requests of one step, in the order in which their tokens lie.

    Attributes:
        rows: one for each.
        device: of the model.
    """

    def __init__(self, runner: Any, planner: Planner) -> None:
        self._runner = runner
        batch = runner.input_batch
        count = batch.num_reqs
        self.device = runner.device
        self._new = np.diff(runner.query_start_loc.np[: count + 1])
        computed = batch.num_computed_tokens_cpu[:count]
        self.rows = [
            Row(_prompt_of(runner.requests[request], planner), int(before), int(new))
            for request, before, new in zip(batch.req_ids[:count], computed, self._new, strict=True)
        ]
        self._positions: dict[int, Tensor] = {}

    def metadata(self, segment: Segment, layer_names: list[str]) -> dict[str, tuple[Any, Tensor]]:
        """Attention metadata and slots of the segment's layers, by their names in vLLM.

        The cache of these layers holds a request's surviving tokens side by side from its first block on, so a token's
        slot follows from how many of them there are, and the kernel goes over just these.
        """
        runner, count = self._runner, len(self.rows)
        given = np.asarray(segment.given, dtype=np.int32)
        starts = np.zeros(count + 1, dtype=np.int32)
        np.cumsum(given, out=starts[1:])
        missing = self._on_device(np.asarray(segment.missing, dtype=np.int32))
        lengths = runner.seq_lens[:count] - missing
        row = self._on_device(np.repeat(np.arange(count), given))
        within = self._on_device(np.arange(starts[-1]) - np.repeat(starts[:-1], given))
        positions = (lengths - self._on_device(given))[row] + within
        self._positions[segment.layers[0]] = positions
        table = runner.input_batch.block_table[0]
        blocks = table.get_device_tensor(count)
        slots = blocks[row, positions // table.block_size].long() * table.block_size + positions % table.block_size
        upper_bound = runner.optimistic_seq_lens_cpu[:count] - torch.from_numpy(
            np.asarray(segment.missing, dtype=np.int32)
        )
        common = CommonAttentionMetadata(
            query_start_loc=self._on_device(starts),
            query_start_loc_cpu=torch.from_numpy(starts),
            seq_lens=lengths,
            seq_lens_cpu_upper_bound=upper_bound,
            num_reqs=count,
            num_actual_tokens=int(starts[-1]),
            max_query_len=int(given.max()),
            max_seq_len=int(upper_bound.max()),
            block_table_tensor=blocks,
            slot_mapping=slots,
            causal=True,
            is_prefilling=torch.tensor([row.computed < row.prompt.length for row in self.rows]),
            positions=positions,
        )
        layers = set(layer_names[slice(*segment.layers)])
        return {
            name: (own, slots)
            for group in runner.attn_groups[0]
            if not layers.isdisjoint(group.layer_names)
            for own in [group.build_metadata(common)]
            for name in layers.intersection(group.layer_names)
        }

    def cache_positions(self, layer: int) -> Tensor:
        """Where the tokens of the segment that starts in this layer stand among those its cache holds, int64 [n]."""
        return self._positions[layer]

    def _on_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device, non_blocking=True)


_PROMPT = "_adaptinfer_prompt"


def _prompt_of(request: Any, planner: Planner) -> Prompt:
    """The plan of a request's prompt; kept on the request, so that it goes when the request goes."""
    prompt = getattr(request, _PROMPT, None)
    if prompt is None or prompt.length != request.num_prompt_tokens:
        prompt = planner.prompt(request.num_prompt_tokens, vision_spans(request.mm_features))
        setattr(request, _PROMPT, prompt)
    return prompt
