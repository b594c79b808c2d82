"""The package as a whole: its public names, and that importing it costs nothing heavy."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import warnings
import zipfile
from pathlib import Path

import pytest

import adaptinfer
from adaptinfer._deprecated import MOVED
from adaptinfer.errors import AdaptInferError, MissingExtraError
from adaptinfer.extras import needs

ROOT = Path(__file__).parents[1]


def test_every_public_name_is_there():
    for name in adaptinfer.__all__:
        assert getattr(adaptinfer, name) is not None
    assert set(adaptinfer.__all__) <= set(dir(adaptinfer))
    assert adaptinfer.functional.text_guided_score and adaptinfer.embedded.path
    with pytest.raises(AttributeError, match="no attribute 'magic'"):
        adaptinfer.magic  # noqa: B018


@pytest.mark.parametrize("name", [name for names in MOVED.values() for name in names])
def test_old_root_names_work_and_warn_at_the_line_that_uses_them(name, monkeypatch):
    monkeypatch.delitem(vars(adaptinfer), name, raising=False)
    for code in (f"import adaptinfer\n\nadaptinfer.{name}", f"\n\nfrom adaptinfer import {name}"):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            exec(compile(code, "user.py", "exec"), {})
            exec(compile(code, "user.py", "exec"), {})
        (warning,) = seen
        assert warning.category is DeprecationWarning and (warning.filename, warning.lineno) == ("user.py", 3)
        place = str(warning.message).split()[4].rstrip(";")
        module, _, found = place.rpartition(".")
        assert found == name and getattr(sys.modules[module], name) is getattr(adaptinfer, name)
        monkeypatch.delitem(vars(adaptinfer), name)


def test_the_root_is_small():
    assert len(adaptinfer.__all__) <= 20
    assert not {name for names in MOVED.values() for name in names} & set(adaptinfer.__all__)


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


def test_a_missing_package_is_one_sentence_with_the_pip_command():
    message = "the report needs no_such_package, which is not installed: pip install 'adaptinfer[eval]'"
    with pytest.raises(MissingExtraError) as raised, needs("eval", "the report"):
        import no_such_package  # noqa: F401  # pyright: ignore
    assert str(raised.value) == message
    assert isinstance(raised.value, ImportError) and isinstance(raised.value, AdaptInferError)


BASE_ONLY = ["typer", "rich", "matplotlib", "ruptures", "scipy", "pandas", "fastapi", "uvicorn", "ray"]


def _without(missing: list[str], code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process in which some packages cannot be imported."""
    head = f"import sys\nfor name in {missing!r}: sys.modules[name] = None\n"
    command = [sys.executable, "-c", head + textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_without_its_extra():
    done = _without(["typer"], "from adaptinfer.cli import main; main()")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: the command line needs typer, which is not installed: pip install 'adaptinfer[cli]'\n"


@pytest.mark.parametrize(
    ("missing", "arguments", "extra"),
    [
        ("matplotlib", ["ask", "a.png", "what?", "--overlay", "kept.png"], "cli"),
        ("matplotlib", ["bench", "--shape", "tiny", "--plot", "plot.png"], "cli"),
        ("ruptures", ["calibrate", "-o", "calibration"], "calibrate"),
        ("scipy", ["eval", "-o", "eval"], "eval"),
        ("jinja2", ["eval", "-o", "eval"], "eval"),
    ],
)
def test_other_extras_on_the_command_line(missing, arguments, extra, tmp_path):
    code = f"import os; os.chdir({str(tmp_path)!r}); sys.argv[1:] = {arguments!r}\n"
    done = _without([missing], code + "from adaptinfer.cli import main; main()")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.endswith(f"pip install 'adaptinfer[{extra}]'\n")
    assert missing in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_pruning_in_python_needs_the_base_install_alone():
    done = _without(
        BASE_ONLY,
        """
        import adaptinfer
        from adaptinfer import embedded
        from adaptinfer.ask import ask
        from adaptinfer.checkpoints import Checkpoint
        from adaptinfer.pictures import Picture
        from PIL import Image
        checkpoint = Checkpoint("embedded")
        prompt = checkpoint.prompt([Picture("white", Image.new("RGB", (256, 256), "white"))], "Is there a red star?")
        answer = ask(checkpoint, prompt, adaptinfer.AdaptInfer(budget=0.33), max_new_tokens=2)
        assert answer.report.true_average[0] < 86
        import adaptinfer.pruners, adaptinfer.resize, adaptinfer.bench
        """,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_wheel_installed_alone(tmp_path):
    """Built, and imported from its own folder with nothing but the base dependencies in reach."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "research" in name or "tests" in name]
    subprocess.run([*pip, "install", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)], check=True)
    code = f"sys.path.insert(0, {str(tmp_path / 'site')!r})\nimport adaptinfer\nprint(adaptinfer.__file__)\n"
    done = _without(BASE_ONLY, code + "from adaptinfer import AdaptInfer, attach, embedded\nembedded.path()\n")
    assert done.returncode == 0 and str(tmp_path) in done.stdout, done.stderr
