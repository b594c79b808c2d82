"""Every request gets the tokens that our engine gives it on transformers, whatever else is in the batch."""

from __future__ import annotations

import pytest
from conftest import engine, request, served

from adaptinfer import AdaptInfer, Random, Schedule, Stage

THREE = Schedule((Stage(1, 30), Stage(2, 12), Stage(4, 3)), 6, vision_tokens=49)


def mixed(count: int) -> list:
    """Requests with no picture, one, two and three."""
    return [request(seed, images=(0, 1, 1, 2, 3)[seed % 5]) for seed in range(count)]


@pytest.mark.parametrize(
    "pruner",
    [AdaptInfer(schedule=THREE)],
    ids=repr,
)
def test_mixed_requests_at_once(folder, reference, pruner):
    requests = mixed(80)
    wanted = reference("llava").tokens(pruner, requests)
    with engine(folder("llava"), pruner) as llm:
        assert served(llm, requests) == wanted
    assert wanted != reference("llava").tokens(None, requests)
