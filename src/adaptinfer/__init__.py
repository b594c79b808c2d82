"""AdaptInfer: vision-language models that answer faster, by pruning vision tokens while they read the prompt.

Names are imported on first use, so that ``adaptinfer --help`` need not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from adaptinfer.version import __version__ as __version__

if TYPE_CHECKING:
    from adaptinfer.calibration.result import Calibration
    from adaptinfer.calibration.run import calibrate
    from adaptinfer.engine.attach import attach, disabled
    from adaptinfer.engine.cache.prefix import PrefixCache
    from adaptinfer.engine.graphs.compiled import Compiled, compile
    from adaptinfer.engine.handle import Handle
    from adaptinfer.engine.report import Report
    from adaptinfer.errors import AdaptInferError, InputError, UnsupportedError
    from adaptinfer.pruners import (
        DART,
        FEATHER,
        METHODS,
        AdaptInfer,
        AdaptInferPlus,
        CDPruner,
        Composed,
        Coverage,
        DivPrune,
        FasterVLM,
        FastV,
        FitPrune,
        HiRED,
        Pool,
        PruMerge,
        PruMergePlus,
        Pruner,
        PrunerError,
        PyramidDrop,
        Random,
        RandomBefore,
        Scans,
        SparseVLM,
        SparseVLMPlus,
        STARPro,
        Stride,
        StrideBefore,
        TextGuided,
        ToMe,
        V2Drop,
        VisionZip,
        VisPruner,
        VScan,
    )
    from adaptinfer.pruners.config import from_pretrained
    from adaptinfer.resize import Resize
    from adaptinfer.schedule import PRESETS, ModelShape, Schedule, ScheduleError, Stage, preset, solve

__all__ = [
    "DART",
    "FEATHER",
    "METHODS",
    "PRESETS",
    "AdaptInfer",
    "AdaptInferError",
    "AdaptInferPlus",
    "CDPruner",
    "Calibration",
    "Compiled",
    "Composed",
    "Coverage",
    "DivPrune",
    "FastV",
    "FasterVLM",
    "FitPrune",
    "Handle",
    "HiRED",
    "InputError",
    "ModelShape",
    "Pool",
    "PrefixCache",
    "PruMerge",
    "PruMergePlus",
    "Pruner",
    "PrunerError",
    "PyramidDrop",
    "Random",
    "RandomBefore",
    "Report",
    "Resize",
    "STARPro",
    "Scans",
    "Schedule",
    "ScheduleError",
    "SparseVLM",
    "SparseVLMPlus",
    "Stage",
    "Stride",
    "StrideBefore",
    "TextGuided",
    "ToMe",
    "UnsupportedError",
    "V2Drop",
    "VScan",
    "VisPruner",
    "VisionZip",
    "attach",
    "calibrate",
    "compile",
    "disabled",
    "from_pretrained",
    "preset",
    "solve",
]

_HOME = {
    "calibration.result": ("Calibration",),
    "calibration.run": ("calibrate",),
    "engine.attach": ("attach", "disabled"),
    "engine.handle": ("Handle",),
    "engine.graphs.compiled": ("Compiled", "compile"),
    "engine.report": ("Report",),
    "errors": ("AdaptInferError", "InputError", "UnsupportedError"),
    "engine.cache.prefix": ("PrefixCache",),
    "pruners": (
        *("METHODS", "AdaptInfer", "AdaptInferPlus", "Pruner", "PrunerError", "Random", "Stride", "TextGuided"),
        *("DART", "FEATHER", "FastV", "FitPrune", "PyramidDrop", "SparseVLM", "SparseVLMPlus", "V2Drop"),
        *("CDPruner", "Composed", "Coverage", "DivPrune", "FasterVLM", "HiRED", "Pool", "PruMerge", "PruMergePlus"),
        *("RandomBefore", "STARPro", "Scans", "StrideBefore", "ToMe", "VScan", "VisPruner", "VisionZip"),
    ),
    "pruners.config": ("from_pretrained",),
    "resize": ("Resize",),
    "schedule": ("PRESETS", "ModelShape", "Schedule", "ScheduleError", "Stage", "preset", "solve"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
_MODULES = ("embedded", "functional")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"adaptinfer.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'adaptinfer' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"adaptinfer.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES, "__version__"])
