"""What every benchmark records beside its figures."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

RESULTS = Path("build/results")
"""Where results go unless told otherwise; ``--json benchmarks/results/NAME.json`` is for runs that are committed."""


def environment() -> dict[str, Any]:
    """Hardware, versions and commit of this run."""
    import torch
    import transformers

    import adaptinfer

    root = Path(__file__).parent.parent

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=False).stdout.strip()

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--", "src", "benchmarks/*.py")),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "adaptinfer": adaptinfer.__version__,
    }


def write(name: str, content: dict[str, Any], path: Path | None = None) -> Path:
    """Write results with their environment to ``build/results/NAME.json`` (or ``path``)."""
    target = path or RESULTS / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"environment": environment(), **content}, indent=2) + "\n", encoding="utf-8")
    return target


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
