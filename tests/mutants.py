"""Break the code on purpose, one place at a time, and see the tests go red.

    .venv/bin/python tests/mutants.py [-j JOBS] [WORDS OF A BUG ...]
    .venv/bin/python tests/mutants.py --check

``mutants_list.py`` lists the bugs: each is one that published pruning code has had, or one that an optimisation here
invites. A mutant names a function, class or constant and the statements or the expression in it to replace. Both are
compared as syntax trees, so moving a function to another file or re-wrapping a line does not lose its mutants.
``--check`` verifies in seconds, without running tests, that every mutant applies exactly once (``test_mutants.py``).

A run first checks that the tests are green on the code as it is. Each mutant is then applied to a copy of ``src`` and
its tests run against the copy. Mutants that survive are reported, and the exit code is 1. A run that judges nothing
(no such test, a crash in collection) never counts as red.

Test processes are forked from this one, which has imported torch and transformers already. That saves some seconds
for each mutant.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src"
TIMEOUT_S = 900
_NAMED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class Mutant(NamedTuple):
    """One bug.

    ``where`` is the qualified name of a function, a class, or a constant of a module or class. It is looked for in all
    modules; ``module:name`` restricts the search to modules whose path ends with ``module`` and is only needed where
    the same code stands in two functions of one name. ``code`` and ``broken`` are both an expression, both a header
    (``if x:``, without its block), both a keyword argument (``name=value``), or both a run of statements; an empty
    ``broken`` deletes statements.
    """

    bug: str
    where: str
    code: str
    broken: str
    tests: str


@dataclass
class Place:
    """Where a mutant's code stands: ``count`` entries of ``parent.field`` from ``index``, or the field itself."""

    path: Path
    name: str
    parent: ast.AST
    field: str
    index: int | None
    count: int

    def replace(self, nodes: Sequence[ast.AST]) -> None:
        value = getattr(self.parent, self.field)
        if self.index is None:
            setattr(self.parent, self.field, _placed(nodes[0], value))
        else:
            value[self.index : self.index + self.count] = [_placed(node, value[self.index]) for node in nodes]
            if not value:
                value.append(ast.Pass())


def _placed(new: ast.AST, old: ast.AST) -> ast.AST:
    """What stands for ``old``: a keyword argument stays one, and a header keeps its block."""
    if isinstance(old, ast.keyword) and isinstance(new, ast.Assign):
        return ast.keyword(old.arg, new.value)
    if _is_header(new):
        for block in _BLOCKS:
            if hasattr(new, block):
                setattr(new, block, getattr(old, block))
    return new


@dataclass
class Code:
    """The parsed modules of a source folder, by path."""

    root: Path = SOURCE
    modules: dict[Path, ast.Module] = field(default_factory=dict)
    texts: dict[Path, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for path in [] if self.modules else sorted(self.root.rglob("*.py")):
            self.texts[path] = path.read_text(encoding="utf-8")
            self.modules[path] = ast.parse(self.texts[path])

    def places(self, mutant: Mutant, anywhere: bool = False) -> list[Place]:
        """Every place of a mutant's code, in its function or anywhere."""
        module, _, name = mutant.where.rpartition(":")
        wanted, _ = parsed(mutant.code, mutant.broken)
        found = []
        for path, tree in self.modules.items():
            dotted = "." + ".".join(path.relative_to(self.root).with_suffix("").parts).removesuffix(".__init__")
            elsewhere = not dotted.endswith(f".{module}" if module else "") or (
                path in self.texts and name.rpartition(".")[2] not in self.texts[path]
            )
            if anywhere or not elsewhere:
                found += _search(tree, wanted, path, "" if anywhere else name)
        return found


def parsed(code: str, broken: str) -> tuple[list[ast.AST], list[ast.AST]]:
    """Both as one expression each, as headers (``if x:``), or else as statements."""
    try:
        return [ast.parse(code, mode="eval").body], [ast.parse(broken, mode="eval").body]
    except SyntaxError:
        block = " ..." if code.endswith(":") else ""
        return list(ast.parse(code + block).body), list(ast.parse(broken + block).body)


_BLOCKS = ("body", "orelse")


def _is_header(node: ast.AST) -> bool:
    body = getattr(node, "body", None)
    return isinstance(body, list) and ast.unparse(body) == "..."


def _same(wanted: object, found: object, skip: Sequence[str] = ()) -> bool:
    """Whether two trees are equal, line numbers and the fields in ``skip`` apart."""
    if type(wanted) is not type(found):
        if isinstance(wanted, ast.Assign) and isinstance(found, ast.keyword):
            target = wanted.targets[0]
            return isinstance(target, ast.Name) and target.id == found.arg and _same(wanted.value, found.value)
        return False
    if isinstance(wanted, list):
        return len(wanted) == len(found) and all(map(_same, wanted, found))
    if isinstance(wanted, ast.AST):
        names = (name for name in wanted._fields if name not in skip)
        return all(_same(getattr(wanted, name, None), getattr(found, name, None)) for name in names)
    return wanted == found


def _search(tree: ast.Module, wanted: list[ast.AST], path: Path, where: str) -> Iterator[Place]:
    """Places of ``wanted`` in a module, in what has the qualified name ``where`` or, if empty, anywhere."""
    count = len(wanted)
    skip = _BLOCKS if _is_header(wanted[0]) else ()

    def visit(node: ast.AST, name: str, inside: bool) -> Iterator[Place]:
        for key in node._fields:
            value = getattr(node, key, None)
            entries = value if isinstance(value, list) else [value]
            for index, entry in enumerate(entries):
                if not isinstance(entry, ast.AST):
                    continue
                called = _called(entry, name, inside)
                here = not where or f"{called}.".startswith(f"{where}.")
                if not here and called and not where.startswith(f"{called}."):
                    continue
                run = entries[index : index + count]
                if (
                    here
                    and len(run) == count
                    and all(_same(one, other, skip) for one, other in zip(wanted, run, strict=True))
                ):
                    yield Place(path, called, node, key, index if isinstance(value, list) else None, count)
                yield from visit(entry, called, inside or isinstance(entry, (ast.FunctionDef, ast.AsyncFunctionDef)))

    yield from visit(tree, "", False)


def _called(node: ast.AST, name: str, inside: bool) -> str:
    """The qualified name of a node below what is called ``name``; ``inside`` a function only definitions are named."""
    own = ""
    if isinstance(node, _NAMED):
        own = node.name
    elif not inside and isinstance(node, (ast.Assign, ast.AnnAssign)):
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        own = target.id if isinstance(target, ast.Name) else ""
    return f"{name}.{own}".strip(".") if own else name


def problem(mutant: Mutant, code: Code) -> str | None:
    """Why a mutant cannot be applied or tested, or ``None``."""
    places = code.places(mutant)
    if len(places) != 1:
        now = places or code.places(mutant, anywhere=True)
        listed = ", ".join(f"{place.path.relative_to(code.root)}:{place.name}" for place in now)
        return f"its code stands {len(places)} times in {mutant.where}; " + (
            f"it is in {listed}" if now else "it is gone"
        )
    file, _, function = mutant.tests.partition("::")
    if not (ROOT / file).is_file():
        return f"there is no {file}"
    if function and f"def {function.split('[')[0]}(" not in (ROOT / file).read_text(encoding="utf-8"):
        return f"there is no {function} in {file}"
    return None


def broken_copy(mutant: Mutant, code: Code, folder: Path) -> Path:
    """A copy of the source in ``folder`` with the mutant in it. The embedded checkpoint is linked, not copied."""
    copy = folder / "src"
    shutil.copytree(code.root, copy, ignore=shutil.ignore_patterns("__pycache__", "checkpoint"))
    checkpoint = Path("adaptinfer/embedded/checkpoint")
    (copy / checkpoint).symlink_to(code.root / checkpoint)
    path = code.places(mutant)[0].path
    (copy / path.relative_to(code.root)).write_text(mutated(mutant, code), encoding="utf-8")
    return copy


def mutated(mutant: Mutant, code: Code) -> str:
    """The text of the module with the mutant in it, without comments. ``code`` stays as it is."""
    (place,) = code.places(mutant)
    fresh = Code(code.root, {place.path: ast.parse(ast.unparse(code.modules[place.path]))})
    (place,) = fresh.places(mutant)
    place.replace(parsed(mutant.code, mutant.broken)[1])
    return ast.unparse(ast.fix_missing_locations(fresh.modules[place.path])) + "\n"


def run_tests(source: Path, tests: Sequence[str], log: Path) -> None:
    """In a forked process: pytest's exit code becomes the process's."""
    signal.alarm(TIMEOUT_S)
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    paths = [str(source), str(ROOT / "tests")]
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    code = 3
    try:
        options = ["-x", "-q", "-W", "ignore", "-p", "no:cacheprovider", "-m", "not full and not slow and not gpu"]
        code = int(importlib.import_module("pytest").main([*options, *tests]))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def verdict(status: int, output: str) -> str:
    """``green``, ``red``, or why pytest judged nothing: a test that does not exist must not count as red."""
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return "green"
    if code == 1 and "FAILED tests/" in output:
        return "red"
    return f"no verdict (pytest ended with {code}): {output[-300:]}"


class Job(NamedTuple):
    """Tests to run against the source that ``prepare`` makes in a folder, and who is told the verdict."""

    prepare: Callable[[Path], Path]
    tests: Sequence[str]
    tell: Callable[[str], None]


def run_all(jobs: Sequence[Job], at_once: int) -> None:
    """Run each job in a process forked from this one, so many at once."""
    waiting, running = list(jobs), {}
    while waiting or running:
        while waiting and len(running) < at_once:
            job = waiting.pop(0)
            folder = tempfile.TemporaryDirectory()
            source, log = job.prepare(Path(folder.name)), Path(folder.name) / "log"
            process = os.fork()
            if process == 0:
                run_tests(source, job.tests, log)
            running[process] = (job, folder, log)
        process, status = os.wait()
        job, folder, log = running.pop(process)
        job.tell(verdict(status, log.read_text(encoding="utf-8", errors="replace")))
        folder.cleanup()


def preload() -> None:
    """Import what every test process needs and no mutant can touch."""
    os.chdir(ROOT)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("pytest", "hypothesis", "numpy", "PIL.Image", "torch", "transformers"):
        importlib.import_module(name)
    families = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "gemma3")
    for name in ("generation.utils", *(f"models.{family}.modeling_{family}" for family in families)):
        importlib.import_module(f"transformers.{name}")


def check(mutants: Sequence[Mutant], code: Code) -> list[str]:
    """The mutants that have lost their place or their tests, one sentence each."""
    found = ((mutant, problem(mutant, code)) for mutant in mutants)
    return [f"{mutant.bug!r}: {what}" for mutant, what in found if what]


def main() -> int:
    parser = argparse.ArgumentParser(description="Break the code on purpose and see the tests go red.")
    parser.add_argument("words", nargs="*", help="run only mutants whose bug contains one of these")
    parser.add_argument("-j", "--jobs", type=int, default=1, help="test processes at once (default: 1)")
    parser.add_argument("--check", action="store_true", help="only verify that every mutant applies exactly once")
    options = parser.parse_args()

    from mutants_list import MUTANTS

    chosen = [m for m in MUTANTS if not options.words or any(word in m.bug for word in options.words)]
    code = Code()
    lost = check(chosen, code)
    if options.check or lost:
        print(f"{len(chosen)} mutants, {len(lost)} without a place" + "".join(f"\n  {line}" for line in lost))
        return 1 if lost else 0

    start = time.monotonic()
    preload()
    bad: list[str] = []
    print("The tests, with nothing broken", flush=True)
    groups: dict[str, list[str]] = {}
    for mutant in chosen:
        tests = groups.setdefault(mutant.tests.partition("::")[0], [])
        if mutant.tests not in tests:
            tests.append(mutant.tests)

    def sound(tests: Sequence[str]) -> Callable[[str], None]:
        def tell(said: str) -> None:
            if said != "green":
                bad.append(f"{said}  {' '.join(tests)}, with nothing broken")
                print(bad[-1], flush=True)

        return tell

    def judged(mutant: Mutant) -> Callable[[str], None]:
        def tell(said: str) -> None:
            print(f"{'SURVIVED' if said == 'green' else said:9} {mutant.bug}", flush=True)
            if said != "red":
                bad.append(mutant.bug)

        return tell

    run_all([Job(lambda _: SOURCE, tests, sound(tests)) for tests in groups.values()], options.jobs)
    run_all([Job(lambda folder, m=m: broken_copy(m, code, folder), [m.tests], judged(m)) for m in chosen], options.jobs)
    print(f"{len(chosen)} ways to break the code, {len(bad)} not noticed" + "".join(f"\n  {line}" for line in bad))
    print(f"{(time.monotonic() - start) / 60:.0f} minutes")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.modules["mutants"] = sys.modules["__main__"]
    sys.exit(main())
