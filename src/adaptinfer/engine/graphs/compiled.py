"""`adaptinfer.compile`: an attached model whose decoder is captured, so that a GPU never waits for Python."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from adaptinfer.engine.cache.access import cache_argument, is_plain
from adaptinfer.engine.calls import Generation
from adaptinfer.engine.forward import Forward
from adaptinfer.engine.graphs.capture import CudaGraphs, Graphs, Store
from adaptinfer.engine.graphs.decoding import DecodingGraph, Lease, groups_of
from adaptinfer.engine.graphs.prefill import CACHE_NAMES, PrefillGraph, bucket_of
from adaptinfer.engine.guards import arguments_of
from adaptinfer.engine.handle import Handle, handle_of
from adaptinfer.errors import check_whole
from adaptinfer.schedule import BEFORE

_MOST_ROOM = 256  # tokens that a decoding graph has room for at most; a longer answer moves on to another graph
_GIVEN = ("inputs_embeds", "attention_mask", "position_ids", "input_ids", "use_cache", *CACHE_NAMES)


def compile(model: Any, *, max_graphs: int = 16, bucket: int = 16) -> Compiled:
    """Capture the decoder of an attached model in CUDA graphs, so that a GPU never waits for Python; same answers.

    A prefill is captured when a prompt of a new bucket is met (batch, counts of vision tokens, length rounded up), one
    token of decoding when `generate` first needs its size. Capturing takes about as long as four runs. What cannot be
    captured runs as before; the first time, a warning says why.

    Weights that change in place are seen. After replacing modules, adding adapters or hooks, or moving the model, call
    it again.

    Args:
        model: with a pruner attached, on one CUDA device, attention sdpa or eager.
        max_graphs: captured graphs held at most, prefills and decoding together; the one used longest ago goes first.
        bucket: lengths of prompts and caches are rounded up to multiples of so many tokens. The tokens that fill up are
            masked; a smaller number computes fewer of them and captures more graphs. 1 pads nothing.

    Returns:
        What is held: ``len(compiled)`` graphs, ``compiled.bytes``, ``compiled.clear()``. It ends with the handle's
        ``detach()``, or before with ``compiled.remove()``.

    Raises:
        AdaptInferError: no pruner is attached to the model.
        InputError: ``max_graphs`` or ``bucket`` is no whole number from 1 on.
    """
    handle = handle_of(model)
    device = next(handle.attachment.decoder.parameters()).device
    graphs = CudaGraphs(device) if device.type == "cuda" else None
    return Compiled(handle, graphs, device, max_graphs, bucket)


class Compiled:
    """The captured graphs of a model. Made by `compile`."""

    def __init__(
        self, handle: Handle, graphs: Graphs | None, device: torch.device, max_graphs: int, bucket: int
    ) -> None:
        for name, value in (("max_graphs", max_graphs), ("bucket", bucket)):
            check_whole(name, value)
        self._handle, self._attachment, self._device, self._bucket = handle, handle.attachment, device, bucket
        self._store: Store[Any] = Store(max_graphs, lambda: self._graphs.wait())
        self._said: set[str] = set()
        self._decoder: Any = handle.attachment.decoder
        self._cache_name = next(
            (name for name in CACHE_NAMES if name in inspect.signature(self._decoder.forward).parameters), "cache"
        )
        self._eager = _backend(self._decoder) == "eager"
        self._hooks = self._hooks_now()
        reason = "no CUDA device" if graphs is None else self._reason_of_model()
        self._graphs: Any = graphs
        if reason is not None:
            self._say(reason)
        else:
            handle.run_decoder_by(self)

    def __len__(self) -> int:
        return len(self._store)

    @property
    def bytes(self) -> int:
        """Bytes of the graphs' inputs, keys and values; what CUDA holds for what lies between comes on top."""
        return self._store.bytes

    def clear(self) -> None:
        """Drop all graphs; they are captured again as prompts come. Caches that lie in them get copies of their own."""
        self._store.clear()

    def remove(self) -> None:
        """Run the model uncompiled again, and drop all graphs. Doing it twice is harmless."""
        self._handle.stop_running_by(self)
        self.clear()

    # -- in place of the decoder's forward --------------------------------------------------------------------------

    def forward(self, run: Callable[..., Any], state: Forward, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run the decoder, captured or not.

        Args:
            run: its own forward.
            state: of the call.
            args: the call's positional arguments.
            kwargs: its named arguments.
        """
        arguments = arguments_of(run, args, kwargs)
        if state.layout is not None:
            reason, work = self._reason_of_prefill(state, arguments), self._prefill
        elif state.length == 1 and state.past and self._attachment.calls.generation is not None:
            reason, work = self._reason_of_decoding(arguments), self._decode
        else:
            return run(*args, **kwargs)
        if reason is None:
            try:
                output = work(run, state, arguments)
            except _CannotCapture as error:
                reason = str(error)
            else:
                if output is not None:
                    return output
        if reason:
            self._say(reason)
        return run(*args, **kwargs)

    def _prefill(self, run: Callable[..., Any], state: Forward, arguments: dict[str, Any]) -> Any:
        layout, embeddings, options = state.layout, arguments["inputs_embeds"], _options(arguments)
        assert layout is not None
        positions = arguments.get("position_ids")
        if positions is None:
            positions = torch.arange(layout.length, device=embeddings.device)[None]
        bucket = bucket_of(layout, state.plan.stages, self._bucket)
        cache = cache_argument(arguments)
        wanted = arguments.get("use_cache")
        if cache is None and (getattr(self._decoder.config, "use_cache", True) if wanted is None else wanted):
            cache = DynamicCache(config=self._decoder.config)

        def make() -> PrefillGraph:
            return PrefillGraph(
                bucket,
                self._graphs,
                run,
                self._cache_name,
                (embeddings, positions),
                options,
                self._attachment,
                self._eager,
                len(self._decoder.layers),
            )

        with self._turn():
            key = self._key("prefill", bucket, (embeddings, positions), options)
            graph: PrefillGraph | None = self._made(key, make)
            return None if graph is None else graph.run(embeddings, positions, state, cache)

    def _decode(self, run: Callable[..., Any], state: Forward, arguments: dict[str, Any]) -> Any:
        call, cache, embeddings = (
            self._attachment.calls.generation,
            cache_argument(arguments),
            arguments["inputs_embeds"],
        )
        assert call is not None and state.past is not None
        positions = arguments.get("position_ids")
        if positions is None:
            positions = torch.full((embeddings.shape[0], 1), state.past, device=embeddings.device)
        with self._turn():
            lease: Lease | None = getattr(cache.layers[0], "lease", None)
            if lease is not None and (lease is not call.lease or lease.full):
                lease.settle()
                lease = None
            if lease is None:
                if call.lease is not None and not call.lease.full:
                    return None  # this way to decode looks at its cache: beams, guesses
                lease = self._lend(run, state.past, call, cache, (embeddings, positions), arguments)
            if lease is None:
                return None
            hidden = lease.step(embeddings, positions)
        kind = lease.graph.output
        return kind(**{"last_hidden_state": hidden, self._cache_name: cache})

    def _lend(
        self,
        run: Callable[..., Any],
        past: int,
        call: Generation,
        cache: Any,
        like: tuple[Tensor, Tensor],
        arguments: dict[str, Any],
    ) -> Lease | None:
        """A lease on a graph that has room for what is left of the answer; None if no graph is free."""
        room = max(1, min(_MOST_ROOM, call.prompt + call.most - past))
        options = _options(arguments)
        histories = groups_of(cache, room, self._bucket)
        groups = tuple(histories)
        stored = [(layer.keys, layer.values) for layer in cache.layers]

        def make() -> DecodingGraph:
            return DecodingGraph(
                groups,
                self._graphs,
                run,
                self._cache_name,
                like,
                stored,
                options,
                self._attachment,
                self._eager,
            )

        graph: DecodingGraph | None = self._made(self._key("decode", groups, like, options), make)
        if graph is None or graph.busy:
            return None
        graph.release()
        graph.begin(cache, histories, arguments.get("attention_mask"))
        call.lease = Lease(graph, cache, past, call, self._turn)
        return call.lease

    # -- graphs -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One call at a time fills, replays and reads buffers, on the host and on the device."""
        with self._store.lock, self._graphs.in_turn():
            yield

    def _key(self, kind: str, what: Hashable, like: tuple[Tensor, Tensor], options: dict[str, Any]) -> Hashable:
        embeddings, positions = like
        layers = self._decoder.layers
        weights = tuple(next(layer.parameters()).data_ptr() for layer in (layers[0], layers[-1]))
        shapes = embeddings.shape[0], embeddings.dtype, positions.shape[:-1], positions.dtype
        return kind, what, shapes, tuple(sorted(options.items())), weights

    def _made(self, key: Hashable, make: Callable[[], Any]) -> Any:
        def captured() -> Any:
            # Buffers outlive the call, so they must be no inference tensors.
            with torch.inference_mode(False), torch.no_grad():
                return make()

        try:
            return self._store.get(key, captured)
        except Exception as error:
            first = (str(error) or type(error).__name__).splitlines()[0]
            raise _CannotCapture(f"capturing failed ({type(error).__name__}: {first})") from error

    # -- what is not captured ---------------------------------------------------------------------------------------

    def _say(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(f"adaptinfer.compile: {reason}; this runs uncompiled, with the same answers", stacklevel=2)

    def _reason_of_model(self) -> str | None:
        family, pruner, decoder = self._attachment.family, self._attachment.pruner, self._decoder
        backend = _backend(decoder)
        if backend not in ("sdpa", "eager"):
            return f"attention backend {backend!r} reads masks or positions on the host; load the model with 'sdpa'"
        if family.recurrent or family.sources or hasattr(decoder, "_deepstack_process"):
            return (
                f"{family.model_type} has layers without attention, layers that share keys, or vision features between "
                "its layers, which is not captured yet"
            )
        if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=decoder.config).layers):
            return f"{family.model_type} has sliding windows, which are not captured yet"
        if not getattr(decoder.config, "is_causal", True) or getattr(
            decoder.config, "use_bidirectional_attention", False
        ):
            return f"{family.model_type} reads its prompt in both directions, which is not captured yet"
        if pruner.capabilities.varies:
            return f"{pruner.name} settles while it runs how many tokens stay, and a graph must know beforehand"
        if pruner.capabilities.observes:
            return f"{pruner.name} looks at every layer, and nothing is dropped"
        if self._attachment.ranks.several:
            return "tensor parallelism adds scores up over ranks, which is not captured yet"
        if len({parameter.device for parameter in decoder.parameters()}) > 1:
            return "the decoder lies on several devices"
        return None

    def _reason_of_prefill(self, state: Forward, arguments: dict[str, Any]) -> str | None:
        layout, cache = state.layout, cache_argument(arguments)
        assert layout is not None
        if state.past:
            return "" if not state.plan.stages else "a prompt on a cache that holds tokens already is not captured"
        if BEFORE in state.plan.stages:
            return f"{self._attachment.pruner.name} selects before the language model, which is not captured"
        call = self._attachment.calls.generation
        if call is not None and call.prompt < state.length:
            return "a prefill with guesses of assisted decoding is not captured"
        if cache is not None and not _is_plain(cache):
            return f"a {type(cache).__name__} of this kind is not captured; leave cache_implementation unset"
        mask = arguments.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            return "a mask that is prepared for every pair of tokens is not captured"
        return self._reason_of_call(arguments)

    def _reason_of_decoding(self, arguments: dict[str, Any]) -> str | None:
        cache, mask = cache_argument(arguments), arguments.get("attention_mask")
        if cache is None or not _is_plain(cache) or len(cache.layers) != len(self._decoder.layers):
            return ""
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            return ""
        return self._reason_of_call(arguments)

    def _reason_of_call(self, arguments: dict[str, Any]) -> str | None:
        embeddings = arguments.get("inputs_embeds")
        if embeddings is None:
            return "a decoder that embeds its tokens itself is not captured"
        if embeddings.device != self._device:
            return "the model was moved to another device; call adaptinfer.compile again"
        if torch.is_grad_enabled():
            return "gradients are on; run the model inside torch.no_grad()"
        if torch.is_autocast_enabled(self._device.type):
            return "autocast is on; load the model in the wanted dtype"
        if self._decoder.training:
            return "the model is in training mode; call model.eval()"
        if self._hooks_now() != self._hooks:
            return "hooks were put on the decoder's layers, which a graph would not call; remove them"
        odd = next((name for name, value in _options(arguments).items() if not _is_plain_option(name, value)), None)
        return None if odd is None else f"the decoder's argument {odd} is not captured"

    def _hooks_now(self) -> list[tuple[int, ...]]:
        modules = self._decoder.layers
        return [(*module._forward_pre_hooks, *module._forward_hooks) for module in modules]


class _CannotCapture(Exception):
    """Why a call runs uncompiled."""


def _backend(decoder: Any) -> str:
    return decoder.config._attn_implementation


def _options(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the decoder besides those that every call has."""
    return {name: value for name, value in arguments.items() if name not in _GIVEN and value is not None}


def _is_plain_option(name: str, value: Any) -> bool:
    if name.startswith("output_") or name == "return_dict":
        return value is (name == "return_dict")
    return isinstance(value, (bool, int, float, str))


def _is_plain(cache: Any) -> bool:
    """Whether a cache is dynamic in all its layers, and on the device."""
    layers = getattr(cache, "layers", None)
    return (
        isinstance(cache, Cache)
        and layers is not None
        and not getattr(cache, "offloading", False)
        and getattr(cache, "layer_class_to_replicate", None) in (None, DynamicLayer)
        and all(map(is_plain, layers))
    )
