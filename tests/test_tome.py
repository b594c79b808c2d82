"""ToMe: equal tokens instead of merged ones, against real merging with proportional attention; one step by hand."""

from __future__ import annotations

import pytest
import tiny
import torch

from adaptinfer import UnsupportedError, attach
from adaptinfer.pruners import ToMe
from adaptinfer.pruners.tome import match, merge_step


def test_matching_by_hand():
    # Even places 0 2 4 at 0, 90 and 180 degrees; odd places 1 3 at 10 and 100: alike by 10, 10 and 80 degrees.
    angles = torch.tensor([0.0, 10, 90, 100, 180]).deg2rad()
    keys = torch.stack([angles.cos(), angles.sin()], dim=1)[None]
    source, target = match(keys, 2)
    assert source.tolist() == [[0, 2]] and target.tolist() == [[1, 3]]
    assert [part.tolist() for part in match(keys, 3)] == [[[0, 2, 4]], [[1, 3, 3]]]
    # Behind a class token the others merge: 1 and 3, alike to 0 and 2 by 10 degrees both.
    assert [part.tolist() for part in match(keys, 2, first=1)] == [[[1, 3]], [[0, 2]]]


def test_a_group_is_the_mean_of_its_members():
    states = torch.tensor([[[1.0], [3.0], [5.0], [7.0]]])
    keys = torch.tensor([[[1.0, 0], [1.0, 0.1], [0, 1.0], [1.0, 0.2]]])
    group = active = torch.arange(4)[None]
    states, group, active = merge_step(states, keys, group, active, 1)  # 0 joins 1; 2 did not join, so it stands first
    assert active.tolist() == [[2, 1, 3]] and group.tolist() == [[1, 1, 2, 3]]
    assert states.flatten().tolist() == [2, 2, 5, 7]
    states, group, active = merge_step(states, keys, group, active, 2)  # 2 and 3, at even places, join 1
    assert active.tolist() == [[1]] and group.tolist() == [[1, 1, 1, 1]]
    assert states.flatten().tolist() == [4, 4, 4, 4], "members count, not groups"


@torch.no_grad()
def reference(tower, pixels, left):
    """The tower of one picture with tokens that really merge: [groups, d] and the members of each.

    Args:
        left: groups after each block.
    """
    vision = tower.vision_model if hasattr(tower, "vision_model") else tower
    hidden = vision.embeddings(pixels[None])
    hidden = vision.pre_layrnorm(hidden)[0]
    members = [[i] for i in range(len(hidden) - 1)]
    for layer, goal in zip(vision.encoder.layers, left, strict=True):
        attention = layer.self_attn
        heads, dim = attention.num_heads, attention.head_dim
        normed = layer.layer_norm1(hidden)
        query, key, value = (
            part(normed).view(-1, heads, dim).transpose(0, 1)
            for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        size = torch.tensor([1.0, *map(len, members)])
        weights = (query @ key.transpose(1, 2) * dim**-0.5 + size.log()).softmax(dim=-1)  # proportional attention
        hidden = hidden + attention.out_proj((weights @ value).transpose(0, 1).flatten(1))
        points = torch.nn.functional.normalize(key.mean(0)[1:], dim=1)
        even, odd = list(range(1, len(members), 2)), list(range(0, len(members), 2))  # with the class token at 0
        likeness = points[even] @ points[odd].T
        order = sorted(range(len(even)), key=lambda i: -likeness[i].max().item())[: len(members) - goal]
        joins = {even[i]: odd[int(likeness[i].argmax())] for i in order}
        states, groups = [], []
        for place in even + odd:
            if place in joins:
                continue
            parts = [place, *(source for source, target in joins.items() if target == place)]
            total = sum(len(members[part]) * hidden[1 + part] for part in parts)
            groups.append([token for part in parts for token in members[part]])
            states.append(total / len(groups[-1]))
        hidden, members = torch.stack([hidden[0], *states]), groups
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
    return hidden[1:], members


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_equal_tokens_are_merged_ones(attention):
    """29 of 49 tokens: 39 after the first of two blocks."""
    model, prompt = tiny.llava(attention), tiny.simple("llava", seed=1)
    inputs = tiny.batch("llava", [prompt])
    seen = []
    with attach(model, ToMe(budget=29)) as handle, torch.no_grad():
        hook = model.get_decoder().layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model(**inputs)
        report = handle.report
        hook.remove()
        states, members = reference(model.base_model.vision_tower, prompt.images[0], (39, 29))
        expected = model.base_model.multi_modal_projector(states)
    first = prompt.index(tiny.IMAGE)
    sizes = dict(zip(report.entered[0][0].tolist(), report.scores[0][0].tolist(), strict=True))
    kept = report.kept[0][0].tolist()
    assert sorted(sizes[place] for place in kept) == sorted(map(float, map(len, members)))
    marks = report.stages[0].kept_mask[0]
    features = dict(zip(kept, seen[0][0][marks], strict=True))
    for own, feature in zip(members, expected, strict=True):
        standing = [place for place in kept if place - first in own]
        assert len(standing) == 1
        torch.testing.assert_close(features[standing[0]], feature, atol=1e-5, rtol=1e-5)


def test_what_is_refused(models):
    with pytest.raises(UnsupportedError, match="tome merges inside CLIP and SigLIP towers; qwen2_5_vl has"):
        attach(models("qwen2_5_vl"), ToMe(budget=0.3))
    two = tiny.batch("llava", [tiny.simple("llava", images=2)])
    with (
        attach(models("llava"), ToMe(budget=30)),
        torch.no_grad(),
        pytest.raises(UnsupportedError, match="give a share"),
    ):
        models("llava")(**two)
