"""The calls of an attached model: which are running, which belong to `generate`, which run without pruning.

State of a call lives in context variables, so that threads, and models within one thread, never see each other's.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from adaptinfer.engine.vision.tower import Encoded
from adaptinfer.errors import AdaptInferError

PAUSED: ContextVar[frozenset[int]] = ContextVar("adaptinfer_disabled", default=frozenset())
_GENERATIONS: ContextVar[dict[int, Generation]] = ContextVar("adaptinfer_generations", default={})  # noqa: B039


@dataclass
class Generation:
    """One call of generate on an attached model.

    Attributes:
        prompt: tokens of its whole prompt, cached ones included; later tokens are answer, or guesses at it.
        most: the most new tokens that it may make.
        begun: whether its first forward was met.
        reported: whether a prefill of it was reported.
        encoded: images that it encoded before its first forward.
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


class Calls:
    """The calls of one attached model."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = 0
        self._ended = False
        self._thread = threading.local()

    @contextmanager
    def running(self) -> Iterator[bool]:
        """Hold off `end` while a call runs; tells whether the pruner is still attached."""
        with self._lock:
            attached = not self._ended
            self._running += attached
        try:
            yield attached
        finally:
            with self._lock:
                self._running -= attached

    def end(self) -> bool:
        """Let no further call prune; False if that was so already.

        Raises:
            AdaptInferError: a call is running, here or in another thread.
        """
        with self._lock:
            if self._running:
                raise AdaptInferError("the model is running; let its calls end before you detach")
            before, self._ended = self._ended, True
        return not before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run without pruning, in this context."""
        token = PAUSED.set(PAUSED.get() | {id(self)})
        try:
            yield
        finally:
            PAUSED.reset(token)

    @property
    def is_paused(self) -> bool:
        """Whether this context runs without pruning."""
        return id(self) in PAUSED.get()

    @contextmanager
    def generating(self, generation: Generation | None) -> Iterator[None]:
        """Run `generate` in this context; None where the engine cannot tell its prompt."""
        mine = {} if generation is None else {id(self): generation}
        token = _GENERATIONS.set({**_GENERATIONS.get(), **mine})
        try:
            yield
        finally:
            _GENERATIONS.reset(token)

    @property
    def generation(self) -> Generation | None:
        """The call of generate that is going on in this context."""
        return _GENERATIONS.get().get(id(self))

    @property
    def expects_forward(self) -> bool:
        """Whether this thread has entered the model, and not yet the engine's own forward."""
        return getattr(self._thread, "expects_forward", False)

    @expects_forward.setter
    def expects_forward(self, value: bool) -> None:
        self._thread.expects_forward = value
