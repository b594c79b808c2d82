"""The support matrix: run the tests in several environments and write docs/results/support.md from what pytest said.

    .venv/bin/python tests/support.py run                      # the whole matrix, in the project's own environment
    .venv/bin/python tests/support.py run --name NAME --python PYTHON [--usual]      # another one, or less of it
    .venv/bin/python tests/support.py table                    # the page, from research/results/support/*.json

A cell counts the tests that passed for it, so the page cannot claim what did not pass.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "research" / "results" / "support"
PAGE = ROOT / "docs" / "results" / "support.md"
MATRIX = "tests/test_families.py"
FILES = [
    MATRIX,
    "tests/test_decoding.py",
    "tests/test_compile.py",
    "tests/test_parallel.py",
    "tests/test_engine_oracle.py",
    "tests/test_engine_exact.py",
    "tests/test_engine_more.py",
    "tests/test_engine_cost.py",
    "tests/test_methods.py",
    "tests/test_refusals.py",
]
MAIN = "main"  # the environment of requirements.lock, where everything is run

app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def run(
    name: Annotated[str, typer.Option(help="Environment; its results are research/results/support/NAME.json.")] = MAIN,
    python: Annotated[str, typer.Option(help="Interpreter that has torch, transformers and pytest.")] = sys.executable,
    usual: Annotated[bool, typer.Option("--usual", help="Only what `make test` runs.")] = False,
    workers: Annotated[int, typer.Option(help="Processes.")] = 2,
) -> None:
    """Run the tests of the engine and keep what pytest says."""
    marks = "not gpu and not slow" + (" and not full" if usual else "")
    result = FOLDER / f"{name}.json"
    FOLDER.mkdir(exist_ok=True)
    result.unlink(missing_ok=True)
    command = [python, "-m", "pytest", "-q", "-n", str(workers), "-m", marks, "-W", "ignore", "-p", "no:cacheprovider"]
    command += ["--support-json", str(result), *FILES]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    if not result.is_file():
        raise SystemExit(f"pytest ended with {code} and left no results")
    print(f"{result.relative_to(ROOT)}: {summary(json.loads(result.read_text()))}")


@app.command()
def table() -> None:
    """Write docs/results/support.md."""
    PAGE.write_text(page(load()), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)} written")


def load() -> dict[str, Any]:
    """The results of every environment by name, the main one first."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))}
    return {MAIN: found.pop(MAIN), **found}


def outcomes(results: dict[str, Any]) -> Counter[str]:
    """How many tests passed, were skipped, failed."""
    return Counter(
        {kind: sum(len(test[kind]) for test in results["tests"].values()) for kind in ("passed", "skipped", "failed")}
    )


def summary(results: dict[str, Any]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in outcomes(results).items() if count)


def page(environments: dict[str, Any]) -> str:
    """The whole page, as Markdown."""
    main = environments[MAIN]
    parts = [_INTRODUCTION, _environments(environments), _families(main)]
    parts += [_tests(main, path) for path in FILES if path != MATRIX]
    return "\n".join(parts)


_INTRODUCTION = """# What is supported

Which tests passed, for each model family and each version of Python, torch and transformers.

A number counts the tests that passed. `✗` counts those that failed. A dash means that no such test exists.
Everything ran on a CPU, on tiny random models of the real transformers classes. No pretrained checkpoint was loaded.

This page is generated: `.venv/bin/python tests/support.py table` writes it from `research/results/support/*.json`.
Do not edit it by hand.
"""


def _environments(environments: dict[str, Any]) -> str:
    lines = [
        "## Environments\n",
        "| Python | torch | transformers | what ran | passed | skipped | failed |",
        "|---|---|---|---|---|---|---|",
    ]
    failures = []
    for name, results in environments.items():
        about, count = results["environment"], outcomes(results)
        lines.append(
            f"| {about['python']} | {about['torch']} | {about['transformers']} | {about['selection']} "
            f"| {count['passed']} | {count['skipped']} | {count['failed'] or '–'} |"
        )
        failed = [
            f"`{test.split('::')[1]}[{case}]`" for test, kinds in results["tests"].items() for case in kinds["failed"]
        ]
        if failed:
            shown = ", ".join(failed[:12]) + (f" and {len(failed) - 12} more" if len(failed) > 12 else "")
            failures.append(f"Failing on transformers {about['transformers']} ({name}): {shown}.\n")
    lines += [
        "",
        "On older versions, tests are skipped where that version lacks the feature or where we reject it.",
        "`OLDER` and `OLDER_TESTS` in `tests/conftest.py` list the reasons.",
    ]
    return "\n".join([*lines, "", *failures])


_COLUMNS = {
    "SDPA": lambda test, ids: "-sdpa-" in ids,
    "eager": lambda test, ids: "-eager-" in ids,
    "one image": lambda test, ids: "-single-" in ids,
    "padded batch": lambda test, ids: re.search("-(left|right)-", ids),
    "several images": lambda test, ids: "-two_images-" in ids,
    "text-only rows": lambda test, ids: "-mixed-" in ids,
    "video": lambda test, ids: "-video-" in ids,
    "decoding": lambda test, ids: "decoding" in test,
    "keep all = vanilla": lambda test, ids: "keeping_all" in test,
    "batch = samples": lambda test, ids: "a_batch" in test,
}


def _families(results: dict[str, Any]) -> str:
    cells: dict[str, dict[str, Counter[str]]] = {}
    refused = []
    for test, kinds in results["tests"].items():
        if not test.startswith(MATRIX):
            continue
        for kind in ("passed", "skipped", "failed"):
            for case in kinds[kind]:
                family = case.split("-")[0]
                if test.endswith("::test_refused"):
                    refused.append(family)
                    continue
                for column, belongs in _COLUMNS.items():
                    if belongs(test, case):
                        cells.setdefault(family, {}).setdefault(column, Counter())[kind] += 1
    lines = [
        "## Families\n",
        f"Against the masked oracle in float32, `{MATRIX}`: prefill and cached decoding, stages in early, middle and",
        "late layers. Names are those of `tests/zoo.py`: mostly `model_type`, followed by the text model where there",
        "are several.\n",
        "| family | " + " | ".join(_COLUMNS) + " |",
        "|---" * (len(_COLUMNS) + 1) + "|",
    ]
    lines += [
        f"| {family} | " + " | ".join(_cell(row.get(column, Counter())) for column in _COLUMNS) + " |"
        for family, row in sorted(cells.items())
    ]
    lines.append(f"\nRefused with the reason when a pruner is attached: {', '.join(sorted(set(refused)))}.\n")
    return "\n".join(lines)


def _cell(count: Counter[str]) -> str:
    if count["failed"]:
        return f"✗ {count['failed']} of {count.total()}"
    return str(count["passed"]) if count["passed"] else "skipped" if count["skipped"] else "–"


def _tests(results: dict[str, Any], path: str) -> str:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    title = (ast.get_docstring(tree) or path).splitlines()[0].rstrip(".")
    lines = [f"## {title}\n", f"`{path}`\n", "| what | passed | skipped | failed |", "|---|---|---|---|"]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            kinds = results["tests"].get(f"{path}::{node.name}")
            if kinds is None:
                continue
            what = node.name.removeprefix("test_").replace("_", " ")
            said = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ").replace("|", "\\|")
            counts = " | ".join(str(len(kinds[kind]) or "–") for kind in ("passed", "skipped", "failed"))
            lines.append(f"| {what}{': ' + said if said else ''} | {counts} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    app()
