"""Tasks made of the embedded model's drawn scenes: single questions, conversations, two pictures."""

from __future__ import annotations

import random
from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING

from adaptinfer.embedded.questions import Question, questions_for
from adaptinfer.embedded.scenes import GRID, SPLITS, Scene, render, sample_scene
from adaptinfer.errors import InputError
from adaptinfer.evaluation.tasks import DRAWN, Sample, Turn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

__all__ = ["SceneTask"]

_QUESTIONS = 4  # of a scene
_PICTURE_SIZE = 512  # pixels, as a user's picture: the processor brings it to the model's size
_VERSION = 1  # changes whenever the same task would hold other samples


class SceneTask:
    """Questions about scenes of a split, in the order of seeds.

    Args:
        form: ``scenes``, ``scenes-turns`` or ``scenes-pair``.
        split: a name in `SPLITS`.

    Raises:
        InputError: there is no such split.
    """

    metric = "exact"
    max_new_tokens = 4
    grid: tuple[int, int] | None = (GRID, GRID)

    def __init__(self, form: str, split: str) -> None:
        if split not in SPLITS:
            raise InputError(f"task '{form}:{split}': there is no split {split!r}; there are {', '.join(SPLITS)}")
        self.form, self.split = form, split
        self.name = form if split == "test" else f"{form}:{split}"

    def samples(self, count: int | None) -> Sequence[Sample]:
        count = DRAWN if count is None else count
        found: list[Sample] = []
        for seed in SPLITS[self.split]:
            if len(found) >= count:
                break
            found += _SAMPLES[self.form](sample_scene(seed))
        return found[:count]

    def pictures(self, sample: Sample) -> list[Image.Image]:
        return [_picture(int(seed)) for seed in sample.group.split("+")]

    def identity(self) -> str:
        return f"{self.form}/{self.split}/{_VERSION}"


@lru_cache(maxsize=8)
def _picture(seed: int) -> Image.Image:
    """Questions about one picture follow one another, so a few are enough to remember."""
    return render(sample_scene(seed), _PICTURE_SIZE)


def _turn(question: Question, picture: int = 0) -> Turn:
    cells = tuple((picture, row, column) for row, column in question.evidence)
    return Turn(question.text, (question.answer,), question.kind, cells)


def _single(scene: Scene) -> list[Sample]:
    questions = questions_for(scene, 0, _QUESTIONS)
    return [Sample(f"{scene.seed}/{n}", str(scene.seed), (_turn(q),)) for n, q in enumerate(questions)]


def _conversation(scene: Scene) -> list[Sample]:
    questions = questions_for(scene, 0, _QUESTIONS)
    return [Sample(str(scene.seed), str(scene.seed), tuple(map(_turn, questions)))]


def _pair(scene: Scene) -> list[Sample]:
    """A colour or a shape of something that only one of two pictures has; the second picture is the next seed's."""
    if scene.seed % 2:
        return []
    scenes = scene, sample_scene(scene.seed + 1)
    rng = random.Random(f"pair/{scene.seed}")
    shapes = Counter(item.shape for each in scenes for item in each.objects)
    unique = [(n, item) for n, each in enumerate(scenes) for item in each.objects if shapes[item.shape] == 1]
    if not unique:
        return []
    picture, item = rng.choice(unique)
    question = Question("colour", f"What colour is the {item.shape}?", item.colour, (item.cell,))
    group = f"{scene.seed}+{scene.seed + 1}"
    return [Sample(group, group, (_turn(question, picture),))]


_SAMPLES = {"scenes": _single, "scenes-turns": _conversation, "scenes-pair": _pair}
