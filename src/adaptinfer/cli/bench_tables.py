"""Results in a terminal of 100 columns: one narrow table per question."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from adaptinfer.cli import terminal
from adaptinfer.cli.terminal import table

_DEFINITIONS = (
    "Medians, with quartiles in brackets; x: speed-up over vanilla, the median of the ratios within each round. TTFT: "
    "processor-ready inputs to first token (vision tower, prefill, lm_head, argmax). Decoder prefill: first to last "
    "decoder layer{clock}. FLOPs bound: vanilla's over the variant's, and the share of it that was reached. Roofline: "
    "layer by layer the larger of matrix work at {rate} TFLOP/s and reading weights at {bandwidth} GB/s, both measured "
    "here, as a share of the time taken. Scorer: time inside the method, of vanilla's decoder prefill."
)


def print_results(document: dict[str, Any]) -> None:
    """Print a document of `results`, batch by batch."""
    console = terminal.console()
    setup = document["setup"]
    for batch in document["batches"]:
        console.print(
            Text(
                f"{setup['model']}, {setup['dtype']}, {setup['attention']}, {setup['device']}, batch {batch['batch']}, "
                f"{batch['vision_tokens']} vision + {batch['text_tokens']} text tokens, {setup['rounds']} rounds",
                style="bold",
            ),
            soft_wrap=True,
        )
        console.print(_prefill(console, batch))
        for count in setup["new_tokens"]:
            console.print(_generation(console, batch, count))
        console.print(_memory(console, batch))
    rates = document["batches"][-1]["rates"]
    clock = ", between CUDA events" if setup["device"].startswith("cuda") else ""
    notes = [
        _DEFINITIONS.format(
            clock=clock,
            rate=f"{rates['flops_per_s'] / 1e12:.3g}",
            bandwidth=f"{rates['bytes_per_s'] / 1e9:.3g}",
        )
    ]
    if "peak_memory_bytes" not in document["batches"][0]["variants"][0]:
        notes.append("No peak memory: this system has no high-water mark that can be reset.")
    elif not clock:
        notes.append("Peak memory: resident memory of the process in one prefill; a few MB of it are the allocator's.")
    for published in document["published"]:
        notes.append(
            f"Published, not measured here: {published['figure']} {published['change']:+.1%} ({published['of']}; "
            f"{published['source']}), which is {1 / (1 + published['change']):.2f}x."
        )
    for note in notes:
        console.print(Text(note, style="dim"))


def _prefill(console: Console, batch: dict[str, Any]) -> Table:
    wall = "decoder_prefill_wall_ms" in batch["variants"][0]["raw"]
    columns = ["", "true\naverage", "TTFT\nms", "\nx", "decoder prefill\nms", "\nx", *(["wall\nx"] if wall else [])]
    found = table(console, *columns, "FLOPs\nbound", "roof-\nline", figures=True)
    for entry in batch["variants"]:
        found.add_row(
            entry["name"],
            f"{entry['true_average']:.1f}",
            _number(entry["summary"]["ttft_ms"]["median"]),
            _speed_up(entry, "ttft_ms"),
            _spread(entry, "decoder_prefill_ms"),
            _speed_up(entry, "decoder_prefill_ms"),
            *([_speed_up(entry, "decoder_prefill_wall_ms")] if wall else []),
            f"{entry['flops_bound']:.2f} {entry['share_of_flops_bound']:>4.0%}",
            f"{entry['share_of_roofline']:.0%}",
        )
    return found


def _generation(console: Console, batch: dict[str, Any], count: int) -> Table:
    whole, step = f"generate_ms/{count}", f"decode_ms_per_token/{count}"
    many = "1 new token" if count == 1 else f"{count} new tokens"
    columns = ["", f"{many},\nend to end, ms", "\nx"]
    found = table(console, *columns, *(["decode,\nms/token", "\nx"] if count > 1 else []), figures=True)
    for entry in batch["variants"]:
        cells = [_spread(entry, whole), _speed_up(entry, whole)]
        if count > 1:
            cells += [_spread(entry, step), _speed_up(entry, step)]
        found.add_row(entry["name"], *cells)
    return found


def _memory(console: Console, batch: dict[str, Any]) -> Table:
    peaks = "peak_memory_bytes" in batch["variants"][0]
    columns = [
        "",
        "prefill FLOPs,\nof vanilla",
        "KV cache MB,\nof vanilla",
        *(["peak MB,\nabove idle"] if peaks else []),
    ]
    found = table(console, *columns, "\nscorer", figures=True)
    vanilla = batch["variants"][0]
    for entry in batch["variants"]:
        scorer = entry["scorer_share_of_vanilla_prefill"]
        cells = [
            f"{entry['prefill_flops'] / 1e9:,.4g} G {entry['prefill_flops'] / vanilla['prefill_flops']:>6.1%}",
            f"{_megabytes(entry['kv_bytes'])} {entry['kv_bytes'] / vanilla['kv_bytes']:>6.1%}",
        ]
        if peaks:
            peak, above = entry["peak_memory_bytes"], entry["peak_above_idle_bytes"]
            cells.append(f"{_megabytes(peak)} {_megabytes(above):>6}")
        found.add_row(entry["name"], *cells, "" if scorer is None else f"{scorer:.2%}")
    return found


def _speed_up(entry: dict[str, Any], figure: str) -> str:
    return f"{entry['speed_up'][figure]['median']:.2f}"


def _spread(entry: dict[str, Any], figure: str) -> str:
    summary = entry["summary"][figure]
    lower, upper = _number(summary["lower_quartile"]), _number(summary["upper_quartile"])
    return f"{_number(summary['median'])} ({lower}-{upper})"


def _number(value: float) -> str:
    """Three digits or more, no exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _megabytes(count: float) -> str:
    return _number(count / 1e6)
