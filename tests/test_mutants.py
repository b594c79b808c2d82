"""``mutants.py`` plants bugs in the code; these tests only see that each of them still has its place."""

from __future__ import annotations

import pytest
from mutants import Code, Mutant, check, mutated, verdict
from mutants_list import MUTANTS

MODULE = """
class Layers:
    chosen = "compact"

    def keep(self, count):
        if count > 1 and self.ready:
            return self.top(count, stable=True)
        return [
            count,
        ]

def keep(count):
    return [count]
"""


@pytest.fixture
def code(tmp_path):
    (tmp_path / "layers.py").write_text(MODULE)
    return Code(tmp_path)


def test_every_mutant_applies_exactly_once():
    assert check(MUTANTS, Code()) == []


def test_no_bug_is_listed_twice():
    assert len({mutant.bug for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize(
    ("where", "before", "after", "there"),
    [
        ("Layers.keep", "[count]", "[count + 1]", "return [count + 1]\n\ndef"),
        ("Layers", "if count > 1 and self.ready:", "if True:", "if True:\n            return self.top"),
        ("Layers.keep", "stable=True", "stable=False", "stable=False)"),
        ("Layers.chosen", "chosen = 'compact'", "", "class Layers:\n\n    def keep"),
        (
            "keep",
            "return [count]",
            "count += 1\nreturn [count]",
            "def keep(count):\n    count += 1\n    return [count]\n",
        ),
    ],
)
def test_planted_where_it_is_named_and_nowhere_else(code, where, before, after, there):
    mutant = Mutant("a bug", where, before, after, "tests/test_mutants.py")
    assert check([mutant], code) == []
    assert there in mutated(mutant, code)
    assert mutated(mutant, code).count("count") >= MODULE.count("count") - 2


@pytest.mark.parametrize(
    ("where", "before", "tests", "said"),
    [
        ("Layers", "[total]", "tests/test_mutants.py", "stands 0 times in Layers; it is gone"),
        ("elsewhere", "self.ready", "tests/test_mutants.py", "it is in layers.py:Layers.keep"),
        ("Layers.keep", "count", "tests/test_mutants.py", "stands 3 times"),
        ("Layers.keep", "self.ready", "tests/test_nothing.py", "there is no tests/test_nothing.py"),
        ("Layers.keep", "self.ready", "tests/test_mutants.py::test_nothing", "there is no test_nothing in"),
    ],
)
def test_a_lost_mutant_is_told(code, where, before, tests, said):
    (problem,) = check([Mutant("a bug", where, before, "None", tests)], code)
    assert said in problem


def test_only_a_failed_test_is_red():
    assert verdict(0, "") == "green"
    assert verdict(1 << 8, "FAILED tests/test_mutants.py::test") == "red"
    assert verdict(1 << 8, "ERROR tests/test_mutants.py").startswith("no verdict")
    assert verdict(4 << 8, "").startswith("no verdict")
    assert verdict(14, "FAILED tests/test_mutants.py::test").startswith("no verdict")  # SIGALRM
