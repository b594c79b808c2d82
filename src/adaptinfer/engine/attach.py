"""Attach a pruner to a transformers model in place, and take it off again without a trace."""

from __future__ import annotations

import copy
import functools
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from adaptinfer.engine.cache import cache_argument, check_cache, history_of
from adaptinfer.engine.families import family_of
from adaptinfer.engine.forward import ACTIVE, Forward
from adaptinfer.engine.guards import arguments_of, check_forward, check_generate, check_ids, check_labels
from adaptinfer.engine.layout import PromptLayout, read_layout
from adaptinfer.engine.report import Report
from adaptinfer.engine.stage import rows_of_mask
from adaptinfer.errors import AdaptInferError, UnsupportedError
from adaptinfer.functional import gather_tokens, scatter_tokens
from adaptinfer.pruners.base import Pruner
from adaptinfer.schedule import ModelShape, Schedule, ScheduleError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

__all__ = ["Handle", "attach", "disabled"]

_HANDLE = "_adaptinfer_handle"
_ATTENTION = "adaptinfer"
_DISABLED: ContextVar[frozenset[int]] = ContextVar("adaptinfer_disabled", default=frozenset())


def attach(model: Any, pruner: Pruner, *, early_drop: bool = True) -> Handle:
    """Let a model prune vision tokens while it reads the prompt.

    The model keeps its class, its weights and its attention backend; ``model.generate(**inputs)`` and
    ``model(**inputs)`` are called as before. Logits of a plain forward have the prompt's full length, with zeros in
    the rows of dropped tokens.

    Args:
        model: a loaded vision-language model of a supported family.
        pruner: what to keep, for example ``AdaptInfer(budget=64)``. Attach to the object whose ``generate`` you call,
            which is then checked for ways of decoding that would go wrong.
        early_drop: skip attention outputs, output projection and MLP of the tokens that a pruning layer drops; the
            results are the same either way, so switch it off only to measure what it saves.

    Returns:
        A handle: ``handle.report``, ``handle.detach()``, or a context manager that detaches.

    Raises:
        UnsupportedError: the model is not supported.
        AdaptInferError: a pruner is attached already, or ``pruner`` is none.
        ScheduleError: the pruner's schedule does not fit the model's depth.
    """
    return Handle(model, pruner, early_drop)


@contextmanager
def disabled(model: Any) -> Iterator[None]:
    """Run a model without pruning for the length of a ``with`` block, in this thread only.

    A thread started inside the block prunes: open the block in the thread. A cache that was pruned before is still read
    correctly.

    Raises:
        AdaptInferError: no pruner is attached to the model.
    """
    handle = getattr(model, "__dict__", {}).get(_HANDLE)
    if handle is None:
        raise AdaptInferError("no pruner is attached to this model; call adaptinfer.attach(model, pruner) first")
    token = _DISABLED.set(_DISABLED.get() | {id(handle)})
    try:
        yield
    finally:
        _DISABLED.reset(token)


class Handle:
    """A pruner on a model. Made by `attach`."""

    def __init__(self, model: Any, pruner: Pruner, early_drop: bool) -> None:
        if _HANDLE in getattr(model, "__dict__", {}):
            raise AdaptInferError("a pruner is attached to this model already; call its handle's detach() first")
        if not isinstance(pruner, Pruner):
            raise AdaptInferError(f"pruner: must be a pruner such as AdaptInfer(budget=64), not {pruner!r}")
        self._family = family_of(model)
        if any(hasattr(layer.self_attn.config, "adaptinfer_original") for layer in model.get_decoder().layers):
            raise AdaptInferError(
                "a pruner is attached to a part of this model already; call its handle's detach() first"
            )
        if pruner.positions == "compact" and not self._family.compact:
            raise UnsupportedError(
                f"positions='compact' renumbers one-dimensional positions, and {self._family.model_type} rotates by "
                "three; use positions='keep'"
            )
        self._model: Any = model
        self._base: Any = model.base_model
        self._decoder: Any = model.get_decoder()
        self._shape = ModelShape.from_config(model.config)
        self._placeholders = tuple(getattr(model.config, name) for name in self._family.placeholders)
        self._plans: dict[int, Schedule] = {}
        self._hooks: list[RemovableHandle] = []
        self._hooked_stages: set[int] = set()
        self._lock = threading.Lock()
        self._running = 0
        self._thread = threading.local()
        self._overrides: list[tuple[Any, str, Any, Any]] = []
        self._attention_configs: list[tuple[Any, Any]] = []
        self._latest: Report | None = None
        if pruner.schedule is not None:
            pruner.schedule.check(self._shape.num_layers)
        self.pruner = pruner
        self.early_drop = early_drop
        self._install()
        model.__dict__[_HANDLE] = self

    @property
    def report(self) -> Report | None:
        """The last prefill of this thread or, if it ran none, of any thread; None before the first.

        Read it in the thread that generates.
        """
        return getattr(self._thread, "report", self._latest)

    def plan(self, vision_tokens: int) -> Schedule:
        """The schedule for a prompt with that many vision tokens.

        Raises:
            ScheduleError: the budget cannot be met for such a prompt.
        """
        if vision_tokens not in self._plans:
            self._plans[vision_tokens] = self.pruner.plan(self._shape.num_layers, vision_tokens)
        return self._plans[vision_tokens]

    def detach(self) -> None:
        """Leave the model exactly as it was before `attach`, and let go of it. Doing it twice is harmless.

        Raises:
            AdaptInferError: a call of the model is running, here or in another thread; its later layers would be wrong.
        """
        with self._lock:
            if self._running:
                raise AdaptInferError("the model is running; let its calls end before you detach")
            model, self._model = self._model, None
        if model is None:
            return
        for hook in self._hooks:
            hook.remove()
        for attention, config in self._attention_configs:
            attention.config = config
        for owner, name, ours, before in self._overrides:
            if vars(owner).get(name) is ours:
                del vars(owner)[name]
                if before is not None:
                    vars(owner)[name] = before
        del vars(model)[_HANDLE]
        self._hooks, self._attention_configs, self._overrides = [], [], []
        self._base = self._decoder = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise AdaptInferError("a model with a pruner attached cannot be copied or pickled; detach first")

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    # -- installation -----------------------------------------------------------------------------------------------

    def _install(self) -> None:
        self._before(self._model, self._check_call)
        self._after(self._decoder.norm, self._restore_length)
        AttentionInterface.register(_ATTENTION, _attention_in_stage)
        for number, layer in enumerate(self._decoder.layers):
            self._before(layer, functools.partial(self._enter_layer, number))
            # Only this module reads the copy, so masks, flags and every other module still see the model's own config.
            original = layer.self_attn.config
            tapped = copy.copy(original)
            tapped._attn_implementation_internal = _ATTENTION
            tapped.adaptinfer_original, tapped.adaptinfer_owner = original, self
            layer.self_attn.config = tapped
            self._attention_configs.append((layer.self_attn, original))
        # Not a pair of hooks: those are skipped when a user interrupts the call.
        self._before(self._base, self._expect_forward)
        self._override(self._base, "forward", self._within_forward(self._base.forward))
        if hasattr(self._model, "generate"):
            self._override(self._model, "generate", self._guarded(self._model.generate))

    def _before(self, module: nn.Module, hook: Any) -> None:
        self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _after(self, module: nn.Module, hook: Any) -> None:
        self._hooks.append(module.register_forward_hook(hook))

    def _override(self, owner: Any, name: str, function: Any) -> None:
        self._overrides.append((owner, name, function, vars(owner).get(name)))
        vars(owner)[name] = function

    def _hook_stages(self, layers: Iterable[int]) -> None:
        """Early drop in the projection and MLP of pruning layers; other layers are spared the hooks."""
        with self._lock:
            for number in set(layers) - self._hooked_stages:
                layer = self._decoder.layers[number]
                for module in (layer.self_attn.o_proj, layer.mlp):
                    self._before(module, functools.partial(self._drop_rows, number))
                    self._after(module, functools.partial(self._restore_rows, number))
                self._hooked_stages.add(number)

    def _within_forward(self, run: Any) -> Any:
        @functools.wraps(run)
        def forward(*args: Any, **kwargs: Any) -> Any:
            with self._call() as attached:
                if not attached:  # somebody kept this function beyond detach
                    return run(*args, **kwargs)
                self._thread.expected = False
                state = self._begin(arguments_of(run, args, kwargs))
                token = ACTIVE.set(state)
                try:
                    output = run(*args, **kwargs)
                finally:
                    ACTIVE.reset(token)
                if state is not None:
                    self._finish(state)
                return output

        return forward

    def _guarded(self, generate: Any) -> Any:
        @functools.wraps(generate)
        def checked(*args: Any, **kwargs: Any) -> Any:
            with self._call() as attached:
                if attached and not self._is_disabled():
                    check_generate(self._model, arguments_of(generate, args, kwargs))
                return generate(*args, **kwargs)

        return checked

    @contextmanager
    def _call(self) -> Iterator[bool]:
        """Hold off `detach` while a call runs; tells whether the pruner is attached still."""
        with self._lock:
            attached = self._model is not None
            self._running += attached
        try:
            yield attached
        finally:
            with self._lock:
                self._running -= attached

    def _expect_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._thread.expected = True

    def _is_disabled(self) -> bool:
        return id(self) in _DISABLED.get()

    def _active(self) -> Forward | None:
        forward = ACTIVE.get()
        return forward if forward is not None and forward.owner is self else None

    # -- hooks, in the order in which a forward meets them ----------------------------------------------------------

    def _check_call(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._is_disabled():
            check_labels(arguments_of(self._model.forward, args, kwargs))

    def _begin(self, arguments: dict[str, Any]) -> Forward | None:
        """Read the prompt, settle the stages, refuse what would go wrong; all before any work."""
        off = self._is_disabled()
        ids = arguments.get("input_ids") if off else check_ids(arguments)
        new = arguments.get("inputs_embeds") if ids is None else ids
        if new is None:
            return None  # the model itself says what is missing
        cache = cache_argument(arguments)
        if cache is not None and not hasattr(cache, "get_seq_length"):
            check_cache(cache)  # refuses it by name
        past = cache.get_seq_length() if cache is not None else 0
        length = new.shape[1]
        layout, stages = None, {}
        if ids is not None and not off and not (past and length == 1):  # a single new token is decoding
            mask = arguments.get("attention_mask")
            flat = mask if mask is not None and getattr(mask, "ndim", 0) == 2 else None
            layout = read_layout(ids, flat, self._placeholders)
            stages = self._stages(layout)
            if stages:
                check_forward(self._model, arguments)
                if cache is not None:
                    check_cache(cache)
                if self.early_drop:
                    self._hook_stages(stages)
        return Forward(self, self.pruner, past, length, layout, stages, self.early_drop, self._decoder.rotary_emb)

    def _stages(self, layout: PromptLayout) -> dict[int, tuple[int, ...]]:
        """Vision tokens that each sample keeps behind each stage; stages at which no sample drops any are left out."""
        left = list(layout.vision_counts)
        planned: dict[int, dict[int, int]] = {}
        for row, count in enumerate(layout.vision_counts):
            if count:
                try:
                    schedule = self.plan(count)
                    keeps = schedule.keeps(count)
                except ScheduleError as error:
                    where = f" (sample {row} of the batch)" if len(left) > 1 else ""
                    raise ScheduleError(f"{error}{where}") from None
                for stage, keep in zip(schedule.stages, keeps, strict=True):
                    planned.setdefault(stage.layer, {})[row] = keep
        stages = {}
        for layer in sorted(planned):
            keeps = [planned[layer].get(row, now) for row, now in enumerate(left)]
            if keeps != left:
                stages[layer] = tuple(keeps)
                left = keeps
        return stages

    def _enter_layer(self, layer: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        forward = self._active()
        if forward is None:
            if getattr(self._thread, "expected", False):
                self._thread.expected = False
                raise AdaptInferError(
                    f"{type(self._base).__name__}.forward was replaced while a pruner is attached, so nothing would be "
                    "pruned; detach before you change it, and attach again"
                )
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden = forward.advance(layer, hidden)
        cache = cache_argument(kwargs)
        history = history_of(cache, layer)
        forward.cache = cache
        if forward.segment is None and history is None:
            return None
        kwargs = {**kwargs, **forward.layer_inputs(history, hidden, kwargs)}
        forward.remember(cache, layer, history)
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    def _drop_rows(self, layer: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        rows = self._rows_going_on(layer)
        return None if rows is None else ((gather_tokens(args[0], rows, dim=1), *args[1:]), kwargs)

    def _restore_rows(self, layer: int, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        rows = self._rows_going_on(layer)
        forward = self._active()
        if rows is None or forward is None:
            return None
        entered = forward.length if forward.segment is None else forward.segment.index.shape[1]
        return scatter_tokens(output, rows, entered)

    def _rows_going_on(self, layer: int) -> Tensor | None:
        forward = self._active()
        return None if forward is None else forward.dropping(layer)

    def _restore_length(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        forward = self._active()
        return None if forward is None or forward.segment is None else forward.restore_length(output)

    def _finish(self, forward: Forward) -> None:
        layout = forward.layout
        if layout is None or (forward.past and not any(layout.vision_counts)):
            return  # it was no prefill
        report = self._make_report(forward, layout)
        self._thread.report = self._latest = report

    def _make_report(self, forward: Forward, layout: PromptLayout) -> Report:
        held = [layer.keys for layer in getattr(forward.cache, "layers", ()) if layer.is_initialized]
        token_bytes = [2 * keys.element_size() * keys.shape[1] * keys.shape[3] * keys.shape[0] for keys in held]
        keep_all = Schedule((), self._shape.num_layers)
        return Report(
            shape=self._shape,
            schedules=tuple(self.plan(count) if count else keep_all for count in layout.vision_counts),
            vision_tokens=layout.vision_counts,
            text_tokens=tuple(r - v for r, v in zip(layout.real_counts, layout.vision_counts, strict=True)),
            cached_tokens=forward.past,
            early_drop=self.early_drop,
            kv_bytes=sum(size * keys.shape[2] for size, keys in zip(token_bytes, held, strict=True)),
            vanilla_kv_bytes=sum(token_bytes) * (forward.past + forward.length),
            stages=tuple(forward.records),
        )


def _attention_in_stage(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The model's own attention function; in a pruning layer it scores first and attends for survivors only."""
    backend = module.config.adaptinfer_original._attn_implementation
    if backend == "eager":
        attend = sys.modules[type(module).__module__].eager_attention_forward  # pyright: ignore
    else:
        attend = ALL_ATTENTION_FUNCTIONS[backend]
    forward, layer = ACTIVE.get(), module.layer_idx
    # Another model may run inside a forward of this one, so the layer's number alone does not tell.
    if forward is None or not forward.scores_in(layer) or forward.owner is not module.config.adaptinfer_owner:
        return attend(module, query, key, value, attention_mask, **kwargs)
    forward.choose(layer, query, key, attention_mask, kwargs["scaling"])
    rows = forward.dropping(layer)
    entered = query.shape[2]
    # All rows under the causal kernel cost half a rectangle; survivors alone need an explicit mask and cost all of it.
    if rows is None or 2 * rows.shape[1] > entered:
        return attend(module, query, key, value, attention_mask, **kwargs)
    mask = rows_of_mask(attention_mask, rows, key.shape[2] - entered, key.shape[2])
    output, _ = attend(module, gather_tokens(query, rows, dim=2), key, value, mask, **kwargs)
    return scatter_tokens(output, rows, entered), None
