"""Peak memory of one pass, and the memory that is free before a model is made."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

import torch


class PeakMemory:
    """The most memory that was in use between `start` and `read`.

    On a GPU that is torch's own count (``max_memory_allocated``). On Linux it is the resident memory of the process,
    whose high-water mark the kernel lets a process reset; it has the allocator's habits in it, so differences of a few
    MB are noise. Elsewhere there is no such figure: ``available`` is False.

    On a CPU `start` gives freed memory back to the system, or a pass would use that and show no peak. What follows has
    to ask for it again, so do not time that pass.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._on_gpu = device.startswith("cuda")
        self._before = 0
        self.available = self._on_gpu or self._reset_process()

    def start(self) -> None:
        """Forget earlier peaks."""
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        elif self.available:
            _trim()
            self._reset_process()
            self._before = _status("VmRSS")

    def read(self) -> tuple[int, int] | None:
        """Bytes at the peak, weights included, and how far that is above what was held at `start`."""
        if not self.available:
            return None
        peak = torch.cuda.max_memory_allocated(self._device) if self._on_gpu else _status("VmHWM")
        return peak, max(0, peak - self._before)

    @staticmethod
    def _reset_process() -> bool:
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the high-water mark, nothing else
            return _status("VmHWM") > 0
        except OSError:
            return False


def free_bytes(device: str) -> int | None:
    """Memory that a model could take on a device; None if that cannot be told."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    free = [_field("/proc/meminfo", "MemAvailable"), _control_group_room()]
    known = [room for room in free if room is not None]
    return min(known, default=None)


def _control_group_room() -> int | None:
    """What a container may still take, by version 2 of Linux's control groups."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    cache = _field("/sys/fs/cgroup/memory.stat", "file", unit=1) or 0  # given back when it is needed
    return None if limit == "max" else max(0, int(limit) - used + cache)


def _trim() -> None:
    """Have glibc give freed memory back; nothing where there is another library."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _status(name: str) -> int:
    return _field(f"/proc/{os.getpid()}/status", name) or 0


def _field(path: str, name: str, unit: int = 1024) -> int | None:
    """A number from a file of lines such as ``VmHWM:  1234 kB``, in bytes."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = next((line.split() for line in lines if line.split()[:1] in ([name], [f"{name}:"])), None)
    return None if found is None else unit * int(found[1])
