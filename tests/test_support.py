"""docs/results/support.md is what the results say, and these are complete."""

from __future__ import annotations

import support

from adaptinfer.engine.families import TESTED


def test_the_page_is_written_from_the_results():
    assert support.PAGE.read_text(encoding="utf-8") == support.page(support.load())


def test_nothing_failed_where_everything_is_pinned():
    main = support.load()[support.MAIN]
    assert main["environment"]["selection"] == "full"
    assert not support.outcomes(main)["failed"]


def test_every_family_that_is_called_tested_was():
    passed = {
        case.split("-")[0]
        for test, kinds in support.load()[support.MAIN]["tests"].items()
        if test.startswith(support.MATRIX) and not test.endswith("refused")
        for case in kinds["passed"]
    }
    assert set(TESTED) <= passed, "every model type has a set-up of its name in tests/zoo.py"
