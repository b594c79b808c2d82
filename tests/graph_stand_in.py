"""CUDA graphs for the CPU: a tape of operators on fixed tensors, played again without a line of the captured Python.

A graph's traps become wrong answers or errors here: what Python decided while it was captured stays decided; what is
read on the host, or comes from there, is refused; after its turn every buffer that is not state is spoiled, so that a
result that was not copied out, or an input that was not copied in, shows.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

WARM_UPS = 2
aten = torch.ops.aten
READS = {  # wait for the device to learn a value or a shape
    aten._local_scalar_dense,
    aten.nonzero,
    aten.is_nonzero,
    aten.equal,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.repeat_interleave,
    aten.bincount,
}
EMPTY = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}


class HostRead(RuntimeError):
    """The captured function waits for the device."""


def spoil(tensor: Tensor) -> None:
    """Write what nobody should ever read."""
    if tensor.is_floating_point():
        tensor.fill_(float("nan"))
    elif tensor.dtype == torch.bool:
        tensor.logical_not_()
    elif tensor.numel():
        tensor.fill_(torch.iinfo(tensor.dtype).max // 3)


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Recorder(TorchDispatchMode):
    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = func.overloadpacket
        indices = [i for i in (args[1] if packet in (aten.index, aten.index_put) else ()) if i is not None]
        if packet in READS or any(index.dtype == torch.bool for index in indices):
            raise HostRead(f"{func} reads the device on the host")
        if packet in (aten.lift_fresh, aten.lift_fresh_copy) and args[0].numel():
            raise HostRead("a tensor is made from values of the host")
        result = func(*args, **kwargs)
        if packet in EMPTY:
            spoil(result)
        given = {storage(part) for part in tree_flatten((args, kwargs))[0] if isinstance(part, Tensor)}
        outputs = [part for part in tree_flatten(result)[0] if isinstance(part, Tensor)]
        self.tape.steps.append((func, args, kwargs, [None if storage(part) in given else part for part in outputs]))
        return result


class Tape:
    def __init__(self, inputs: list[Tensor]) -> None:
        self.inputs, self.steps, self.outputs, self.replays = inputs, [], None, 0

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for func, args, kwargs, recorded in self.steps:
                results = [part for part in tree_flatten(func(*args, **kwargs))[0] if isinstance(part, Tensor)]
                for old, new in zip(recorded, results, strict=True):
                    if old is not None:
                        old.copy_(new)

    def spoil(self) -> None:
        with torch.no_grad():
            for part in self.inputs:
                spoil(part)
            for *_, recorded in self.steps:
                for part in recorded:
                    if part is not None and part.numel():
                        spoil(part)


class StandIn:
    """In the place of `CudaGraphs`."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []
        self._depth = 0

    def capture(self, function, inputs) -> Any:
        for _ in range(WARM_UPS):
            function()
        tape = Tape(inputs)
        with _Recorder(tape):
            tape.outputs = function()
        self.tapes.append(tape)
        tape.spoil()
        return tape

    def wait(self) -> None:
        """Nothing here runs on."""

    @contextmanager
    def in_turn(self):
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                for tape in self.tapes:
                    tape.spoil()
