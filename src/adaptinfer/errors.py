"""The errors that AdaptInfer raises on purpose. Each message says what to do instead."""

from __future__ import annotations

from typing import Any


class AdaptInferError(Exception):
    """Base of everything AdaptInfer refuses."""


class UnsupportedError(AdaptInferError, ValueError):
    """The model, the input or the way of decoding is one that pruning would get wrong, so nothing was run."""


class InputError(AdaptInferError, ValueError):
    """A picture, a question or a checkpoint that cannot be used; the message says which and why."""


class MissingExtraError(AdaptInferError, ImportError):
    """A package of an optional extra is not installed; the message has the pip command."""


def check_whole(name: str, value: Any, least: int = 1) -> None:
    """Raise InputError unless an argument is a whole number of at least ``least``; a bool is rejected."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name}: must be a whole number from {least} on, not {value!r}")


def first_line(error: BaseException) -> str:
    """The first line of another library's error, or its type: for one sentence of ours that quotes it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
