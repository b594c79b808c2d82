"""The tables of docs/results/performance.md from committed results.

    python research/performance_tables.py

prints all of them, to be pasted into the page: those of `profile_prefill.py`, `steps.py` and `adaptinfer bench`.
`tests/test_profile.py` and `tests/test_readme.py` hold it to them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from watch import IN_LAYERS, PARTS

COMMITTED = Path(__file__).parent / "results"
SPEED = ("bench_llava-1b_float32_cpu.json", "bench_llava-1b_bfloat16_cpu.json")


def committed(folder: Path = COMMITTED) -> Iterator[tuple[Path, list[str]]]:
    """Each committed file with the lines of its table."""
    for kind, lines in (("profile", profile_lines), ("steps", steps_lines), ("memory", memory_lines)):
        for path in sorted(folder.glob(f"{kind}_*.json")):
            yield path, lines(json.loads(path.read_text(encoding="utf-8")))


def speed_lines(folder: Path = COMMITTED) -> list[str]:
    """A row per variant of each run of `adaptinfer bench`."""
    speed = ("median ms", "min–max ms", "speed-up", "FLOPs bound", "share of the bound")
    names = ("true average of 576", *speed, "TTFT", "scorer")
    lines = [_row("dtype", *names), _row("---", *["---:"] * len(names))]
    for name in SPEED:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        (batch,) = content["batches"]
        for variant in batch["variants"]:
            prefill, scorer = variant["summary"]["decoder_prefill_ms"], variant["scorer_share_of_vanilla_prefill"]
            whole = variant["name"] if variant["name"] in ("vanilla", "keep all") else ""
            lines.append(
                _row(
                    content["setup"]["dtype"],
                    whole or f"{variant['true_average']:.1f}",
                    f"{prefill['median']:.0f}",
                    f"{prefill['least']:.0f}–{prefill['most']:.0f}",
                    f"{variant['speed_up']['decoder_prefill_ms']['median']:.2f}×",
                    f"{variant['flops_bound']:.2f}×",
                    f"{variant['share_of_flops_bound']:.0%}",
                    f"{variant['speed_up']['ttft_ms']['median']:.2f}×",
                    "" if scorer is None else f"{scorer:.2%}",
                )
            )
    return lines


def profile_lines(content: dict[str, Any]) -> list[str]:
    """A row per part in milliseconds, the floor's in brackets, then the whole prefill against the floor."""
    entries = content["variants"]
    lines = [_row("ms (floor's)", *(entry["name"] for entry in entries)), _row("---", *["---:"] * len(entries))]
    for part in PARTS:
        if any(part in entry["parts"] for entry in entries):
            lines.append(_row(part, *(_cell(entry, part) for entry in entries)))
    for label, figure, form in (
        ("decoder prefill", "decoder_prefill_ms", "{:.0f}"),
        ("its floor", "floor_ms", "{:.0f}"),
        ("**share of the floor**", "share_of_floor", "{:.1%}"),
        ("TTFT", "ttft_ms", "{:.0f}"),
        ("sum of the parts, of TTFT", "watched_to_unwatched", "{:.1%}"),
    ):
        lines.append(_row(label, *(_spread(entry["summary"][figure], form) for entry in entries)))
    return lines


def steps_lines(content: dict[str, Any]) -> list[str]:
    """A row per step that was taken back: how many times as long it takes without the step, prefix reuse with it."""
    lines = [_row("", "decoder prefill ms", "×", "first token ms", "×"), _row("---", *["---:"] * 4)]
    for way in content["ways"]:
        cells = []
        for figure in ("decoder_prefill_ms", "first_token_ms"):
            same = way["name"] == way["against"]
            cells += [
                _spread(way["summary"][figure], "{:.0f}"),
                "" if same else _spread(way["ratio"][figure], "{:.3f}"),
            ]
        lines.append(_row(way["name"], *cells))
    return lines


def memory_lines(content: dict[str, Any]) -> list[str]:
    """A row per way: megabytes above what was held before, and of the cache."""
    lines = [_row("", "peak above idle, MB", "KV cache, MB"), _row("---", "---:", "---:")]
    for way in content["peaks"]:
        lines.append(_row(way["name"], *(f"{way[fact] / 1e6:,.0f}" for fact in ("peak_above_idle_bytes", "kv_bytes"))))
    return lines


def _cell(entry: dict[str, Any], part: str) -> str:
    if part not in entry["parts"]:
        return ""
    floor = entry["floor_parts"].get(part) if part in IN_LAYERS else None
    return f"{entry['parts'][part]['median']:.1f}" + ("" if floor is None else f" ({floor['median']:.1f})")


def _spread(summary: dict[str, float], form: str) -> str:
    median, lower, upper = (form.format(summary[name]) for name in ("median", "lower_quartile", "upper_quartile"))
    return f"{median} ({lower}–{upper})"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(*speed_lines(), "", sep="\n")
    for path, lines in committed():
        print(f"`research/results/{path.name}`:", *lines, "", sep="\n")
