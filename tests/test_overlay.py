"""The overlay: which part of a picture a vision token stands for, checked against the image processors themselves."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from adaptinfer import AdaptInfer, Schedule, Stage
from adaptinfer.overlay import (
    Grid,
    OverlayError,
    check_path,
    draw_overlay,
    merged_grid,
    picture_grids,
    place_tokens,
    seen_region,
    square_grid,
)

CROPPING = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
PROCESSORS = {
    "crop": CLIPImageProcessorPil(**CROPPING),
    "crop smaller": CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56}),
    "squeeze": CLIPImageProcessorPil(size={"height": 56, "width": 56}, do_center_crop=False),
    "pad": LlavaImageProcessorPil(**CROPPING, do_pad=True),
    "crop only": CLIPImageProcessorPil(do_resize=False, crop_size={"height": 56, "width": 56}),
}


@pytest.mark.parametrize("size", [(140, 70), (70, 140), (112, 112), (133, 61)])
@pytest.mark.parametrize("name", PROCESSORS)
def test_cells_are_what_the_processor_shows(name, size):
    """Paint one token's part white: in the processor's own output, that patch and no other lights up."""
    processor = PROCESSORS[name]
    grid = square_grid(49, seen_region(size, processor))
    lit = 0
    for row, column in ((0, 0), (3, 3), (2, 5), (6, 6)):
        left, top, right, bottom = grid.cell(row, column)
        inside = left >= 0 and top >= 0 and right <= size[0] and bottom <= size[1]
        if not inside:
            continue
        image = Image.new("RGB", size, "black")
        image.paste((255, 255, 255), (round(left), round(top), round(right), round(bottom)))
        pixels = processor(image, return_tensors="pt")["pixel_values"][0, 0]
        patches = pixels.unfold(0, 8, 8).unfold(1, 8, 8).mean(dim=(2, 3))
        assert patches.shape == (7, 7)
        assert divmod(int(patches.argmax()), 7) == (row, column)
        share = (patches - patches.min()) / (patches.max() - patches.min())
        assert share.flatten().sort().values[-2] < 0.6  # padding is grey, and rounding to pixels spills a little
        lit += 1
    assert lit


def test_regions_by_hand():
    assert seen_region((200, 100), PROCESSORS["crop"]) == (50.0, 0.0, 150.0, 100.0)
    assert seen_region((100, 200), PROCESSORS["crop"]) == (0.0, 50.0, 100.0, 150.0)
    assert seen_region((200, 100), PROCESSORS["squeeze"]) == (0.0, 0.0, 200.0, 100.0)
    assert seen_region((200, 100), PROCESSORS["pad"]) == (0.0, -50.0, 200.0, 150.0)
    with pytest.raises(OverlayError, match="longest_edge"):
        seen_region((200, 100), CLIPImageProcessorPil(size={"longest_edge": 56}, do_center_crop=False))


@pytest.mark.parametrize("size", [(200, 130), (90, 240)])
def test_merged_patches_of_a_picture_of_any_size(size):
    processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 60)
    inputs = processor([Image.new("RGB", size)] * 2, return_tensors="pt")
    tokens = int(inputs["image_grid_thw"].prod(dim=1).sum()) // processor.merge_size**2
    grids = picture_grids([size] * 2, tokens, processor, inputs)
    assert sum(grid.tokens for grid in grids) == tokens
    assert grids[0].region == (0.0, 0.0, *size) and (grids[0].rows < grids[0].columns) == (size[0] > size[1])
    assert merged_grid((1, 6, 8), 2, size).cell(1, 2) == (size[0] / 2, size[1] / 3, size[0] * 0.75, size[1] * 2 / 3)


def test_tokens_are_placed_row_by_row_and_picture_by_picture():
    grids = [Grid(2, 3, (0, 0, 1, 1)), Grid(1, 2, (0, 0, 1, 1))]
    places = place_tokens([4, 5, 6, 7, 8, 9, 20, 21], grids)
    assert places == {
        4: (0, 0, 0), 5: (0, 0, 1), 6: (0, 0, 2), 7: (0, 1, 0), 8: (0, 1, 1), 9: (0, 1, 2), 20: (1, 0, 0), 21: (1, 0, 1)
    }  # fmt: skip
    with pytest.raises(OverlayError, match="7 vision tokens do not fit grids of 8"):
        place_tokens(range(7), grids)


@pytest.mark.parametrize(
    ("tokens", "sizes", "inputs", "message"),
    [
        (50, [(10, 10)], {}, "not a square grid"),
        (99, [(10, 10)] * 2, {}, "cannot be drawn yet"),
        (49, [(10, 10)], {"image_sizes": torch.tensor([[10, 10]])}, "cannot be drawn yet"),
        (13, [(10, 10)], {"image_grid_thw": torch.tensor([[1, 6, 8]])}, "13 vision tokens, which do not fit 3 x 4"),
        (12, [(10, 10)], {"image_grid_thw": torch.tensor([[2, 4, 6]])}, "are not one picture"),
    ],
)
def test_tokens_that_fit_no_grid_are_refused(tokens, sizes, inputs, message):
    processor = Qwen2VLImageProcessorPil() if "image_grid_thw" in inputs else PROCESSORS["crop"]
    with pytest.raises(OverlayError, match=message):
        picture_grids(sizes, tokens, processor, inputs)


def test_paths_are_checked(tmp_path):
    check_path(tmp_path / "a.PDF")
    (tmp_path / "b.png").mkdir()
    for path, message in (
        ("a.gif", "must end in"),
        ("a", "must end in"),
        ("c/a.png", "no folder"),
        ("b.png", "a folder"),
    ):
        with pytest.raises(OverlayError, match=message):
            check_path(tmp_path / path)


@pytest.fixture
def report(models):
    """A prompt with two pictures of 49 tokens, pruned twice."""
    model = models("llava")
    schedule = Schedule((Stage(1, 30), Stage(3, 5)), tiny.LAYERS, None)
    with AdaptInfer(schedule=schedule)(model) as handle, torch.no_grad():
        model(**tiny.batch("llava", [tiny.simple("llava", images=2)]))
        return handle.report


IMAGES = [Image.new("RGB", (200, 100), (200, 60, 60)), Image.new("RGB", (80, 80), (60, 200, 60))]
GRIDS = [square_grid(49, seen_region(image.size, PROCESSORS["squeeze"])) for image in IMAGES]


def test_survivors_are_bright_and_the_rest_is_dark(report, tmp_path, monkeypatch):
    import adaptinfer.overlay as overlay

    drawn = []
    original = overlay._draw_picture

    def draw(axes, image, grid, frame, panel, survivors):
        original(axes, image, grid, frame, panel, survivors)
        if survivors is not None:
            drawn.append((axes, grid, set(survivors)))

    monkeypatch.setattr(overlay, "_draw_picture", draw)
    draw_overlay(IMAGES, report, GRIDS, "what is it?", "red", tmp_path / "kept.png")
    with Image.open(tmp_path / "kept.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert len(drawn) == 4  # two pictures, two stages
    for stage in range(2):
        places = place_tokens(report.entered[0][0].tolist(), GRIDS)
        wanted = {places[position] for position in report.kept[stage][0].tolist()}
        shown = {(n, *cell) for n, (_, _, cells) in enumerate(drawn[stage::2]) for cell in cells}
        assert shown == wanted and len(wanted) == (30, 5)[stage]
    for axes, grid, survivors in drawn:
        for row in range(7):
            for column in range(7):
                left, top, right, bottom = grid.cell(row, column)
                x, y = axes.transData.transform(((left + right) / 2, (top + bottom) / 2))
                brightness = pixels[pixels.shape[0] - int(y), int(x)].max()
                assert (brightness > 120) == ((row, column) in survivors)


def test_colours_follow_scores(report):
    from adaptinfer.overlay import _panels

    panels = _panels(report, GRIDS)
    strengths = [value for panel in panels[0] for value in panel.values()]
    assert min(strengths) == 0.0 and max(strengths) == 1.0
    scores = dict(zip(report.entered[0][0].tolist(), report.scores[0][0].tolist(), strict=True))
    best = max(report.kept[0][0].tolist(), key=scores.__getitem__)
    number, row, column = place_tokens(report.entered[0][0].tolist(), GRIDS)[best]
    assert panels[0][number][row, column] == 1.0


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".pdf", ".svg"])
def test_formats(suffix, report, tmp_path):
    path = tmp_path / f"kept{suffix}"
    draw_overlay(IMAGES, report, GRIDS, "cost: $5 or $6? " * 40, "日本 [b]", path)
    starts = {".jpg": b"\xff\xd8", ".webp": b"RIFF", ".pdf": b"%PDF", ".svg": b"<?xml"}
    assert path.read_bytes().startswith(starts[suffix])


def test_nothing_pruned_still_draws(models, tmp_path):
    model = models("llava")
    with AdaptInfer(budget=49)(model) as handle, torch.no_grad():
        model(**tiny.batch("llava", [tiny.simple("llava")]))
        draw_overlay(IMAGES[:1], handle.report, GRIDS[:1], "what?", "", tmp_path / "all.png")
    assert (tmp_path / "all.png").stat().st_size > 1000


def test_reports_that_do_not_fit_are_refused(report, models, tmp_path):
    path = tmp_path / "kept.png"
    with pytest.raises(OverlayError, match="98 vision tokens do not fit grids of 49"):
        draw_overlay(IMAGES[:1], report, GRIDS[:1], "what?", "red", path)
    with pytest.raises(OverlayError, match="1 pictures and 2 grids"):
        draw_overlay(IMAGES[:1], report, GRIDS, "what?", "red", path)
    model = models("llava")
    with AdaptInfer(budget=20)(model) as handle, torch.no_grad():
        model(**tiny.batch("llava", [tiny.simple("llava"), tiny.simple("llava")]))
        with pytest.raises(OverlayError, match="a batch of 2 prompts"):
            draw_overlay(IMAGES[:1], handle.report, GRIDS[:1], "what?", "red", path)
    assert not path.exists()
