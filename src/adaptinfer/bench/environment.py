"""What every measurement is recorded with: hardware, versions, commit."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers

from adaptinfer.version import __version__


def versions() -> dict[str, str]:
    """Of Python, this package and those that compute."""
    return {
        "adaptinfer": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def environment() -> dict[str, Any]:
    """Hardware, versions and commit of this run; the commit is None where the package is not in its repository."""
    commit = _git("rev-parse", "HEAD") if _git("ls-files", "--error-unmatch", "../__init__.py") else None
    changed = _git("status", "--porcelain", "--", ":/src", ":/research/*.py")
    has_gpu = torch.cuda.is_available()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or None,
        "uncommitted_changes": bool(changed) if commit else None,
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "gpu_memory_bytes": torch.cuda.get_device_properties().total_memory if has_gpu else None,
        "cuda": torch.version.cuda,
        "system": platform.platform(),
        **versions(),
    }


def _git(*command: str) -> str:
    """What git says, run where this file is; nothing where there is no git or no repository."""
    folder = Path(__file__).parent
    try:
        run = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
