"""Calibration samples from the embedded model's scene world. Nothing else in this package knows scenes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from PIL import Image

from adaptinfer.calibration.samples import Sample
from adaptinfer.embedded import patches
from adaptinfer.embedded.world import SPLITS, Scene, sample_scene
from adaptinfer.embedded.world.questions import questions_for
from adaptinfer.embedded.world.render import render
from adaptinfer.errors import InputError

_STRIDE = 7_368_787  # a prime that divides no split's size, so that no scene comes twice


class SceneSource:
    """One question about each of many training scenes, in an order that is random and the same for every count.

    Raises:
        InputError: another split than ``"train"``: schedules are judged on those, so they must not shape one.
    """

    def __init__(self, split: str = "train", seed: int = 0) -> None:
        if split not in SPLITS:
            raise InputError(f"data 'scenes:{split}': there is no such split; 'scenes' takes training scenes")
        if split != "train":
            raise InputError(
                f"data 'scenes:{split}': evaluation scenes are refused, or a schedule would be judged on what shaped "
                "it; 'scenes' takes training scenes"
            )
        self._scenes = SPLITS[split]
        self._start = random.Random(f"calibration/{seed}").randrange(len(self._scenes))
        self.identity: dict[str, Any] = {"scenes": split, "seed": seed}

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> Sample:
        seed = self._scenes[(self._start + index * _STRIDE) % len(self._scenes)]
        scene = _scene(seed)
        question = questions_for(scene, 0, 1)[0]
        return Sample(f"scene {seed}", (_picture(scene),), question.text, question.kind)


def held_out(scenes: int, questions: int) -> Iterator[tuple[Sample, str]]:
    """Questions about test scenes with their answers, to judge schedules by. Never a source to calibrate on."""
    for seed in SPLITS["test"][:scenes]:
        scene = _scene(seed)
        picture = _picture(scene)
        for question in questions_for(scene, 0, questions):
            yield Sample(f"scene {seed}", (picture,), question.text, question.kind), question.answer


def _scene(seed: int) -> Scene:
    return sample_scene(seed, patches()[0])


def _picture(scene: Scene) -> Image.Image:
    return Image.fromarray(render(scene, patches()[1]))
