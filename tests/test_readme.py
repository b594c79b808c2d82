"""The figures of the README and of the site are those of the committed results."""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path

import numpy as np
from mutants import MUTANTS
from PIL import Image

from adaptinfer import embedded
from adaptinfer.embedded.__main__ import picture
from adaptinfer.embedded.world import SPLITS, sample_scene
from adaptinfer.evaluation.plan import weights_digest

sys.path.insert(0, str(Path(__file__).parent.parent / "research" / "training"))
sys.path.insert(0, str(Path(__file__).parent.parent / "research"))

import card
import evaluation_tables
import measure
import performance_tables

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "docs" / "results"
PERFORMANCE = (RESULTS / "performance.md").read_text(encoding="utf-8")


def test_the_ten_lines_run(monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    monkeypatch.chdir(ROOT)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "yellow" in printed and "(256, 146, 146, 146, 146, 36" in printed


def test_the_examples_picture_is_the_demos_scene():
    scene = sample_scene(SPLITS["test"][6], embedded.patches()[0])
    assert (np.asarray(Image.open(ROOT / "examples/scene.png")) == np.asarray(picture(scene, 384))).all()
    assert "draw --seed 6 " in (ROOT / "Makefile").read_text()


def test_accuracy_is_that_of_the_committed_runs_on_the_shipped_weights():
    """`train.py measure`, then `... card`, wrote the card and the site's table, from these weights."""
    documents = card.read(measure.RESULTS)
    for name in measure.RUNS:
        assert documents[name]["weights"] == weights_digest("embedded"), f"{name}.json is of another model"
    shipped = ROOT / "src/adaptinfer/embedded/checkpoint/README.md"
    assert shipped.read_text(encoding="utf-8") == card.card(documents)
    page = (ROOT / card.PAGE).read_text(encoding="utf-8")
    assert card.into(page, card.pruned(documents)) == page


def test_speed_is_that_of_the_committed_runs():
    assert "\n".join(performance_tables.speed_lines()) in PERFORMANCE


def test_accuracy_of_methods_is_that_of_the_committed_runs():
    """Every table of the two pages, each on one of them."""
    pages = "".join((RESULTS / name).read_text(encoding="utf-8") for name in ("accuracy.md", "search.md"))
    for name, lines in evaluation_tables.committed().items():
        assert "\n".join([f"<!-- {name} -->", "", *lines]) in pages, f"docs/results does not hold the table {name!r}"
        assert len(lines) > 3


def test_throughput_is_that_of_the_committed_run():
    rounds = json.loads((ROOT / "research/results/vllm_throughput_llava-1b_cpu.json").read_text())["rounds"]
    plain = next(iter(rounds.values()))
    for measured in rounds.values():
        rates = [each["requests_per_second"] for each in measured]
        ratio = statistics.median(each / own["requests_per_second"] for each, own in zip(rates, plain, strict=True))
        waits = statistics.median(statistics.median(each["ttft_seconds"]) for each in measured)
        spread = f"{statistics.median(rates):.3f} ({min(rates):.3f}–{max(rates):.3f}) | {ratio:.2f}× | {waits:.2f} s |"
        assert spread in PERFORMANCE


def test_each_mutant_still_finds_its_line():
    assert f"breaks the code in {len(MUTANTS)} ways" in README
    sources = ROOT / "src/adaptinfer"
    assert [
        bug for bug, file, line, *_ in MUTANTS if (sources / file).read_text(encoding="utf-8").count(line) != 1
    ] == []
