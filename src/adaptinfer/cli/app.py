"""The command line: reads arguments, calls the library, prints. Heavy imports happen inside the commands."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich import box
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from adaptinfer.cli.bench import register as register_bench
from adaptinfer.cli.calibrate import register as register_calibrate
from adaptinfer.cli.eval import register as register_eval
from adaptinfer.cli.options import Device, DType
from adaptinfer.cli.serve import register as register_serve
from adaptinfer.errors import AdaptInferError, InputError
from adaptinfer.schedule import MODEL_SHAPES, PRESETS, Schedule, ScheduleError, preset

if TYPE_CHECKING:
    from adaptinfer.ask import Answer
    from adaptinfer.checkpoints import Checkpoint, Prompt
    from adaptinfer.overlay import Grid
    from adaptinfer.pruners.contracts import Pruner

__all__ = ["app", "main"]

DEFAULT_BUDGET = 0.33
"""Share of the vision tokens that a decoder layer gets on average when nothing is said: about 192 of 576."""

_NO_SPEED_UP = 0.95  # ratios above this are called none
_USER_ERROR = 2
_EXIT_CODES = "Exit codes: 0 done, 2 input that you can mend (one line on standard error says what), 1 a bug."


class _Commands(TyperGroup):
    """One clear line on standard error and exit code 2 for whatever the user can mend; anything else is a bug."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
        except (AdaptInferError, ScheduleError) as error:
            message = str(error)
        except Exception as error:
            usage = getattr(error, "format_message", None)  # what Typer's own errors have in common
            if usage is None:
                raise
            message = usage()
            if not message:  # called without arguments, and the help was printed
                sys.exit(_USER_ERROR)
        else:
            sys.exit(code if isinstance(code, int) else 0)
        _say("error:", message, "red")
        sys.exit(_USER_ERROR)


class _AskCommand(TyperCommand):
    """Shows its two kinds of arguments in the usage line, which Typer would put into one."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["[OPTIONS]", "IMAGE...", "QUESTION"]


def _say(label: str, message: str, style: str) -> None:
    """One line on standard error."""
    text = Text.assemble((label, style), " ", " ".join(message.split()))
    Console(stderr=True, highlight=False).print(text, soft_wrap=True)


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_EXIT_CODES,
)


def main() -> None:
    """The entry point ``adaptinfer``."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # an answer may hold letters that the terminal's encoding lacks
            stream.reconfigure(errors="replace")  # pyright: ignore
    try:
        app()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EPIPE):
            raise
        if error.errno == errno.ENOSPC:
            _say("error:", f"standard output cannot be written ({error.strerror})", "red")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to be flushed at exit
        sys.exit(1)


def _print_version(wanted: bool) -> None:
    if wanted:
        from adaptinfer import __version__

        print(f"adaptinfer {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Vision-language models that answer faster: they drop most vision tokens while they read the prompt."""


# ---------------------------------------------------------------------------------------------------- ask


@app.command("ask", cls=_AskCommand, epilog=_EXIT_CODES)
def _ask(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE... QUESTION",
            help="One or more PNG, JPEG or WebP files ('-' for one on standard input), and last the question.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str, typer.Option(help="'embedded', a checkpoint folder, or an id on the Hugging Face hub (safetensors only).")
    ] = "embedded",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Vision tokens a decoder layer gets, averaged over layers: a number of tokens, or below 1 a share "
            f"of them. Taken when nothing is said: {DEFAULT_BUDGET}.",
            show_default=False,
        ),
    ] = None,
    schedule: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Stages and keeps from a JSON file, in place of a budget.")
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
    requested = _requested(budget, schedule, preset_name)
    if overlay is not None:
        from adaptinfer.overlay import check_path

        check_path(overlay)
    pictures = read_pictures(images)
    if overlay is not None and overlay.exists() and any(name != "-" and overlay.samefile(name) for name in images):
        raise InputError(f"overlay {str(overlay)!r}: would overwrite a picture that is asked about")

    with _progress() as progress:
        progress("starting")
        _quieten()
        pruner = _pruner(requested, positions)
        from adaptinfer.ask import ask
        from adaptinfer.checkpoints import Checkpoint

        checkpoint = Checkpoint(model, trust_remote_code=trust_remote_code, device=device, dtype=dtype)
        checkpoint.check(pruner)
        prompt = checkpoint.prompt(pictures, question)
        grids = _grids(checkpoint, prompt) if overlay is not None else []
        answer = ask(checkpoint, prompt, pruner, max_new_tokens=max_new_tokens, compare=compare, progress=progress)
        if overlay is not None:
            from adaptinfer.overlay import draw_overlay

            progress("drawing")
            draw_overlay(
                [picture.image for picture in pictures], answer.report, grids, prompt.question, answer.text, overlay
            )

    notes = _notes(checkpoint, prompt)
    for note in notes:
        _say("warning:", note, "yellow")
    if as_json:
        print(json.dumps(_document(checkpoint, prompt, pruner, requested, answer, overlay, notes), ensure_ascii=False))
    elif answer.comparison is None:
        _print_answer(answer, requested)
    else:
        _print_comparison(checkpoint, answer, requested)
    if overlay is not None and not as_json:
        _console().print(Text(f"overlay: {overlay}", style="dim"), soft_wrap=True)


@dataclasses.dataclass(frozen=True)
class _Requested:
    """What the user wants pruned: one of the three is set."""

    budget: float | None = None
    schedule: Schedule | None = None
    preset: str | None = None
    by_default: bool = False

    def __str__(self) -> str:
        if self.preset is not None:
            return f"preset {self.preset}"
        if self.budget is None:
            return "schedule from file"
        return f"budget {self.budget:g}" + (" (default)" if self.by_default else "")


def _requested(budget: float | None, schedule: Path | None, preset_name: str | None) -> _Requested:
    """Which of the three options was given; files and names are looked up."""
    given = {"--budget": budget, "--schedule": schedule, "--preset": preset_name}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise AdaptInferError(f"{' and '.join(names)}: give only one of {', '.join(given)}")
    if schedule is not None:
        return _Requested(schedule=Schedule.load(schedule))
    if preset_name is not None:
        preset(preset_name)
        return _Requested(preset=preset_name)
    if budget is None:
        return _Requested(budget=DEFAULT_BUDGET, by_default=True)
    if not 0 < budget < float("inf"):
        raise AdaptInferError(f"budget: must be a positive number of tokens, or a share below 1, not {budget:g}")
    return _Requested(budget=budget)


def _pruner(requested: _Requested, positions: Literal["keep", "compact"] | None) -> Pruner:
    from adaptinfer.pruners import AdaptInfer

    if requested.preset is None:
        pruner = AdaptInfer(budget=requested.budget, schedule=requested.schedule)
    else:
        model, _, label = requested.preset.partition("/")
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


# ---------------------------------------------------------------------------------------------------- printing


def _console() -> Console:
    """Standard output; in a pipe nothing is wrapped, so that a line stays a line."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 10_000)


def _print_answer(answer: Answer, requested: _Requested) -> None:
    console, report = _console(), answer.report
    console.print(Text(answer.text or "(no answer)", style="bold"), soft_wrap=True)
    kept = ", ".join(f"{len(kept[0])} {stage.place}" for stage, kept in zip(report.stages, report.kept, strict=True))
    console.print(
        Text(
            f"{report.vision_tokens[0]} vision tokens -> {report.true_average[0]:.4g} a layer on average, {requested} "
            f"({'kept: ' + kept if kept else 'all kept'}); "
            f"decoder prefill FLOPs {_change(report.flops, report.vanilla_flops)}; "
            f"KV cache {_bytes(report.vanilla_kv_bytes)} -> {_bytes(report.kv_bytes)}",
            style="dim",
        ),
        soft_wrap=True,
    )


def _print_comparison(checkpoint: Checkpoint, answer: Answer, requested: _Requested) -> None:
    from adaptinfer.ask import WARM_UPS
    from adaptinfer.checkpoints import EMBEDDED

    report, comparison = answer.report, answer.comparison
    assert comparison is not None
    layers, vision = report.shape.num_layers, report.vision_tokens[0]

    def share(pruned: float, vanilla: float) -> str:
        return f"{pruned / vanilla:.2f}"

    def ratio(measure: Literal["ttft_ms", "decode_ms_per_token"]) -> str:
        median, least, most = comparison.ratio(measure)
        return f"{median:.2f} ({least:.2f}-{most:.2f})"

    console = _console()
    table = _table(console, "", "vanilla", "AdaptInfer", "ratio")
    rows: list[tuple[str, str, str, str]] = [
        (
            "answer",
            comparison.vanilla_text or "(no answer)",
            answer.text or "(no answer)",
            "same" if comparison.vanilla_text == answer.text else "differs",
        ),
        ("vision tokens x layers", f"{vision}x{layers}", _runs(report.tokens_per_layer[0]), ""),
        (
            "true average",
            f"{vision:.1f}",
            f"{report.true_average[0]:.1f}",
            share(report.true_average[0], vision),
        ),
        (
            "decoder prefill FLOPs",
            _flops(report.vanilla_flops),
            _flops(report.flops),
            share(report.flops, report.vanilla_flops),
        ),
        (
            "KV cache",
            _bytes(report.vanilla_kv_bytes),
            _bytes(report.kv_bytes),
            share(report.kv_bytes, report.vanilla_kv_bytes),
        ),
        ("TTFT, ms", _spread(comparison.vanilla.ttft_ms), _spread(comparison.pruned.ttft_ms), ratio("ttft_ms")),
        (
            "decode, ms/token",
            _spread(comparison.vanilla.decode_ms_per_token),
            _spread(comparison.pruned.decode_ms_per_token),
            ratio("decode_ms_per_token"),
        ),
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
    for note in notes:
        console.print(Text(note, style="dim"), soft_wrap=True)


def _table(console: Console, *columns: str) -> Table:
    """A table with rules on a terminal, plain columns in a pipe."""
    terminal = console.is_terminal
    table = Table(box=box.SIMPLE_HEAD if terminal else None, pad_edge=False, header_style="bold" if terminal else "")
    for number, column in enumerate(columns):
        table.add_column(column, no_wrap=number == 0)
    return table


def _runs(tokens: tuple[int, ...]) -> str:
    """(64, 9, 9) as "64x1 9x2"."""
    runs: list[list[int]] = []
    for count in tokens:
        if runs and runs[-1][0] == count:
            runs[-1][1] += 1
        else:
            runs.append([count, 1])
    return " ".join(f"{count}x{layers}" for count, layers in runs)


def _spread(values: tuple[float, ...]) -> str:
    import statistics

    return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"


def _change(now: float, before: float) -> str:
    return f"{100 * (now / before - 1):+.0f} %" if now != before else "unchanged"


def _bytes(count: float) -> str:
    return _scaled(count, ("B", "kB", "MB", "GB", "TB"))


def _flops(count: float) -> str:
    return _scaled(count, ("", "k", "M", "G", "T", "P"))


def _scaled(number: float, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if number < 999.5:
            return f"{number:.3g} {unit}".strip()
        number /= 1000
    return f"{number:.3g} {units[-1]}"


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


register_bench(app, _EXIT_CODES)
register_serve(app, _EXIT_CODES)
register_calibrate(app, _EXIT_CODES)
register_eval(app, _EXIT_CODES)


# ---------------------------------------------------------------------------------------------------- what there is


@app.command("methods")
def _methods() -> None:
    """List the pruning methods."""
    from adaptinfer.pruners import METHODS

    console = _console()
    table = _table(console, "method", "reference", "what it does")
    for name, method in METHODS.items():
        table.add_row(name, method.reference, (method.__doc__ or "").strip().splitlines()[0])
    console.print(table)


@app.command("models")
def _models() -> None:
    """List the model families that are tested."""
    from adaptinfer.engine.families import TESTED

    console = _console()
    table = _table(console, "model_type", "models")
    for model_type, models in TESTED.items():
        table.add_row(model_type, models)
    console.print(table)
    console.print("Others are probed when a pruner is attached: they work, or are refused with the reason.")


_TEXT_TOKENS = 92  # 35 before the image and 57 after it


@app.command("presets")
def _presets() -> None:
    """List the published schedules, with what they save of LLaVA's prefill FLOPs at 92 text tokens."""
    console = _console()
    table = _table(
        console,
        "preset",
        "layers",
        "after layer",
        "keep",
        "nominal",
        "true average",
        "FLOPs saved",
        "without early drop",
    )
    for name, schedule in PRESETS.items():
        if schedule.vision_tokens is None:
            many = 1_000_000  # a share has no count of its own
            nominal, true = f"{schedule.nominal:.0%}", f"{schedule.true_average(many) / many:.1%}"
        else:
            nominal, true = f"{schedule.nominal:g}", f"{schedule.true_average():.1f} of {schedule.vision_tokens}"
        keeps = [f"{stage.keep:.0%}" if isinstance(stage.keep, float) else str(stage.keep) for stage in schedule.stages]
        layers = [str(stage.layer) for stage in schedule.stages]
        saved = ["", ""]
        shape = MODEL_SHAPES.get(name.partition("/")[0])
        if shape is not None:
            vanilla = Schedule((), shape.num_layers, schedule.vision_tokens).prefill_flops(shape, _TEXT_TOKENS)
            saved = [
                f"{1 - schedule.prefill_flops(shape, _TEXT_TOKENS, early_drop=early) / vanilla:.1%}"
                for early in (True, False)
            ]
        table.add_row(name, str(schedule.num_layers), "/".join(layers), "/".join(keeps), nominal, true, *saved)
    console.print(table)


# ---------------------------------------------------------------------------------------------------- the terminal


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A spinner with the present step and the time it takes, on standard error and only if that is a terminal."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("")
        yield lambda text: progress.update(task, description=text)


def _quieten() -> None:
    """No progress bars, log lines or warnings of transformers between ours; what goes wrong is raised anyway."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    from logging import CRITICAL

    from huggingface_hub.utils import logging as hub_logging

    hub_logging.set_verbosity(CRITICAL)  # its retries would stand before our one line


if __name__ == "__main__":
    main()
