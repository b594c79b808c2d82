"""The command ``adaptinfer bench``: options, refusals before any work, and what is written where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from adaptinfer.cli import terminal
from adaptinfer.cli.bench_tables import print_results
from adaptinfer.cli.options import Device, DType, Methods, Presets, recorded_command
from adaptinfer.errors import InputError
from adaptinfer.extras import needs
from adaptinfer.files import check_output, write_output
from adaptinfer.schedule import Schedule


def bench(
    context: typer.Context,
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Sizes of a published model, with random weights: llava-1.5-7b, llava-1.5-13b, llava-next-7b, "
            "qwen2.5-vl-7b, llava-1b (for CPUs, the default), qwen2.5-vl-narrow (long "
            "prompts), tiny.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A checkpoint instead of a shape: 'embedded', a folder, or an id on the Hugging Face hub.",
            show_default=False,
        ),
    ] = None,
    methods: Methods = None,
    budgets: Annotated[
        list[float] | None,
        typer.Option(
            "--budget",
            metavar="TOKENS",
            help="True average of vision tokens a layer gets, or below 1 a share of them; repeatable. "
            "Default without a preset: 192, 128 and 64 of 576, in proportion, where the model "
            "has enough layers to meet them.",
            show_default=False,
        ),
    ] = None,
    presets: Presets = None,
    schedule_files: Annotated[
        list[Path] | None,
        typer.Option(
            "--schedule",
            metavar="FILE",
            help="Stages and keeps from a JSON file, as 'adaptinfer calibrate' writes it; repeatable.",
            show_default=False,
        ),
    ] = None,
    early_drop: Annotated[
        Literal["on", "off", "both"],
        typer.Option(help="Whether pruning layers skip the outputs of tokens that they drop; both: side by side."),
    ] = "on",
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile", help="Measure every attached variant also with its decoder in CUDA graphs; needs a GPU."
        ),
    ] = False,
    batches: Annotated[
        list[int] | None,
        typer.Option(
            "--batch",
            min=1,
            metavar="N",
            help="Samples at once; repeatable. Default: 1.",
            show_default=False,
        ),
    ] = None,
    new_tokens: Annotated[
        list[int] | None,
        typer.Option(
            "--new-tokens",
            min=0,
            metavar="N",
            help="Measure generation up to so many new tokens; repeatable, in one pass. 0 leaves generation out. "
            "Default: 1 and 32.",
            show_default=False,
        ),
    ] = None,
    text_before: Annotated[int, typer.Option(min=0, metavar="N", help="Text tokens before the picture.")] = 35,
    text_after: Annotated[int, typer.Option(min=1, metavar="N", help="Text tokens after it.")] = 57,
    image_size: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="PIXELS", help="Edge of the picture, for models that take any.", show_default=False
        ),
    ] = None,
    attention: Annotated[
        str,
        typer.Option(metavar="NAME", help="Backend of vanilla and of all variants: sdpa, eager, flash_attention_2."),
    ] = "sdpa",
    dtype: DType = "auto",
    device: Device = "auto",
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Measured rounds; each runs every variant.")] = 7,
    warmup: Annotated[int, typer.Option(min=0, metavar="N", help="Warm-up rounds before them.")] = 1,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, metavar="N", help="Of random weights and text.")] = 0,
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every raw value and how it was measured.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw latency against budget with the bound (.png, .pdf or .svg)."),
    ] = None,
) -> None:
    """Measure what pruning saves: latency, memory, FLOPs, vanilla and methods in turn.

    [dim]adaptinfer bench --shape llava-1b --budget 192 --budget 128 --budget 64 --plot bench.png[/dim]
    """
    from adaptinfer.charts import PLOT_SUFFIXES

    if shape is not None and model is not None:
        raise InputError("--shape and --model: give only one of them")
    shape = "llava-1b" if model is None and shape is None else shape
    if as_json is not None:
        check_output("--json", as_json)
    if plot is not None:
        check_output("--plot", plot, PLOT_SUFFIXES)
        with needs("cli", "--plot"):
            import matplotlib  # noqa: F401
    if as_json is not None and plot is not None and as_json.resolve() == plot.resolve():
        raise InputError(f"--json and --plot: both name {str(plot)!r}; give two files")
    batch_sizes, counts = sorted({*(batches or [1])}), sorted({*([1, 32] if new_tokens is None else new_tokens)} - {0})

    with terminal.spinner() as progress:
        terminal.quieten()
        from adaptinfer.bench.environment import environment
        from adaptinfer.bench.plot import draw
        from adaptinfer.bench.prompts import prompt
        from adaptinfer.bench.results import FORMAT, VERSION, batch_document, published_figures
        from adaptinfer.bench.runner import SCORER_PASSES, Plan, run_batch
        from adaptinfer.bench.subject import Subject, checked_device
        from adaptinfer.bench.variants import check_names, check_variants, variants

        check_names(methods or [], presets or [])
        from_files = [(str(file), Schedule.load(file)) for file in schedule_files or []]
        where = checked_device(device)
        if compiled and not where.startswith("cuda"):
            raise InputError(f"--compile: CUDA graphs need a GPU, and the device is {where}; leave it out")
        subject = Subject(shape, model, dtype, where, attention, seed)
        picture = subject.picture(image_size)
        vision = picture.vision_tokens
        found = variants(
            methods or ["adaptinfer"],
            budgets or [],
            presets or [],
            early_drop,
            vision,
            subject.shape.num_layers,
            from_files,
            compiled,
        )
        schedules = check_variants(found, subject.family, subject.shape.num_layers, vision)
        vocabulary = subject.config.get_text_config().vocab_size

        def prompt_of(batch: int, where: str) -> Any:
            return prompt(picture, vocabulary, text_before, text_after, batch, where, subject.dtype, seed)

        sample = prompt_of(1, "cpu")
        subject.check_memory(vision, sample.text_tokens, max(batch_sizes))
        progress(f"making {subject.name}" if model is None else f"loading {subject.name}")
        loaded = subject.load()
        plan = Plan(rounds, warmup, tuple(counts))
        started = environment()
        measured = []
        for batch in batch_sizes:
            inputs = prompt_of(batch, subject.device)
            result = run_batch(loaded, inputs, subject.device, subject.dtype, found, schedules, plan, progress)
            measured.append(batch_document(result, found, subject.bytes_per_value))
        document = {
            "format": FORMAT,
            "version": VERSION,
            "command": recorded_command(context),
            "environment": started,
            "setup": {
                "model": subject.name,
                "description": subject.description,
                "parameters": subject.parameters,
                "model_type": subject.config.model_type,
                "device": subject.device,
                "dtype": subject.dtype,
                "attention": attention,
                "text_before": text_before,
                "text_after": text_after,
                "rounds": rounds,
                "warmup": warmup,
                "scorer_passes": SCORER_PASSES,
                "new_tokens": counts,
                "seed": seed,
            },
            "published": published_figures(found),
            "batches": measured,
        }
    print_results(document)  # first: a disk that is full must not cost the run
    if as_json is not None:
        write_output("--json", as_json, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())
    if plot is not None:
        draw(document, plot)
    for label, path in (("results", as_json), ("plot", plot)):
        if path is not None:
            typer.echo(f"{label}: {path}")
