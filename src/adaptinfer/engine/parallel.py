"""Tensor parallelism: every rank holds some heads, and all must choose the same tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from adaptinfer.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["sum_over_ranks"]


def sum_over_ranks(model: Any) -> Callable[[Tensor], Tensor]:
    """A function that adds a tensor up over the model's ranks of tensor parallelism; one that does nothing without.

    Raises:
        UnsupportedError: the model is split, and the group of its ranks cannot be found.
    """
    size = getattr(model, "_tp_size", None) or 1
    if size == 1:
        return lambda tensor: tensor
    group = _group(model, size)

    def total(tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        dist.all_reduce(tensor, group=group)
        return tensor

    return total


def _group(model: Any, size: int) -> Any:
    mesh = getattr(model, "_device_mesh", None)
    if mesh is not None:
        return mesh.get_group("tp" if "tp" in (mesh.mesh_dim_names or ()) else 0)
    if dist.is_initialized() and dist.get_world_size() == size:
        return dist.group.WORLD
    raise UnsupportedError(
        f"the model is split over {size} ranks, but their process group cannot be told from it; use tensor parallelism "
        "over all processes, or open an issue"
    )
