"""Shared set-up: the hub is never asked, two cores are shared by the workers, models are made once."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import tiny
import torch
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
