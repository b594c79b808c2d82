"""Tensor parallelism: every rank holds some heads, and all must choose the same tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor

from adaptinfer.errors import UnsupportedError


class Ranks:
    """The process groups over which a model may be split, as far as it shows them.

    Which of them share out the heads is settled by counting heads when a layer runs: ranks that share out experts,
    parameters (FSDP) or samples hold all heads, and adding their scores up would be wrong.
    """

    def __init__(self, model: Any) -> None:
        """Raises:
        UnsupportedError: the model says that it is split, and shows no process group.
        """
        self._groups = list(dict.fromkeys(_groups(model)))
        size = getattr(model, "_tp_size", None) or 1
        if size > 1 and not self._groups:
            raise UnsupportedError(f"the model is split over {size} ranks, but {_NO_GROUP}")

    @property
    def several(self) -> bool:
        """Whether there is any such group."""
        return bool(self._groups)

    def total(self, held: int, heads: int) -> Callable[[Tensor], Tensor]:
        """A function that adds a tensor up over the ranks that share out a layer's heads.

        Args:
            held: heads of the layer on this rank.
            heads: on all of them; if they are as many, the function does nothing.

        Raises:
            UnsupportedError: heads are elsewhere, and no process group has the right number of ranks.
        """
        if held == heads or not (dist.is_available() and dist.is_initialized()):
            return _as_it_is
        group = next((group for group in self._groups if held * dist.get_world_size(group) == heads), None)
        if group is None:
            raise UnsupportedError(f"this rank holds {held} of {heads} attention heads, but {_NO_GROUP}")
        return functools.partial(sum_over_ranks, group=group)


_NO_GROUP = (
    "the process group of its tensor parallelism cannot be told from it, so ranks would choose different tokens; load "
    "it with transformers' own tensor parallelism (tp_plan='auto'), or open an issue"
)


def sum_over_ranks(tensor: Tensor, group: Any) -> Tensor:
    """The sum of a tensor over the ranks of a group; the same on each of them, bit for bit."""
    tensor = tensor.contiguous().clone()  # the reduction works in place
    dist.all_reduce(tensor, group=group)
    return tensor


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _groups(model: Any) -> Iterator[Any]:
    for mesh in _meshes(model):
        if mesh is None or (mesh.ndim != 1 and "tp" not in (mesh.mesh_dim_names or ())):
            continue
        yield mesh.get_group(0 if mesh.ndim == 1 else "tp")


def _meshes(model: Any) -> Iterator[Any]:
    """Device meshes: of the object that from_pretrained returned, and of its parts, should one of them be attached to.

    Split modules of transformers 5.3 name theirs; since 5.17, as with torch's own tensor parallelism, weights are
    DTensors that do.
    """
    yield getattr(model, "_device_mesh", None)
    for module in model.get_decoder().modules():
        yield getattr(module, "_hf_device_mesh", None)
        for parameter in module.parameters(recurse=False):
            yield getattr(parameter, "device_mesh", None)
