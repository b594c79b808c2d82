"""What single steps of docs/results/performance.md gain, each measured by taking it back, in interleaved rounds.

    python research/steps.py                                            # llava-1b, float32, a true 64
    python research/steps.py --dtype bfloat16 --json research/results/NAME.json
    python research/steps.py --memory --shape qwen2.5-vl-narrow --image-size 3584 --budget 0.25      # step 7

Timed is a pruned `generate` of one new token, and its decoder layers alone. Beside it, on the same prompt:

- step 3, early drop: pruning layers compute the outputs of tokens that they drop;
- step 4, no mask: the first token of the prompt is padding, so that every layer needs a mask;
- step 5, once per stage: masks, positions and cos/sin of that padded prompt are made anew for every layer;
- step 8, prefix reuse: the text before the picture comes from `adaptinfer.PrefixCache`, filled before, its lookup and
  copy included.

With --memory instead, step 7: the peak of a prefill above what was held before (resident memory on a CPU), with
survivors' masks a few rows at a time, whole, and of vanilla. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import write
from rich.console import Console
from rich.table import Table

from adaptinfer import AdaptInfer, PrefixCache
from adaptinfer.bench.measure import Bench
from adaptinfer.bench.prompts import PromptTensors, prompt
from adaptinfer.bench.subject import Subject, checked_device
from adaptinfer.bench.timing import order_of_round, paired_ratios, summarise
from adaptinfer.bench.variants import VANILLA, Variant, check_variants
from adaptinfer.engine import attention
from adaptinfer.engine.layer_inputs import LayerInputs
from adaptinfer.errors import AdaptInferError


@dataclass(frozen=True)
class Way:
    """One way to run the prompt.

    Attributes:
        name: in the table.
        against: the way that it is compared with; itself for those that nothing is taken back from.
        prompt: what is run.
        early_drop: as of `attach`.
        within: what is in force while it runs.
        cache: makes the cache that it begins with.
    """

    name: str
    against: str
    prompt: PromptTensors
    early_drop: bool = True
    within: Callable[[], AbstractContextManager[Any]] = nullcontext
    cache: Callable[[], Any] | None = None


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llava-1b", help="of adaptinfer bench")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--budget", type=float, default=1 / 9, help="true average, below 1 a share; default: a ninth")
    parser.add_argument("--text", type=int, nargs=2, default=[35, 57], help="text tokens before and after the picture")
    parser.add_argument("--image-size", type=int, help="edge in pixels, for shapes that take any")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--memory", action="store_true", help="step 7 alone: peak memory in place of time")
    parser.add_argument("--json", type=Path, help="where to write all figures; default: build/results/steps.json")
    options = parser.parse_args()
    if options.rounds < 1 or options.warmup < 0 or min(options.text) < 1:
        parser.error("--rounds and --text: at least 1; --warmup: at least 0")
    try:
        bench, setup = set_up(options)
        content = peaks(bench, setup) if options.memory else times(bench, setup, options.rounds, options.warmup)
    except AdaptInferError as error:
        parser.error(str(error))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    console.print(memory_table(content) if options.memory else table(content))
    arguments = {name: str(value) for name, value in vars(options).items()}
    console.print(f"written to {write('steps', {'arguments': arguments, **content}, options.json)}", soft_wrap=True)


def set_up(options: argparse.Namespace) -> tuple[Bench, dict[str, Any]]:
    """The model with its prompt, and what the results say of them."""
    device = checked_device(options.device)
    subject = Subject(options.shape, None, options.dtype, device, "sdpa")
    picture = subject.picture(options.image_size)
    (before, after), vocabulary = options.text, subject.config.get_text_config().vocab_size
    made = prompt(picture, vocabulary, before, after, 1, device, subject.dtype)
    variant = Variant("adaptinfer", AdaptInfer(budget=options.budget))
    schedule = check_variants([variant], subject.family, subject.shape.num_layers, made.vision_tokens)[variant.name]
    subject.check_memory(made.vision_tokens, made.text_tokens, 1)
    setup = {
        "model": subject.name,
        "dtype": subject.dtype,
        "device": device,
        "budget": options.budget,
        "true_average": schedule.true_average(made.vision_tokens),
        "vision_tokens": made.vision_tokens,
        "text_before": before,
        "text_after": after,
    }
    return Bench(subject.load(), made, device), setup


# -- steps 3, 4, 5 and 8 --------------------------------------------------------------------------------------------


def ways(bench: Bench) -> list[Way]:
    """The prompt as it is and with each step taken back."""
    made, prefixes = bench.prompt, PrefixCache(bench.model)
    mask = torch.ones_like(made.inputs["input_ids"])
    mask[:, 0] = 0
    padded = replace(made, inputs={**made.inputs, "attention_mask": mask})
    return [
        Way("as it is", "as it is", made),
        Way("3: without early drop", "as it is", made, early_drop=False),
        Way("4: with a mask", "as it is", padded),
        Way("5: masks and cos/sin made in every layer", "4: with a mask", padded, within=made_in_every_layer),
        Way("8: the prefix reused", "as it is", made, cache=lambda: prefixes.start(made.inputs)),
    ]


@contextmanager
def made_in_every_layer() -> Iterator[None]:
    """The engine's memory of what layers share, switched off."""
    with replaced(LayerInputs, "remembered", lambda self, key, make, *operands: make()):
        yield


def times(bench: Bench, setup: dict[str, Any], rounds: int, warmup: int) -> dict[str, Any]:
    """All rounds of all ways, interleaved."""
    found = ways(bench)
    raw: dict[str, dict[str, list[float]]] = {way.name: {} for way in found}
    for number in range(-warmup, rounds):
        for way in order_of_round(found, number):
            print(f"round {number + 1} of {rounds}: {way.name}", file=sys.stderr, flush=True)
            if way.cache is not None:
                way.cache()  # filled: the first request of a kind pays for it
            for figure, value in timed(bench, way, setup["budget"]).items():
                if number >= 0:
                    raw[way.name].setdefault(figure, []).append(value)
    return {
        "setup": {**setup, "rounds": rounds},
        "ways": [
            {
                "name": way.name,
                "against": way.against,
                "summary": {figure: asdict(summarise(values)) for figure, values in raw[way.name].items()},
                "ratio": {
                    figure: asdict(summarise(paired_ratios(values, raw[way.against][figure])))
                    for figure, values in raw[way.name].items()
                },
                "raw": raw[way.name],
            }
            for way in found
        ],
    }


def timed(bench: Bench, way: Way, budget: float) -> dict[str, float]:
    """``first_token_ms`` of `generate`, and ``decoder_prefill_ms`` of its decoder layers alone."""
    layers: list[Any] = []
    clock, variant = bench.clock, Variant(way.name, AdaptInfer(budget=budget), way.early_drop)
    gc.collect()
    with way.within(), bench.attached(variant):
        clock.synchronise()
        with bench.around_layers(lambda: layers.append(clock.mark()), False):
            start = clock.mark()
            cache = {} if way.cache is None else {"past_key_values": way.cache()}
            bench.model.generate(
                **way.prompt.inputs, **cache, do_sample=False, min_new_tokens=1, max_new_tokens=1, pad_token_id=0
            )
            end = clock.mark()
        clock.synchronise()
    return {"first_token_ms": clock.device_ms(start, end), "decoder_prefill_ms": clock.device_ms(*layers)}


def table(content: dict[str, Any]) -> Table:
    """Times, and by how much a way is slower (or, for prefix reuse, faster) than what it is compared with."""
    setup = content["setup"]
    made = Table(
        title=f"{setup['model']}, {setup['dtype']}, {setup['device']}, a true average of {setup['true_average']:.1f} "
        f"of {setup['vision_tokens']} vision tokens, {setup['text_before']} + {setup['text_after']} text tokens, "
        f"{setup['rounds']} rounds: medians (quartiles)",
        title_justify="left",
    )
    for column in ("", "decoder prefill ms", "against", "×", "first token ms", "×"):
        made.add_column(column, justify="left" if column in ("", "against") else "right")
    for way in content["ways"]:
        cells = []
        for figure in ("decoder_prefill_ms", "first_token_ms"):
            ratio = way["ratio"][figure]
            compared = way["against"] != way["name"]
            cells.append(_spread(way["summary"][figure], "{:.1f}"))
            cells.append(_spread(ratio, "{:.3f}") if compared else "")
        made.add_row(way["name"], cells[0], "" if way["against"] == way["name"] else way["against"], *cells[1:])
    return made


# -- step 7 ---------------------------------------------------------------------------------------------------------


def peaks(bench: Bench, setup: dict[str, Any]) -> dict[str, Any]:
    """Peak memory of one prefill, vanilla and pruned, with survivors' masks in pieces and whole."""
    pruned = Variant("adaptinfer", AdaptInfer(budget=setup["budget"]))
    found: list[tuple[str, Variant, AbstractContextManager[Any]]] = [
        ("pruned, survivors a few rows at a time", pruned, nullcontext()),
        ("7: pruned, survivors all at once", pruned, replaced(attention, "LARGEST_MASK", 2**62)),
        (VANILLA, Variant(VANILLA), nullcontext()),
    ]
    measured = []
    for name, variant, within in found:
        print(name, file=sys.stderr, flush=True)
        with within:
            facts = bench.facts(variant)
        kept = ("kv_bytes", "peak_memory_bytes", "peak_above_idle_bytes")
        measured.append({"name": name, **{fact: facts[fact] for fact in kept if fact in facts}})
    return {"setup": setup, "peaks": measured}


def memory_table(content: dict[str, Any]) -> Table:
    """Megabytes; nothing where the system has no high-water mark that can be reset."""
    setup = content["setup"]
    made = Table(title=f"{setup['model']}, {setup['dtype']}, {setup['vision_tokens']} vision tokens")
    for column in ("", "peak above idle MB", "peak MB", "KV cache MB"):
        made.add_column(column, justify="right" if column else "left")
    for way in content["peaks"]:
        facts = ("peak_above_idle_bytes", "peak_memory_bytes", "kv_bytes")
        made.add_row(way["name"], *(f"{way[fact] / 1e6:,.0f}" if fact in way else "unknown" for fact in facts))
    return made


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of the engine, replaced for as long as this lasts."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _spread(summary: dict[str, float], form: str) -> str:
    median, *quartiles = (form.format(summary[name]) for name in ("median", "lower_quartile", "upper_quartile"))
    return f"{median} ({'–'.join(quartiles)})"


if __name__ == "__main__":
    main()
