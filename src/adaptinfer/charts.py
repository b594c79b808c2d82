"""What the plots share: colours, quiet axes, and files that are written whole."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from adaptinfer.errors import InputError
from adaptinfer.extras import needs
from adaptinfer.files import write_whole

if TYPE_CHECKING:  # matplotlib belongs to an extra
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLOT_SUFFIXES = (".png", ".pdf", ".svg")
INK, QUIET, GRID, BAND = "#1d2733", "#6b7785", "#e4e8ec", "#d5dbe1"
BLUE, RED, GREEN = "#0b6e99", "#c8553d", "#5b8c5a"


def new_figure(width: float, height: float, title: str) -> Figure:
    """An empty figure; sizes in inches."""
    with needs("cli", "a plot"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    figure.suptitle(title, color=INK, fontsize=12)
    return figure


def label(axes: Axes, title: str, x: str, y: str = "") -> None:
    """Title and axis labels; a light grid, and no frame on the right and at the top."""
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=QUIET)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(QUIET)


def save(figure: Figure, what: str, path: Path) -> None:
    """Write a figure; the same figure makes the same file.

    Raises:
        InputError: the file cannot be written, or ends in none of `PLOT_SUFFIXES`; starts with ``what``.
    """
    suffix = path.suffix.lower()
    if suffix not in PLOT_SUFFIXES:
        raise InputError(f"{what} {str(path)!r}: must end in one of {', '.join(PLOT_SUFFIXES)}")
    target = io.BytesIO()
    figure.savefig(target, format=suffix[1:], dpi=140, metadata={"Date": None} if suffix == ".svg" else None)
    try:
        write_whole(path, target.getvalue())
    except OSError as error:
        raise InputError(f"{what} {str(path)!r}: cannot be written ({error.strerror})") from None
