"""Tasks made of the scene world that the embedded model is trained on: single questions, hard scenes, conversations,
two pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

from PIL import Image

from adaptinfer.embedded import patches
from adaptinfer.embedded.world import SPLITS, VERSION, Scene, sample_scene
from adaptinfer.embedded.world.questions import Question, conversation, pair_questions, questions_for
from adaptinfer.embedded.world.render import render
from adaptinfer.errors import InputError
from adaptinfer.evaluation.samples import DRAWN, TaskSample, Turn

_QUESTIONS = 4  # of a scene, and turns of a conversation


class WorldTask:
    """Questions about scenes of a split, in the order of seeds, drawn for the embedded model's patches.

    Args:
        form: a name in `FORMS`.
        split: a name in `SPLITS`.

    Raises:
        InputError: there is no such split.
    """

    metric = "exact"
    max_new_tokens = 24  # a caption of four things

    def __init__(self, form: str, split: str) -> None:
        if split not in SPLITS:
            raise InputError(f"task '{form}:{split}': there is no split {split!r}; there are {', '.join(SPLITS)}")
        self.form, self.split = form, split
        self.name = form if split == "test" else f"{form}:{split}"
        side, self._patch = patches()
        self.grid: tuple[int, int] | None = (side, side)

    def samples(self, count: int | None) -> Sequence[TaskSample]:
        count = DRAWN if count is None else count
        found: list[TaskSample] = []
        for seed in SPLITS[self.split]:
            if len(found) >= count:
                break
            found += FORMS[self.form](self._scene, seed)
        return found[:count]

    def pictures(self, sample: TaskSample) -> list[Image.Image]:
        hard = self.form == "world-hard"
        assert self.grid is not None
        return [_picture(int(seed), self.grid[0], hard, self._patch) for seed in sample.group.split("+")]

    def identity(self) -> str:
        return f"{self.form}/{self.split}/{VERSION}/{self.grid}/{self._patch}"

    def _scene(self, seed: int) -> Scene:
        assert self.grid is not None
        return sample_scene(seed, self.grid[0], self.form == "world-hard")


@lru_cache(maxsize=8)
def _picture(seed: int, grid: int, hard: bool, patch: int) -> Image.Image:
    """Questions about one picture follow one another, so a few are enough to remember."""
    return Image.fromarray(render(sample_scene(seed, grid, hard), patch))


def _turn(question: Question, *scenes: Scene) -> Turn:
    things = [(picture, thing, scene.grid) for picture, scene in enumerate(scenes) for thing in scene.things]
    cells = [
        (picture, row, column)
        for picture, thing, grid in (things[number] for number in question.evidence)
        for row, column in thing.cells(grid)
    ]
    return Turn(question.text, (question.answer,), question.kind, tuple(cells))


def _single(scene_of: Callable[[int], Scene], seed: int) -> list[TaskSample]:
    scene = scene_of(seed)
    questions = questions_for(scene, 0, _QUESTIONS)
    return [TaskSample(f"{seed}/{n}", str(seed), (_turn(question, scene),)) for n, question in enumerate(questions)]


def _conversation(scene_of: Callable[[int], Scene], seed: int) -> list[TaskSample]:
    scene = scene_of(seed)
    return [
        TaskSample(
            str(seed), str(seed), tuple(_turn(question, scene) for question in conversation(scene, 0, _QUESTIONS))
        )
    ]


def _pair(scene_of: Callable[[int], Scene], seed: int) -> list[TaskSample]:
    if seed % 2:
        return []
    scenes, group = (scene_of(seed), scene_of(seed + 1)), f"{seed}+{seed + 1}"
    questions = pair_questions(*scenes, 0, _QUESTIONS)
    return [TaskSample(f"{group}/{n}", group, (_turn(question, *scenes),)) for n, question in enumerate(questions)]


FORMS: dict[str, Callable[[Callable[[int], Scene], int], list[TaskSample]]] = {
    "world": _single,
    "world-hard": _single,
    "world-turns": _conversation,
    "world-pair": _pair,
}
"""Samples of a scene's seed, by the task's name.

- ``world``: single questions of every kind about one picture, four a picture.
- ``world-hard``: the same about pictures in which everything is small.
- ``world-turns``: conversations of four questions, some of which refer to the one before.
- ``world-pair``: questions that compare two pictures.
"""
