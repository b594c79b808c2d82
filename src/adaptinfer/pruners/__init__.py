"""Pruning methods, one small file each. A new one is a file here and a line in `METHODS`."""

from __future__ import annotations

from adaptinfer.pruners.adaptinfer import AdaptInfer
from adaptinfer.pruners.base import Pruner, PrunerError
from adaptinfer.pruners.fastv import FastV
from adaptinfer.pruners.pyramiddrop import PyramidDrop
from adaptinfer.pruners.random import Random

__all__ = ["METHODS", "AdaptInfer", "FastV", "Pruner", "PrunerError", "PyramidDrop", "Random"]

METHODS: dict[str, type[Pruner]] = {method.name: method for method in (AdaptInfer, Random, FastV, PyramidDrop)}
