"""Redraw the plots of an evaluation from its committed figures; nothing is run or computed anew.

    python research/redraw.py research/results/evaluation

writes a PNG per task beside the folder's ``summary.json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from adaptinfer.evaluation.plots import draw


def main() -> None:
    """Draw all tasks of the given folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="with a summary.json")
    for folder in parser.parse_args().folders:
        document = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        for task in document["tasks"]:
            if task["conditions"]:
                target = folder / f"{task['name'].replace(':', '-')}.png"
                target.write_bytes(draw(task, document["latency"]))
                print(target)


if __name__ == "__main__":
    main()
