"""The engine's small parts by themselves: rows of a layer, patches that undo themselves, the handle's repr."""

from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from adaptinfer import AdaptInfer, AdaptInferError, Schedule, Stage, attach
from adaptinfer.engine.patches import Patches
from adaptinfer.engine.segment import GivenRows, Segment


def segment_of(index: torch.Tensor) -> Segment:
    marks = torch.zeros_like(index, dtype=torch.bool)
    return Segment(layer=1, index=index, relative=index, valid=None, vision=marks, text=marks)


def test_all_tokens_are_given():
    rows = GivenRows.of(None, length=5, given=5)
    assert (rows.index, rows.rows, rows.cut) == (None, None, 0)
    assert rows.positions(10, torch.device("cpu")).tolist() == [[10, 11, 12, 13, 14]]


def test_the_last_tokens_of_all():
    rows = GivenRows.of(None, length=5, given=2)
    assert (rows.index, rows.rows, rows.cut) == (None, None, 3)
    assert rows.positions(10, torch.device("cpu")).tolist() == [[13, 14]]


def test_survivors():
    rows = GivenRows.of(segment_of(torch.tensor([[0, 2, 5], [1, 4, 5]])), length=6, given=3)
    assert rows.cut == 0
    assert rows.index.tolist() == rows.rows.tolist() == [[0, 2, 5], [1, 4, 5]]
    assert rows.positions(10, torch.device("cpu")).tolist() == [[10, 12, 15], [11, 14, 15]]


def test_the_last_survivors():
    """The model cut its inputs to the last two tokens of the prompt: token 5 is row 1 of them."""
    rows = GivenRows.of(segment_of(torch.tensor([[0, 2, 4, 5]])), length=6, given=2)
    assert (rows.index.tolist(), rows.rows.tolist(), rows.cut) == ([[4, 5]], [[0, 1]], 2)
    assert rows.positions(10, torch.device("cpu")).tolist() == [[14, 15]]


@given(
    length=st.integers(2, 40), tail=st.integers(1, 10), seed=st.integers(0, 2**16), whole=st.booleans(), data=st.data()
)
def test_rows_find_in_cut_inputs_what_positions_find_in_whole_ones(length, tail, seed, whole, data):
    """Tokens of the tail are never dropped; a model may go on with any number of these."""
    tail = min(tail, length)
    generator = torch.Generator().manual_seed(seed)
    alive = torch.rand(length, generator=generator) < 0.5
    alive[length - tail :] = True
    index = alive.nonzero().flatten()[None]
    given_tokens = index.shape[1] if whole else data.draw(st.integers(1, tail))
    rows = GivenRows.of(segment_of(index), length, given_tokens)
    inputs = torch.arange(length) * 7  # one value per token of the call
    inputs = inputs[length - given_tokens :] if rows.cut else inputs
    assert torch.equal(inputs[rows.rows[0]], (torch.arange(length) * 7)[rows.index[0]])
    assert rows.index.shape[1] == given_tokens
    assert torch.equal(rows.positions(3, index.device), rows.index + 3)


def test_patches_undo_themselves():
    """Also a method that was replaced twice; what somebody else put in its place stays."""
    module, other = nn.Linear(2, 2), nn.Linear(2, 2)
    module.config = original = object()
    x, patches = torch.ones(1, 2), Patches()
    expected = module(x)
    patches.before(module, lambda _, args, kwargs: ((args[0] + 1,), kwargs))
    patches.after(module, lambda _, args, output: output * 2)
    patches.config(module, object())
    patches.override(module, "forward", lambda x: x)
    patches.override(module, "forward", lambda x: -x)
    patches.override(other, "forward", lambda x: x)
    assert module(x).tolist() == [[-4.0, -4.0]]
    other.forward = theirs = lambda x: x * 3
    for _ in range(2):
        patches.undo()
        assert torch.equal(module(x), expected) and module.config is original
        assert "forward" not in vars(module) and vars(other)["forward"] is theirs


def test_a_handle_says_what_it_is(models):
    handle = attach(models("llava"), AdaptInfer(schedule=Schedule((Stage(1, 0.5),), tiny.LAYERS)))
    assert "attached, llava" in repr(handle) and "AdaptInfer(" in repr(handle)
    assert handle.attachment.decoder is models("llava").get_decoder()
    handle.detach()
    assert "detached, llava" in repr(handle)
    with pytest.raises(AdaptInferError, match="was detached"):
        _ = handle.attachment
