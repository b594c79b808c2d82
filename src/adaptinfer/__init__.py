"""AdaptInfer: vision-language models that answer faster, by pruning vision tokens while they read the prompt.

Methods are in `adaptinfer.pruners`, the idea as pure functions in `adaptinfer.functional`. Names are imported on first
use, so that ``adaptinfer --help`` need not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from adaptinfer.version import __version__ as __version__

if TYPE_CHECKING:
    from adaptinfer.calibration.run import calibrate
    from adaptinfer.engine.attach import attach, disabled
    from adaptinfer.engine.cache.prefix import PrefixCache
    from adaptinfer.engine.graphs.compiled import compile
    from adaptinfer.engine.report import Report
    from adaptinfer.errors import AdaptInferError, InputError, UnsupportedError
    from adaptinfer.pruners import AdaptInfer, AdaptInferPlus, Pruner, PrunerError
    from adaptinfer.pruners.config import from_pretrained
    from adaptinfer.schedule import Budget, Schedule, ScheduleError, Stage, preset, solve

__all__ = [
    "AdaptInfer",
    "AdaptInferError",
    "AdaptInferPlus",
    "Budget",
    "InputError",
    "PrefixCache",
    "Pruner",
    "PrunerError",
    "Report",
    "Schedule",
    "ScheduleError",
    "Stage",
    "UnsupportedError",
    "attach",
    "calibrate",
    "compile",
    "disabled",
    "from_pretrained",
    "preset",
    "solve",
]

_HOME = {
    "calibration.run": ("calibrate",),
    "engine.attach": ("attach", "disabled"),
    "engine.cache.prefix": ("PrefixCache",),
    "engine.graphs.compiled": ("compile",),
    "engine.report": ("Report",),
    "errors": ("AdaptInferError", "InputError", "UnsupportedError"),
    "pruners": ("AdaptInfer", "AdaptInferPlus", "Pruner", "PrunerError"),
    "pruners.config": ("from_pretrained",),
    "schedule": ("Budget", "Schedule", "ScheduleError", "Stage", "preset", "solve"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
_MODULES = ("embedded", "functional", "pruners", "schedule")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"adaptinfer.{name}")
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(f"adaptinfer.{_MODULE_OF[name]}"), name)
    else:
        from adaptinfer._deprecated import moved

        value = moved(name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES, "__version__"])
