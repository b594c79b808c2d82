"""The package as a whole: its public names, and that importing it costs nothing heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

import adaptinfer


def test_every_public_name_is_there():
    for name in adaptinfer.__all__:
        assert getattr(adaptinfer, name) is not None
    assert set(adaptinfer.__all__) <= set(dir(adaptinfer))
    assert adaptinfer.functional.text_guided_score and adaptinfer.embedded.path
    with pytest.raises(AttributeError, match="no attribute 'magic'"):
        adaptinfer.magic  # noqa: B018


def test_importing_is_light():
    code = (
        "import sys, adaptinfer, adaptinfer.cli.app; from adaptinfer import Schedule, embedded; "
        "print(sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_no_installed_module_is_shadowed():
    """A method's file may be called as a standard module (`random.py`) only because imports are absolute."""
    import random

    assert "adaptinfer" not in random.__file__
