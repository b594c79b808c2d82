"""Checksums of the scene world: the same seed makes the same bytes on every machine, and this is how one knows.

``python tests/world_checksums.py`` tells whether this machine agrees with the published checksums. ``--write`` replaces
them, after a change of the world, which also changes :data:`~adaptinfer.embedded.world.things.VERSION`.
"""

import json
import sys
from hashlib import sha256
from pathlib import Path

from adaptinfer.embedded.world.questions import conversation, pair_questions, questions_for
from adaptinfer.embedded.world.render import render
from adaptinfer.embedded.world.scene import sample_scene
from adaptinfer.embedded.world.things import SPLITS, VERSION

FILE = Path(__file__).with_suffix(".json")
SCENES = 64
"""The first scenes of each split are summed; every fourth is a hard one."""

Checksums = dict[str, dict[str, str]]


def compute() -> Checksums:
    """For each split the sha256 sums, in hexadecimal, of its scenes, pictures and questions."""
    return {split: _sums(seeds.start) for split, seeds in SPLITS.items()}


def published() -> Checksums:
    """The published checksums, as :func:`compute` gives them."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def _sums(first: int) -> dict[str, str]:
    sums = {name: sha256() for name in ("scenes", "pictures", "questions")}
    before = None
    for seed in range(first, first + SCENES):
        scene = sample_scene(seed, hard=seed % 4 == 3)
        asked = questions_for(scene, 0, 10) + conversation(scene, 0, 10)
        if before is not None:
            asked += pair_questions(before, scene, 0, 4)
        sums["scenes"].update(repr(scene).encode())
        sums["pictures"].update(render(scene).tobytes())
        sums["questions"].update("".join(map(repr, asked)).encode())
        before = scene
    return {name: total.hexdigest() for name, total in sums.items()}


def main() -> None:
    checksums = compute()
    if "--write" in sys.argv[1:]:
        FILE.write_text(json.dumps(checksums, indent=2) + "\n", encoding="utf-8")
    if checksums != published():
        sys.exit(f"this machine makes another world than the published one: {json.dumps(checksums)}")
    print(f"scenes, pictures and questions of version {VERSION} are the published ones")


if __name__ == "__main__":
    main()
