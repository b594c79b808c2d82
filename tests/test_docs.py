"""The code of the README and of the pages in docs/: Python blocks run, commands are parsed by the real command line.

A block's language says what happens to it: ``python`` runs, in one namespace per page; ``bash`` is parsed command by
command, and run if ``<!-- run -->`` stands on the line before; ``json`` must parse. A comment ``<!-- needs ... -->`` or
``<!-- shown -->`` on the line before a Python block means that it is compiled but not run, ``<!-- file: NAME -->`` that
it is written to that file for the blocks below.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import click
import pytest
import typer
from sybil import Document, Example
from sybil.parsers.markdown.codeblock import CodeBlockParser
from typer.testing import CliRunner

from adaptinfer.cli.app import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
LANGUAGES = ("python", "bash", "json", "toml")


def examples(page: Path) -> list[Example]:
    """The code blocks of a page in order, each with what evaluates it."""
    parsers = [CodeBlockParser(language, evaluate) for language, evaluate in EVALUATORS.items()]
    return list(Document.parse(str(page), *parsers).examples())


def mark(example: Example) -> str:
    """The text of an HTML comment on the line before a block."""
    before = example.document.text[: example.region.start].rstrip(" ").splitlines()
    found = re.fullmatch(r"\s*<!-- (.*) -->", before[-1]) if before else None
    return found[1] if found else ""


def run_python(example: Example) -> None:
    code = compile("\n" * example.line + example.parsed, example.path, "exec")
    kind, _, what = mark(example).partition(" ")
    if kind == "file:":
        Path(what).write_text(example.parsed, encoding="utf-8")
    elif kind not in ("needs", "shown"):
        exec(code, example.namespace)


def run_bash(example: Example) -> None:
    for command in commands(example.parsed):
        check(command)
        if mark(example) == "run":
            command = command[2:] if command[:2] == ["python", "-m"] else command
            assert command[0] == "adaptinfer", "only our own commands are run"
            result = CliRunner().invoke(app, command[1:])
            assert result.exit_code == 0, f"{shlex.join(command)}: {result.output}"


def read_json(example: Example) -> None:
    for line in example.parsed.splitlines():
        json.loads(line)


EVALUATORS = {"python": run_python, "bash": run_bash, "json": read_json}  # toml is shown: Python 3.10 has no parser


def commands(text: str) -> list[list[str]]:
    """The commands of a block as words, without comments, environment variables and launchers."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        if "base64 -w0" in text or "additional-config" in line:  # quotes within quotes
            found.append(line.split())
            continue
        words = shlex.split(line, comments=True)
        while words and "=" in words[0]:
            words = words[1:]
        if words:
            found.append(words)
    return [words for words in found if words]


def check(words: list[str]) -> None:
    """Raise unless the command exists and takes these arguments."""
    program = words[0].removeprefix(".venv/bin/")
    if "-m adaptinfer " in " ".join(words):  # python, accelerate, torchrun
        program, words = "adaptinfer", words[words.index("adaptinfer") :]
    if program == "adaptinfer":
        parse(words[1:])
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert words[1] in targets, f"the Makefile has no {words[1]!r}"
    elif program in ("python", "python3") and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file(), f"there is no {words[1]}"


def parse(arguments: list[str]) -> None:
    """Let the command line parse arguments, without running anything. Raises click's error if it cannot."""
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group) or hasattr(group, "get_command")
    command = group.get_command(click.Context(group), arguments[0])  # type: ignore[attr-defined]
    assert command is not None, f"there is no command {arguments[0]!r}"
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    for word in arguments[1:]:
        if word.startswith("-") and not re.fullmatch(r"-\d.*|-", word):
            assert word in options, f"adaptinfer {arguments[0]} has no option {word}"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A place to run a page's code in: what it writes is thrown away."""
    for name in ("examples", "src", "research"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_the_code_of_a_page_works(page, folder):
    for example in examples(page):
        example.evaluate()


def test_the_readmes_example_answers(folder, capsys):
    (example,) = (each for each in examples(ROOT / "README.md") if each.parsed.startswith("from PIL"))
    example.evaluate()
    printed = capsys.readouterr().out
    assert "yellow" in printed and "(256, 146, 146, 146, 146, 36" in printed


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_block_has_a_language_that_is_checked(page):
    """A block without a language, or an indented one, would go unchecked. Output and diagrams are indented blocks."""
    text = page.read_text(encoding="utf-8")
    fences = re.findall(r"^ *```(\w*)", text, flags=re.MULTILINE)
    assert set(fences[::2]) <= set(LANGUAGES) and not any(fences[1::2]), fences


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 140


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_of_a_page_lead_somewhere(page):
    """mkdocs checks the site's pages; this checks links as a reader of the repository follows them."""
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_pages_are_in_english(page):
    """Words that we used in a sense they do not have: "behind" for "after", "mend" for "fix", and the like."""
    text = re.sub(r"leaves? nothing behind", "", page.read_text(encoding="utf-8"))
    assert re.findall(r"\b(behind|heeded|mended|unrest)\b", text) == []
