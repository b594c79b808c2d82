"""The errors that AdaptInfer raises on purpose. Each message says what to do instead."""

from __future__ import annotations

__all__ = ["AdaptInferError", "InputError", "UnsupportedError"]


class AdaptInferError(Exception):
    """Base of everything AdaptInfer refuses."""


class UnsupportedError(AdaptInferError, ValueError):
    """The model, the input or the way of decoding is one that pruning would get wrong, so nothing was run."""


class InputError(AdaptInferError, ValueError):
    """A picture, a question or a checkpoint that cannot be used; the message says which and why."""
