"""Calibration samples, pictures with a question each, and how they are built from rows of named fields."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from adaptinfer.errors import InputError, first_line
from adaptinfer.pictures import read_pictures

IMAGES, QUESTIONS, KINDS = ("images", "image"), ("question", "text", "prompt"), ("kind", "type", "question_type")
"""Names under which a row may hold its pictures, its question and the kind of question."""


@dataclass(frozen=True)
class Sample:
    """One question about one or more pictures.

    Attributes:
        id: names it in messages.
        images: RGB.
        question: with letters in it.
        kind: of question, to compare schedules between kinds; may be empty.
    """

    id: str
    images: tuple[Image.Image, ...]
    question: str
    kind: str = ""


class Source(Protocol):
    """Random access to samples by index: the same sample for the same index in every process.

    So recording can be split, stopped and resumed. ``identity`` describes the samples in JSON; a recording is resumed
    only for the same identity. A sample that cannot be used raises `InputError` when it is read.

    A source may also have ``mark(index)``, a digest of what else makes a sample, its pictures above all (None if that
    cannot be read): a reading is used again only while its sample's mark is the same.
    """

    @property
    def identity(self) -> dict[str, Any]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


def mark_of(source: Source, index: int) -> str | None:
    """A sample's mark, where its source has marks."""
    mark = getattr(source, "mark", None)
    return None if mark is None else mark(index)


def sample_from(name: str, row: Mapping[str, Any], folder: Path) -> Sample:
    """A sample from named fields; picture files are relative to ``folder``. Raises InputError that names the sample."""
    question, kind = field_of(row, QUESTIONS), field_of(row, KINDS)
    if not isinstance(question, str) or not question.strip():
        raise InputError(f"{name}: no question")
    images = _listed(field_of(row, IMAGES))
    if not images:
        raise InputError(f"{name}: no image")
    try:
        decoded = tuple(_image(image, folder) for image in images)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    return Sample(name, decoded, question.strip(), kind if isinstance(kind, str) else "")


def field_of(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The first of some fields that a row has; None without any."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def digest_of_images(images: Any, folder: Path) -> str | None:
    """A digest of pictures: of a file its bytes, of a PIL image its pixels. None if one of them cannot be read."""
    digest = hashlib.sha256()
    for image in _listed(images):
        try:
            if isinstance(image, Image.Image):
                pixels = _image(image, folder)
                content = repr(pixels.size).encode() + pixels.tobytes()
            else:
                content = (folder / image).read_bytes()
        except (InputError, OSError, ValueError, TypeError):
            return None
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def _image(image: Any, folder: Path) -> Image.Image:
    if isinstance(image, Image.Image):
        try:
            return image.convert("RGB")
        except Exception as error:  # one that was opened lazily is decoded here, and may be damaged in any way
            raise InputError(f"an image cannot be decoded ({first_line(error)})") from None
    if not isinstance(image, (str, Path)):
        raise InputError(f"an image is a file name or a picture, not {type(image).__name__}")
    return read_pictures([folder / image])[0].image


def _listed(images: Any) -> list[Any]:
    return list(images) if isinstance(images, (list, tuple)) else [] if images is None else [images]
