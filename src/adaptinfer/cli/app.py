"""The application: all commands in one place, errors as one line, and what each exit code means."""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from adaptinfer.cli import ask, bench, calibrate, eval, lists, serve
from adaptinfer.cli.options import RecordedCommand
from adaptinfer.cli.terminal import say
from adaptinfer.errors import AdaptInferError
from adaptinfer.schedule import ScheduleError

_USER_ERROR = 2
_EXIT_CODES = "Exit codes: 0 done, 2 invalid input (one line on standard error says what), 1 a bug."


class _Commands(TyperGroup):
    """One clear line on standard error and exit code 2 for invalid input; anything else is a bug."""

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
        say("error:", message, "red")
        sys.exit(_USER_ERROR)


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
            say("error:", f"standard output cannot be written ({error.strerror})", "red")
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
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Vision-language models that answer faster: they drop most vision tokens while they read the prompt."""


for _name, _function, _class in (
    ("ask", ask.ask, ask.AskCommand),
    ("calibrate", calibrate.calibrate, None),
    ("eval", eval.evaluate, RecordedCommand),
    ("bench", bench.bench, RecordedCommand),
    ("serve", serve.serve, None),
    ("methods", lists.methods, None),
    ("models", lists.models, None),
    ("presets", lists.presets, None),
):
    app.command(_name, cls=_class, epilog=_EXIT_CODES)(_function)


if __name__ == "__main__":
    main()
