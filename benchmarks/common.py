"""What the scripts here record beside their figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adaptinfer.benchmark.environment import environment

RESULTS = Path("build/results")
"""Where results go unless told otherwise; ``--json benchmarks/results/NAME.json`` is for runs that are committed."""


def write(name: str, content: dict[str, Any], path: Path | None = None) -> Path:
    """Write results with their environment to ``build/results/NAME.json`` (or ``path``)."""
    target = path or RESULTS / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"environment": environment(), **content}, indent=2) + "\n", encoding="utf-8")
    return target
