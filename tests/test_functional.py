"""The method's pure functions against float64 references written as loops, hand-worked cases, and properties."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from adaptinfer.functional import (
    attention_rows,
    counter_uniform,
    gather_tokens,
    positions_of,
    scatter_tokens,
    select_top_k,
    text_guided_score,
    top_k_mask,
)


def causal_attention(batch, heads, tokens, seed):
    logits = torch.randn(batch, heads, tokens, tokens, generator=torch.Generator().manual_seed(seed)) * 3
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    return logits.masked_fill(~mask, float("-inf")).softmax(-1)


def test_a_case_worked_by_hand():
    # One head, two text rows, two vision tokens.
    text = torch.tensor([[[[0.4, 0.0], [0.3, 0.2]]]])
    vision = torch.tensor([[[[0.5, 0.1], [0.1, 0.4]]]])
    # S = [[.4, .3], [.3, .2]]; w = (.7, .5); scores = (.7*.5 + .5*.1, .7*.1 + .5*.4)
    torch.testing.assert_close(text_guided_score(text, vision), torch.tensor([[0.40, 0.27]]))
    # λ = 0: S~ is the mean .3 everywhere, w = (.6, .6)
    torch.testing.assert_close(text_guided_score(text, vision, 0.0), torch.tensor([[0.36, 0.30]]))
    # λ = 1/2: w = (.65, .55)
    torch.testing.assert_close(text_guided_score(text, vision, 0.5), torch.tensor([[0.38, 0.285]]))


@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 4),
    vision=st.integers(1, 9),
    text=st.integers(1, 6),
    weight=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 1000),
)
def test_score_is_the_float64_reference(batch, heads, vision, text, weight, seed):
    attention = causal_attention(batch, heads, vision + text, seed)
    rows = list(range(vision, vision + text))
    score = text_guided_score(attention[:, :, vision:, vision:], attention[:, :, vision:, :vision], weight)
    assert score.dtype == torch.float32
    for b in range(batch):
        expected = oracle.score(attention[b].numpy(), list(range(vision)), rows, weight)
        np.testing.assert_allclose(score[b], [expected[v] for v in range(vision)], rtol=2e-5, atol=1e-6)


@given(
    lengths=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    weight=st.sampled_from([0.0, 0.6, 1.0]),
    seed=st.integers(0, 1000),
)
def test_padding_rows_change_nothing(lengths, weight, seed):
    vision, longest = 5, max(lengths)
    singles, text_to_text, text_to_vision, mask = [], [], [], []
    for b, length in enumerate(lengths):
        attention = causal_attention(1, 3, vision + length, seed + b)[:, :, vision:]
        singles.append(text_guided_score(attention[..., vision:], attention[..., :vision], weight))
        # Padding holds rubbish on purpose: it must be masked, not merely be zero.
        rubbish_text, rubbish_vision = torch.rand(1, 3, longest, longest), torch.rand(1, 3, longest, vision)
        rubbish_text[:, :, :length, :length] = attention[..., vision:]
        rubbish_vision[:, :, :length] = attention[..., :vision]
        text_to_text.append(rubbish_text)
        text_to_vision.append(rubbish_vision)
        mask.append(torch.arange(longest) < length)
    together = text_guided_score(torch.cat(text_to_text), torch.cat(text_to_vision), weight, torch.stack(mask))
    torch.testing.assert_close(together, torch.cat(singles))


def test_half_precision_attention_is_scored_in_float32():
    attention = causal_attention(1, 2, 300, 0).to(torch.bfloat16)
    score = text_guided_score(attention[:, :, 200:, 200:], attention[:, :, 200:, :200])
    exact = text_guided_score(attention[:, :, 200:, 200:].double(), attention[:, :, 200:, :200].double())
    torch.testing.assert_close(score, exact.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weight", [-0.1, 1.5, float("nan")])
def test_prior_weight_out_of_range(weight):
    with pytest.raises(ValueError, match="prior_weight"):
        text_guided_score(torch.rand(1, 1, 2, 2), torch.rand(1, 1, 2, 3), weight)


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="text_to_text must be"):
        text_guided_score(torch.rand(1, 1, 2, 3), torch.rand(1, 1, 2, 3))


@given(
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    rows=st.integers(1, 4),
    columns=st.integers(1, 7),
    kind=st.sampled_from(["none", "bool", "float"]),
    seed=st.integers(0, 100),
)
def test_attention_rows_is_attention_with_repeated_keys(kv_heads, groups, rows, columns, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, kv_heads * groups, rows, 4, generator=generator, dtype=torch.float64)
    key = torch.randn(2, kv_heads, columns, 4, generator=generator, dtype=torch.float64)
    allowed = torch.rand(2, 1, rows, columns, generator=generator) < 0.7
    allowed[..., 0] = True
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    mask = {"none": None, "bool": allowed, "float": additive}[kind]
    logits = query @ key.repeat_interleave(groups, dim=1).transpose(2, 3) * 0.5
    expected = (logits if mask is None else logits.masked_fill(~allowed, float("-inf"))).softmax(-1)
    result = attention_rows(query.float(), key.float(), 0.5, mask)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, atol=1e-6, rtol=1e-5)


scores = arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 30)), elements=st.integers(-3, 3).map(float))


@given(scores=scores, data=st.data())
def test_selection_is_ascending_best_and_earliest_on_ties(scores, data):
    k = data.draw(st.integers(0, scores.shape[1]))
    chosen = select_top_k(torch.from_numpy(scores), k)
    assert chosen.shape == (scores.shape[0], k)
    for row, values in zip(chosen.tolist(), scores, strict=True):
        assert row == oracle.best({i: float(v) for i, v in enumerate(values)}, k)


@given(scores=scores, data=st.data())
def test_each_row_may_keep_its_own_number(scores, data):
    rows, columns = scores.shape
    keeps = data.draw(st.lists(st.integers(0, columns), min_size=rows, max_size=rows))
    candidates = torch.from_numpy(data.draw(arrays(np.bool_, scores.shape)))
    chosen = top_k_mask(torch.from_numpy(scores), candidates, torch.tensor(keeps)[:, None])
    for b in range(rows):
        allowed = {i: float(scores[b, i]) for i in range(columns) if candidates[b, i]}
        assert chosen[b].nonzero()[:, 0].tolist() == oracle.best(allowed, keeps[b])


@given(mask=arrays(np.bool_, st.tuples(st.integers(1, 4), st.integers(1, 20))), extra=st.integers(0, 5))
def test_marked_positions_stand_last_and_in_order(mask, extra):
    marked = torch.from_numpy(mask)
    count = min(int(marked.sum(1).max()) + extra, mask.shape[1])
    index = positions_of(marked, count)
    assert index.shape == (mask.shape[0], count)
    for b in range(mask.shape[0]):
        row, real = index[b].tolist(), list(np.flatnonzero(mask[b]))
        assert len(set(row)) == count
        assert row[count - len(real) :] == real


def test_k_out_of_range():
    with pytest.raises(ValueError, match="k: must lie between 0 and the 3"):
        select_top_k(torch.rand(1, 3), 4)


@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 8),
    broadcast=st.booleans(),
    seed=st.integers(0, 100),
    data=st.data(),
)
def test_gather_and_scatter_are_inverse(batch, tokens, broadcast, seed, data):
    count = data.draw(st.integers(1, tokens))
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(batch, tokens, generator=generator).argsort(1)[:, :count].sort(1).values
    tensor = torch.randn(1 if broadcast else batch, tokens, 2, 3, generator=generator)
    full = tensor.expand(batch, -1, -1, -1)
    taken = gather_tokens(tensor, index, dim=1)
    for b in range(batch):
        assert torch.equal(taken[b], full[b, index[b]])
    swapped = gather_tokens(tensor.permute(2, 0, 3, 1), index, dim=3, batch_dim=1)
    assert torch.equal(swapped, taken.permute(2, 0, 3, 1))
    valid = torch.rand(batch, count, generator=generator) < 0.5
    back = scatter_tokens(taken, index, tokens, valid)
    for b in range(batch):
        expected = torch.zeros(tokens, 2, 3)
        expected[index[b, valid[b]]] = full[b, index[b, valid[b]]]
        assert torch.equal(back[b], expected)


def test_random_numbers_are_a_function_of_seed_stream_and_place():
    long = counter_uniform(5000, seed=3, stream=1)
    assert torch.equal(counter_uniform(17, seed=3, stream=1), long[:17])
    assert not torch.equal(counter_uniform(17, seed=4, stream=1), long[:17])
    assert not torch.equal(counter_uniform(17, seed=3, stream=2), long[:17])
    assert long.min() >= 0 and long.max() < 1
    counts = torch.histc(long, bins=10, min=0, max=1)
    assert (counts - 500).abs().max() < 90, "about four standard deviations of a fair draw"
    assert abs(torch.corrcoef(torch.stack([long[:-1], long[1:]]))[0, 1]) < 0.05
