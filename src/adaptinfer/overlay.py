"""Draw what was kept: the picture once per stage, dropped patches dark, the survivors' scores as a heat map.

Which part of a picture a vision token stands for is worked out here, by pure functions on sizes and positions. Nothing
here knows a model; what has to be known of its image processor is read from the processor's settings.
"""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptinfer.errors import InputError
from adaptinfer.extras import needs
from adaptinfer.files import check_output, write_output

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from PIL import Image

    from adaptinfer.engine.report import Report

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")
"""What an overlay can be saved as."""

Region = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the original picture; may reach beyond it where the model saw padding."""


class OverlayError(InputError):
    """An overlay that cannot be written, or tokens that cannot be laid on a picture."""


# ---------------------------------------------------------------------------------------------------- where tokens lie


@dataclass(frozen=True)
class Grid:
    """The vision tokens of one picture, row by row from the top left, over the region that the model saw."""

    rows: int
    columns: int
    region: Region

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self.rows * self.columns

    def cell(self, row: int, column: int) -> Region:
        """The part of the original picture that one token stands for."""
        left, top, right, bottom = self.region
        width, height = (right - left) / self.columns, (bottom - top) / self.rows
        return left + column * width, top + row * height, left + (column + 1) * width, top + (row + 1) * height


def picture_grids(
    sizes: Sequence[tuple[int, int]], vision_tokens: int, image_processor: Any, inputs: Mapping[str, Any]
) -> list[Grid]:
    """The grid of each picture in a prompt.

    Args:
        sizes: (width, height) of each original picture.
        vision_tokens: vision tokens in the prompt, of all pictures together.
        image_processor: the processor's; its settings for resizing, padding and cropping are read.
        inputs: what the processor made of the prompt; ``image_grid_thw`` is read if it is there.

    Raises:
        OverlayError: the tokens are not laid out as a grid that is known here.
    """
    if "image_grid_thw" in inputs:
        merge = image_processor.merge_size
        patches = [tuple(map(int, grid)) for grid in inputs["image_grid_thw"]]
        grids = [merged_grid(grid, merge, size) for grid, size in zip(patches, sizes, strict=True)]
    elif "image_sizes" in inputs or vision_tokens % len(sizes):
        raise OverlayError("overlay: this model splits pictures into tiles, which cannot be drawn yet")
    else:
        tokens = vision_tokens // len(sizes)
        grids = [square_grid(tokens, seen_region(size, image_processor)) for size in sizes]
    if sum(grid.tokens for grid in grids) != vision_tokens:
        raise OverlayError(
            f"overlay: the prompt has {vision_tokens} vision tokens, which do not fit "
            f"{' + '.join(f'{grid.rows} x {grid.columns}' for grid in grids)} patches"
        )
    return grids


def square_grid(tokens: int, region: Region) -> Grid:
    """As many rows as columns, as in LLaVA. Raises OverlayError if the number is no square."""
    side = math.isqrt(tokens)
    if not tokens or side * side != tokens:
        raise OverlayError(f"overlay: {tokens} vision tokens are not a square grid")
    return Grid(side, side, region)


def merged_grid(grid_thw: tuple[int, ...], merge: int, size: tuple[int, int]) -> Grid:
    """One token for every ``merge`` x ``merge`` patches of a picture that is resized and never cropped, as in Qwen-VL.

    Args:
        grid_thw: patches in time (1 for a picture), down and across.
        merge: patches along each side of a token.
        size: (width, height) of the original picture.
    """
    time, down, across = grid_thw
    if time != 1 or down % merge or across % merge:
        raise OverlayError(
            f"overlay: {time} x {down} x {across} patches, merged {merge} x {merge}, are not one picture"
        )
    return Grid(down // merge, across // merge, (0.0, 0.0, float(size[0]), float(size[1])))


def seen_region(size: tuple[int, int], image_processor: Any) -> Region:
    """What an image processor lets the model see of a picture: it pads to a square, resizes, then crops the centre.

    Args:
        size: (width, height) of the original picture.
        image_processor: whose ``do_pad``, ``do_resize``, ``size``, ``do_center_crop`` and ``crop_size`` are read.

    Raises:
        OverlayError: it resizes in a way that is not known here.
    """

    def setting(name: str) -> Any:
        return getattr(image_processor, name, None)

    width, height = size
    left = top = 0.0
    if setting("do_pad"):
        side = max(width, height)
        left, top = -((side - width) // 2), -((side - height) // 2)
        width = height = side
    resized = width, height
    if setting("do_resize"):
        wanted = {key: value for key, value in dict(setting("size")).items() if value is not None}
        if set(wanted) == {"shortest_edge"}:
            short, long = sorted((width, height))
            edges = wanted["shortest_edge"], int(wanted["shortest_edge"] * long / short)
            resized = edges if width <= height else edges[::-1]
        elif set(wanted) == {"height", "width"}:
            resized = wanted["width"], wanted["height"]
        else:
            raise OverlayError(f"overlay: pictures are resized by {sorted(wanted)}, which cannot be drawn yet")
    scale_x, scale_y = width / resized[0], height / resized[1]
    cropped, offset = resized, (0, 0)
    if setting("do_center_crop"):
        crop = dict(setting("crop_size"))
        cropped = crop["width"], crop["height"]
        offset = (resized[0] - cropped[0]) // 2, (resized[1] - cropped[1]) // 2
    left, top = left + offset[0] * scale_x, top + offset[1] * scale_y
    return left, top, left + cropped[0] * scale_x, top + cropped[1] * scale_y


def place_tokens(positions: Sequence[int], grids: Sequence[Grid]) -> dict[int, tuple[int, int, int]]:
    """(picture, row, column) of every vision token.

    Args:
        positions: prompt positions of all vision tokens, ascending.
        grids: the pictures in the order in which they stand in the prompt.

    Raises:
        OverlayError: there are more or fewer tokens than the grids have.
    """
    wanted = sum(grid.tokens for grid in grids)
    if len(positions) != wanted:
        raise OverlayError(f"overlay: {len(positions)} vision tokens do not fit grids of {wanted}")
    cells = (
        (number, row, column)
        for number, grid in enumerate(grids)
        for row in range(grid.rows)
        for column in range(grid.columns)
    )
    return dict(zip(positions, cells, strict=True))


# ---------------------------------------------------------------------------------------------------- the picture


def check_path(path: Path) -> None:
    """Refuse, before any work, a path that an overlay cannot be written to.

    Raises:
        OverlayError: an ending that is not one of `SUFFIXES`, no such folder, or no permission.
        MissingExtraError: matplotlib is not installed.
    """
    check_output("overlay", path, SUFFIXES, OverlayError)
    with needs("cli", "an overlay"):
        import matplotlib  # noqa: F401


def draw_overlay(
    images: Sequence[Image.Image],
    report: Report,
    grids: Sequence[Grid],
    question: str,
    answer: str,
    path: str | Path,
) -> None:
    """Draw one row per picture, the picture itself and then one panel per stage, and save it.

    Args:
        images: the original pictures.
        report: of a prefill of one prompt with these pictures.
        grids: from `picture_grids`.
        question: goes into the title.
        answer: likewise.
        path: file to write; its ending chooses the format.

    Raises:
        OverlayError: the report does not fit the pictures, or the file cannot be written.
    """
    path = Path(path)
    check_path(path)
    if len(report.vision_tokens) != 1:
        raise OverlayError(f"overlay: the report is of a batch of {len(report.vision_tokens)} prompts, not of one")
    if len(images) != len(grids):
        raise OverlayError(f"overlay: {len(images)} pictures and {len(grids)} grids")
    panels = _panels(report, grids)
    figure = _figure(images, grids, panels, [stage.place for stage in report.stages], question, answer)
    target = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a sign that the font lacks is drawn as a box
        figure.savefig(target, format=path.suffix[1:].lower(), facecolor=_PAPER)
    write_output("overlay", path, target.getvalue(), OverlayError)


Panel = dict[tuple[int, int], float]
"""The survivors in one picture: (row, column) and strength, 0 for the lowest score kept in this stage to 1."""

_DPI = 150
_PAPER, _INK, _QUIET = "white", "#1d2733", "#6b7785"
_HEAT = "plasma"
_HEAT_FROM = 0.28  # its darkest part would not show on dropped patches
_DARKNESS = 0.74  # of dropped patches
_LONGEST_EDGE = 1200  # pixels of a picture in the figure
_PANEL, _WIDEST = 3.1, 26.0  # inches


def _panels(report: Report, grids: Sequence[Grid]) -> list[list[Panel]]:
    """``[stage][picture]``, read from the report."""
    if not report.stages:
        return []
    places = place_tokens(report.entered[0][0].tolist(), grids)
    stages = []
    for entered, scores, kept in zip(report.entered, report.scores, report.kept, strict=True):
        score_at = dict(zip(entered[0].tolist(), scores[0].tolist(), strict=True))
        survivors = {position: score_at[position] for position in kept[0].tolist()}
        least, most = min(survivors.values(), default=0.0), max(survivors.values(), default=0.0)
        panels: list[Panel] = [{} for _ in grids]
        for position, score in survivors.items():
            number, row, column = places[position]
            panels[number][row, column] = (score - least) / (most - least) if most > least else 1.0
        stages.append(panels)
    return stages


def _figure(
    images: Sequence[Image.Image],
    grids: Sequence[Grid],
    stages: list[list[Panel]],
    places: list[str],
    question: str,
    answer: str,
) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    columns = 1 + len(stages)
    panel = max(1.6, min(_PANEL, _WIDEST / columns))
    frames = [_frame(image, grid) for image, grid in zip(images, grids, strict=True)]
    heights = [panel * min(2.0, max(0.3, (f[3] - f[1]) / (f[2] - f[0]))) for f in frames]
    width = max(panel * columns + 0.3, 6.5)
    asked, answered = _wrapped(question, width), _wrapped(f"→ {answer or '(no answer)'}", width)
    line = 0.26  # inches of the title's lines
    title_height = line * (len(asked) + len(answered)) + 0.14
    bar_height = 0.62 if stages else 0.1
    height = sum(heights) + 0.36 * len(images) + title_height + bar_height

    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor=_PAPER)
    FigureCanvasAgg(figure)
    for number, text in enumerate([*asked, *answered]):
        figure.text(
            0.15 / width, 1 - (0.14 + number * line) / height, text,
            fontsize=13, color=_INK, va="top", parse_math=False, weight="bold" if number < len(asked) else "normal",
        )  # fmt: skip
    axes = figure.subplots(
        len(images), columns, squeeze=False,
        gridspec_kw={
            "height_ratios": heights,
            "left": 0.15 / width, "right": 1 - 0.15 / width, "wspace": 0.06,
            "top": 1 - (title_height + 0.3) / height, "bottom": bar_height / height,
            "hspace": 0.36 / (sum(heights) / len(heights)),
        },
    )  # fmt: skip
    for number, (image, grid, frame) in enumerate(zip(images, grids, frames, strict=True)):
        _draw_picture(axes[number, 0], image, grid, frame, panel, survivors=None)
        _caption(axes[number, 0], f"the picture: {grid.tokens} tokens")
        for stage, (place, panels) in enumerate(zip(places, stages, strict=True), start=1):
            _draw_picture(axes[number, stage], image, grid, frame, panel, panels[number])
            _caption(axes[number, stage], f"{place}: {len(panels[number])} of {grid.tokens} tokens")
    if stages:
        bar = figure.add_axes((0.15 / width, 0.3 / height, min(2.6, width / 3) / width, 0.11 / height))
        figure.colorbar(ScalarMappable(cmap=_heat_map()), cax=bar, orientation="horizontal")
        bar.set_xticks([0, 1], ["lowest kept", "highest"], fontsize=8, color=_QUIET)
        bar.get_xticklabels()[0].set_horizontalalignment("left")
        bar.get_xticklabels()[1].set_horizontalalignment("right")
        bar.tick_params(length=0)
        cropped = any(frame != grid.region for frame, grid in zip(frames, grids, strict=True))
        note = "frame: score of a kept token within its stage.  dark: dropped." + (
            "  pale: outside what the model sees." if cropped else ""
        )
        figure.text(
            (0.15 + min(2.6, width / 3) + 0.25) / width, 0.355 / height, note, fontsize=9, color=_QUIET, va="center"
        )
    return figure


def _wrapped(text: str, width: float) -> list[str]:
    letters = int(width * 8.2)  # of 13 points, and bold
    return textwrap.wrap(text, letters, max_lines=4, placeholder=" …")


def _heat_map() -> Colormap:
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps[_HEAT](np.linspace(_HEAT_FROM, 1, 256)))


def _caption(axes: Axes, text: str) -> None:
    axes.set_title(text, fontsize=10, color=_INK, loc="left", pad=5)


def _frame(image: Image.Image, grid: Grid) -> Region:
    """What a panel shows: the whole picture, and padding around it that the model saw."""
    left, top, right, bottom = grid.region
    return min(0.0, left), min(0.0, top), max(float(image.width), right), max(float(image.height), bottom)


def _draw_picture(
    axes: Axes, image: Image.Image, grid: Grid, frame: Region, panel: float, survivors: Panel | None
) -> None:
    """The picture with its grid; with ``survivors``, the tokens that went on framed by score and all others dark."""
    import numpy as np
    from matplotlib.collections import LineCollection, PatchCollection
    from matplotlib.patches import Rectangle

    left, top, right, bottom = grid.region
    shown = image.copy()
    shown.thumbnail((_LONGEST_EDGE, _LONGEST_EDGE))
    axes.imshow(np.asarray(shown), extent=(0, image.width, image.height, 0), aspect="equal")
    for x0, y0, x1, y1 in (  # what the model never sees, on each side of what it does
        (0, 0, image.width, top),
        (0, bottom, image.width, image.height),
        (0, top, left, bottom),
        (right, top, image.width, bottom),
    ):
        if x1 > x0 and y1 > y0:
            axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, facecolor=_PAPER, alpha=0.78, linewidth=0))

    points = 72 * panel * (right - left) / (frame[2] - frame[0]) / grid.columns  # of a cell's side
    lines = [[(x, top), (x, bottom)] for x in np.linspace(left, right, grid.columns + 1)]
    lines += [[(left, y), (right, y)] for y in np.linspace(top, bottom, grid.rows + 1)]
    if survivors is not None:
        dark = np.zeros((grid.rows, grid.columns, 4))
        dark[..., 3] = _DARKNESS
        for row, column in survivors:
            dark[row, column, 3] = 0.0
        axes.imshow(dark, extent=(left, right, bottom, top), interpolation="nearest", aspect="equal")
    axes.add_collection(LineCollection(lines, colors="white", linewidths=min(0.5, points / 40), alpha=0.35))
    if survivors:
        boxes = []
        thick = min(2.6, points / 8)
        inset = thick / 2 * (right - left) / grid.columns / points  # so that neighbours' frames do not cover each other
        for row, column in survivors:
            x0, y0, x1, y1 = grid.cell(row, column)
            boxes.append(Rectangle((x0 + inset, y0 + inset), x1 - x0 - 2 * inset, y1 - y0 - 2 * inset))
        colours = _heat_map()(np.array(list(survivors.values())))
        tint = colours.copy()
        tint[:, 3] = 0.1  # more would change the colours that a question may be about
        axes.add_collection(PatchCollection(boxes, facecolors=tint, edgecolors=colours, linewidths=thick))
    axes.set(xlim=(frame[0], frame[2]), ylim=(frame[3], frame[1]), xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)
