"""AdaptInfer: vision-language models that answer faster, by pruning vision tokens while they read the prompt."""

from adaptinfer import functional
from adaptinfer.engine.attach import Handle, attach, disabled
from adaptinfer.engine.report import Report
from adaptinfer.errors import AdaptInferError, UnsupportedError
from adaptinfer.pruners import METHODS, AdaptInfer, Pruner, PrunerError, Random
from adaptinfer.pruners.config import from_pretrained
from adaptinfer.schedule import ModelShape, Schedule, ScheduleError, Stage, preset, solve

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "AdaptInfer",
    "AdaptInferError",
    "Handle",
    "ModelShape",
    "Pruner",
    "PrunerError",
    "Random",
    "Report",
    "Schedule",
    "ScheduleError",
    "Stage",
    "UnsupportedError",
    "attach",
    "disabled",
    "from_pretrained",
    "functional",
    "preset",
    "solve",
]
