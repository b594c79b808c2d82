"""Names that stood at the root of the package in 0.1 and have moved: the one table of them, removed at 0.2."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

MOVED = {
    "calibration.result": ("Calibration",),
    "engine.handle": ("Handle",),
    "engine.graphs.compiled": ("Compiled",),
    "pruners": (
        *("METHODS", "Random", "Stride", "TextGuided", "DART", "FEATHER", "FastV", "FitPrune", "PyramidDrop"),
        *("SparseVLM", "SparseVLMPlus", "V2Drop", "CDPruner", "Composed", "Coverage", "DivPrune", "FasterVLM"),
        *("HiRED", "Pool", "PruMerge", "PruMergePlus", "RandomBefore", "STARPro", "Scans", "StrideBefore", "ToMe"),
        *("VScan", "VisPruner", "VisionZip"),
    ),
    "resize": ("Resize",),
    "schedule": ("PRESETS", "ModelShape"),
}
"""Old root names by the module of `adaptinfer` that has them now."""


def moved(name: str) -> Any:
    """What an old root name stands for, with a warning at the line that used it. Raises AttributeError for others."""
    for module, names in MOVED.items():
        if name in names:
            warnings.warn(
                f"adaptinfer.{name} has moved to adaptinfer.{module}.{name}; the old name is removed at 0.2",
                DeprecationWarning,
                stacklevel=3,  # past the package's __getattr__
            )
            return getattr(importlib.import_module(f"adaptinfer.{module}"), name)
    raise AttributeError(f"module 'adaptinfer' has no attribute {name!r}")
