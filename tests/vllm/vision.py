"""PyPI's torchvision beside a CPU build of torch: its kernels do not load, and its Python code works without them."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

# Where `make test-vllm` puts it, out of sight of anything but these tests: vLLM's own server would fail over it.
FOLDER = str(Path(sys.prefix, "torchvision"))
sys.path.append(FOLDER)

_KERNELS = ("nms", "qnms")
_library = None


def has_torchvision() -> bool:
    """Whether it is installed; if its kernels are missing, they are declared, which is enough for it to be imported."""
    global _library
    try:
        import torchvision
    except ImportError:
        return False
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _library = torch.library.Library("torchvision", "DEF")
        for kernel in _KERNELS:
            _library.define(f"{kernel}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401
    return True


HAS_TORCHVISION = has_torchvision()
