"""Captured work: a fixed sequence of kernels on fixed buffers, and how many of them are held. No model is known here.

Whoever replays a graph copies its inputs into the graph's own buffers first and its results out of them afterwards;
between the two the graph belongs to that call alone.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

_MOST_HOPELESS = 256  # keys that are remembered as not to be captured
_WARM_UPS = 2  # kernels are chosen and workspaces allocated in runs that are not captured


def round_up(count: int, step: int) -> int:
    """The next multiple of ``step``."""
    return -(-count // step) * step


class Captured(Protocol):
    """Work that can be done again without Python."""

    outputs: Any
    """What the function returned when it was captured; its tensors are written anew by every replay."""

    def replay(self) -> None:
        """Do all of it again, on what the buffers hold now."""
        ...


class Graphs(Protocol):
    """A way to capture work."""

    def capture(self, function: Callable[[], Any], inputs: list[Tensor]) -> Captured:
        """Run a function, more than once, and remember what it does to the device.

        Args:
            function: reads nothing on the host, and takes nothing from there.
            inputs: the buffers that its caller fills before each replay.

        Raises:
            RuntimeError: the function waits for the device, or cannot be captured for another reason.
        """
        ...

    def in_turn(self) -> Any:
        """A context in which graphs are filled, replayed and read, after all that was done in earlier ones."""
        ...

    def wait(self) -> None:
        """Until all of that is done; buffers may then be freed, whatever stream they were used in."""
        ...


class _CudaGraph:
    def __init__(self, graph: Any, outputs: Any) -> None:
        self._graph, self.outputs = graph, outputs

    def replay(self) -> None:
        self._graph.replay()


class CudaGraphs:
    """CUDA graphs on one device. All share a pool of memory: they run one after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self._stream: Any = None
        self._done: Any = None

    def capture(self, function: Callable[[], Any], inputs: list[Tensor]) -> Captured:
        with torch.cuda.device(self._device):
            if self._stream is None:
                self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UPS):
                    function()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # Thread-local: what other threads do meanwhile, allocate for example, is none of this graph's business.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                outputs = function()
        return _CudaGraph(graph, outputs)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Threads may use streams of their own: each waits, on the device, for the one before."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            if self._done is None:
                self._done = torch.cuda.Event()
            else:
                stream.wait_event(self._done)
            try:
                yield
            finally:
                self._done.record(stream)

    def wait(self) -> None:
        if self._done is not None:
            self._done.synchronize()


class Held(Protocol):
    """An entry of a `Store`."""

    @property
    def bytes(self) -> int:
        """Of its buffers."""
        ...

    @property
    def busy(self) -> bool:
        """Whether a call goes on that will come back to it."""
        ...

    def release(self) -> None:
        """Give away what is still needed of its buffers; it is about to be dropped."""
        ...


_Entry = TypeVar("_Entry", bound=Held)


class Store(Generic[_Entry]):
    """The captured graphs, at most so many; the one used longest ago goes first, but for busy ones.

    Args:
        most: entries.
        wait: called before any is dropped.
    """

    def __init__(self, most: int, wait: Callable[[], None]) -> None:
        self._most, self._wait = most, wait
        self.lock = threading.RLock()
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._hopeless: set[Hashable] = set()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def bytes(self) -> int:
        """Bytes of all entries' buffers."""
        with self.lock:
            return sum(entry.bytes for entry in self._entries.values())

    def get(self, key: Hashable, make: Callable[[], _Entry]) -> _Entry | None:
        """The entry of that key, made if there is none. Hold the lock as long as you use it.

        Returns:
            None where it could not be made before, or where there is no room because all others are busy.

        Raises:
            Exception: whatever ``make`` raises, the first time.
        """
        if key in self._hopeless:
            return None
        if key not in self._entries:
            while len(self._entries) >= self._most:
                oldest = next((known for known, entry in self._entries.items() if not entry.busy), None)
                if oldest is None:
                    return None
                self._entries[oldest].release()
                self._wait()
                del self._entries[oldest]
            try:
                self._entries[key] = make()
            except Exception:  # of whatever kind: it is raised again, and not tried again
                if len(self._hopeless) >= _MOST_HOPELESS:
                    self._hopeless.clear()
                self._hopeless.add(key)
                raise
        self._entries.move_to_end(key)
        return self._entries[key]

    def clear(self) -> None:
        """Drop all entries, busy or not, and forget what could not be captured."""
        with self.lock:
            for entry in self._entries.values():
                entry.release()
            if self._entries:
                self._wait()
            self._entries.clear()
            self._hopeless.clear()
