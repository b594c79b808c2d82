"""A layer's rotary embedding, put on and taken off again, by the model's own function: whatever its convention."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """Rotary embedding R of a layer's tokens.

    Attributes:
        apply: the model's own function: (x [B, H, N, D], cos, sin) -> R x.
        cos, sin: of the N tokens, [B or 1, N, D'], as the layer was given them.
    """

    apply: Callable[[Tensor, Tensor, Tensor], Tensor]
    cos: Tensor
    sin: Tensor

    def of(self, tensor: Tensor) -> Tensor:
        """R x, float32."""
        cos, sin = self._angles(tensor)
        return self.apply(tensor.float(), cos, sin)

    def undo(self, tensor: Tensor) -> Tensor:
        """x from R x, float32.

        Turning back by the same angles is exact but for the factor that long-context variants put on cos and sin,
        which then stands in the result twice; what becomes of ones tells that factor.
        """
        cos, sin = self._angles(tensor)
        ones = torch.ones_like(tensor[:, :1], dtype=torch.float32)
        return self.apply(tensor.float(), cos, -sin) / self.apply(self.apply(ones, cos, sin), cos, -sin)

    def _angles(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        return self.cos.to(tensor.device).float(), self.sin.to(tensor.device).float()


def rotary_function(attention: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """How an attention module turns its queries and keys; None if that cannot be told.

    A layer without rotary embedding in a model that has some (SmolLM3, Cohere 2) leaves them as they are.
    """
    function = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if function is None:
        return None
    if not getattr(attention, "use_rope", True) or (
        type(attention).__name__.startswith("Cohere2") and attention.sliding_window is None
    ):
        return _as_it_is
    names = list(inspect.signature(function).parameters)
    if names[:3] == ["x", "cos", "sin"]:
        return function
    if names[:4] == ["q", "k", "cos", "sin"]:
        return lambda tensor, cos, sin: function(tensor, tensor, cos, sin)[0]
    return None


def _as_it_is(tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return tensor
