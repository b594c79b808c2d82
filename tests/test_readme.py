"""The README's Python runs as it stands, and its figures are those of the committed results."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

from mutants import MUTANTS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_ten_lines_run(monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    monkeypatch.chdir(ROOT)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "red" in printed and "(64, 36, 36, 36, 36, 9" in printed


def test_accuracy_is_that_of_the_committed_run():
    card = (ROOT / "src/adaptinfer/embedded/checkpoint/README.md").read_text(encoding="utf-8")
    results = json.loads((ROOT / "benchmarks/results/embedded_accuracy.json").read_text())["results"]
    for result in results.values():
        cells = [f"{100 * r['share']:.1f} ± {r['margin_points']:.1f}" for r in result["accuracy"].values()]
        assert " | ".join(cells) in README
        assert " | ".join(cells) in card


def test_speed_is_that_of_the_committed_run():
    document = json.loads((ROOT / "benchmarks/results/bench_llava-1b_float32_cpu.json").read_text())
    for variant in document["batches"][0]["variants"]:
        ms = variant["summary"]["decoder_prefill_ms"]
        prefill, ttft = (variant["speed_up"][what]["median"] for what in ("decoder_prefill_ms", "ttft_ms"))
        row = f"| {ms['median']:.0f} | {ms['least']:.0f}–{ms['most']:.0f} | {prefill:.2f}× |"
        assert row in README and f"{ttft:.2f}× |" in README


def test_throughput_is_that_of_the_committed_run():
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    rounds = json.loads((ROOT / "benchmarks/results/vllm_throughput_llava-1b_cpu.json").read_text())["rounds"]
    plain = next(iter(rounds.values()))
    for measured in rounds.values():
        rates = [each["requests_per_second"] for each in measured]
        ratio = statistics.median(each / own["requests_per_second"] for each, own in zip(rates, plain, strict=True))
        waits = statistics.median(statistics.median(each["ttft_seconds"]) for each in measured)
        spread = f"{statistics.median(rates):.3f} ({min(rates):.3f}–{max(rates):.3f}) | {ratio:.2f}× | {waits:.2f} s |"
        assert spread in page


def test_each_mutant_still_finds_its_line():
    assert f"breaks the code in {len(MUTANTS)} ways" in README
    sources = ROOT / "src/adaptinfer"
    assert [
        bug for bug, file, line, *_ in MUTANTS if (sources / file).read_text(encoding="utf-8").count(line) != 1
    ] == []
