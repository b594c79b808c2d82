"""Draw the glyph atlas of the scene world: every letter and digit in three fonts, large, as one grey picture.

    python research/training/make_glyphs.py

It writes ``src/adaptinfer/embedded/world/glyphs.png``, which is committed: pictures of scenes must be the same to the
bit everywhere, and FreeType is not the same everywhere. Run it again only to change the fonts, together with
``things.VERSION``.

The fonts are DejaVu (free to use, embed and change; see https://dejavu-fonts.github.io/License.html), as shipped with
matplotlib.
"""

from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from adaptinfer.embedded.world import masks

FONTS = ("DejaVuSans-Bold.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSansMono-Bold.ttf")


def main() -> None:
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    width, height = masks.GLYPH_WIDTH, masks.GLYPH_HEIGHT
    atlas = Image.new("L", (width * len(masks.GLYPHS), height * len(FONTS)))
    pen = ImageDraw.Draw(atlas)
    for row, name in enumerate(FONTS):
        size = 10
        while True:  # the size at which capitals are as high as wanted
            font = ImageFont.truetype(str(folder / name), size)
            top, bottom = font.getbbox("H", anchor="ls")[1::2]
            if bottom - top >= masks.CAPITAL_HEIGHT:
                break
            size += 1
        for col, glyph in enumerate(masks.GLYPHS):
            left, _, right, _ = font.getbbox(glyph, anchor="ls")
            x = col * width + (width - (right - left)) // 2 - left
            pen.text((x, row * height + masks.BASELINE), glyph, fill=255, font=font, anchor="ls")
    cells = np.asarray(atlas).reshape(len(FONTS), height, len(masks.GLYPHS), width)
    assert not (cells[:, [0, -1]].any() or cells[..., [0, -1]].any()), "a glyph touches its cell's edge"
    atlas.save(masks.ATLAS, optimize=True)
    print(f"{masks.ATLAS.name}: {atlas.width} x {atlas.height}, {masks.ATLAS.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
