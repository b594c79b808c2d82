"""The figures of the README and of the site are those of the committed results."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import numpy as np
from mutants_list import MUTANTS
from PIL import Image

from adaptinfer import embedded
from adaptinfer.embedded.__main__ import picture
from adaptinfer.embedded.world import SPLITS, sample_scene
from adaptinfer.evaluation.plan import weights_digest
from adaptinfer.pruners import METHODS
from adaptinfer.schedule import ModelShape, Schedule, preset

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


def committed(name):
    return json.loads((ROOT / "research" / "results" / name).read_text(encoding="utf-8"))


def test_the_readmes_results_are_those_of_the_committed_runs():
    """Its five lines; the pages that they point at are held to the same files below."""
    text = " ".join(README.split())
    (batch,) = committed("bench_llava-1b_bfloat16_cpu.json")["batches"]
    by_budget = {round(each["true_average"]): each["speed_up"] for each in batch["variants"] if each["true_average"]}
    prefill, ttft = ([by_budget[b][name]["median"] for b in (64, 192)] for name in ("decoder_prefill_ms", "ttft_ms"))
    assert f"{prefill[0]:.2f}× faster at 64 of 576 vision tokens, {prefill[1]:.2f}× at 192;" in text
    assert f"(TTFT): {ttft[0]:.2f}× and {ttft[1]:.2f}×." in text

    published, llava = preset("llava-1.5-7b/64"), ModelShape(32, 4096, 32, 32, 128, 11008)
    vanilla = Schedule((), 32).prefill_flops(llava, 92, 576)
    with_early_drop, without = (
        100 - 100 * published.prefill_flops(llava, 92, 576, early_drop=early) / vanilla for early in (True, False)
    )
    assert f"published 64-token schedule: {with_early_drop:.1f} % fewer ({without:.1f} % without early drop)" in text

    (task,) = committed("evaluation/summary.json")["tasks"]
    right = {each["name"]: f"{100 * each['accuracy']['value']:.1f}" for each in task["conditions"]}
    plus = [right[f"adaptinfer+ {budget}"] for budget in (0.33, 0.22, 0.11, 0.06)]
    plain = [right[f"adaptinfer {budget}"] for budget in (0.33, 0.22, 0.11)]
    assert f"on {task['answers']} questions, vanilla {right['vanilla']} %:" in text
    assert f"AdaptInfer+ {', '.join(plus[:3])} and {plus[3]} % at 33, 22, 11 and 6 %" in text
    assert f"AdaptInfer {', '.join(plain[:2])} and {plain[2]} % at 33, 22 and 11 %" in text
    margins = evaluation_tables.margin_lines(task, ("adaptinfer+",))[2:]
    assert len(margins) == 4 and all(line.endswith("| none |") for line in margins), "none beats it"

    plain_rounds, pruned = committed("vllm_throughput_llava-1b_cpu.json")["rounds"].values()
    rate = statistics.median(
        each["requests_per_second"] / own["requests_per_second"] for each, own in zip(pruned, plain_rounds, strict=True)
    )
    assert f"{rate:.2f}× the requests per second" in text
    assert f"with {len(METHODS) - 1} other pruning methods and controls" in text


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


def test_the_number_of_mutants_is_that_of_the_list():
    assert f"breaks the code in {len(MUTANTS)} ways" in README


def test_every_research_script_is_listed():
    research = ROOT / "research"
    text = (research / "README.md").read_text(encoding="utf-8")
    scripts = [path.name for path in research.rglob("*.py")]
    assert scripts
    assert [name for name in scripts if f"{name}`" not in text] == []


def test_the_plot_of_the_page_is_the_committed_runs():
    drawn = ROOT / "research" / "results" / "evaluation" / "world.png"
    assert (ROOT / "docs" / "images" / "accuracy.png").read_bytes() == drawn.read_bytes()
