"""The command ``adaptinfer calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adaptinfer.cli import terminal
from adaptinfer.cli.options import DEFAULT_BUDGET, Budget, Device, DType, Model, TrustRemoteCode
from adaptinfer.errors import AdaptInferError, InputError

if TYPE_CHECKING:
    from adaptinfer.calibration.result import Calibration, Candidate


def calibrate(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Folder for what comes out.")],
    model: Model = "embedded",
    data: Annotated[
        str,
        typer.Option(
            metavar="DATA",
            help="'scenes' (training scenes), a folder of pictures with a JSONL file of questions, or "
            "'hf:NAME[:SPLIT]'.",
        ),
    ] = "scenes",
    budget: Budget = None,
    flops: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="A share of the decoder's prefill FLOPs, instead of a budget of tokens."),
    ] = None,
    stages: Annotated[
        int | None,
        typer.Option(min=1, max=6, metavar="N", help="At most so many stages. Default: chosen from the data."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, metavar="N", help="Samples to read; fewer if there are fewer.")] = 256,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Which scenes, and of resampling.")] = 0,
    ray: Annotated[
        int | None, typer.Option("--ray", min=1, metavar="N", help="Record in N Ray actors (extra 'ray').")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = "auto",
    dtype: DType = "auto",
) -> None:
    """Choose a model's stages and keeps from its own attention.

    [dim]adaptinfer calibrate --model embedded --data scenes --budget 0.22 -o calibration[/dim]
    """
    if budget is not None and flops is not None:
        raise InputError("--budget and --flops: give only one of them")
    with terminal.spinner() as progress:
        terminal.quieten()
        from adaptinfer.calibration.distributed import Job, processes, record_alone, record_with_ray
        from adaptinfer.calibration.run import Target, analyse
        from adaptinfer.pruners import AdaptInfer

        wanted = Target(flops, True) if flops is not None else Target(DEFAULT_BUDGET if budget is None else budget)
        number, many = processes()
        if many > 1 and ray is not None:
            raise InputError("--ray: start it once, not under accelerate launch or torchrun")
        if many > 1 and device in ("auto", "cuda"):
            device = _own_device()
        score = AdaptInfer(budget=0.5)  # of which only the score is used
        job = Job(model, data, output / "recording", samples, score, seed, device, dtype, trust_remote_code)
        count = min(samples, len(job.source()))
        try:
            if ray is None:
                recording, shape = record_alone(job, progress, wanted)
            else:
                recording, shape = record_with_ray(job, ray, progress)
            if number:
                return
            calibration = analyse(recording, count, wanted, shape, stages=stages, seed=seed, progress=progress)
        except KeyboardInterrupt:
            raise AdaptInferError(
                f"interrupted; what was recorded is in {str(job.folder)!r}, and the same command goes on from there"
            ) from None
        progress("drawing")
        written = calibration.save(output)
    _print(calibration)
    for path in written:
        typer.echo(f"written: {path}")


def _gain(candidate: Candidate) -> str:
    """Over the published shape, in points."""
    if candidate.gain is None or candidate.gain_low is None or candidate.gain_high is None:
        return "-"
    return f"{100 * candidate.gain:+.1f} ({100 * candidate.gain_low:+.1f} to {100 * candidate.gain_high:+.1f}) points"


def _own_device() -> str:
    """This process's GPU among those of its machine, or the CPU."""
    import os

    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def _print(calibration: Calibration) -> None:
    console = terminal.console()
    table = terminal.table(console, "chosen by", "stages", "true average", "kept mass", "against the published shape")
    for each in calibration.candidates:
        if each.schedule is None:
            layers = ", ".join(map(str, each.layers))
            reason = f"layers {layers} cannot meet the budget" if layers else "no layers found"
            if each is calibration.candidates[0]:
                reason = "cannot meet the budget"
            table.add_row(each.name, reason, "", "", "")
            continue
        stages = ", ".join(f"{stage.keep} after {stage.layer}" for stage in each.schedule.stages)
        table.add_row(
            each.name,
            stages or "nothing dropped",
            f"{each.schedule.true_average():.1f} of {each.schedule.vision_tokens}",
            f"{each.kept_mass:.1%} ({each.low:.1%} to {each.high:.1%})",
            "" if each is calibration.candidates[0] else _gain(each),
        )
    console.print(table)
    about = calibration.provenance
    by_stages = ", ".join(f"{number}: {kept:.1%}" for number, kept in calibration.by_stages.items())
    lines = [
        f"{about['samples']} samples ({about['skipped']} skipped). Kept mass: share of the unpruned model's "
        "text-to-vision attention that is paid to tokens which are still there; 95 % intervals over samples.",
        f"Kept mass of the best by number of stages at most: {by_stages}.",
        *(f"skipped: {reason}" for reason in calibration.skipped[:5]),
    ]
    terminal.print_notes(console, lines)
