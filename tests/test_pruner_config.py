"""Pruners as files: what is saved is read back, what is broken is named."""

from __future__ import annotations

import json

import pytest

from adaptinfer import AdaptInfer, PrunerError, Schedule, ScheduleError, Stage, from_pretrained
from adaptinfer.pruners import Random

PRUNERS = [
    AdaptInfer(budget=64),
    AdaptInfer(budget=0.22, prior_weight=0.5),
    AdaptInfer.paper(64),
    AdaptInfer(schedule=Schedule((Stage(0, 0.5), Stage(3, 2)), 12), positions="compact"),
    Random(budget=20, seed=7),
]


@pytest.mark.parametrize("pruner", PRUNERS, ids=repr)
def test_round_trip(tmp_path, pruner):
    pruner.save_pretrained(tmp_path / "made" / "on the way")
    assert from_pretrained(tmp_path / "made" / "on the way") == pruner
    assert from_pretrained(tmp_path / "made" / "on the way" / "adaptinfer_config.json") == pruner


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"format": "something"}, PrunerError, "format"),
        ({"version": 2}, PrunerError, "version: 2 .* upgrade"),
        ({"method": "magic"}, PrunerError, "method: there is no method 'magic'; there are adaptinfer, random"),
        ({"seed": 3}, PrunerError, "seed: no setting of adaptinfer"),
        ({"budget": -1}, PrunerError, "budget"),
        ({"budget": None, "schedule": {"version": 1}}, ScheduleError, "format"),
        ({"positions": "odd"}, PrunerError, "positions"),
    ],
)
def test_broken_files(tmp_path, change, error, message):
    AdaptInfer(budget=64).save_pretrained(tmp_path)
    file = tmp_path / "adaptinfer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(error, match=message):
        from_pretrained(tmp_path)


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(PrunerError, match="cannot be read"):
        from_pretrained(tmp_path)
    (tmp_path / "adaptinfer_config.json").write_text("{")
    with pytest.raises(PrunerError, match="not valid JSON"):
        from_pretrained(tmp_path)
    (tmp_path / "adaptinfer_config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(PrunerError, match="cannot be read"):
        from_pretrained(tmp_path)
