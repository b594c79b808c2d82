"""Pruning methods, one small file each. A new one is a file here and a line in `METHODS`."""

from __future__ import annotations

from adaptinfer.pruners.adaptinfer import AdaptInfer
from adaptinfer.pruners.base import Pruner, PrunerError
from adaptinfer.pruners.dart import DART
from adaptinfer.pruners.fastv import FastV
from adaptinfer.pruners.feather import FEATHER
from adaptinfer.pruners.fitprune import FitPrune
from adaptinfer.pruners.pyramiddrop import PyramidDrop
from adaptinfer.pruners.random import Random
from adaptinfer.pruners.sparsevlm import SparseVLM, SparseVLMPlus
from adaptinfer.pruners.stride import Stride
from adaptinfer.pruners.v2drop import V2Drop

__all__ = [
    "DART",
    "FEATHER",
    "METHODS",
    "AdaptInfer",
    "FastV",
    "FitPrune",
    "Pruner",
    "PrunerError",
    "PyramidDrop",
    "Random",
    "SparseVLM",
    "SparseVLMPlus",
    "Stride",
    "V2Drop",
]

_INSIDE = (
    AdaptInfer,
    Random,
    Stride,
    FastV,
    PyramidDrop,
    SparseVLM,
    SparseVLMPlus,
    DART,
    FEATHER,
    V2Drop,
    FitPrune,
)

METHODS: dict[str, type[Pruner]] = {method.name: method for method in _INSIDE}
