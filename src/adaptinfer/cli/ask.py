"""The command ``adaptinfer ask``."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.text import Text
from typer.core import TyperCommand

from adaptinfer.cli import terminal
from adaptinfer.cli.options import DEFAULT_BUDGET, Budget, Device, DType, Model, TrustRemoteCode
from adaptinfer.errors import InputError
from adaptinfer.schedule import Schedule, preset

if TYPE_CHECKING:
    from adaptinfer.ask import Answer
    from adaptinfer.checkpoints import Checkpoint, Prompt
    from adaptinfer.overlay import Grid
    from adaptinfer.pruners.contracts import Pruner

_NO_SPEED_UP = 0.95  # a ratio above this is not called a speed-up


class AskCommand(TyperCommand):
    """Shows its two kinds of arguments in the usage line, which Typer would put into one."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["[OPTIONS]", "IMAGE...", "QUESTION"]


def ask(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE... QUESTION",
            help="One or more PNG, JPEG or WebP files ('-' for one on standard input), and last the question.",
            show_default=False,
        ),
    ],
    model: Model = "embedded",
    trust_remote_code: TrustRemoteCode = False,
    budget: Budget = None,
    schedule: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Stages and keeps from a JSON file, instead of a budget.")
    ] = None,
    preset_name: Annotated[
        str | None,
        typer.Option("--preset", metavar="NAME", help="A published schedule, see 'adaptinfer presets'."),
    ] = None,
    positions: Annotated[
        Literal["keep", "compact"] | None,
        typer.Option(
            help="Kept tokens keep their positions (the default), or are renumbered (the default of LLaVA presets).",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer, in tokens.")] = 64,
    compare: Annotated[
        bool, typer.Option("--compare", help="Answer without pruning too, and measure both side by side.")
    ] = False,
    overlay: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw what each stage kept (.png, .jpg, .webp, .pdf or .svg)."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else.")
    ] = False,
    device: Device = "auto",
    dtype: DType = "auto",
) -> None:
    """Ask a model about pictures, with most vision tokens pruned.

    [dim]adaptinfer ask photo.png "What colour is the star?" --budget 14 --compare --overlay kept.png[/dim]
    """
    from adaptinfer.checkpoints import check_question
    from adaptinfer.pictures import read_pictures

    *images, question = arguments
    if not images:
        raise InputError(f"give image files and then the question; there is only {question!r}")
    if question == "-" or os.path.isfile(question):  # noqa: PTH113 - pathlib raises for text too long to be a name
        raise InputError(f"the question comes last, after the image files, but {question!r} is one of those")
    question = check_question(question)
    requested = _Requested.of_options(budget, schedule, preset_name)
    if overlay is not None:
        from adaptinfer.overlay import check_path

        check_path(overlay)
    pictures = read_pictures(images)
    if overlay is not None and overlay.exists() and any(name != "-" and overlay.samefile(name) for name in images):
        raise InputError(f"overlay {str(overlay)!r}: would overwrite a picture that is asked about")

    with terminal.spinner() as progress:
        terminal.quieten()
        pruner = requested.pruner(positions)
        from adaptinfer.ask import ask as answer_to
        from adaptinfer.checkpoints import Checkpoint

        checkpoint = Checkpoint(model, trust_remote_code=trust_remote_code, device=device, dtype=dtype)
        checkpoint.check(pruner)
        prompt = checkpoint.prompt(pictures, question)
        grids = _grids(checkpoint, prompt) if overlay is not None else []
        answer = answer_to(
            checkpoint, prompt, pruner, max_new_tokens=max_new_tokens, compare=compare, progress=progress
        )
        if overlay is not None:
            from adaptinfer.overlay import draw_overlay

            progress("drawing")
            draw_overlay(
                [picture.image for picture in pictures], answer.report, grids, prompt.question, answer.text, overlay
            )

    notes = _notes(checkpoint, prompt)
    for note in notes:
        terminal.say("warning:", note, "yellow")
    if as_json:
        print(json.dumps(_document(checkpoint, prompt, pruner, requested, answer, overlay, notes), ensure_ascii=False))
    elif answer.comparison is None:
        _print_answer(answer, requested)
    else:
        _print_comparison(checkpoint, answer, requested)
    if overlay is not None and not as_json:
        terminal.print_notes(terminal.console(), [f"overlay: {overlay}"])


@dataclasses.dataclass(frozen=True)
class _Requested:
    """What the user wants pruned: one of the three is set."""

    budget: float | None = None
    schedule: Schedule | None = None
    preset: str | None = None
    by_default: bool = False

    @classmethod
    def of_options(cls, budget: float | None, schedule: Path | None, preset_name: str | None) -> _Requested:
        """Which of the three options was given; files and names are looked up."""
        given = {"--budget": budget, "--schedule": schedule, "--preset": preset_name}
        names = [name for name, value in given.items() if value is not None]
        if len(names) > 1:
            raise InputError(f"{' and '.join(names)}: give only one of {', '.join(given)}")
        if schedule is not None:
            return cls(schedule=Schedule.load(schedule))
        if preset_name is not None:
            preset(preset_name)
            return cls(preset=preset_name)
        if budget is None:
            return cls(budget=DEFAULT_BUDGET, by_default=True)
        if not 0 < budget < float("inf"):
            raise InputError(f"budget: must be a positive number of tokens, or a share below 1, not {budget:g}")
        return cls(budget=budget)

    def __str__(self) -> str:
        if self.preset is not None:
            return f"preset {self.preset}"
        if self.budget is None:
            return "schedule from file"
        return f"budget {self.budget:g}" + (" (default)" if self.by_default else "")

    def pruner(self, positions: Literal["keep", "compact"] | None) -> Pruner:
        from adaptinfer.pruners import AdaptInfer

        if self.preset is None:
            pruner = AdaptInfer(budget=self.budget, schedule=self.schedule)
        else:
            model, _, label = self.preset.partition("/")
            pruner = AdaptInfer.paper(label, model)
        return pruner if positions is None else dataclasses.replace(pruner, positions=positions)


def _grids(checkpoint: Checkpoint, prompt: Prompt) -> list[Grid]:
    from adaptinfer.overlay import picture_grids

    sizes = [picture.image.size for picture in prompt.pictures]
    return picture_grids(sizes, prompt.vision_tokens, checkpoint.processor.image_processor, prompt.inputs)


def _notes(checkpoint: Checkpoint, prompt: Prompt) -> list[str]:
    """What the user should know about the answer."""
    from adaptinfer.checkpoints import EMBEDDED

    if not prompt.unknown_words:
        return []
    words = ", ".join(map(repr, prompt.unknown_words))
    if checkpoint.name == EMBEDDED:
        return [f"the embedded model only knows drawn scenes of shapes and signs; it has no word for {words}"]
    return [f"the model's tokenizer has no word for {words}"]


def _print_answer(answer: Answer, requested: _Requested) -> None:
    console, report = terminal.console(), answer.report
    console.print(Text(answer.text or "(no answer)", style="bold"), soft_wrap=True)
    kept = ", ".join(f"{len(kept[0])} {stage.place}" for stage, kept in zip(report.stages, report.kept, strict=True))
    summary = (
        f"{report.vision_tokens[0]} vision tokens -> {report.true_average[0]:.4g} a layer on average, {requested} "
        f"({'kept: ' + kept if kept else 'all kept'}); "
        f"decoder prefill FLOPs {terminal.change(report.flops, report.vanilla_flops)}; "
        f"KV cache {terminal.scaled_bytes(report.vanilla_kv_bytes)} -> {terminal.scaled_bytes(report.kv_bytes)}"
    )
    terminal.print_notes(console, [summary])


def _print_comparison(checkpoint: Checkpoint, answer: Answer, requested: _Requested) -> None:
    from adaptinfer.ask import WARM_UPS
    from adaptinfer.checkpoints import EMBEDDED

    report, comparison = answer.report, answer.comparison
    assert comparison is not None
    layers, vision = report.shape.num_layers, report.vision_tokens[0]
    texts = [comparison.vanilla_text or "(no answer)", answer.text or "(no answer)"]
    counts = [(len(list(run)), count) for count, run in groupby(report.tokens_per_layer[0])]

    def costs(label: str, form: Callable[[float], str], vanilla: float, pruned: float) -> tuple[str, ...]:
        return label, form(vanilla), form(pruned), f"{pruned / vanilla:.2f}"

    def latency(label: str, measure: Literal["ttft_ms", "decode_ms_per_token"]) -> tuple[str, ...]:
        median, least, most = comparison.ratio(measure)
        both = (terminal.spread(getattr(way, measure)) for way in (comparison.vanilla, comparison.pruned))
        return label, *both, f"{median:.2f} ({least:.2f}-{most:.2f})"

    console = terminal.console()
    table = terminal.table(console, "", "vanilla", "AdaptInfer", "ratio")
    rows = [
        ("answer", *texts, "same" if comparison.vanilla_text == answer.text else "differs"),
        ("vision tokens x layers", f"{vision}x{layers}", " ".join(f"{count}x{run}" for run, count in counts), ""),
        costs("true average", "{:.1f}".format, vision, report.true_average[0]),
        costs("decoder prefill FLOPs", terminal.scaled_flops, report.vanilla_flops, report.flops),
        costs("KV cache", terminal.scaled_bytes, report.vanilla_kv_bytes, report.kv_bytes),
        latency("TTFT, ms", "ttft_ms"),
        latency("decode, ms/token", "decode_ms_per_token"),
    ]
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
    repeats = len(comparison.vanilla.ttft_ms)
    notes = [
        f"{requested}; {checkpoint.device}, {checkpoint.dtype}; {repeats} repeats in turn after {WARM_UPS} warm-ups, "
        "median (least-most); TTFT: from the processor's tensors to the first token."
    ]
    median, _, most = comparison.ratio("ttft_ms")
    if median > _NO_SPEED_UP:
        notes.append("No speed-up to the first token was measured here.")
        if checkpoint.name == EMBEDDED:
            notes[-1] += " The embedded model is so small that fixed costs can outweigh the work saved."
    elif most >= 1:
        notes.append("The spread of the TTFT ratio includes 1: too noisy here to call it a speed-up.")
    terminal.print_notes(console, notes)


def _document(
    checkpoint: Checkpoint,
    prompt: Prompt,
    pruner: Pruner,
    requested: _Requested,
    answer: Answer,
    overlay: Path | None,
    notes: list[str],
) -> dict[str, Any]:
    """Everything about one answer, for `--json`."""
    import platform

    import torch
    import transformers

    from adaptinfer import __version__
    from adaptinfer.ask import DECODED_TOKENS, WARM_UPS

    report, comparison = answer.report, answer.comparison

    latency = None
    if comparison is not None:
        latency = {"warm_ups": WARM_UPS, "decoded_tokens": DECODED_TOKENS}
        latency |= {"vanilla": dataclasses.asdict(comparison.vanilla), "pruned": dataclasses.asdict(comparison.pruned)}
    return {
        "question": prompt.question,
        "images": [picture.name for picture in prompt.pictures],
        "answer": answer.text,
        "vanilla_answer": comparison.vanilla_text if comparison else None,
        "model": checkpoint.name,
        "device": checkpoint.device,
        "dtype": checkpoint.dtype,
        "method": pruner.name,
        "budget": requested.budget,
        "preset": requested.preset,
        "positions": pruner.positions,
        "schedule": json.loads(report.schedules[0].to_json()),
        "vision_tokens": report.vision_tokens[0],
        "text_tokens": report.text_tokens[0],
        "vision_tokens_per_layer": list(report.tokens_per_layer[0]),
        "true_average": report.true_average[0],
        "stages": [
            {"layer": stage.layer, "entered": len(entered[0]), "kept_positions": kept[0].tolist()}
            for stage, entered, kept in zip(report.stages, report.entered, report.kept, strict=True)
        ],
        "prefill_flops": {"vanilla": report.vanilla_flops, "pruned": report.flops},
        "kv_bytes": {"vanilla": report.vanilla_kv_bytes, "pruned": report.kv_bytes},
        "latency": latency,
        "overlay": None if overlay is None else str(overlay),
        "warnings": notes,
        "versions": {
            "adaptinfer": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
