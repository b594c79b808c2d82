"""Options that several commands share, and a command that remembers how it was called."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from adaptinfer import checkpoints

DEFAULT_BUDGET = 0.33
"""Default share of the vision tokens that a decoder layer gets on average: about 192 of 576."""

_ARGUMENTS = "adaptinfer.arguments"

Model = Annotated[
    str,
    typer.Option(
        metavar="NAME", help="'embedded', a checkpoint folder, or an id on the Hugging Face hub (safetensors only)."
    ),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]
Device = Annotated[
    str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, mps; auto is cuda if there is one, else cpu.")
]
DType = Annotated[
    checkpoints.DType,
    typer.Option(metavar="NAME", help="float32, bfloat16, float16; auto is float32 on a CPU, else the model's own."),
]
Budget = Annotated[
    float | None,
    typer.Option(
        metavar="TOKENS",
        help="Vision tokens a decoder layer gets, averaged over layers: a number of tokens, or below 1 a share of "
        f"them. Default: {DEFAULT_BUDGET}.",
        show_default=False,
    ),
]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        metavar="NAME",
        help="A method of 'adaptinfer methods'; repeatable. Default: adaptinfer.",
        show_default=False,
    ),
]
Presets = Annotated[
    list[str] | None,
    typer.Option(
        "--preset",
        metavar="NAME",
        help="A published schedule with the paper's positions, see 'adaptinfer presets'; repeatable.",
        show_default=False,
    ),
]
Pruners = Annotated[
    list[Path] | None,
    typer.Option("--pruner", metavar="DIR", help="A pruner written by save_pretrained; repeatable."),
]


class RecordedCommand(TyperCommand):
    """Remembers the arguments as they were given, for the record."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[_ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)


def recorded_command(context: typer.Context) -> str:
    """The command line of a `RecordedCommand`, as it can be pasted into a shell."""
    return shlex.join(["adaptinfer", str(context.info_name), *context.meta[_ARGUMENTS]])
