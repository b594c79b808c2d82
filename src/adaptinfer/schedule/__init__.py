"""Where vision tokens are dropped and how many remain: budgets, stages, schedules, what they cost, and a solver.

    budget.py    `Budget`, the one place that knows that a number below 1 is a share
    stages.py    `Stage`, `Schedule` and its JSON file
    cost.py      `ModelShape`: FLOPs and KV bytes
    presets.py   the published schedules
    solver.py    `solve`: stages and keeps for a budget

Arithmetic only: no torch, no transformers, no scores. Counts depend on the number of vision tokens alone, so every
prompt with the same number of vision tokens has the same shapes in every layer.

The averages of a schedule, all in vision tokens per layer (nominal <= computed <= true):

- true: what the layers are given, and what their KV caches hold. Budgets of this library are true averages.
- computed: the work really done, since a stage's layer stops working for a token once the token is dropped.
- nominal: the count of arXiv 2508.06084, which takes a stage's layer at its size after pruning. Its "64 tokens" are
  82.9 in the true count.
"""

from adaptinfer.schedule.budget import Budget
from adaptinfer.schedule.checks import ScheduleError
from adaptinfer.schedule.cost import ModelShape
from adaptinfer.schedule.presets import MODEL_SHAPES, PRESETS, preset
from adaptinfer.schedule.solver import solve
from adaptinfer.schedule.stages import BEFORE, Schedule, Stage

__all__ = [
    "BEFORE",
    "MODEL_SHAPES",
    "PRESETS",
    "Budget",
    "ModelShape",
    "Schedule",
    "ScheduleError",
    "Stage",
    "preset",
    "solve",
]
