"""What the sub-commands of the command line share: options, and a command that remembers how it was called."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

__all__ = ["DType", "Device", "RecordedCommand", "recorded_arguments"]

_ARGUMENTS = "adaptinfer.arguments"

Device = Annotated[
    str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, mps; auto is cuda if there is one, else cpu.")
]
DType = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(metavar="NAME", help="float32, bfloat16, float16; auto is float32 on a CPU, else the model's own."),
]


class RecordedCommand(TyperCommand):
    """Remembers the arguments as they were given, for the record."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[_ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)


def recorded_arguments(context: typer.Context) -> list[str]:
    """The arguments of a `RecordedCommand`."""
    return context.meta[_ARGUMENTS]
