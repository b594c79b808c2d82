"""Tensor parallelism: each of two ranks holds half the heads, and both keep the same tokens."""

from __future__ import annotations

import pytest
from conftest import engine, served
from test_tokens import THREE, mixed

from adaptinfer import AdaptInfer


@pytest.mark.parametrize("prior_weight", [1.0, 0.5])
def test_two_ranks(folder, reference, prior_weight):
    pruner = AdaptInfer(schedule=THREE, prior_weight=prior_weight)
    requests = mixed(24)
    wanted = reference("llava").tokens(pruner, requests)
    with engine(folder("llava"), pruner, tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        assert served(llm, requests) == wanted
