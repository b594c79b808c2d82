"""Attach a pruner to a transformers model in place, and run without it for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from adaptinfer.engine.handle import Handle, handle_of
from adaptinfer.pruners.contracts import Pruner


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
        AdaptInferError: a pruner is attached already, or ``pruner`` is not one.
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
    with handle_of(model).attachment.calls.paused():
        yield
