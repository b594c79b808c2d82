"""Batches of pictures and questions. A batch depends on the seed and the step's number alone, so that a run that was
stopped goes on exactly."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from config import Config
from lessons import describe_all, drill, roll_call
from llava import ASSISTANT, BEGIN, END, IMAGE, USER, Words
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from adaptinfer.embedded.world.chance import Chance
from adaptinfer.embedded.world.questions import KINDS, Question, conversation, pair_questions, questions_for
from adaptinfer.embedded.world.render import render
from adaptinfer.embedded.world.scene import sample_scene
from adaptinfer.embedded.world.things import (
    COLOURS,
    DIGITS,
    LETTERS,
    NUMBERS,
    PATTERNS,
    SHAPES,
    SIGN,
    SIZES,
    SPLITS,
    WORDS,
    Scene,
)

TEXTS = ("", *WORDS, *NUMBERS, *LETTERS, *DIGITS)
NAMES: dict[str, tuple[str, ...]] = {
    "part": ("background", "part", "anchor"),
    "shape": (*SHAPES, SIGN),
    "colour": COLOURS,
    "pattern": PATTERNS,
    "size": SIZES,
    "text": TEXTS,
}
"""What the tower learns to say of a patch; of a patch that is no thing's middle only ``part`` and ``colour``."""
TARGETS = (*NAMES, "row", "col")
IGNORED = -100
FOLLOW_UP, PAIR = "follow_up", "pair"
SINGLE = tuple(kind for kind in KINDS if kind not in (FOLLOW_UP, PAIR))
BASICS = ("attribute", "exists", "read", "where")
"""Kinds that look up one thing; the others build on them."""
_INDEX = {name: {value: i for i, value in enumerate(values)} for name, values in NAMES.items()}
_HARD_SHARE = 0.2  # of training scenes
_DESCRIBED, _ROLL_CALLS = 0.3, 0.3  # share of conversations while basics are learnt; share of those
_DRILLED = 0.4  # share of conversations while there are drills


@dataclass
class Batch:
    """Pictures, what stands in their patches, and a conversation about each (or about each pair).

    Attributes:
        pictures: uint8 [B, n, side, side, 3]; n pictures of one conversation.
        labels: int64 [B, n, V, len(TARGETS)].
        tokens: int64 [B, L], padded on the right: ``<s> USER:``, the pictures' V placeholders each, the turns. Nothing
            for the tower alone.
        answers: per question: its row, the first position of its answer, and the position after its ``</s>``.
        kinds: of the questions, as ``answers``.
        looks: int64 [B, M], (shape, colour) pairs in the (first) picture as numbers, padded with -1; for matching.
    """

    pictures: Tensor
    labels: Tensor
    tokens: Tensor
    answers: list[tuple[int, int, int]]
    kinds: list[str]
    looks: Tensor


def patch_labels(scene: Scene) -> np.ndarray:
    """int64 [V, len(TARGETS)]: what stands in each patch."""
    grid = scene.grid
    labels = np.full((grid, grid, len(TARGETS)), IGNORED, dtype=np.int64)
    labels[..., 0] = 0
    labels[..., -2] = np.arange(grid)[:, None]
    labels[..., -1] = np.arange(grid)[None, :]
    for thing in scene.things:
        for row, col in thing.cells(grid):
            labels[row, col, 0], labels[row, col, 2] = 1, _INDEX["colour"][thing.colour]
    for thing in scene.things:
        named = [2, *(_INDEX[name][getattr(thing, name)] for name in ("shape", "colour", "pattern", "size", "text"))]
        labels[(*thing.anchor, slice(0, 6))] = named
    return labels.reshape(grid * grid, -1)


def draw(scene: Scene, config: Config, chance: Chance) -> np.ndarray:
    """A training picture, uint8 [side, side, 3]: sometimes drawn large and shrunk, changed a little as files are."""
    factor = 2 if chance.happens(0.25) else 1
    pixels = render(scene, config.patch * factor)
    picture = Image.fromarray(pixels)
    if factor != 1:
        picture = picture.resize((config.side, config.side), Image.Resampling.BICUBIC)  # what the processor does
    if chance.happens(0.1):
        picture = picture.filter(ImageFilter.GaussianBlur(chance.uniform(0.2, 0.5)))
    if chance.happens(0.15):
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=chance.integer(70, 95))
        picture = Image.open(file)
    if chance.happens(0.5):
        pixels = np.asarray(picture, dtype=np.float32) * chance.uniform(0.9, 1.1)
        return np.clip(pixels + 0.5, 0, 255).astype(np.uint8)
    return np.asarray(picture)


def draw_clean(scene: Scene, config: Config) -> np.ndarray:
    """A validation picture, uint8 [side, side, 3]: a large one as the processor shrinks it."""
    picture = Image.fromarray(render(scene, 2 * config.patch))
    return np.asarray(picture.resize((config.side, config.side), Image.Resampling.BICUBIC))


def spell(tokenizer: Words, questions: Sequence[Question], images: int) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a conversation that begins with ``images`` placeholders, and where its answers stand."""
    user, assistant, image, begin, end = tokenizer.convert_tokens_to_ids([USER, ASSISTANT, IMAGE, BEGIN, END])
    texts = [text for question in questions for text in (question.text, question.answer)]
    spelt = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    ids, answers = [begin, user, *[image] * images], []
    for turn in range(len(questions)):
        ids += [*([user] if turn else []), *spelt[2 * turn], assistant]
        start = len(ids)
        ids += [*spelt[2 * turn + 1], end]
        answers.append((start, len(ids)))
    return ids, answers


def gather(
    config: Config,
    tokenizer: Words | None,
    scenes: Sequence[Sequence[Scene]],
    pictures: Sequence[Sequence[np.ndarray]],
    asked: Sequence[Sequence[Question]],
) -> Batch:
    """Scenes, their pictures and the questions about them as one batch; row by row, all with as many pictures."""
    images = len(scenes[0]) * config.tokens
    spelt = [spell(tokenizer, questions, images) for questions in asked] if tokenizer else []
    looks = [[len(COLOURS) * i + k for i, k in _looks(row[0])] for row in scenes]
    return Batch(
        pictures=torch.from_numpy(np.stack([np.stack(row) for row in pictures])),
        labels=torch.from_numpy(np.stack([np.stack([patch_labels(scene) for scene in row]) for row in scenes])),
        tokens=_rectangle([ids for ids, _ in spelt], tokenizer.pad_token_id if tokenizer else 0),
        answers=[(row, *span) for row, (_, spans) in enumerate(spelt) for span in spans],
        kinds=[question.kind for questions in asked for question in questions],
        looks=_rectangle(looks, -1),
    )


def _rectangle(rows: list[list[int]], filler: int) -> Tensor:
    longest = max(map(len, rows), default=0)
    return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])


def _looks(scene: Scene) -> list[tuple[int, int]]:
    return sorted({(_INDEX["shape"][thing.shape], _INDEX["colour"][thing.colour]) for thing in scene.things})


class Lessons(Dataset):
    """Training batches by step.

    Args:
        config: the run's.
        tokenizer: the model's; None draws pictures without questions, for the tower.
        steps: which steps, in order.
        weights: how often each kind of :data:`SINGLE` is asked, :data:`PAIR`'s share of the batches, and
            :data:`FOLLOW_UP`'s of the conversations of a batch: those in which a turn can refer to the one before.
    """

    def __init__(self, config: Config, tokenizer: Words | None, steps: range, weights: dict[str, float]) -> None:
        self._config, self._tokenizer, self._steps, self._weights = config, tokenizer, steps, weights

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, index: int) -> Batch:
        config, tokenizer = self._config, self._tokenizer
        step = self._steps[index]
        chance = Chance("lesson", config.seed, step, tokenizer is None)
        pair = tokenizer is not None and chance.happens(self._weights[PAIR])
        size, each = (config.batch // 2, 2) if pair else (config.batch, 1)
        size = config.tower_batch if tokenizer is None else size
        most = next((count for until, count in config.crowd if 0 < step <= until and tokenizer), None)
        scenes = [[self._scene(chance, most) for _ in range(each)] for _ in range(size)]
        if tokenizer is None:
            asked: list[list[Question]] = []
        elif pair:
            asked = [pair_questions(row[0], row[1], 0, config.turns) for row in scenes]
        else:
            described = 1.0 if step <= config.described else _DESCRIBED if step <= config.basics else 0.0
            drilled = _DRILLED if step <= config.drilled else 0.0
            asked = [self._lesson(row[0], chance, described, drilled) for row in scenes]
        pictures = [[draw(scene, config, chance) for scene in row] for row in scenes]
        return gather(config, tokenizer, scenes, pictures, asked)

    def _scene(self, chance: Chance, most: int | None) -> Scene:
        """A training scene with ``most`` things at most; it keeps its seed, and with that what may be asked of it."""
        seed = int(chance.random() * len(SPLITS["train"]))
        scene = sample_scene(seed, self._config.grid, chance.happens(_HARD_SHARE))
        if most is None:
            return scene
        kept = chance.sample(scene.things, chance.integer(1, most))
        return replace(scene, things=tuple(sorted(kept, key=lambda thing: thing.anchor)))

    def _lesson(self, scene: Scene, chance: Chance, described: float, drilled: float) -> list[Question]:
        if chance.happens(described):
            return self._describe(scene, chance)
        if drilled and chance.happens(drilled):
            return drill(scene, chance)
        return self._ask(scene, chance)

    def _ask(self, scene: Scene, chance: Chance) -> list[Question]:
        turns, seed = self._config.turns, chance.integer(0, 2**31)
        if chance.happens(self._weights[FOLLOW_UP]):
            return conversation(scene, seed, turns)
        kinds = Counter(chance.weighted(SINGLE, [self._weights[kind] for kind in SINGLE]) for _ in range(turns))
        asked = [
            question
            for i, (kind, count) in enumerate(sorted(kinds.items()))
            for question in questions_for(scene, seed + i, count, kinds=(kind,))
        ]
        kinds_asked = [kind for kind in SINGLE if self._weights[kind]]
        # In place of kinds that this scene cannot be asked about.
        asked += questions_for(scene, seed - 1, turns - len(asked), kinds=kinds_asked)
        return chance.shuffle(asked)

    def _describe(self, scene: Scene, chance: Chance) -> list[Question]:
        if chance.happens(_ROLL_CALLS):
            return roll_call(scene, chance, 2 * self._config.turns)
        return [describe_all(scene, chance)]


def batches(config: Config, tokenizer: Words | None, steps: range, weights: dict[str, float]) -> Iterator[Batch]:
    """The batches of some steps, made in processes beside the training."""
    workers = max(1, (os.cpu_count() or 2) - 1)
    lessons = Lessons(config, tokenizer, steps, weights)
    yield from DataLoader(lessons, batch_size=None, num_workers=workers, prefetch_factor=2)


def validation(config: Config, tokenizer: Words | None, turns: int, pair: bool = False) -> Batch:
    """One batch of ``config.held_out`` validation scenes (or half as many pairs) with ``turns`` questions each."""
    each = 2 if pair else 1
    seeds = SPLITS["validation"]
    scenes = [
        [sample_scene(seeds[each * i + k], config.grid, hard=i % 5 == 4) for k in range(each)]
        for i in range(config.held_out // each)
    ]
    asked: list[list[Question]] = []
    if tokenizer is not None and pair:
        asked = [pair_questions(row[0], row[1], 1, turns) for row in scenes]
    elif tokenizer is not None and turns == 1:  # all kinds as the first question
        asked = [questions_for(row[0], 1, 1, kinds=(SINGLE[i % len(SINGLE)],)) for i, row in enumerate(scenes)]
    elif tokenizer is not None:
        asked = [conversation(row[0], 1, turns) for row in scenes]
    pictures = [[draw_clean(scene, config) for scene in row] for row in scenes]
    return gather(config, tokenizer, scenes, pictures, asked)
