"""Attach a pruner to a transformers model in place, and take it off again without a trace."""

from __future__ import annotations

import copy
import functools
import inspect
import operator
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import AttentionInterface

from adaptinfer.engine.cache.access import cache_argument, kv_bytes, seen_by
from adaptinfer.engine.cache.checks import check_cache, check_cache_kind
from adaptinfer.engine.families import attention_of, family_of, is_flash, own_attention
from adaptinfer.engine.forward import ACTIVE, Forward, decoding_inputs
from adaptinfer.engine.guards import (
    arguments_of,
    check_counts,
    check_flash,
    check_forward,
    check_generate,
    check_ids,
    check_labels,
    check_mask,
    check_needs,
    check_padding,
    check_past,
    most_new_tokens,
    prompt_length,
    refuse_continuous_batching,
)
from adaptinfer.engine.layout import PromptLayout, read_layout
from adaptinfer.engine.masks import real_tokens
from adaptinfer.engine.parallel import Ranks
from adaptinfer.engine.report import Report
from adaptinfer.engine.selection import Images
from adaptinfer.engine.vision.recorder import Recorder
from adaptinfer.engine.vision.tower import TOWER_ATTENTION, Encoded, attention_in_tower
from adaptinfer.errors import AdaptInferError, UnsupportedError
from adaptinfer.functional import gather_tokens, scatter_tokens
from adaptinfer.pruners.before import SelectsBefore
from adaptinfer.pruners.contracts import Pruner
from adaptinfer.pruners.tome import ToMe
from adaptinfer.schedule import BEFORE, ModelShape, Schedule, ScheduleError, Stage

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

    from adaptinfer.engine.families import Family
    from adaptinfer.engine.graphs.compiled import Compiled

__all__ = ["Handle", "attach", "disabled", "handle_of", "is_attached"]

_HANDLE = "_adaptinfer_handle"
_ATTENTION = "adaptinfer"
_DISABLED: ContextVar[frozenset[int]] = ContextVar("adaptinfer_disabled", default=frozenset())
_GENERATIONS: ContextVar[dict[int, Generation]] = ContextVar("adaptinfer_generations", default={})  # noqa: B039
_Function = TypeVar("_Function", bound=Callable[..., Any])
_LARGEST_MASK = 2**20  # entries of a mask made for survivors
_OUTPUT = ("o_proj", "out_proj", "dense", "wo")
_MLP = ("mlp", "feed_forward", "block_sparse_moe")


def _outside_graphs(function: _Function) -> _Function:
    """Keep a function out of compiled graphs: it reads state of the call, which a graph would take for a constant."""
    return torch.compiler.disable(function)  # pyright: ignore


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


@dataclass
class Generation:
    """One call of generate on an attached model.

    Attributes:
        prompt: tokens of its whole prompt, cached ones included; what comes behind is answer, or a guess at it.
        begun: whether its first forward was met.
        reported: whether a prefill of it was reported.
        encoded: images that it encoded before its first forward.
        most: new tokens that it may make.
        lease: the graph that decodes for it, or did, if the model is compiled.
    """

    prompt: int
    most: int = 0
    begun: bool = False
    reported: bool = False
    encoded: list[Encoded] = field(default_factory=list)
    lease: Any = None

    def begin(self, past: int, new: int) -> None:
        """Take note of a forward; the first one tells whether generate was given the new tokens of a turn alone."""
        if not self.begun and past >= self.prompt:
            self.prompt = past + new
        self.begun = True


@contextmanager
def disabled(model: Any) -> Iterator[None]:
    """Run a model without pruning for the length of a ``with`` block, in this thread only.

    A thread started inside the block prunes: open the block in the thread. A cache that was pruned before is still read
    correctly.

    Raises:
        AdaptInferError: no pruner is attached to the model.
    """
    handle = handle_of(model)
    token = _DISABLED.set(_DISABLED.get() | {id(handle)})
    try:
        yield
    finally:
        _DISABLED.reset(token)


def handle_of(model: Any) -> Handle:
    """The handle on a model.

    Raises:
        AdaptInferError: no pruner is attached to the model.
    """
    if not is_attached(model):
        raise AdaptInferError("no pruner is attached to this model; call adaptinfer.attach(model, pruner) first")
    return vars(model)[_HANDLE]


def is_attached(model: Any) -> bool:
    """Whether a pruner is attached to a model."""
    return _HANDLE in getattr(model, "__dict__", {})


class Handle:
    """A pruner on a model. Made by `attach`."""

    def __init__(self, model: Any, pruner: Pruner, early_drop: bool) -> None:
        if is_attached(model):
            raise AdaptInferError("a pruner is attached to this model already; call its handle's detach() first")
        if not isinstance(pruner, Pruner):
            raise AdaptInferError(f"pruner: must be a pruner such as AdaptInfer(budget=64), not {pruner!r}")
        if any(hasattr(module.config, "adaptinfer_original") for module in _attentions(model)):
            raise AdaptInferError(
                "a pruner is attached to a part of this model already; call its handle's detach() first"
            )
        self._family = family_of(model)
        check_cache_kind(model)
        if pruner.positions == "compact" and self._family.rotary is None:
            raise UnsupportedError(
                "positions='compact' renumbers survivors as the published LLaVA code does, which is defined for one "
                f"rotary embedding of one-dimensional positions; {self._family.model_type} has another, so use "
                "positions='keep'"
            )
        check_needs(self._family, pruner)
        self._stage_layers = self._family.stage_layers(pruner.needs)
        self._model: Any = model
        self._base: Any = model.base_model
        self._decoder: Any = model.get_decoder()
        self._ranks = Ranks(model)
        self._shape = ModelShape.from_config(model.config)
        self._call_names = list(inspect.signature(self._decoder.layers[0].forward).parameters)
        self._plans: dict[int, Schedule] = {}
        self._hooks: list[RemovableHandle] = []
        self._hooked_stages: set[int] = set()
        self._lock = threading.Lock()
        self._running = 0
        self._thread = threading.local()
        self._overrides: list[tuple[Any, str, Any, Any]] = []
        self._attention_configs: list[tuple[Any, Any]] = []
        self._latest: Report | None = None
        self._compiled: Compiled | None = None
        self._has_graphs = False
        self.pruner = pruner
        before = pruner if isinstance(pruner, SelectsBefore) else None
        groups = functools.partial(pruner.groups, self._shape.num_layers) if isinstance(pruner, ToMe) else None
        self._recorder = Recorder(self._base, model.config, before.reads, groups) if before else None
        if pruner.schedule is not None:
            pruner.schedule.check(self._shape.num_layers)
            self._check_stages(pruner.schedule)
        self.early_drop = early_drop and not pruner.acts_behind  # which needs the outputs of all tokens
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
            schedule = self.pruner.plan(self._shape.num_layers, vision_tokens, self._stage_layers)
            self._check_stages(schedule)
            self._plans[vision_tokens] = schedule
        return self._plans[vision_tokens]

    def _check_stages(self, schedule: Schedule) -> None:
        if self._recorder is None and any(stage.layer == BEFORE for stage in schedule.stages):
            raise ScheduleError(
                f"stages: {self.pruner.name} scores inside a layer, so it cannot select before the first one (layer "
                f"{BEFORE}); put a method that can before it, as in DivPrune(budget=128) >> AdaptInfer(budget=64)"
            )
        odd = [stage.layer for stage in schedule.stages if stage.layer not in (BEFORE, *self._stage_layers)]
        if odd:
            raise ScheduleError(
                f"stages: layer {odd[0]} has no keys of its own to score with (linear attention, or keys of an earlier "
                f"layer){', or stands before one' if self.pruner.acts_behind else ''}; {self.pruner.name} can prune "
                f"{self._family.model_type} in layers {', '.join(map(str, self._stage_layers))}"
            )

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
        if self._compiled is not None:
            self._compiled.clear()
        self._base = self._decoder = self._compiled = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise AdaptInferError("a model with a pruner attached cannot be copied or pickled; detach first")

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    # -- what graphs are made of, see compiled.py -------------------------------------------------------------------

    @property
    def decoder(self) -> Any:
        """The text model whose layers prune."""
        return self._decoder

    @property
    def family(self) -> Family:
        """What the engine found in the model."""
        return self._family

    @property
    def is_split(self) -> bool:
        """Whether several ranks share the model out."""
        return self._ranks.several

    @property
    def generation(self) -> Generation | None:
        """The call of generate that is going on in this context."""
        return _GENERATIONS.get().get(id(self))

    def bounded_forward(self, kind: type[Forward], layout: PromptLayout, stages: dict[int, tuple[int, ...]]) -> Forward:
        """The state of a prefill from an empty cache whose layout gives bounds."""
        length = layout.length
        parts = (self, self._family, self.pruner, 0, length, length, layout, stages, self.early_drop, self._ranks)
        return kind(*parts, False)

    def uncompile(self, compiled: Compiled) -> None:
        """Run the decoder through these captured graphs no longer; others stay in use."""
        if self._compiled is compiled:
            self._compiled = None

    def compile_with(self, compiled: Compiled) -> None:
        """Run the decoder through captured graphs from now on."""
        before, self._compiled = self._compiled, compiled
        if before is not None:
            before.clear()
        if not self._has_graphs:
            self._has_graphs = True
            self._override(self._decoder, "forward", self._through_graphs(self._decoder.forward))

    def _through_graphs(self, run: Any) -> Any:
        @functools.wraps(run)
        def forward(*args: Any, **kwargs: Any) -> Any:
            state, compiled = self._active(), self._compiled
            if compiled is None or state is None or self._is_disabled():
                return run(*args, **kwargs)
            return compiled.forward(run, state, args, kwargs)

        return forward

    # -- installation -----------------------------------------------------------------------------------------------

    def _install(self) -> None:
        self._before(self._model, self._check_call)
        self._after(self._decoder, functools.partial(_unless_decoded, self._restore_length))
        AttentionInterface.register(_ATTENTION, _attention_in_stage)
        if self._recorder is not None:
            AttentionInterface.register(TOWER_ATTENTION, attention_in_tower)
            self._recorder.install(self._override, self._retune, self._before, self._after, self._encodings)
        for number, layer in enumerate(self._decoder.layers):
            self._before(layer, functools.partial(self._enter_layer, number))
        for attention in _attentions(self._model):
            # Only this module reads the copy, so masks, flags and every other module still see the model's own config.
            original = attention.config
            tapped = copy.copy(original)
            tapped._attn_implementation_internal = _ATTENTION
            tapped.adaptinfer_original, tapped.adaptinfer_owner = original, self
            self._retune(attention, original, tapped)
        if hasattr(self._decoder, "_deepstack_process"):
            self._override(self._decoder, "_deepstack_process", self._deepstack(self._decoder._deepstack_process))
        # Not a pair of hooks: those are skipped when a user interrupts the call.
        self._before(self._base, self._expect_forward)
        self._override(self._base, "forward", self._within_forward(self._base.forward))
        if hasattr(self._model, "generate"):
            self._override(self._model, "generate", self._guarded(self._model.generate))
        for name in ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager"):
            if hasattr(self._model, name):
                self._override(self._model, name, functools.partial(refuse_continuous_batching, name))

    def _before(self, module: nn.Module, hook: Any, first: bool = False) -> None:
        self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=first))

    def _after(self, module: nn.Module, hook: Any) -> None:
        self._hooks.append(module.register_forward_hook(hook))

    def _retune(self, attention: Any, original: Any, tapped: Any) -> None:
        attention.config = tapped
        self._attention_configs.append((attention, original))

    def _override(self, owner: Any, name: str, function: Any) -> None:
        self._overrides.append((owner, name, function, vars(owner).get(name)))
        vars(owner)[name] = function

    def _hook_stages(self, layers: Iterable[int]) -> None:
        """Early drop in the projection and MLP of pruning layers; other layers are spared the hooks."""
        with self._lock:
            for number in set(layers) - self._hooked_stages - {BEFORE}:
                layer = self._decoder.layers[number]
                parts = [getattr(attention_of(layer), name, None) for name in _OUTPUT]
                parts += [getattr(layer, name, None) for name in _MLP]
                for module in filter(None, parts):
                    # Around all other hooks: those of tensor parallelism turn tensors into distributed ones and back.
                    self._before(module, functools.partial(_unless_decoding, self._drop_rows, number), first=True)
                    self._after(module, functools.partial(_unless_decoding, self._restore_rows, number))
                self._hooked_stages.add(number)

    def _within_forward(self, run: Any) -> Any:
        @functools.wraps(run)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() and _is_one_token(arguments_of(run, args, kwargs)):
                return run(*args, **kwargs)  # a compiled decoding step: the cache layers know all that is needed
            return eagerly(*args, **kwargs)

        @_outside_graphs
        def eagerly(*args: Any, **kwargs: Any) -> Any:
            with self._call() as attached:
                if not attached:  # somebody kept this function beyond detach
                    return run(*args, **kwargs)
                self._thread.expected = False
                state = self._begin(arguments_of(run, args, kwargs))
                if state is not None and state.prunes and "logits_to_keep" in kwargs and self._cuts_early():
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
        return bool(self._family.sources) and id(self) not in _GENERATIONS.get()

    def _guarded(self, generate: Any) -> Any:
        @functools.wraps(generate)
        def checked(*args: Any, **kwargs: Any) -> Any:
            with self._call() as attached:
                if not attached or self._is_disabled():
                    return generate(*args, **kwargs)
                arguments = arguments_of(generate, args, kwargs)
                check_generate(self._model, arguments)
                length = prompt_length(arguments)
                most = most_new_tokens(self._model, arguments, length or 0)
                calls = {} if length is None else {id(self): Generation(length, most)}
                token = _GENERATIONS.set({**_GENERATIONS.get(), **calls})
                try:
                    return generate(*args, **kwargs)
                finally:
                    _GENERATIONS.reset(token)

        return checked

    def _deepstack(self, process: Any) -> Any:
        """Qwen3-VL adds vision features behind its first layers, by a mask of the whole prompt."""

        @functools.wraps(process)
        @_outside_graphs
        def add(hidden: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor) -> Tensor:
            forward = self._active()
            if forward is None or forward.segment is None:
                return process(hidden, visual_pos_masks, visual_embeds)
            features = hidden.new_zeros(*visual_pos_masks.shape, hidden.shape[-1])
            places = visual_pos_masks[..., None].to(hidden.device)
            features = features.masked_scatter(places, visual_embeds.to(hidden.device, hidden.dtype))
            return hidden + forward.spread(features)

        return add

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
        if not torch.compiler.is_compiling():
            self._thread.expected = True

    def _is_disabled(self) -> bool:
        return id(self) in _DISABLED.get()

    def _active(self) -> Forward | None:
        forward = None if torch.compiler.is_compiling() else ACTIVE.get()
        return forward if forward is not None and forward.owner is self else None

    # -- hooks, in the order in which a forward meets them ----------------------------------------------------------

    def _check_call(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.compiler.is_compiling() and not self._is_disabled():
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
        seen, length = seen_by(cache), new.shape[1]
        call = _GENERATIONS.get().get(id(self))
        # Static caches count on the device; reading that waits for it, and one new token can do without.
        past: int | None = seen if isinstance(seen, int) else None if length == 1 else int(seen)
        if call is not None and past is not None:
            call.begin(past, length)
        decoding = past is None or (past > 0 and (length == 1 or (call is not None and past >= call.prompt)))
        flash = is_flash(self._model.config.get_text_config()._attn_implementation)
        layout, stages = None, {}
        if ids is not None and not off and not decoding:
            assert past is not None
            prompt = length if call is None else min(length, call.prompt - past)
            mask = arguments.get("attention_mask")
            if call is None:
                check_mask(mask)  # inside generate it may come prepared
            layout = read_layout(ids, real_tokens(mask, past, length), self._family.placeholders, prompt)
            stages = self._stages(layout)
            if stages:
                check_forward(self._model, arguments)
                if call is not None:
                    check_padding(layout.right_padded)
                if flash:
                    check_flash(self._family.sources, stages)
                if cache is not None:
                    check_cache(cache)
                    check_past(self.pruner, cache, past)
                    check_counts(self.pruner, cache)
                if self.early_drop:
                    self._hook_stages(stages)
        tail = length if layout is None else layout.tail
        forward = Forward(
            self, self._family, self.pruner, past, length, tail, layout, stages, self.early_drop, self._ranks, flash
        )
        if BEFORE in stages and ids is not None:
            forward.images = functools.partial(self._images, forward, ids, [] if call is None else call.encoded)
        return forward

    def _encodings(self) -> list[Encoded] | None:
        """Where the images that the model is about to encode are noted; None if nobody would ask for them."""
        forward, call = self._active(), _GENERATIONS.get().get(id(self))
        if self._is_disabled() or (forward is None and call is None):
            return None
        return call.encoded if forward is None else forward.encoded  # pyright: ignore

    def _images(self, forward: Forward, ids: Tensor, earlier: list[Encoded]) -> Images:
        """The images of a call, which it encoded itself, or `generate` did before it."""
        recorder = self._recorder
        assert recorder is not None and forward.layout is not None
        encoded = forward.encoded or earlier
        return Images(
            encoded, ids, forward.layout, recorder.kinds, recorder.tower, recorder.model_type, recorder.projector
        )

    def _stages(self, layout: PromptLayout) -> dict[int, tuple[int, ...]]:
        """Vision tokens that each sample keeps behind each stage; stages at which no sample drops any are left out."""
        left = list(layout.vision_counts)
        if self.pruner.observes:
            return dict.fromkeys(self._family.scoring, layout.vision_counts) if any(left) else {}
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
        named = {**dict(zip(self._call_names[: len(args)], args, strict=True)), **kwargs}
        hidden = named.pop("hidden_states")
        if torch.compiler.is_compiling() and hidden.shape[1] == 1:
            changed = self._decoding_inputs(layer, hidden, named)
        else:
            hidden, changed = self._prefill_inputs(layer, hidden, named)
        return ((hidden,), {**named, **changed}) if args else (args, {**named, **changed, "hidden_states": hidden})

    def _decoding_inputs(self, layer: int, hidden: Tensor, named: dict[str, Any]) -> dict[str, Any]:
        """Of a call without a `Forward`: a decoding step in a compiled graph, or the decoder called by itself."""
        backend = self._model.config.get_text_config()._attn_implementation
        return decoding_inputs(self._family, layer, hidden, named, is_flash(backend))

    @_outside_graphs
    def _prefill_inputs(self, layer: int, hidden: Tensor, named: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        forward = self._active()
        if forward is None:
            if hidden.shape[1] > 1 and getattr(self._thread, "expected", False):
                self._thread.expected = False
                raise AdaptInferError(
                    f"{type(self._base).__name__}.forward was replaced while a pruner is attached, so nothing would be "
                    "pruned; detach before you change it, and attach again"
                )
            return hidden, self._decoding_inputs(layer, hidden, named)
        if forward.length != hidden.shape[1] and layer == 0:
            raise UnsupportedError(
                f"{hidden.shape[1]} tokens reach the decoder where the prompt has {forward.length}: the model does not "
                "put its vision tokens in place of as many placeholder ids, so they cannot be told from text"
            )
        return forward.enter(layer, hidden, named, self._decoder.layers[layer].forward)

    @_outside_graphs
    def _drop_rows(self, layer: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        rows = self._rows_going_on(layer)
        if rows is None:
            return None
        entered = args[0].shape[:2]

        def pick(value: Any) -> Any:
            per_token = isinstance(value, torch.Tensor) and value.shape[:2] == entered
            return gather_tokens(value, rows, dim=1) if per_token else value

        return tuple(map(pick, args)), {name: pick(value) for name, value in kwargs.items()}

    @_outside_graphs
    def _restore_rows(self, layer: int, module: nn.Module, args: Any, output: Any) -> Any:
        rows = self._rows_going_on(layer)
        forward = self._active()
        if rows is None or forward is None:
            return None
        entered = forward.length if forward.segment is None else forward.segment.index.shape[1]
        batch, given = rows.shape

        def restore(part: Tensor) -> Tensor:
            if part.shape[:2] == (batch, given):
                return scatter_tokens(part, rows, entered)
            # Some mixtures of experts return [B * n, d].
            return scatter_tokens(part.view(batch, given, -1), rows, entered).flatten(0, 1)

        return (restore(output[0]), *output[1:]) if isinstance(output, tuple) else restore(output)

    def _rows_going_on(self, layer: int) -> Tensor | None:
        forward = self._active()
        return None if forward is None else forward.dropping(layer)

    @_outside_graphs
    def _restore_length(self, module: nn.Module, args: Any, output: Any) -> Any:
        forward = self._active()
        if forward is None or forward.segment is None:
            return None
        if isinstance(output, tuple):
            return (forward.restore_length(output[0]), *output[1:])
        output.last_hidden_state = forward.restore_length(output.last_hidden_state)
        return output

    def _finish(self, forward: Forward) -> None:
        layout, call = forward.layout, _GENERATIONS.get().get(id(self))
        if layout is None or (forward.past and not any(layout.vision_counts) and not any(layout.unguided_counts)):
            return  # it was no prefill
        forward.check_stages()
        if call is not None:
            if call.reported and not any(layout.vision_counts):
                return  # the text alone, for classifier-free guidance
            call.reported = True
        report = self._make_report(forward, layout)
        self._thread.report = self._latest = report

    def _schedules(self, forward: Forward, layout: PromptLayout) -> tuple[Schedule, ...]:
        """Of each sample; what really happened where counts vary, else the plan."""
        depth = self._shape.num_layers
        if not self.pruner.varies:
            return tuple(self.plan(count) if count else Schedule((), depth) for count in layout.vision_counts)
        return tuple(
            Schedule(tuple(Stage(layer, keeps[row]) for layer, keeps in forward.keeps.items()) if count else (), depth)
            for row, count in enumerate(layout.vision_counts)
        )

    def _make_report(self, forward: Forward, layout: PromptLayout) -> Report:
        assert forward.past is not None
        held, whole = kv_bytes(forward.cache)
        vision = tuple(map(operator.add, layout.vision_counts, layout.unguided_counts))
        return Report(
            shape=self._shape,
            schedules=self._schedules(forward, layout),
            vision_tokens=vision,
            text_tokens=tuple(map(operator.sub, layout.real_counts, vision)),
            cached_tokens=forward.past,
            early_drop=self.early_drop,
            kv_bytes=held,
            vanilla_kv_bytes=whole,
            stages=tuple(forward.records),
        )


def _attentions(model: Any) -> Iterator[Any]:
    """The attention modules of a model's decoder, in order."""
    layers = getattr(model.get_decoder(), "layers", ()) if hasattr(model, "get_decoder") else ()
    return filter(None, map(attention_of, layers))


def _is_one_token(arguments: dict[str, Any]) -> bool:
    new = arguments.get("input_ids")
    new = arguments.get("inputs_embeds") if new is None else new
    return new is not None and new.shape[1] == 1


def _unless_decoding(hook: Any, layer: int, module: nn.Module, args: Any, *rest: Any) -> Any:
    """Keep a hook that a decoding step does not need out of its compiled graph."""
    decoding = torch.compiler.is_compiling() and args[0].shape[-2] == 1
    return None if decoding else hook(layer, module, args, *rest)


def _unless_decoded(hook: Any, module: nn.Module, args: Any, output: Any) -> Any:
    """The same for a hook behind the decoder."""
    decoding = torch.compiler.is_compiling() and output[0].shape[1] == 1
    return None if decoding else hook(module, args, output)


def _attention_in_stage(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The model's own attention function; in a pruning layer it scores first and attends for survivors only."""
    attend, caller, backend = own_attention(module)
    if torch.compiler.is_compiling() and query.shape[2] == 1:
        return attend(caller, query, key, value, attention_mask, **kwargs)
    return _attention_of_call(attend, caller, backend, module, query, key, value, attention_mask, kwargs)


@_outside_graphs
def _attention_of_call(
    attend: Any,
    caller: Any,
    backend: str,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    forward = ACTIVE.get()
    # Another model may run inside a forward of this one, so the layer's number alone does not tell.
    if forward is None or forward.owner is not module.config.adaptinfer_owner:
        return attend(caller, query, key, value, attention_mask, **kwargs)
    if is_flash(backend) and forward.segment is not None:
        kwargs.pop("position_ids", None)  # survivors' gaps would be taken for the seams of packed sequences
    forward.answer(query, key, attention_mask, kwargs)
    layer = module.layer_idx
    if not forward.scores_in(layer):
        return attend(caller, query, key, value, attention_mask, **kwargs)
    used, visible = forward.choose(layer, query, key, attention_mask, kwargs)
    rows = forward.dropping(layer)
    entered = query.shape[2]
    # All rows under the causal kernel cost half a rectangle; survivors alone need an explicit mask and cost all of it.
    # FlashAttention takes no mask, and a block mask would have to be made, for less than it saves.
    if rows is None or 2 * rows.shape[1] > entered or backend not in ("sdpa", "eager"):
        return attend(caller, query, key, value, attention_mask, **kwargs)
    key, value = key[:, :, :used], value[:, :, :used]
    # The mask of a few rows at a time: of all survivors it would be the largest thing in a long prompt's prefill.
    step = max(1, _LARGEST_MASK // (rows.shape[0] * used))
    parts = [
        attend(caller, gather_tokens(query, some, dim=2), key, value, visible(some), **kwargs)[0]
        for some in rows.split(step, dim=1)
    ]
    return scatter_tokens(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), rows, entered), None
