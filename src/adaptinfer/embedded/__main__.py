"""Draw a scene that the embedded model has not seen, and say what can be asked about it.

``python -m adaptinfer.embedded draw --seed 7 --size 512 out.png``
"""

import argparse
import sys
from pathlib import Path

from adaptinfer.embedded.questions import questions_for
from adaptinfer.embedded.scenes import GRID, SPLITS, render, sample_scene

_LARGEST = 4096  # pixels


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m adaptinfer.embedded", description="Held-out scenes.")
    draw = parser.add_subparsers(required=True, metavar="COMMAND").add_parser("draw", help="draw a held-out scene")
    draw.add_argument("file", type=Path, help="picture to write: .png, .jpg or .webp")
    draw.add_argument("--seed", type=int, default=0, help="which test scene (default %(default)s)")
    draw.add_argument("--size", type=int, default=512, help="pixels a side (default %(default)s)")
    draw.add_argument("--questions", type=int, default=6, help="questions to print (default %(default)s)")
    options = parser.parse_args(arguments)
    if not 0 <= options.seed < len(SPLITS["test"]):
        parser.error(f"--seed must be 0 to {len(SPLITS['test']) - 1}, got {options.seed}")
    if not GRID <= options.size <= _LARGEST:
        parser.error(f"--size must be {GRID} to {_LARGEST} pixels, got {options.size}")
    if options.file.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        parser.error(f"{options.file}: must end in .png, .jpg or .webp")
    if options.questions < 0:
        parser.error(f"--questions must be 0 or more, got {options.questions}")

    scene = sample_scene(SPLITS["test"][options.seed])
    try:
        render(scene, options.size).save(options.file)
    except (OSError, ValueError) as error:  # ValueError: Pillow knows no format of that name
        parser.error(f"cannot write {options.file}: {error}")
    lines = [f"{options.file}: test scene {options.seed}, {len(scene.objects)} objects"]
    lines += [f"  {question.text}  {question.answer}" for question in questions_for(scene, 0, options.questions)]
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
