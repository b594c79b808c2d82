"""What both phases need to be run in pieces: a clock, a log, saved states that a run goes on from."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn


class Clock:
    """How long a run has taken, over all of its pieces, and whether this piece's time is over."""

    def __init__(self, minutes: float) -> None:
        self._started, self._limit, self.before = time.monotonic(), minutes * 60, 0.0

    @property
    def total(self) -> float:
        """Seconds of all pieces."""
        return self.before + time.monotonic() - self._started

    @property
    def is_over(self) -> bool:
        """Whether this piece has had its minutes."""
        return time.monotonic() - self._started > self._limit


def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(path: Path, parts: dict[str, Any], clock: Clock, **more: dict[str, Any]) -> int:
    """Bring modules, optimizers and further dictionaries to a saved state; returns its step, 0 without a file."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location=device(), weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    for name, values in more.items():
        values.update(state[name])
    clock.before = state["seconds"]
    return state["step"]


def save(path: Path, parts: dict[str, Any], step: int, clock: Clock, **more: dict[str, Any]) -> None:
    """Write a state that `load` reads; the old one stands until the new one is whole."""
    state = {name: part.state_dict() for name, part in parts.items()}
    torch.save({**state, **more, "step": step, "seconds": clock.total}, path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)


def optimizers_for(
    blocks: nn.Module, parameters: Iterable[nn.Parameter], rate: float, muon_rate: float, weight_decay: float
) -> dict[str, torch.optim.Optimizer]:
    """Muon for the matrices of transformer blocks, AdamW for all other parameters."""
    matrices = [parameter for parameter in blocks.parameters() if parameter.ndim == 2]
    known = set(map(id, matrices))
    others = [parameter for parameter in parameters if id(parameter) not in known]
    return {
        "muon": torch.optim.Muon(matrices, lr=muon_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        "adamw": torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
    }


def schedule(step: int, steps: int, warmup: int, decay: float) -> float:
    """Learning rate as a share of its peak: a linear rise, level, a linear fall to zero at the end."""
    return min(1.0, step / warmup, max(0.0, (steps - step + 1) / (decay * steps)))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def log(path: Path, **values: Any) -> None:
    """Print values and add them to a JSONL file."""
    line = json.dumps(values)
    print(line, flush=True)
    with path.open("a") as file:
        file.write(line + "\n")
