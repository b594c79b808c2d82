"""Tensor parallelism: each of two ranks holds half the heads, and both keep the same tokens."""

from __future__ import annotations

import sys

import pytest
import vision
from conftest import engine, served
from test_tokens import THREE, mixed

from adaptinfer import AdaptInfer


@pytest.mark.parametrize("prior_weight", [1.0, 0.5])
def test_two_ranks(folder, reference, monkeypatch, prior_weight):
    pruner = AdaptInfer(schedule=THREE, prior_weight=prior_weight)
    requests = mixed(24)
    wanted = reference("llava").tokens(pruner, requests)
    # Each rank is a process that is given this list, and none of them has the declared kernels.
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != vision.FOLDER])
    with engine(folder("llava"), pruner, tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        assert served(llm, requests) == wanted
