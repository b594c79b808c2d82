"""The command ``adaptinfer eval``: options, refusals before any work, progress, and what is written where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from adaptinfer.cli import terminal
from adaptinfer.cli.options import Device, DType, Model, Pruners, TrustRemoteCode, recorded_command
from adaptinfer.errors import InputError
from adaptinfer.files import write_output

if TYPE_CHECKING:
    from adaptinfer.evaluation.journal import Block, Journal
    from adaptinfer.evaluation.plan import EvaluationPlan

_INTERRUPTED = 130  # what a shell says of a command stopped by Ctrl-C


def evaluate(
    context: typer.Context,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder of answers and report; a run goes on in it.")
    ],
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            metavar="NAME",
            help="world, world-hard, world-turns, world-pair (append ':validation' for other scenes), or FILE.jsonl "
            "with pictures beside it (append ':exact', ':yes_no', ':vqa' or ':anls' for its metric). Repeatable. "
            "Default: world.",
            show_default=False,
        ),
    ] = None,
    model: Model = "embedded",
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            metavar="NAME",
            help="See 'adaptinfer methods'; repeatable, or 'all'; also evidence-before, a control. The first is "
            "compared with the others. Default: adaptinfer.",
            show_default=False,
        ),
    ] = None,
    budgets: Annotated[
        list[float] | None,
        typer.Option(
            "--budget",
            metavar="TOKENS",
            help="True average of vision tokens a layer gets, or below 1 a share of them; repeatable. Default: "
            " 0.33 and 0.11.",
            show_default=False,
        ),
    ] = None,
    presets: Annotated[
        list[str] | None,
        typer.Option(
            "--preset",
            metavar="NAME",
            help="[METHOD:]MODEL/LABEL, a published schedule with its positions, see 'adaptinfer presets'; repeatable.",
            show_default=False,
        ),
    ] = None,
    schedules: Annotated[
        list[str] | None,
        typer.Option(
            "--schedule",
            metavar="FILE",
            help="[METHOD:]FILE, stages and keeps as 'adaptinfer calibrate' writes them; repeatable.",
            show_default=False,
        ),
    ] = None,
    pruners: Pruners = None,
    positions: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WAY",
            help="keep or compact; twice for both. Default: the method's own.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Samples of each task. Default: 500 of drawn ones, all of a file.",
            show_default=False,
        ),
    ] = None,
    skip: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", help="Leave out the first N samples of each task, which an earlier look has used."
        ),
    ] = 0,
    seeds: Annotated[int, typer.Option(min=1, metavar="N", help="Runs of a method with chance in it, averaged.")] = 3,
    controls: Annotated[
        bool, typer.Option(help="Add random and evidence tokens, and resized, blank, shuffled and wrong pictures.")
    ] = True,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Samples answered at once.")] = 32,
    latency_rounds: Annotated[
        int, typer.Option(min=0, metavar="N", help="Rounds of timing, after the answers; 0 leaves latency out.")
    ] = 5,
    device: Device = "auto",
    dtype: DType = "auto",
    ray: Annotated[
        int, typer.Option(min=0, metavar="N", help="Answer on N Ray actors; needs the extra 'ray'. 0: in this process.")
    ] = 0,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Compare methods at true budgets: accuracy with intervals, flips, FLOPs, KV cache, latency; a report.

    [dim]adaptinfer eval --task world --method adaptinfer --budget 0.33 --budget 0.11 -o build/eval[/dim]

    A stopped run goes on with the same command. Several processes: 'accelerate launch -m adaptinfer eval ...'.
    """
    from adaptinfer.evaluation.conditions import conditions, first_refusals
    from adaptinfer.evaluation.plan import EvaluationPlan
    from adaptinfer.evaluation.processes import Processes
    from adaptinfer.pruners import METHODS

    terminal.quieten()
    # "all" adds every method not listed explicitly; the first method is compared with the others, so names come first.
    named = [name for name in methods or ["adaptinfer"] if name != "all"]
    chosen = named + [name for name in METHODS if "all" in (methods or ()) and name not in named]
    found = conditions(
        chosen,
        budgets or [0.33, 0.11],
        positions or (),
        presets or (),
        schedules or (),
        pruners or (),
        seeds=seeds,
        controls=controls,
    )
    ranks = Processes.of_environment(device)
    if ray and ranks.count > 1:
        raise InputError("--ray: not together with accelerate launch; use one of them")
    where = ranks.device(device)
    if skip and samples is None:
        raise InputError("--skip: also give --samples, how many to take after the skipped ones")
    plan = EvaluationPlan(
        model, tuple(tasks or ["world"]), tuple(found), samples, batch, where, dtype, trust_remote_code, skip
    )
    _check_budgets(plan, first_refusals, quiet=not ranks.is_main)
    command = recorded_command(context)
    journal, done = ranks.journal(output, plan)
    try:
        with terminal.bar(not ranks.is_main) as progress:
            worker = _answer(plan, journal, done, ranks, ray, progress)
            if not ranks.finish(plan, journal):
                return
            document = _finish(plan, journal, worker, command, latency_rounds, output, progress)
    except KeyboardInterrupt:
        if ranks.is_main:
            message = (
                f"interrupted; {len(journal.done())} blocks of answers are in {output}, run the same command to go on"
            )
            Console(stderr=True).print(message, soft_wrap=True)
        raise typer.Exit(_INTERRUPTED) from None
    from adaptinfer.cli.eval_tables import print_results

    print_results(document)
    for name in ("report.html", "report.md", "summary.json", "answers.jsonl"):
        typer.echo(f"{name.partition('.')[0]}: {output / name}")


def _check_budgets(plan: EvaluationPlan, first_refusals: Any, quiet: bool) -> None:
    """Plan every condition on the first prompt's vision tokens; say which cannot run, refuse if none can."""
    name, task = next(iter(plan.loaded_tasks.items()))
    samples = plan.loaded_samples[name]
    if not samples:
        raise InputError(f"task {name!r}: has no samples" + (f" after the first {plan.skip}" if plan.skip else ""))
    for sample in samples:
        try:
            pictures = task.pictures(sample)
        except InputError:
            continue
        from adaptinfer.pictures import Picture

        shown = [Picture(sample.id, picture) for picture in pictures]
        prompt = plan.checkpoint.prompt(shown, sample.turns[0].question)
        for condition, reason in first_refusals(plan.conditions, plan.checkpoint, prompt.vision_tokens).items():
            if not quiet:
                Console(stderr=True).print(f"{condition}: not run: {reason}", style="yellow", soft_wrap=True)
        return
    raise InputError(f"task {name!r}: none of its {len(samples)} samples can be used")


def _answer(plan: EvaluationPlan, journal: Journal, done: set[Block], ranks: Any, ray: int, progress: Any) -> Any:
    from adaptinfer.evaluation.plan import units
    from adaptinfer.evaluation.runner import run

    todo = ranks.share(units(plan, done))
    total = sum(len(unit.wanted) for unit in todo)
    progress.begin(total, "answers")
    if ray:
        from adaptinfer.evaluation.on_ray import run_on_ray

        run_on_ray(plan, journal, todo, ray, progress.step, prepare=terminal.quieten)
        return None
    return run(plan, journal, todo, progress.step)


def _finish(
    plan: EvaluationPlan, journal: Journal, worker: Any, command: str, rounds: int, output: Path, progress: Any
) -> dict[str, Any]:
    """Latency, summary, plots and report from the answers on disk."""
    from adaptinfer.bench.environment import environment
    from adaptinfer.evaluation.latency import measure
    from adaptinfer.evaluation.plots import draw, file_of
    from adaptinfer.evaluation.report import to_html, to_markdown
    from adaptinfer.evaluation.runner import Worker
    from adaptinfer.evaluation.summary import FORMAT, VERSION, finite, summarise

    latency = _measured_before(output, journal.hash, rounds) if rounds else None
    if rounds and latency is None:
        latency = measure(plan, worker or Worker(plan), rounds, progress.say)
    progress.say("summary")
    document = finite(
        {
            "format": FORMAT,
            "version": VERSION,
            "command": command,
            "environment": environment(),
            "setup": {
                "model": plan.model,
                "device": plan.checkpoint.device,
                "dtype": plan.checkpoint.dtype,
                "batch": plan.batch,
                "samples": plan.samples,
                "skip": plan.skip,
                "run": journal.hash,
            },
            "tasks": summarise(plan, journal.records()),
            "latency": latency,
        }
    )
    pictures = {}
    for task in document["tasks"]:
        if task["conditions"]:
            progress.say(f"plot of {task['name']}")
            pictures[task["name"]] = draw(task, latency)
    files = {file_of(name): data for name, data in pictures.items()} | {
        "summary.json": (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode(),
        "report.md": to_markdown(document, pictures).encode(),
        "report.html": to_html(document, pictures).encode(),
    }
    for name, data in files.items():
        write_output("report", output / name, data)
    return document


def _measured_before(output: Path, run: str, rounds: int) -> dict[str, Any] | None:
    """The latency of a report of the same run, so that writing it anew measures nothing twice."""
    try:
        document = json.loads((output / "summary.json").read_text(encoding="utf-8"))
        latency = document["latency"] if document["setup"]["run"] == run else None
        return latency if latency and latency["rounds"] == rounds else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
