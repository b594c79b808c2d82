"""The scene world: scenes drawn from seeds, and their pictures."""

import ast
import copy
import inspect
import random
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from hashlib import sha256
from itertools import combinations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from adaptinfer.embedded.world import backdrop, masks, render
from adaptinfer.embedded.world.chance import Chance
from adaptinfer.embedded.world.render import RGB, SHADES
from adaptinfer.embedded.world.scene import GAP, MAX_ALIKE, MAX_OVERLAP, sample_scene
from adaptinfer.embedded.world.things import (
    BACKGROUNDS,
    COLOURS,
    DIGITS,
    FONTS,
    HELD_OUT,
    LETTERED,
    LETTERS,
    NUMBERS,
    OUTLINES,
    PATTERNS,
    SHAPES,
    SIGN,
    SIZES,
    SPLITS,
    WORDS,
    Background,
    Blot,
    Scene,
    Thing,
    split_of,
)

SEEDS = st.integers(0, SPLITS["test"].stop - 1)
VALIDATION = SPLITS["validation"].start
WIDTHS = {"small": (0.85, 1.1), "medium": (1.4, 1.8), "large": (2.3, 3.0)}
SIGN_WIDTHS = {"small": (2.0, 2.4), "medium": (2.4, 2.9), "large": (2.9, 3.4)}
EVEN = Background("gradient", (128, 128, 128), (128, 128, 128), 3.0, 0.0, 0, 0.0, 0, ())


# ------------------------------------------------------------------------------------------------------- chance


def test_chance_is_the_same_everywhere():
    chance = Chance("scene", 1, 7, 16, False)
    drawn = (chance.integer(0, 999), chance.choice("abcdef"), chance.sample(range(9), 3), chance.shuffle("abcd"))
    assert drawn == PINNED_CHOICES


def test_chance_is_fair():
    chance = Chance("fair")
    rolls = Counter(chance.integer(1, 6) for _ in range(6000))
    assert sorted(rolls) == [1, 2, 3, 4, 5, 6]
    assert min(rolls.values()) > 850
    weighted = Counter(chance.weighted("abc", (1, 0, 3)) for _ in range(4000))
    assert weighted["b"] == 0
    assert 0.72 < weighted["c"] / 4000 < 0.78
    firsts = Counter(chance.shuffle("abc")[0] for _ in range(3000))
    assert min(firsts.values()) > 900
    assert sorted(chance.sample("abcde", 9)) == list("abcde")  # no more than there are


# ------------------------------------------------------------------------------------------------------- scenes


def test_names_are_what_other_modules_count_on():
    assert len(SHAPES) == 10
    assert len(WORDS) == 40
    assert len(COLOURS) == 8 and set(COLOURS) == set(RGB) == set(SHADES)
    assert all(3 <= len(word) <= 4 and word.isalpha() and word.islower() for word in WORDS)
    for one, other in combinations(WORDS, 2):  # one misread letter makes no other word
        assert len(one) != len(other) or sum(a != b for a, b in zip(one, other, strict=True)) >= 2, (one, other)
    assert not set(WORDS) & {*SHAPES, *COLOURS, *PATTERNS, *SIZES, SIGN}
    assert set(LETTERED["medium"]) | set(LETTERED["large"]) <= set(SHAPES)
    assert len(HELD_OUT) == 8 and all(shape in SHAPES and colour in COLOURS for shape, colour in HELD_OUT)
    assert len({shape for shape, _ in HELD_OUT}) == len({colour for _, colour in HELD_OUT}) == 8


@given(SEEDS, st.sampled_from([12, 16, 24]), st.booleans())
def test_scene_follows_its_rules(seed, grid, hard):
    scene = sample_scene(seed, grid, hard)
    assert scene == sample_scene(seed, grid, hard)
    assert (scene.seed, scene.grid, scene.hard) == (seed, grid, hard)
    assert 4 <= len(scene.things) <= 14
    anchors = [thing.anchor for thing in scene.things]
    assert anchors == sorted(set(anchors))
    for thing in scene.things:
        check_thing(thing, grid)
        if split_of(seed) == "train":
            assert (thing.shape, thing.colour) not in HELD_OUT
        if hard:
            assert thing.size == "small"
    for attribute in ("shape", "colour"):
        assert max(Counter(getattr(thing, attribute) for thing in scene.things).values()) <= MAX_ALIKE


def check_thing(thing, grid):
    left, top, right, bottom = thing.box
    assert left >= 0 and top >= 0 and right <= grid and bottom <= grid
    for centre, patch in zip((thing.y, thing.x), thing.anchor, strict=True):
        assert abs(centre - patch - 0.5) <= 0.25
    assert thing.colour in COLOURS and thing.size in SIZES and thing.outline in OUTLINES
    assert 0 <= thing.font < FONTS
    if thing.shape == SIGN:
        low, high = SIGN_WIDTHS[thing.size]
        assert 0.95 <= thing.height <= 1.3
        assert thing.text in WORDS + NUMBERS
        assert thing.pattern == "plain"
    else:
        assert thing.shape in SHAPES
        low, high = WIDTHS[thing.size]
        assert thing.height == thing.width
        assert thing.text in ("", *LETTERS, *DIGITS)
        assert not thing.text or thing.shape in LETTERED[thing.size]
        assert thing.pattern in PATTERNS
    assert low <= thing.width <= high
    if thing.size == "small":
        assert (thing.pattern, thing.outline) == ("plain", "none")
    assert (thing.colour, thing.outline) not in (("black", "dark"), ("white", "light"))


@given(SEEDS, st.sampled_from([12, 16, 24]))
@example(seed=0, grid=16)
def test_boxes_are_apart_but_for_one_overlap(seed, grid):
    overlaps = 0
    for one, other in combinations(sample_scene(seed, grid).things, 2):
        across = min(one.box[2], other.box[2]) - max(one.box[0], other.box[0])
        along = min(one.box[3], other.box[3]) - max(one.box[1], other.box[1])
        if max(across, along) <= 1e-9 - GAP or min(across, along) <= 1e-9 - GAP:
            continue
        overlaps += 1
        upper, under = sorted((one, other), key=lambda thing: thing.width * thing.height)  # as they are drawn
        assert 0 < across * along / (upper.width * upper.height) <= MAX_OVERLAP
        assert under.shape != SIGN and under.size != "small"
        row, col = under.anchor  # neither this patch nor what is written on the thing is covered
        for rect in (
            (col, row, col + 1, row + 1),
            (under.x - 0.45, under.y - 0.45, under.x + 0.45, under.y + 0.45),
        ):
            assert (
                min(upper.box[2], rect[2]) <= max(upper.box[0], rect[0]) + 1e-9
                or min(upper.box[3], rect[3]) <= max(upper.box[1], rect[1]) + 1e-9
            )
    assert overlaps <= 1


@given(SEEDS, st.sampled_from([12, 16]))
def test_cells_are_the_patches_that_a_box_covers(seed, grid):
    def covered(low, high):
        """How much of each patch the stretch covers, exactly."""
        low, high = Fraction(low), Fraction(high)
        return [max(min(high, place + 1) - max(low, place), 0) for place in range(grid)]

    for thing in sample_scene(seed, grid).things:
        across, along = covered(thing.box[0], thing.box[2]), covered(thing.box[1], thing.box[3])
        expected = (
            (row, col)
            for row in range(grid)
            for col in range(grid)
            if across[col] * along[row] > Fraction(12, 100) or (row, col) == thing.anchor
        )
        assert thing.cells(grid) == tuple(expected)


def test_cells_of_a_thing_worked_by_hand():
    # From 1.9 to 3.3 across and from 2.2 to 3.6 down: a tenth of column 1, all of 2 and three tenths of 3.
    thing = Thing(2.6, 2.9, 1.4, 1.4, "star", "red", "plain", "medium", "none", "", 0)
    assert thing.anchor == (2, 2)
    assert thing.cells(16) == ((2, 2), (2, 3), (3, 2), (3, 3))


def test_scenes_are_as_varied_as_promised():
    scenes = [sample_scene(VALIDATION + seed) for seed in range(1500)]
    things = [thing for scene in scenes for thing in scene.things]
    others = [thing for thing in things if thing.shape != SIGN]
    larger = [thing for thing in others if thing.size != "small"]

    def share(items, holds):
        return sum(map(holds, items)) / len(items)

    assert 0.50 < share(things, lambda thing: thing.size == "small") < 0.60
    assert 0.20 < share(things, lambda thing: thing.size == "medium") < 0.30
    assert 0.40 < share(larger, lambda thing: thing.pattern != "plain") < 0.60
    assert 0.18 < share(larger, lambda thing: thing.text != "") < 0.30
    assert 1.0 < (len(things) - len(others)) / len(scenes) < 1.4
    assert 0.08 < share(others, lambda thing: (thing.shape, thing.colour) in HELD_OUT) < 0.12  # 8 of 80 pairs
    assert 0.15 < share(scenes, overlapping) < 0.35
    assert 0.6 < share(scenes, has_distractors) < 1.0
    counts = Counter(Counter(thing.shape for thing in scene.things)[shape] for scene in scenes for shape in SHAPES)
    assert set(counts) == set(range(7))
    assert all(counts[number] > 120 for number in range(6))


def overlapping(scene):
    boxes = [thing.box for thing in scene.things]
    return any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for a, b in combinations(boxes, 2))


def has_distractors(scene):
    """Two things that differ in one attribute alone."""
    looks = [(thing.shape, thing.colour, thing.size, thing.pattern, thing.text) for thing in scene.things]
    return any(sum(x != y for x, y in zip(a, b, strict=True)) == 1 for a, b in combinations(looks, 2))


def test_splits():
    assert [split_of(seed) for seed in (0, 3_999_999, 4_000_000, 4_099_999, 4_100_000, 4_199_999)] == [
        "train", "train", "validation", "validation", "test", "test",
    ]  # fmt: skip
    assert (len(SPLITS["validation"]), len(SPLITS["test"])) == (100_000, 100_000)
    for seed in (-1, 4_200_000):
        with pytest.raises(ValueError, match="in no split"):
            split_of(seed)
        with pytest.raises(ValueError, match="in no split"):
            sample_scene(seed)


def test_too_small_a_grid_is_refused():
    with pytest.raises(ValueError, match="grid must be at least 12 patches, got 11"):
        sample_scene(0, 11)


def test_sampling_and_drawing_leave_global_randomness_alone():
    before = random.getstate(), copy.deepcopy(np.random.get_state())
    render.render(sample_scene(3))
    assert random.getstate() == before[0]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[1], strict=True))


# ------------------------------------------------------------------------------------------------------- pictures


def digest(pictures):
    checksum = sha256()
    for picture in pictures:
        checksum.update(str((picture.dtype, picture.shape)).encode())
        checksum.update(picture.tobytes())
    return checksum.hexdigest()[:16]


# When one of these changes, the same seed gives something else: raise scene.VERSION and train again.
PINNED_CHOICES = (695, "d", [2, 6, 8], ["a", "c", "b", "d"])
PINNED_SCENES = "c09df63bbb7b21f0"
PINNED_PICTURES = {
    (16, 12, False): "aec240353e68c86e",
    (16, 12, True): "9cb02ddd81fec90b",
    (24, 14, False): "ceaf6aa99b7a84ce",
    (16, 24, True): "ccb09a87bb03f475",
    (12, 7, False): "7f0435ab107ddd75",
}


def test_scenes_are_the_pinned_ones():
    scenes = [
        sample_scene(start + k, 16, hard) for start in (0, VALIDATION) for k in range(20) for hard in (False, True)
    ]
    assert sha256(repr(scenes).encode()).hexdigest()[:16] == PINNED_SCENES


@pytest.mark.parametrize(("grid", "patch", "hard"), PINNED_PICTURES)
def test_pictures_are_the_pinned_ones(grid, patch, hard):
    pictures = [render.render(sample_scene(VALIDATION + seed, grid, hard), patch) for seed in range(12)]
    assert all(picture.shape == (grid * patch, grid * patch, 3) for picture in pictures)
    assert digest(pictures) == PINNED_PICTURES[grid, patch, hard]


def test_only_exact_operations_draw_pictures():
    """Nothing whose last bit depends on the machine: the list of what may be used is short and closed."""
    allowed = {
        *("arange", "array", "asarray", "concatenate", "empty", "errstate", "float32", "float64", "floor", "int32"),
        *("flatnonzero", "int64", "intp", "maximum", "minimum", "multiply", "ndarray", "pad", "searchsorted", "stack"),
        *("take_along_axis", "uint32", "uint8", "where", "zeros"),
    }
    for module in (render, masks, backdrop):
        nodes = list(ast.walk(ast.parse(inspect.getsource(module))))
        used = {node.attr for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "np"}
        assert used and used <= allowed, (module.__name__, used - allowed)
        powers = {ast.unparse(node) for node in nodes if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow)}
        assert powers <= {"2 ** 24", "(along + 1) ** 2", "across ** 2", "reach ** 2"}  # of whole numbers
        assert not any(isinstance(node, ast.MatMult) for node in nodes)
        assert not {node.attr for node in nodes if isinstance(node, ast.Attribute)} & {"mean", "dot", "std", "resize"}


@pytest.mark.parametrize("hard", [False, True])
def test_a_picture_looks_the_same_at_every_size(hard):
    for seed in range(VALIDATION, VALIDATION + 6):
        scene = sample_scene(seed, 16, hard)
        small = render.render(scene, 12).astype(float)
        for times in (2, 4):
            large = render.render(scene, 12 * times).astype(float)
            averaged = large.reshape(192, times, 192, times, 3).mean(axis=(1, 3))
            assert np.abs(averaged - small).mean() < 2.5
        tiny = small.reshape(96, 2, 96, 2, 3).mean(axis=(1, 3))
        assert np.abs(render.render(scene, 6) - tiny).max() <= 0.5  # below 12 it is the average


@pytest.mark.parametrize("patch", [3, 0, -12, 65])
def test_sizes_out_of_range_are_refused(patch):
    with pytest.raises(ValueError, match=f"from 4 to 64, got {patch}"):
        render.render(sample_scene(0), patch)


@pytest.mark.parametrize("patch", [12, 24])
def test_things_stay_in_their_boxes_and_show_their_colour(patch):
    for seed in range(VALIDATION, VALIDATION + 12):
        scene = sample_scene(seed, hard=seed % 3 == 0)
        drawn = render.render(scene, patch).astype(int)
        changed = (drawn != render.render(replace(scene, things=()), patch)).any(axis=-1)
        for thing in scene.things:
            left, top, right, bottom = (edge * patch for edge in thing.box)
            inside = slice(int(top), int(-(-bottom // 1))), slice(int(left), int(-(-right // 1)))
            assert changed[inside].any()
            own = [np.array(rgb) for rgb in (RGB[thing.colour], SHADES[thing.colour])]
            distance = min(np.abs(drawn[inside] - rgb).sum(-1).min() for rgb in own)
            assert distance <= 30, thing
            row, col = (patch * place for place in thing.anchor)
            assert changed[row : row + patch, col : col + patch].any() or thing.shape in ("ring", "moon")
        for thing in scene.things:
            left, top, right, bottom = (edge * patch for edge in thing.box)
            changed[int(top) : int(-(-bottom // 1)), int(left) : int(-(-right // 1))] = False
        assert not changed.any()


def test_the_smaller_of_two_things_lies_on_top():
    large = Thing(2.5, 2.5, 2.6, 2.6, "square", "blue", "plain", "large", "none", "", 0)
    small = Thing(3.75, 3.75, 1.0, 1.0, "square", "red", "plain", "small", "none", "", 0)
    for things in ((large, small), (small, large)):
        picture = render.render(Scene(0, 5, False, things, EVEN))
        red, _, blue = picture[41, 41]  # in both boxes
        assert red > 200 and blue < 60


def test_overlapped_things_still_show_their_middle():
    shown = 0
    for seed in range(VALIDATION, VALIDATION + 60):
        scene = sample_scene(seed)
        if not overlapping(scene):
            continue
        drawn = render.render(scene, 12).astype(int)
        for thing in scene.things:
            row, col = int(thing.y * 12), int(thing.x * 12)
            alone = render.render(replace(scene, things=(thing,)), 12).astype(int)
            assert np.array_equal(
                drawn[row - 2 : row + 3, col - 2 : col + 3], alone[row - 2 : row + 3, col - 2 : col + 3]
            )
            shown += 1
    assert shown > 30


@pytest.mark.parametrize("kind", BACKGROUNDS)
def test_backgrounds_are_muted_and_of_middle_brightness(kind):
    for seed in range(4):
        scene = sample_scene(seed)
        bare = replace(scene, things=(), background=replace(scene.background, kind=kind))
        picture = render.render(bare).astype(int)
        assert picture.min() >= 66 and picture.max() <= 190
        assert picture.std() > 3  # it has a texture
        assert np.percentile(picture.max(axis=-1) - picture.min(axis=-1), 95) < 60  # nearly grey
        nearest = min(np.abs(picture - np.array(rgb)).sum(-1).min() for rgb in RGB.values())
        assert nearest > 60  # no spot that could be taken for a thing


def test_clutter_and_vignette_change_light_alone():
    blot = replace(EVEN, blots=(Blot(6.0, 6.0, 2.0, 1.0, 1.0),))
    plain, spotted, dark = (
        render.render(Scene(0, 12, False, (), background)).astype(int)
        for background in (EVEN, blot, replace(EVEN, vignette=1.0))
    )
    assert np.array_equal(plain, np.full_like(plain, 128))
    assert spotted[72, 72, 0] > 150 and spotted[2, 2, 0] == 128 and (spotted[..., 0] == spotted[..., 2]).all()
    assert dark[0, 0, 0] < 105 and dark[72, 72, 0] == 128


# ------------------------------------------------------------------------------------------------------- masks


@given(st.data())
def test_sampled_is_the_exact_mean_of_each_rectangle(data):
    height, width = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    bitmap = np.array([[data.draw(st.integers(0, 255)) for _ in range(width)] for _ in range(height)])
    edges = []
    for size in (height, width):  # in sixteenths of a pixel, partly beyond the bitmap
        start, step, count = (
            data.draw(st.integers(-16, 16)),
            data.draw(st.integers(1, 40)),
            data.draw(st.integers(1, 4)),
        )
        edges.append([Fraction(start + step * k, 16 * size) for k in range(count + 1)])
    lattice = masks.window(*(np.array([float(edge) for edge in line]) for line in edges), height, width)
    means = masks.sampled(masks._integral(bitmap), lattice)
    assert means.dtype == np.float32
    for row, (top, bottom) in enumerate(zip(edges[0], edges[0][1:], strict=False)):
        for col, (left, right) in enumerate(zip(edges[1], edges[1][1:], strict=False)):
            total = sum(
                int(bitmap[r, c])
                * max(min(bottom * height, r + 1) - max(top * height, r), 0)
                * max(min(right * width, c + 1) - max(left * width, c), 0)
                for r in range(height)
                for c in range(width)
            )
            mean = total / ((bottom - top) * height * (right - left) * width * 255)
            assert means[row, col] == pytest.approx(float(mean), abs=1e-6)


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("square", 1.0),
        ("circle", 0.7854),  # π / 4
        ("triangle", 0.5),
        ("diamond", 0.4),
        ("cross", 1 - 4 * 0.33**2),
        ("ring", 0.7854 * (1 - 0.45**2)),
        ("arrow", (1.05 * 0.72 + 0.95 * 1.9 / 2) / 4),
        ("star", 0.3756),  # by the shoelace formula
    ],
)
def test_shapes_have_the_area_that_geometry_says(shape, area):
    for detail in (masks.COARSE, masks.FINE):
        assert masks.shape_mask(shape, detail)[-1, -1] / (255 * detail**2) == pytest.approx(area, abs=0.005)


@pytest.mark.parametrize("shape", [*SHAPES, SIGN])
def test_shapes_fill_their_box_and_outlines_leave_a_core(shape):
    integral, core = masks.shape_mask(shape, masks.FINE), masks.core_mask(shape, masks.FINE)
    size = masks.FINE
    rows, cols = np.diff(integral[:, -1]) > 0, np.diff(integral[-1]) > 0
    across = cols.nonzero()[0]
    narrow = shape in ("diamond", "heart")
    assert rows[: size // 16].any() and rows[-size // 16 :].any()
    assert len(across) >= (0.78 if narrow else 0.98) * size
    assert 0.3 * integral[-1, -1] < core[-1, -1] < 0.93 * integral[-1, -1]


def test_every_glyph_is_whole():
    glyphs = masks._atlas()
    assert glyphs.shape == (FONTS, len(masks.GLYPHS), masks.GLYPH_HEIGHT, masks.GLYPH_WIDTH)
    assert (glyphs.max(axis=(2, 3)) == 255).all()
    assert not glyphs[:, :, [0, -1]].any() and not glyphs[..., [0, -1]].any()  # none is cut off
    assert masks.ATLAS.stat().st_size < 150_000
    assert set("".join((*WORDS, *NUMBERS, *LETTERS, *DIGITS))) <= set(masks.GLYPHS)


def closest(pictures):
    """The smallest mean difference of any two pictures, 0 to 255."""
    flat = np.stack([picture.astype(np.float64).ravel() for picture in pictures])
    return min(np.abs(flat[place + 1 :] - row).mean(axis=1).min() for place, row in enumerate(flat[:-1]))


def portrait(thing, grid=4):
    """The thing alone on grey, at 12 pixels a patch; only its own pixels."""
    picture = render.render(Scene(0, grid, False, (thing,), EVEN), 12)
    left, top, right, bottom = (edge * 12 for edge in thing.box)
    return picture[int(top) : int(-(-bottom // 1)), int(left) : int(-(-right // 1))]


@pytest.mark.parametrize("font", range(FONTS))
def test_the_smallest_signs_can_be_told_apart(font):
    for words, difference in ((WORDS, 12), (NUMBERS, 4)):
        signs = [Thing(2.1, 2.1, 2.0, 0.95, SIGN, "blue", "plain", "small", "none", w, font) for w in words]
        assert closest([portrait(sign) for sign in signs]) > difference
    things = [Thing(2.1, 2.1, 1.4, 1.4, "circle", "red", "plain", "medium", "none", t, font) for t in LETTERS + DIGITS]
    assert closest([portrait(thing) for thing in things]) > 2


def test_the_smallest_shapes_colours_and_patterns_can_be_told_apart():
    small = Thing(2.1, 2.1, 0.85, 0.85, "circle", "red", "plain", "small", "none", "", 0)
    pairs = [replace(small, shape=shape, colour=colour) for shape in SHAPES for colour in COLOURS]
    assert closest([portrait(thing) for thing in pairs]) > 6
    for shape in SHAPES:
        for colour in COLOURS:
            medium = Thing(2.1, 2.1, 1.4, 1.4, shape, colour, "plain", "medium", "none", "", 0)
            assert closest([portrait(replace(medium, pattern=pattern)) for pattern in PATTERNS]) > 4, (shape, colour)


def test_a_text_stands_in_the_middle_in_the_ink_that_shows():
    for colour in COLOURS:
        bare = Thing(2.5, 2.5, 1.6, 1.6, "square", colour, "plain", "medium", "none", "", 0)
        blank, lettered = (
            render.render(Scene(0, 5, False, (replace(bare, text=text),), EVEN)).astype(int) for text in ("", "H")
        )
        inked = np.abs(lettered - blank).sum(-1) > 200
        rows, cols = inked.any(axis=1).nonzero()[0], inked.any(axis=0).nonzero()[0]
        assert 8 <= rows[-1] - rows[0] + 1 <= 11  # 0.8 patches
        assert abs((rows[0] + rows[-1]) / 2 - 29.5) <= 1 and abs((cols[0] + cols[-1]) / 2 - 29.5) <= 1
