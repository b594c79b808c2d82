"""Picture files as the model needs them: fully decoded, upright, RGB; anything else is refused in one line."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageOps

from adaptinfer.errors import InputError

__all__ = ["FORMATS", "Picture", "read_pictures"]

FORMATS = ("PNG", "JPEG", "WEBP")
"""Picture formats that are read; Pillow knows more, with decoders that fewer people have looked at."""

_LARGEST_FILE = 256 * 2**20  # bytes


@dataclass(frozen=True)
class Picture:
    """A fully decoded picture: upright, RGB, 8 bits."""

    name: str
    image: Image.Image


def read_pictures(sources: Sequence[str | Path], stdin: BinaryIO | None = None) -> list[Picture]:
    """Read PNG, JPEG and WebP files; ``-`` is a picture on standard input (``stdin`` if given).

    Raises:
        InputError: a file is missing, unreadable, too large, damaged or no such picture, or ``-`` is given twice.
    """
    if [str(source) for source in sources].count("-") > 1:
        raise InputError("image '-': standard input can be read only once")
    pictures = []
    for source in map(str, sources):
        data = _read_stdin(stdin) if source == "-" else _read_file(source)
        pictures.append(Picture(source, _decode(source, data)))
    return pictures


def _read_stdin(stdin: BinaryIO | None) -> bytes:
    stream: BinaryIO | None = getattr(sys.stdin, "buffer", None) if stdin is None else stdin  # None: it was closed
    if stream is None or stream.isatty():
        raise InputError("image '-': nothing is piped into standard input")
    return _read_limited("-", stream)


def _read_file(name: str) -> bytes:
    try:
        with Path(name).open("rb") as file:
            return _read_limited(name, file)
    except FileNotFoundError:
        raise InputError(f"image {name!r}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"image {name!r}: is a folder, not a picture file") from None
    except InputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise InputError(f"image {name!r}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _read_limited(name: str, file: BinaryIO) -> bytes:
    data = file.read(_LARGEST_FILE + 1)
    if len(data) > _LARGEST_FILE:
        raise InputError(f"image {name!r}: larger than {_LARGEST_FILE // 2**20} MiB")
    if not data:
        raise InputError(f"image {name!r}: is empty (0 bytes)")
    return data


def _decode(name: str, data: bytes) -> Image.Image:
    """Decode every pixel, so that damage shows now and not in the middle of the work."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on odd but readable metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
        except Image.UnidentifiedImageError:
            raise InputError(f"image {name!r}: {_what_is(data)}; PNG, JPEG and WebP are read") from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise InputError(
                f"image {name!r}: more than {Image.MAX_IMAGE_PIXELS:,} pixels, which may be a decompression bomb; "
                "scale it down"
            ) from None
        except Exception as error:  # Pillow raises whatever its decoders stumble over
            raise InputError(f"image {name!r}: is damaged or truncated ({error})") from None


def _what_is(data: bytes) -> str:
    try:
        with Image.open(io.BytesIO(data)) as image:  # reads a header, decodes nothing
            return f"is a {image.format} picture"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return "is not a picture"  # Pillow's parsers raise SyntaxError for a header that is none


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: 16 bits are scaled and not clipped, transparency is laid on white."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        import numpy as np

        return Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
