"""Shared set-up: the hub is never asked, two cores are shared by the workers, models are made once."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import tiny
import torch
import transformers
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("adaptinfer", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("adaptinfer")


@pytest.fixture(scope="session")
def models():
    """Tiny models by (family, attention backend); tests must leave them detached."""
    made = {}

    def model(family: str, attention: str = "sdpa"):
        if (family, attention) not in made:
            made[family, attention] = tiny.FAMILIES[family](attention)
        ready = made[family, attention]
        if hasattr(ready.base_model, "rope_deltas"):  # older transformers reuse those of the last prompt for any text
            ready.base_model.rope_deltas = None
        return ready

    return model


@pytest.fixture(autouse=True)
def leave_detached(models):
    """Fail a test that leaves something attached to a shared model."""
    yield
    for family in tiny.FAMILIES:
        for attention in ("sdpa", "eager"):
            assert "_adaptinfer_handle" not in models(family, attention).__dict__


def pytest_addoption(parser):
    parser.addoption("--support-json", help="write what every test said to this file; see tests/support.py")


def pytest_configure(config):
    path = config.getoption("--support-json")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(path, config.getoption("markexpr")))


class Outcomes:
    """Collects outcomes by test and case, in the process that hears of all of them."""

    def __init__(self, path: str, selection: str) -> None:
        self.path, self.selection = Path(path), selection
        self.tests: dict[str, dict[str, list]] = {}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            name, _, case = report.nodeid.partition("[")
            kinds = self.tests.setdefault(name, {"passed": [], "skipped": [], "failed": []})
            kinds[report.outcome].append(case.removesuffix("]"))

    def pytest_sessionfinish(self):
        environment = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "selection": "usual" if "not full" in self.selection else "full",
        }
        tests = {
            name: {kind: sorted(set(cases)) for kind, cases in kinds.items()}
            for name, kinds in sorted(self.tests.items())
        }
        self.path.write_text(json.dumps({"environment": environment, "tests": tests}, indent=0) + "\n")
