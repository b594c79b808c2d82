"""Pruning methods, one small file each. A new one is a file here and a line in `METHODS`."""

from __future__ import annotations

from adaptinfer.pruners.adaptinfer import AdaptInfer
from adaptinfer.pruners.adaptinferplus import AdaptInferPlus
from adaptinfer.pruners.before import Composed
from adaptinfer.pruners.before_controls import RandomBefore, StrideBefore
from adaptinfer.pruners.cdpruner import CDPruner
from adaptinfer.pruners.contracts import Pruner, PrunerError
from adaptinfer.pruners.dart import DART
from adaptinfer.pruners.divprune import DivPrune
from adaptinfer.pruners.fastervlm import FasterVLM
from adaptinfer.pruners.fastv import FastV
from adaptinfer.pruners.feather import FEATHER
from adaptinfer.pruners.fitprune import FitPrune
from adaptinfer.pruners.hired import HiRED
from adaptinfer.pruners.pool import Pool
from adaptinfer.pruners.prumerge import PruMerge, PruMergePlus
from adaptinfer.pruners.pyramiddrop import PyramidDrop
from adaptinfer.pruners.random import Random
from adaptinfer.pruners.registry import METHODS
from adaptinfer.pruners.sparsevlm import SparseVLM, SparseVLMPlus
from adaptinfer.pruners.starpro import Coverage, STARPro
from adaptinfer.pruners.stride import Stride
from adaptinfer.pruners.textguided import TextGuided
from adaptinfer.pruners.tome import ToMe
from adaptinfer.pruners.v2drop import V2Drop
from adaptinfer.pruners.visionzip import VisionZip
from adaptinfer.pruners.vispruner import VisPruner
from adaptinfer.pruners.vscan import Scans, VScan

__all__ = [
    "DART",
    "FEATHER",
    "METHODS",
    "AdaptInfer",
    "AdaptInferPlus",
    "CDPruner",
    "Composed",
    "Coverage",
    "DivPrune",
    "FastV",
    "FasterVLM",
    "FitPrune",
    "HiRED",
    "Pool",
    "PruMerge",
    "PruMergePlus",
    "Pruner",
    "PrunerError",
    "PyramidDrop",
    "Random",
    "RandomBefore",
    "STARPro",
    "Scans",
    "SparseVLM",
    "SparseVLMPlus",
    "Stride",
    "StrideBefore",
    "TextGuided",
    "ToMe",
    "V2Drop",
    "VScan",
    "VisPruner",
    "VisionZip",
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
    TextGuided,
)

_BEFORE = (
    DivPrune,
    CDPruner,
    Coverage,
    FasterVLM,
    VisPruner,
    VisionZip,
    PruMerge,
    PruMergePlus,
    HiRED,
    Scans,
    ToMe,
    Pool,
    RandomBefore,
    StrideBefore,
)

_BOTH = (AdaptInferPlus, VScan, STARPro)

METHODS.update({method.name: method for method in (*_INSIDE, *_BEFORE, *_BOTH)})
