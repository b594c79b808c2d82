"""Backgrounds: textures of middle brightness, nearly grey, with light, shade and clutter."""

import numpy as np

from adaptinfer.embedded.world.things import Background, Blot

# Sines of the eighths of half a turn.
_SINES = (0.0, 0.3826834, 0.7071068, 0.9238795, 1.0, 0.9238795, 0.7071068, 0.3826834)

Array = np.ndarray


def backdrop(background: Background, grid: int, patch: int) -> Array:
    """Float32 canvas [3, side, side], 0 to 255."""
    side = grid * patch
    line = ((np.arange(side) + 0.5) / patch).astype(np.float32)  # centres of pixels, in patches
    mix, light = _TEXTURES[background.kind](background, line)
    rough = np.float32(background.strength)
    light = light * (22 * rough)
    light += (_noise(background.seed + 901, line, 0.17) - np.float32(0.5)) * (14 * rough)
    half = np.float32(grid / 2)
    out = (line - half) / half
    if background.vignette:
        square = out * out
        light -= (square[:, None] + square[None, :]) * np.float32(16 * background.vignette)
    for blot in background.blots:
        _smear(light, blot, line)
    canvas = np.empty((3, side, side), dtype=np.float32)
    for channel, base, accent in zip(canvas, background.base, background.accent, strict=True):
        np.multiply(mix, np.float32(accent - base), out=channel)
        channel += np.float32(base)
        channel += light
    np.maximum(canvas, 66, out=canvas)
    return np.minimum(canvas, 190, out=canvas)


def _smear(light: Array, blot: Blot, line: Array) -> None:
    """Add a soft-edged spot of clutter, in place."""
    profiles, spans = [], []
    for centre, length in ((blot.y, blot.height), (blot.x, blot.width)):
        first, last = np.searchsorted(line, (centre - length, centre + length))
        away = (line[first:last] - np.float32(centre)) / np.float32(length)
        bump = 1 - away * away
        profiles.append(bump * bump)
        spans.append(slice(first, last))
    light[spans[0], spans[1]] += profiles[0][:, None] * (profiles[1] * np.float32(32 * blot.shade))[None, :]


def _hashed(seed: int, rows: Array, cols: Array) -> Array:
    """A random number for each lattice point: float32 [rows, cols], 0 to 1."""
    with np.errstate(over="ignore"):
        bits = rows.astype(np.uint32)[:, None] * np.uint32(0x9E3779B1) + cols.astype(np.uint32) * np.uint32(0x85EBCA77)
        bits += np.uint32(seed & 0xFFFFFFFF)
        for factor in (0x7FEB352D, 0x846CA68B):
            bits ^= bits >> np.uint32(15)
            bits *= np.uint32(factor)
        bits ^= bits >> np.uint32(16)
    return (bits >> np.uint32(8)).astype(np.float32) * np.float32(1 / 2**24)


def _noise(seed: int, line: Array, scale: float, stretch: float = 1.0) -> Array:
    """Value noise with bumps ``scale`` patches high and ``scale * stretch`` wide: float32 [side, side], 0 to 1."""
    rows, cols = line / np.float32(scale), line / np.float32(scale * stretch)
    lattice = _hashed(seed, np.arange(int(rows[-1]) + 2), np.arange(int(cols[-1]) + 2))
    return _smooth(_smooth(lattice.T, cols).T, rows)


def _smooth(values: Array, places: Array) -> Array:
    """Rows of ``values`` at fractional places, with a smooth step from row to row."""
    rows = places.astype(np.intp)
    share = places - rows.astype(np.float32)
    share = share * share * (3 - 2 * share)
    low = values.take(rows, axis=0)
    step = values.take(rows + 1, axis=0)
    step -= low
    step *= share[:, None]
    low += step
    return low


def _along(background: Background, line: Array) -> Array:
    """How far along the background's direction each pixel lies: float32 [side, side], 0 to 1."""
    sine = _SINES[background.direction % 8] * (1 if background.direction < 8 else -1)
    turned = (background.direction + 4) % 16
    cosine = _SINES[turned % 8] * (1 if turned < 8 else -1)
    unit = line / np.float32(line[-1]) - np.float32(0.5)
    return (unit * np.float32(cosine * 0.7))[None, :] + (unit * np.float32(sine * 0.7))[:, None] + np.float32(0.5)


def _clouds(background: Background, line: Array) -> tuple[Array, Array]:
    mix = _noise(background.seed, line, background.scale)
    light = _noise(background.seed + 1, line, background.scale / 2) - np.float32(0.5)
    light += (_noise(background.seed + 2, line, background.scale / 5) - np.float32(0.5)) * np.float32(0.7)
    return mix, light


def _bricks(background: Background, line: Array) -> tuple[Array, Array]:
    width, height = background.scale * 0.7, background.scale * 0.34
    rows, cols = line / np.float32(height), line / np.float32(width)
    row = rows.astype(np.intp)
    shifted = np.stack((cols, cols + np.float32(0.5)))  # every other row is shifted by half a brick
    col = shifted.astype(np.intp)
    shades = _hashed(background.seed, np.arange(row[-1] + 1), np.arange(col.max() + 1))
    # Mortar: within 0.06 patches of a brick's edge.
    near = np.minimum(shifted - col, 1 - (shifted - col)) * np.float32(width)
    between = np.minimum(rows - row, 1 - (rows - row)) * np.float32(height)
    near, between = (np.minimum(distance * np.float32(9), np.float32(1)) for distance in (near, between))
    parity = np.arange(row[-1] + 1) % 2
    strips = np.take_along_axis(shades, col[parity], axis=1)
    mortar = np.minimum(near[row % 2], between[:, None])
    return strips[row], mortar * np.float32(0.9) - np.float32(0.6)


def _wood(background: Background, line: Array) -> tuple[Array, Array]:
    upright = background.direction % 2 == 1
    bend = _noise(background.seed, line, background.scale, 2.5)
    grain = _hashed(background.seed + 1, np.arange(512), np.arange(1))[:, 0]
    place = line[:, None] * np.float32(2.2) + bend * np.float32(5)
    index = place.astype(np.intp)
    share = place - index.astype(np.float32)
    low = grain.take(index)
    light = low + (grain.take(index + 1) - low) * share - np.float32(0.5)
    light += (_noise(background.seed + 2, line, 0.25, 8) - np.float32(0.5)) * np.float32(0.6)
    return (bend.T, light.T) if upright else (bend, light)


def _speckle(background: Background, line: Array) -> tuple[Array, Array]:
    grains = _noise(background.seed, line, 0.3)
    light = (grains - np.float32(0.5)) * np.float32(1.2)
    return _noise(background.seed + 2, line, background.scale), light


def _weave(background: Background, line: Array) -> tuple[Array, Array]:
    thread = line / np.float32(0.18 + 0.05 * background.scale)
    index = thread.astype(np.intp)
    round_ = thread - index.astype(np.float32)
    round_ = round_ * (1 - round_) * 4  # a thread is bright along its middle
    over = (index[:, None] + index[None, :]) % 2 == 0
    light = np.where(over, round_[:, None], round_[None, :] - np.float32(0.35)) - np.float32(0.5)
    return _noise(background.seed, line, background.scale), light


def _gradient(background: Background, line: Array) -> tuple[Array, Array]:
    light = _noise(background.seed, line, background.scale * 2) - np.float32(0.5)
    return _along(background, line), light


_TEXTURES = {
    "clouds": _clouds, "bricks": _bricks, "wood": _wood, "speckle": _speckle, "weave": _weave, "gradient": _gradient,
}  # fmt: skip
