"""What the model is asked while it is calibrated: pictures with questions, each to be had at any time by its number.

A source gives the same sample for the same number in every process, so recording can be split, stopped and taken up
again. A sample that cannot be used raises `InputError` when it is asked for; the others stay usable.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image

from adaptinfer.errors import InputError
from adaptinfer.pictures import read_pictures

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["DataSetSource", "FolderSource", "ListSource", "Sample", "Source", "open_source"]

HUB = "hf:"
_IMAGES, _QUESTIONS, _KINDS = ("images", "image"), ("question", "text", "prompt"), ("kind", "type", "question_type")


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
    """Samples by number. ``identity`` says in JSON what they are: a recording is continued only by its equal.

    A source may also have ``mark(index)``, a digest of what else makes a sample, its pictures above all (None if that
    cannot be read): a reading is gone on with only as long as its sample's mark is the same.
    """

    @property
    def identity(self) -> dict[str, Any]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


def open_source(name: str, seed: int = 0) -> Source:
    """The source behind ``--data``.

    Args:
        name: ``"scenes"``; a folder with pictures and one JSONL file of questions, or that file; ``"hf:NAME"`` or
            ``"hf:NAME:SPLIT"`` for a Hugging Face data set, or a folder that ``save_to_disk`` wrote.
        seed: which scenes.

    Raises:
        InputError: there is nothing of that name, or scenes that are kept for evaluation were asked for.
    """
    if name.partition(":")[0] == "scenes":
        from adaptinfer.calibration.scenes import SceneSource

        return SceneSource(name.partition(":")[2] or "train", seed)
    if name.startswith(HUB):
        repository, _, split = name.removeprefix(HUB).partition(":")
        return DataSetSource.from_hub(repository, split or "train")
    try:
        path = Path(name).expanduser()
    except RuntimeError:  # ~nobody
        raise InputError(f"data {name!r}: there is no such user's home folder") from None
    if path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
        return DataSetSource.from_disk(path)
    return FolderSource(path)


class FolderSource:
    """Pictures beside a JSONL file, one object a line: ``{"image": "a.png", "question": "...", "kind": "..."}``.

    ``image`` may be a list (or be called ``images``); ``kind`` may be missing. Paths are taken from the file's folder.

    Args:
        path: the folder, with one file that ends in .jsonl, or that file.

    Raises:
        InputError: there is no such file, more than one, or nothing in it.
    """

    def __init__(self, path: Path) -> None:
        self._file = _questions_file(path)
        try:
            content = self._file.read_bytes()
            lines = content.decode("utf-8-sig").split("\n")  # JSON strings may hold the other ends of lines
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"data {str(self._file)!r}: cannot be read ({error})") from None
        self._lines = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        if not self._lines:
            raise InputError(f"data {str(self._file)!r}: holds no questions")
        self.identity = {"questions": self._file.name, "sha256": hashlib.sha256(content).hexdigest()}

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Sample:
        where, row = self._row(index)
        return _sample(where, row, self._file.parent)

    def mark(self, index: int) -> str | None:
        """A digest of the sample's picture files; None if one cannot be read."""
        try:
            _, row = self._row(index)
        except InputError:
            return None
        return _mark(_field(row, _IMAGES), self._file.parent)

    def _row(self, index: int) -> tuple[str, dict[str, Any]]:
        number, line = self._lines[index]
        where = f"{self._file.name} line {number}"
        try:
            row = json.loads(line)
        except RecursionError:
            raise InputError(f"{where}: not JSON that can be read (nested too deep)") from None
        except ValueError as error:
            raise InputError(f"{where}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise InputError(f"{where}: not a JSON object")
        return where, row


class DataSetSource:
    """Rows of a Hugging Face data set with a picture column and a question column.

    Args:
        rows: the loaded data set.
        identity: what it is.
    """

    def __init__(self, rows: Any, identity: dict[str, Any]) -> None:
        self._rows, self.identity = rows, identity
        columns = list(rows.column_names)
        if not set(_IMAGES) & set(columns) or not set(_QUESTIONS) & set(columns):
            raise InputError(
                f"data: a column {' or '.join(_IMAGES)} and a column {', '.join(_QUESTIONS)} are needed; "
                f"there are {', '.join(columns)}"
            )

    @classmethod
    def from_hub(cls, name: str, split: str) -> DataSetSource:
        """Load from the hub or its local cache. Raises InputError if that fails, or without the extra ``datasets``."""
        datasets = _datasets()
        try:
            rows = datasets.load_dataset(name, split=split)
        except Exception as error:  # a foreign data set may break its reader in any way
            raise InputError(f"data {HUB + name!r}: cannot be loaded ({_first_line(error)})") from None
        return cls(rows, {"dataset": name, "split": split, "fingerprint": getattr(rows, "_fingerprint", None)})

    @classmethod
    def from_disk(cls, path: Path) -> DataSetSource:
        """Read what ``save_to_disk`` wrote; of several splits ``train`` is taken. Raises InputError if that fails."""
        datasets = _datasets()
        try:
            rows = datasets.load_from_disk(str(path))
        except Exception as error:
            raise InputError(f"data {str(path)!r}: cannot be loaded ({_first_line(error)})") from None
        if isinstance(rows, dict):
            if "train" not in rows:
                raise InputError(f"data {str(path)!r}: has no split 'train' but {', '.join(map(str, rows))}")
            rows = rows["train"]
        return cls(rows, {"dataset": path.name, "fingerprint": getattr(rows, "_fingerprint", None)})

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        try:
            row = self._rows[index]
        except Exception as error:  # decodes pictures
            raise InputError(f"row {index}: cannot be read ({_first_line(error)})") from None
        return _sample(f"row {index}", row, Path())


class ListSource:
    """Samples given in Python: `Sample`, ``(image, question)`` or ``{"image": ..., "question": ...}`` each.

    An image is a PIL image or a file. Two lists are told apart by their questions, and by pixels or contents of files.

    Raises:
        InputError: the list is empty.
    """

    def __init__(self, samples: Iterable[Any]) -> None:
        self._samples: Sequence[Any] = list(samples)
        if not self._samples:
            raise InputError("samples: there are none")
        digest = hashlib.sha256()
        for given in self._samples:
            digest.update(repr(_described(given)).encode())
        self.identity = {"samples": "given in Python", "sha256": digest.hexdigest()}

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        given = self._samples[index]
        if isinstance(given, Sample):
            return _sample(given.id, {"images": given.images, "question": given.question, "kind": given.kind}, Path())
        if isinstance(given, dict):
            return _sample(f"sample {index}", given, Path())
        if isinstance(given, (tuple, list)) and len(given) == 2:
            return _sample(f"sample {index}", {"images": given[0], "question": given[1]}, Path())
        raise InputError(f"sample {index}: must be a Sample, (image, question) or a dictionary, not {type(given)}")

    def mark(self, index: int) -> str | None:
        """A digest of the sample's pictures, by pixel or by the content of their files; None if one cannot be read."""
        given = self._samples[index]
        if isinstance(given, Sample):
            return _mark(given.images, Path())
        if isinstance(given, dict):
            return _mark(_field(given, _IMAGES), Path())
        return _mark(given[0], Path()) if isinstance(given, (tuple, list)) and len(given) == 2 else None


def _sample(name: str, row: Mapping[str, Any], folder: Path) -> Sample:
    """A sample from named fields. Raises InputError that begins with its name."""
    question, kind = _field(row, _QUESTIONS), _field(row, _KINDS)
    if not isinstance(question, str) or not question.strip():
        raise InputError(f"{name}: no question")
    images = _field(row, _IMAGES)
    images = _listed(images)
    if not images:
        raise InputError(f"{name}: no image")
    try:
        decoded = tuple(_image(image, folder) for image in images)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    return Sample(name, decoded, question.strip(), kind if isinstance(kind, str) else "")


def _described(given: Any) -> Any:
    """What is the same in every process about a sample given in Python; an image's size stands for it, see `_mark`."""
    if isinstance(given, Image.Image):
        return given.size
    if isinstance(given, Sample):
        return given.id, given.question, _described(given.images)
    if isinstance(given, dict):
        return [(key, _described(value)) for key, value in given.items()]
    return [_described(each) for each in given] if isinstance(given, (tuple, list)) else given


def _field(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _image(image: Any, folder: Path) -> Image.Image:
    if isinstance(image, Image.Image):
        try:
            return image.convert("RGB")
        except Exception as error:  # one that was opened lazily is decoded here, and may be damaged in any way
            raise InputError(f"an image cannot be decoded ({_first_line(error)})") from None
    if not isinstance(image, (str, Path)):
        raise InputError(f"an image is a file name or a picture, not {type(image).__name__}")
    return read_pictures([folder / image])[0].image


def _listed(images: Any) -> list[Any]:
    return list(images) if isinstance(images, (list, tuple)) else [] if images is None else [images]


def _mark(images: Any, folder: Path) -> str | None:
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


def _questions_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise InputError(
            f"data {str(path)!r}: no such folder; give a folder with a JSONL file of questions, 'scenes', or "
            f"'{HUB}NAME'"
        )
    found = sorted(path.glob("*.jsonl"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise InputError(f"data {str(path)!r}: must hold one .jsonl file of questions, and holds {names}")
    return found[0]


def _datasets() -> Any:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError("data: Hugging Face data sets need the extra: pip install 'adaptinfer[datasets]'") from None
    return datasets


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
