"""Where the time of a prefill goes: each moment belongs to one named part, so the parts add up to the whole.

Spans nest, and a moment belongs to the innermost. They are put around `forward` of modules and around a few functions,
not around operators: some hundred marks a prefill, against tens of thousands of a tracing profiler, so what is measured
is hardly disturbed. How much, a caller tells by timing the same pass unwatched beside it.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from adaptinfer.engine.families import attention_of
from adaptinfer.engine.hooks import STAGE_WORK
from adaptinfer.errors import InputError

if TYPE_CHECKING:
    from adaptinfer.bench.timing import Clock, Mark
    from adaptinfer.pruners.contracts import Pruner

TOWER, PROJECTOR, HEAD = "vision tower", "projector", "head"
OUTSIDE = "embeddings, merge, layout"
BETWEEN = "decoder, around its layers"
NORMS, QKV, ROTARY, ATTENTION = "norms", "q, k, v", "rotary embedding", "attention"
OUTPUT, MLP, REST = "output projection", "MLP", "residuals, cache, Python"
SCORING, STAGES = "scoring and choosing", "stages: gathers, masks, scatters"
IN_LAYERS = (NORMS, QKV, ROTARY, ATTENTION, OUTPUT, MLP, SCORING, STAGES, REST)
PARTS = (TOWER, PROJECTOR, OUTSIDE, *IN_LAYERS, BETWEEN, HEAD)

_CLOSED = frozenset({TOWER, PROJECTOR, QKV, OUTPUT, MLP, HEAD})  # what runs inside belongs to them
_TOWERS, _PROJECTORS = ("vision_tower", "visual"), ("multi_modal_projector",)
_PROJECTIONS = {"q_proj": QKV, "k_proj": QKV, "v_proj": QKV, "o_proj": OUTPUT}
_ROTARY = "apply_rotary_pos_emb"  # in transformers' file of the language model


class Watch:
    """Put around a model with `on`, asked for the parts of one pass with `parts`.

    Args:
        clock: of the model's device.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._open: list[str] = []
        self.marks: list[tuple[str | None, Mark]] = []  # from this mark on time belongs to this part

    @contextmanager
    def on(self, model: Any) -> Iterator[None]:
        """Watch a model that no pruner is attached to; attach inside. The model is as before afterwards.

        Raises:
            InputError: its attention backend cannot be watched.
        """
        decoder = model.get_decoder()
        backend = model.config.get_text_config()._attn_implementation
        if backend != "sdpa":
            raise InputError(f"attention {backend!r}: only 'sdpa' can be watched")
        with ExitStack() as stack:
            for module, part in self._modules(model, decoder):
                stack.enter_context(_replaced(module, "forward", self.timed(module.forward, part)))
            code = sys.modules[type(attention_of(decoder.layers[0])).__module__]
            if hasattr(code, _ROTARY):
                stack.enter_context(_replaced(code, _ROTARY, self.timed(getattr(code, _ROTARY), ROTARY)))
            for owner, name in STAGE_WORK:
                stack.enter_context(_replaced(owner, name, self.timed(getattr(owner, name), STAGES)))
            own = ALL_ATTENTION_FUNCTIONS[backend]
            ALL_ATTENTION_FUNCTIONS[backend] = self.timed(own, ATTENTION)
            try:
                yield
            finally:
                ALL_ATTENTION_FUNCTIONS[backend] = own

    def scoring(self, pruner: Pruner | None) -> Any:
        """The pruner, with what it spends on scores and choice as a part of its own."""
        watched: Any = copy.copy(pruner)
        if pruner is not None:
            object.__setattr__(watched, "select", self.timed(pruner.select, SCORING))  # the dataclass is frozen
        return watched

    def parts(self, work: Callable[[], Any], outermost: str = OUTSIDE) -> dict[str, float]:
        """Milliseconds of each part of one piece of work, those of `PARTS` that occurred; they add up to all of it."""
        self._clock.synchronise()
        self.marks.clear()
        self.timed(work, outermost, starts=True)()
        self._clock.synchronise()
        spent: Counter[str] = Counter()
        for (part, start), (_, end) in zip(self.marks, self.marks[1:], strict=False):
            if part is not None:
                spent[part] += self._clock.device_ms(start, end)  # pyright: ignore[reportArgumentType]
        return {part: spent[part] for part in PARTS if part in spent}

    def timed(self, function: Any, part: str, starts: bool = False) -> Any:
        """A function whose time belongs to a part, while some work is watched."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if (not self._open and not starts) or (self._open and self._open[-1] in _CLOSED):
                return function(*args, **kwargs)
            self._open.append(part)
            self.marks.append((part, self._clock.mark()))
            try:
                return function(*args, **kwargs)
            finally:
                self._open.pop()
                self.marks.append((self._open[-1] if self._open else None, self._clock.mark()))

        return timed

    @staticmethod
    def _modules(model: Any, decoder: Any) -> Iterator[tuple[Any, str]]:
        base = model.base_model
        for names, part in ((_TOWERS, TOWER), (_PROJECTORS, PROJECTOR)):
            yield from ((getattr(base, name), part) for name in names if hasattr(base, name))
        yield model.get_output_embeddings(), HEAD
        yield decoder, BETWEEN
        for layer in decoder.layers:
            yield layer, REST
            yield layer.mlp, MLP
            attention = attention_of(layer)
            yield from ((getattr(attention, name), part) for name, part in _PROJECTIONS.items())
            for module in (*layer.children(), *attention.children()):
                if "norm" in type(module).__name__.lower():
                    yield module, NORMS


@contextmanager
def _replaced(owner: Any, name: str, function: Any) -> Iterator[None]:
    """An attribute of a module, a class or an object, replaced for as long as this lasts."""
    own = vars(owner).get(name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)
