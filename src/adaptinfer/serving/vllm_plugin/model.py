# pyright: reportMissingImports=false
"""vLLM's Transformers-backend models, with layers that are given fewer tokens.

One class serves every vision-language model that vLLM runs through transformers. vLLM's attention stays what it is;
each segment of layers gets separate metadata, which counts for each request the tokens that these layers hold. Their
keys and values are packed at the start of the request's own blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.transformers import (
    TransformersMultiModalForCausalLM,
    TransformersMultiModalMoEForCausalLM,
)
from vllm.model_executor.models.transformers.base import VLLM_ATTN_ATTR

from adaptinfer.engine.parallel import sum_over_ranks
from adaptinfer.errors import UnsupportedError
from adaptinfer.serving.vllm_plugin.configuration import planner_of, pruner_of
from adaptinfer.serving.vllm_plugin.plan import plan_step
from adaptinfer.serving.vllm_plugin.runner import Batch
from adaptinfer.serving.vllm_plugin.step import Heads, ScoringClock, Step

_OUTPUT = ("o_proj", "out_proj", "dense", "wo")
_MLP = ("mlp", "feed_forward", "block_sparse_moe")


class Pruning:
    """Hooks on the decoder of one model, and the step that they serve. ``begin`` and ``end`` enclose a forward."""

    def __init__(self, model: Any, vllm_config: VllmConfig) -> None:
        self.planner = planner_of(vllm_config)
        self.clock = ScoringClock(vllm_config.device_config.device)
        self._step: Step | None = None
        self._batch: Batch | None = None
        self._step_length = self._length = 0  # tokens in the step, and given to the present layer
        self._hidden: Tensor | None = None  # that entered the present layer, if it is a stage's
        self._decoder = model.model.get_decoder()
        self._attentions = [
            getattr(model.get_submodule(model.attention_fusers[number][0]), VLLM_ATTN_ATTR)
            for number in range(self.planner.num_layers)
        ]
        self.layer_names = [attention.layer_name for attention in self._attentions]
        self._compact = self.planner.pruner.positions == "compact"
        if self._compact and (vllm_config.model_config.uses_mrope or not hasattr(self._decoder, "rotary_emb")):
            raise UnsupportedError(
                "positions='compact' is defined for one rotary embedding of one-dimensional positions; "
                f"{model.config.model_type} has another, so use positions='keep'"
            )
        self._install(model)

    def begin(self, batch: Batch) -> None:
        """Plan the next forward, and give each segment of layers its own attention metadata."""
        segments = plan_step(batch.rows, self.planner.num_layers)
        if len(segments) == 1:
            return
        self._step = Step(batch.rows, segments, batch.device, self.clock)
        self._batch = batch
        context = get_forward_context()
        metadata, slots = dict(context.attn_metadata), dict(context.slot_mapping)
        for segment in segments[1:]:
            for name, (own_metadata, own_slots) in batch.metadata(segment, self.layer_names).items():
                metadata[name], slots[name] = own_metadata, own_slots
        context.attn_metadata, context.slot_mapping = metadata, slots

    def end(self) -> None:
        """Forget the forward."""
        self._step = self._batch = self._hidden = None

    # -- hooks ------------------------------------------------------------------------------------------------------

    def _install(self, model: Any) -> None:
        all_heads = model.text_config.num_attention_heads
        for number, (layer, attention) in enumerate(zip(self._decoder.layers, self._attentions, strict=True)):
            total = functools.partial(self._sum, held=attention.num_heads, heads=all_heads)
            softcap = getattr(attention.impl, "logits_soft_cap", None) or None
            heads = Heads(attention.impl.scale, softcap, all_heads, total)
            layer.register_forward_pre_hook(functools.partial(self._enter, number), with_kwargs=True)
            attention.forward = functools.partial(self._attend, number, heads, attention, attention.forward)
            owner = model.get_submodule(model.attention_fusers[number][0])
            parts = [getattr(owner, name, None) for name in _OUTPUT] + [getattr(layer, name, None) for name in _MLP]
            for part in filter(None, parts):
                self._drop_early(number, part)
        self._decoder.norm.register_forward_hook(self._restore)

    def _drop_early(self, number: int, part: nn.Module) -> None:
        """Run a module of a stage's layer for survivors only: the output of the other tokens is never read."""

        def before(module: nn.Module, args: Any) -> Any:
            survivors = self._survivors(number)
            if survivors is None:
                return None
            hidden = args[0]
            return (hidden.index_select(hidden.ndim - 2, survivors), *args[1:])

        def after(module: nn.Module, args: Any, output: Any) -> Any:
            survivors = self._survivors(number)
            if survivors is None:
                return None
            first, *rest = output if isinstance(output, tuple) else (output,)  # mixtures of experts may return more
            full = first.new_zeros(*first.shape[:-2], self._length, first.shape[-1])
            full = full.index_copy(first.ndim - 2, survivors, first)
            return (full, *rest) if isinstance(output, tuple) else full

        part.register_forward_pre_hook(before)
        part.register_forward_hook(after)

    def _survivors(self, number: int) -> Tensor | None:
        step = self._step
        return step.survivors if step is not None and step.stage(number) is not None else None

    def _enter(self, number: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        step = self._step
        if step is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if number == 0:
            self._step_length = hidden.shape[1]
        survivors = step.go_on()
        if survivors is not None:
            hidden = hidden.index_select(1, survivors)
        self._length = hidden.shape[1]
        self._hidden = hidden[0] if step.stage(number) is not None else None
        kwargs = {**kwargs, **step.inputs(number, kwargs, functools.partial(self._compact_positions, number, hidden))}
        return ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})

    def _compact_positions(self, number: int, hidden: Tensor) -> dict[str, Any]:
        if not self._compact or number == 0:
            return {}
        assert self._batch is not None
        positions = self._batch.cache_positions(number)[None]
        return {"position_ids": positions, "position_embeddings": self._decoder.rotary_emb(hidden, positions)}

    def _attend(
        self,
        number: int,
        heads: Heads,
        attention: Any,
        attend: Callable[..., Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        output = attend(query, key, value, *args, **kwargs)
        step = self._step
        if step is not None and step.stage(number) is not None:
            query, key = (tensor.view(tensor.shape[0], -1, attention.head_size) for tensor in (query, key))
            pruner, hidden = self.planner.pruner, self._hidden
            assert hidden is not None
            step.choose(number, query.transpose(0, 1), key.transpose(0, 1), hidden, heads, pruner)
        return output

    @staticmethod
    def _sum(tensor: Tensor, held: int, heads: int) -> Tensor:
        """Over the ranks that share out the heads; every rank gets the same bits, so all keep the same tokens."""
        return tensor if held == heads else sum_over_ranks(tensor, get_tp_group().device_group)

    def _restore(self, module: nn.Module, args: Any, output: Any) -> Any:
        step = self._step
        if step is None or step.tokens is None:
            return None
        return step.restore(output, self._step_length)


class _Prunes:
    """Mixed into a model class of vLLM."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # pyright: ignore[reportCallIssue]
        self.pruning = Pruning(self, vllm_config) if pruner_of(vllm_config) is not None else None


class PrunedModel(_Prunes, TransformersMultiModalForCausalLM):
    """Any vision-language model of the Transformers backend."""


class PrunedMoEModel(_Prunes, TransformersMultiModalMoEForCausalLM):
    """The same with mixtures of experts."""
