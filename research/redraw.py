"""Redraw the plots and the report of an evaluation from its committed figures; nothing is run or computed anew.

    python research/redraw.py research/results/evaluation

writes ``report.md`` and a PNG per task beside the folder's ``summary.json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from adaptinfer.evaluation.plots import draw, file_of
from adaptinfer.evaluation.report import to_markdown


def main() -> None:
    """Draw all tasks of the given folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="with a summary.json")
    for folder in parser.parse_args().folders:
        document = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        tasks = [task for task in document["tasks"] if task["conditions"]]
        pictures = {task["name"]: draw(task, document["latency"]) for task in tasks}
        for name, data in pictures.items():
            (folder / file_of(name)).write_bytes(data)
        (folder / "report.md").write_text(to_markdown(document, pictures), encoding="utf-8")


if __name__ == "__main__":
    main()
