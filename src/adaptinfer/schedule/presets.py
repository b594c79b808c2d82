"""The schedules of arXiv 2508.06084, and the sizes of the models that they are for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from adaptinfer.schedule.checks import ScheduleError
from adaptinfer.schedule.cost import ModelShape
from adaptinfer.schedule.stages import Schedule, Stage

MODEL_SHAPES: Mapping[str, ModelShape] = MappingProxyType(
    {
        "llava-1.5-7b": ModelShape(32, 4096, 32, 32, 128, 11008),
        "llava-1.5-13b": ModelShape(40, 5120, 40, 40, 128, 13824),
    }
)
"""Language models of the presets whose keeps are token counts."""
PUBLISHED_LAYERS = (1, 10, 20)  # of 32
PUBLISHED_KEEPS = {128: (290, 72, 18), 64: (133, 27, 3), 48: (80, 24, 2), 32: (40, 12, 0)}  # by label, of 576


def preset(name: str) -> Schedule:
    """A published schedule by its name in PRESETS. Raises ScheduleError that lists the names."""
    if not isinstance(name, str) or name not in PRESETS:
        raise ScheduleError(f"name: there is no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]


def _published() -> dict[str, Schedule]:
    def stages(layers: Sequence[int], keeps: Sequence[float]) -> tuple[Stage, ...]:
        return tuple(map(Stage, layers, keeps))

    schedules: dict[str, Schedule] = {}
    for label, keeps in PUBLISHED_KEEPS.items():
        name = f"llava-1.5-7b/{label}"
        schedules[name] = Schedule(stages(PUBLISHED_LAYERS, keeps), 32, 576, label, name)
    for label, keeps in {128: (300, 94, 30), 64: (148, 40, 5)}.items():
        name = f"llava-1.5-13b/{label}"
        schedules[name] = Schedule(
            stages((1, 11, 22), keeps), 40, 576, label, f"{name} (layers inferred, not published)"
        )
    for percent, shares in {50: (0.7, 0.9, 0.3), 30: (0.5, 0.6, 0.3), 10: (0.17, 0.6, 0.3)}.items():
        name = f"qwen2-vl-2b/{percent}"
        schedules[name] = Schedule(stages((0, 9, 19), shares), 28, None, percent / 100, name)
    return schedules


PRESETS: Mapping[str, Schedule] = MappingProxyType(_published())
"""The schedules of arXiv 2508.06084. For LLaVA-1.5-13B only keeps are published: its layers are the ones that fit the
labels best. Qwen2-VL's keeps are shares of the tokens entering a stage, and its labels shares of all vision tokens."""
