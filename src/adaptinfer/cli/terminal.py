"""What the commands print with: the console, tables, numbers, progress, and one line on standard error."""

from __future__ import annotations

import statistics
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text


def console() -> Console:
    """Standard output; in a pipe nothing is wrapped, so that a line stays a line."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 10_000)


def say(label: str, message: str, style: str) -> None:
    """One line on standard error."""
    text = Text.assemble((label, style), " ", " ".join(message.split()))
    Console(stderr=True, highlight=False).print(text, soft_wrap=True)


def print_notes(target: Console, notes: Sequence[str]) -> None:
    """Dim lines below a table or an answer."""
    for note in notes:
        target.print(Text(note, style="dim"), soft_wrap=True)


def table(target: Console, *columns: str, figures: bool = False) -> Table:
    """A table with rules on a terminal, plain columns in a pipe.

    Args:
        target: where it will be printed.
        columns: their headers.
        figures: all columns but the first hold figures: right-aligned, close together and never wrapped.
    """
    terminal = target.is_terminal
    found = Table(box=box.SIMPLE_HEAD if terminal else None, pad_edge=False, header_style="bold" if terminal else "")
    if figures:
        found.padding = (0, 1, 0, 0) if terminal else (0, 2, 0, 0)
    for number, column in enumerate(columns):
        found.add_column(column, justify="right" if figures and number else "left", no_wrap=figures or not number)
    return found


@contextmanager
def spinner() -> Iterator[Callable[[str], None]]:
    """The current step and its time on standard error, if that is a terminal. Yields what sets the step."""
    target = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=target, transient=True, disable=not target.is_terminal) as progress:
        task = progress.add_task("starting")
        yield lambda text: progress.update(task, description=text)


class Bar:
    """Progress of a known number of steps, each with a few words about it."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._task = progress, progress.add_task("starting", total=None)

    def begin(self, total: int, text: str) -> None:
        """Start again from zero."""
        self._progress.reset(self._task, total=total, description=text)

    def step(self, *words: str) -> None:
        """One more step is done."""
        self._progress.update(self._task, advance=1, description=", ".join(words))

    def say(self, text: str) -> None:
        """Show other words without a step."""
        self._progress.update(self._task, description=text)


@contextmanager
def bar(quiet: bool) -> Iterator[Bar]:
    """A progress bar on standard error, if that is a terminal."""
    target = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=target, transient=True, disable=quiet or not target.is_terminal) as progress:
        yield Bar(progress)


def quieten() -> None:
    """Hide progress bars, log lines and warnings of transformers: whatever goes wrong is raised anyway."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    from logging import CRITICAL

    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity(CRITICAL)  # its retries would be printed before our one line


# ---------------------------------------------------------------------------------------------------- numbers


def change(now: float, before: float) -> str:
    """-25 %, +3 % or unchanged."""
    return f"{100 * (now / before - 1):+.0f} %" if now != before else "unchanged"


def spread(values: Sequence[float]) -> str:
    """median (least-most)"""
    return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"


def scaled_bytes(count: float) -> str:
    return _scaled(count, ("B", "kB", "MB", "GB", "TB"))


def scaled_flops(count: float) -> str:
    return _scaled(count, ("", "k", "M", "G", "T", "P"))


def _scaled(number: float, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if number < 999.5:
            return f"{number:.3g} {unit}".strip()
        number /= 1000
    return f"{number:.3g} {units[-1]}"
