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

NEWEST = (5, 24)  # of requirements.lock, on which nothing may be skipped for its age

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


# What older versions of transformers cannot do themselves, by what they say, or what is refused on them.
OLDER = (
    "module transformers has no attribute",
    "module 'transformers.cache_utils' has no attribute 'Fp8QuantizedLayer'",
    "Unknown quantization backend `fp8`",
    "assisted generate is not supported with Static cache classes",
    "The following `model_kwargs` are not used by the model: ['pixel_values']",
    "'StaticLayer' object has no attribute 'crop'",
    "object has no attribute 'max_batch_size'",
    "'DynamicCache' object has no attribute 'activate_past_recording'",
    "static caches need transformers 5.5 or newer",
    "needs a newer transformers",
    "pruning needs a cache whose layers may hold different lengths",
    "isin() received an invalid combination of arguments - got (Tensor, NoneType)",
    "unknown device type for autocast in get_autocast_dispatch_key_from_device_type",
)

# Where older versions disagree with themselves; each was checked without a pruner.
OLDER_TESTS = {
    "[vipllava-": "VipLlava's vision features cannot be made",
    "test_an_image_in_each_of_two_turns[gemma3-": "Gemma 3 with a new image on a cache is not Gemma 3 without one",
    "test_a_reset_cache_is_a_fresh_one[dynamic": "a reset dynamic cache keeps its length",
    "test_quantisers_of_other_libraries_without_loss": "beams on a quantised cache fail",
    "test_text_alone_is_vanilla_bit_for_bit[qwen2_5_vl": "rope deltas of the last prompt are used for text alone",
    "test_ways_to_generate[{'num_beams'": "beams repeat pictures, not rows of pictures",
    "test_second_turn_on_one_cache[qwen2_5_vl": "rope deltas of the last prompt are used for text alone",
}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Skip, on older versions of transformers, what these cannot do."""
    try:
        return (yield)
    except Exception as error:
        newest = tuple(map(int, transformers.__version__.split(".")[:2])) >= NEWEST
        reason = next((words for words in OLDER if words in str(error)), None)
        reason = reason or next((why for part, why in OLDER_TESTS.items() if part in item.nodeid), None)
        if newest or reason is None:
            raise
        pytest.skip(f"transformers {transformers.__version__}: {reason}")


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
