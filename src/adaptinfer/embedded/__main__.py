"""Draw scenes that the embedded model has not seen, and say what can be asked about them.

``python -m adaptinfer.embedded draw --seed 7 --size 512 out.png``
"""

import argparse
import sys
from pathlib import Path

from PIL import Image

from adaptinfer.embedded import patches
from adaptinfer.embedded.world import SPLITS, Scene, sample_scene
from adaptinfer.embedded.world.questions import KINDS, Question, pair_questions, questions_for
from adaptinfer.embedded.world.render import MAX_PATCH, MIN_PATCH, render

_ALONE = tuple(kind for kind in KINDS if kind not in ("follow_up", "pair"))  # need no other turn or picture


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m adaptinfer.embedded", description="Held-out scenes.")
    draw = parser.add_subparsers(required=True, metavar="COMMAND").add_parser("draw", help="draw a held-out scene")
    draw.add_argument("file", type=Path, help="picture to write: .png, .jpg or .webp")
    draw.add_argument("--seed", type=int, default=0, help="which test scene (default %(default)s)")
    draw.add_argument("--size", type=int, default=512, help="pixels a side (default %(default)s)")
    draw.add_argument("--hard", action="store_true", help="a scene of small things only")
    draw.add_argument("--pair", type=Path, metavar="FILE", help="also draw the next scene, and compare the two")
    draw.add_argument("--questions", type=int, default=1, help="questions to print of each kind (default %(default)s)")
    options = parser.parse_args(arguments)
    files = [options.file] if options.pair is None else [options.file, options.pair]
    last = len(SPLITS["test"]) - len(files)
    if not 0 <= options.seed <= last:
        parser.error(f"--seed must be 0 to {last}, got {options.seed}")
    grid, _ = patches()
    if not grid * MIN_PATCH <= options.size <= grid * MAX_PATCH:
        parser.error(f"--size must be {grid * MIN_PATCH} to {grid * MAX_PATCH} pixels, got {options.size}")
    for file in files:
        if file.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            parser.error(f"{file}: must end in .png, .jpg or .webp")
    if options.pair is not None and options.pair.resolve() == options.file.resolve():
        parser.error(f"--pair {options.pair}: is the first picture's file; give another")
    if options.questions < 0:
        parser.error(f"--questions must be 0 or more, got {options.questions}")

    lines = []
    scenes = [sample_scene(SPLITS["test"][options.seed + n], grid, options.hard) for n in range(len(files))]
    for number, (file, scene) in enumerate(zip(files, scenes, strict=True), options.seed):
        try:
            picture(scene, options.size).save(file)
        except (OSError, ValueError) as error:  # ValueError: Pillow knows no format of that name
            parser.error(f"cannot write {file}: {error}")
        lines.append(f"{file}: test scene {number}, {len(scene.things)} things")
        for kind in _ALONE:
            lines += map(_told, dict.fromkeys(questions_for(scene, 0, options.questions, kinds=(kind,))))
    if options.pair is not None:
        lines.append(f"{files[0]} and {files[1]}")
        lines += map(_told, pair_questions(scenes[0], scenes[1], 0, options.questions))
    print("\n".join(lines))
    return 0


def picture(scene: Scene, size: int) -> Image.Image:
    """A scene as an RGB picture of ``size`` pixels a side, from 4 to 64 times its grid."""
    drawn = Image.fromarray(render(scene, -(-size // scene.grid)))
    return drawn if drawn.width == size else drawn.resize((size, size), Image.Resampling.BOX)


def _told(question: Question) -> str:
    return f"  {question.kind:<10}{question.text}: {question.answer}"


if __name__ == "__main__":
    sys.exit(main())
