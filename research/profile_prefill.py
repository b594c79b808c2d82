"""Where the time of a prefill goes, whole and pruned, and how near the pruned one is to what its layers cost at least.

    python research/profile_prefill.py                                  # llava-1b, float32, true 192, 128 and 64
    python research/profile_prefill.py --dtype bfloat16 --budgets 64 --json research/results/NAME.json

Each round runs, for vanilla and every budget in turn: the prefill as it is, the prefill watched (every moment belongs
to one part, `watch.py`), and the floor (`floor.py`): the same layers without a pruner on as many tokens as each is
given. Vanilla's own floor is a control: it must come to 100 %.
Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import write
from floor import Floor
from rich.console import Console
from rich.table import Table
from watch import BETWEEN, IN_LAYERS, PARTS, Watch

from adaptinfer.bench.measure import Bench
from adaptinfer.bench.prompts import prompt
from adaptinfer.bench.roofline import layer_tokens
from adaptinfer.bench.subject import Subject, checked_device
from adaptinfer.bench.timing import order_of_round, summarise
from adaptinfer.bench.variants import EarlyDrop, Variant, check_variants, variants
from adaptinfer.errors import AdaptInferError
from adaptinfer.schedule import Schedule

Measured = dict[str, dict[str, list[Any]]]  # variant, figure, one value a round


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llava-1b", help="of adaptinfer bench; of the Llama kind")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--budgets", type=float, nargs="*", default=[], help="true; default: 192, 128 and 64 of 576")
    parser.add_argument("--early-drop", default="on", choices=["on", "off", "both"])
    parser.add_argument("--text", type=int, nargs=2, default=[35, 57], help="text tokens before and after the picture")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to write all figures; default: build/results/profile.json")
    options = parser.parse_args()
    if min(options.rounds, options.batch) < 1 or options.warmup < 0:
        parser.error("--rounds and --batch: at least 1; --warmup: at least 0")
    try:
        content = profile(options)
    except AdaptInferError as error:
        parser.error(str(error))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    for table in tables(content):
        console.print(table)
    arguments = {name: str(value) for name, value in vars(options).items()}
    console.print(f"written to {write('profile', {'arguments': arguments, **content}, options.json)}", soft_wrap=True)


def profile(options: argparse.Namespace) -> dict[str, Any]:
    """All rounds of all variants, interleaved."""
    device = checked_device(options.device)
    subject = Subject(options.shape, None, options.dtype, device, "sdpa")
    picture = subject.picture(None)
    early: EarlyDrop = options.early_drop
    found = variants(["adaptinfer"], options.budgets, [], early, picture.vision_tokens, subject.shape.num_layers)
    found = [each for each in found if each.pruner is None or each.pruner.budget != picture.vision_tokens]  # keep all
    schedules = check_variants(found, subject.family, subject.shape.num_layers, picture.vision_tokens)
    vocabulary = subject.config.get_text_config().vocab_size
    before, after = options.text
    made = prompt(picture, vocabulary, before, after, options.batch, device, subject.dtype)
    subject.check_memory(made.vision_tokens, made.text_tokens, options.batch)
    model = subject.load()
    bench, floor = Bench(model, made, device), Floor(model, options.batch)
    tokens = {
        variant.name: layer_tokens(
            schedules[variant.name], made.vision_tokens, made.text_tokens, variant.early_drop and bool(variant.pruner)
        )
        for variant in found
    }
    measured = measure(bench, floor, found, tokens, options.rounds, options.warmup)
    return {
        "setup": {
            "model": subject.name,
            "dtype": subject.dtype,
            "device": device,
            "batch": options.batch,
            "vision_tokens": made.vision_tokens,
            "text_tokens": made.text_tokens,
            "rounds": options.rounds,
        },
        "variants": [
            _entry(variant, schedules[variant.name], made.vision_tokens, tokens[variant.name], measured[variant.name])
            for variant in found
        ],
    }


def measure(
    bench: Bench,
    floor: Floor,
    found: Sequence[Variant],
    tokens: dict[str, list[tuple[int, int]]],
    rounds: int,
    warmup: int,
) -> Measured:
    """Per variant and round: ``ttft_ms`` and ``decoder_prefill_ms`` unwatched, ``parts``, ``floor_parts``."""
    watch = Watch(bench.clock)
    floors = {name: floor.prepared(each) for name, each in tokens.items()}
    measured: Measured = {variant.name: {} for variant in found}
    for number in range(-warmup, rounds):
        for variant in order_of_round(found, number):
            print(f"round {number + 1} of {rounds}: {variant.name}", file=sys.stderr, flush=True)
            figures: dict[str, Any] = dict(bench.run(variant, ()))
            gc.collect()
            with watch.on(bench.model):
                with bench.attached(variant, watch.scoring(variant.pruner) if variant.pruner else None):
                    figures["parts"] = watch.parts(bench.first_token)
                figures["floor_parts"] = watch.parts(floors[variant.name], BETWEEN)
            if number >= 0:
                for figure, value in figures.items():
                    measured[variant.name].setdefault(figure, []).append(value)
    return measured


def _entry(
    variant: Variant, schedule: Schedule, vision: int, tokens: list[tuple[int, int]], raw: dict[str, list[Any]]
) -> dict[str, Any]:
    """One variant: raw values, and what follows from them round by round."""
    decoder = raw["decoder_prefill_ms"]
    floors = [sum(parts.values()) for parts in raw["floor_parts"]]
    watched = [sum(parts.values()) for parts in raw["parts"]]
    layers = [sum(parts.get(part, 0) for part in IN_LAYERS) for parts in raw["parts"]]
    return {
        "name": variant.name,
        "true_average": schedule.true_average(vision),
        "early_drop": None if variant.pruner is None else variant.early_drop,
        "tokens": tokens,
        "summary": {
            "ttft_ms": asdict(summarise(raw["ttft_ms"])),
            "decoder_prefill_ms": asdict(summarise(decoder)),
            "floor_ms": asdict(summarise(floors)),
            "share_of_floor": asdict(summarise([a / b for a, b in zip(floors, decoder, strict=True)])),
            "watched_to_unwatched": asdict(summarise([a / b for a, b in zip(watched, raw["ttft_ms"], strict=True)])),
            "layers_watched_to_unwatched": asdict(summarise([a / b for a, b in zip(layers, decoder, strict=True)])),
        },
        "parts": _by_part(raw["parts"]),
        "floor_parts": _by_part(raw["floor_parts"]),
        "raw": raw,
    }


def _by_part(rounds: list[dict[str, float]]) -> dict[str, Any]:
    return {part: asdict(summarise([parts[part] for parts in rounds])) for part in PARTS if part in rounds[0]}


def tables(content: dict[str, Any]) -> list[Table]:
    """The prefill part by part, beside what the floor takes for the same part, and the whole against the floor."""
    setup, entries = content["setup"], content["variants"]
    title = (
        f"{setup['model']}, {setup['dtype']}, {setup['device']}, batch {setup['batch']}, {setup['vision_tokens']} "
        f"vision + {setup['text_tokens']} text tokens: median ms of {setup['rounds']} rounds (quartiles; floor)"
    )
    parts = Table(title=title, title_justify="left")
    whole = Table(title="against the floor (floor ms / decoder prefill ms) and against itself unwatched")
    parts.add_column("")
    for entry in entries:
        parts.add_column(entry["name"], justify="right", no_wrap=True)
    for part in PARTS:
        if any(part in entry["parts"] for entry in entries):
            parts.add_row(part, *(_cell(entry, part) for entry in entries))
    parts.add_section()
    sums = [sum(part["median"] for part in entry["parts"].values()) for entry in entries]
    parts.add_row("sum of the medians", *map(_number, sums))
    parts.add_row("TTFT, unwatched", *(_spread(entry["summary"]["ttft_ms"]) for entry in entries))
    for column in ("", "tokens a layer", "decoder prefill ms", "floor ms", "share of floor", "watched / not"):
        whole.add_column(column, justify="right" if column else "left", no_wrap=True)
    for entry in entries:
        summary = entry["summary"]
        share, ratio = summary["share_of_floor"], summary["watched_to_unwatched"]["median"]
        whole.add_row(
            entry["name"],
            f"{statistics.mean(entered for entered, _ in entry['tokens']):.1f}",
            _spread(summary["decoder_prefill_ms"]),
            _spread(summary["floor_ms"]),
            f"{share['median']:.1%} ({share['lower_quartile']:.1%}–{share['upper_quartile']:.1%})",
            f"{ratio:.3f}",
        )
    return [parts, whole]


def _cell(entry: dict[str, Any], part: str) -> str:
    if part not in entry["parts"]:
        return ""
    floor = entry["floor_parts"].get(part) if part in IN_LAYERS else None
    return _spread(entry["parts"][part], "" if floor is None else f"; {_number(floor['median'])}")


def _spread(summary: dict[str, float], more: str = "") -> str:
    quartiles = "–".join(_number(summary[name]) for name in ("lower_quartile", "upper_quartile"))
    return f"{_number(summary['median'])} ({quartiles}{more})"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


if __name__ == "__main__":
    main()
