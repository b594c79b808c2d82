"""Where calibration samples come from: a folder with JSONL, a Hugging Face data set, a list, the built-in scenes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from adaptinfer.calibration.samples import (
    IMAGES,
    QUESTIONS,
    Sample,
    Source,
    digest_of_images,
    field_of,
    sample_from,
)
from adaptinfer.errors import InputError, first_line

HUB = "hf:"


def open_source(name: str, seed: int = 0) -> Source:
    """The source that ``--data`` names.

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


class _RowSource:
    """A source whose samples are rows of named fields."""

    identity: dict[str, Any]
    _folder = Path()

    def __getitem__(self, index: int) -> Sample:
        return sample_from(*self._row(index), self._folder)

    def mark(self, index: int) -> str | None:
        """A digest of the sample's pictures, by pixel or by the content of their files; None if one cannot be read."""
        try:
            _, row = self._row(index)
        except InputError:
            return None
        return digest_of_images(field_of(row, IMAGES), self._folder)

    def _row(self, index: int) -> tuple[str, Mapping[str, Any]]:
        """The sample's name in messages, and its fields. Raises InputError if it has none."""
        raise NotImplementedError


class FolderSource(_RowSource):
    """Pictures beside a JSONL file, one object a line: ``{"image": "a.png", "question": "...", "kind": "..."}``.

    ``image`` may be a list (or be called ``images``); ``kind`` may be missing. Paths are taken from the file's folder.

    Args:
        path: the folder, with one file that ends in .jsonl, or that file.

    Raises:
        InputError: there is no such file, more than one, or nothing in it.
    """

    def __init__(self, path: Path) -> None:
        self._file = _questions_file(path)
        self._folder = self._file.parent
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

    def _row(self, index: int) -> tuple[str, Mapping[str, Any]]:
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


class DataSetSource(_RowSource):
    """Rows of a Hugging Face data set with a picture column and a question column.

    Args:
        rows: the loaded data set.
        identity: what it is.
    """

    def __init__(self, rows: Any, identity: dict[str, Any]) -> None:
        self._rows, self.identity = rows, identity
        columns = list(rows.column_names)
        if not set(IMAGES) & set(columns) or not set(QUESTIONS) & set(columns):
            raise InputError(
                f"data: a column {' or '.join(IMAGES)} and a column {', '.join(QUESTIONS)} are needed; "
                f"there are {', '.join(columns)}"
            )

    @classmethod
    def from_hub(cls, name: str, split: str) -> DataSetSource:
        """Load from the hub or its local cache. Raises InputError if that fails, or without the extra ``datasets``."""
        rows = _loaded("load_dataset", HUB + name, name, split=split)
        return cls(rows, {"dataset": name, "split": split, "fingerprint": getattr(rows, "_fingerprint", None)})

    @classmethod
    def from_disk(cls, path: Path) -> DataSetSource:
        """Read what ``save_to_disk`` wrote; of several splits ``train`` is taken. Raises InputError if that fails."""
        rows = _loaded("load_from_disk", str(path), str(path))
        if isinstance(rows, dict):
            if "train" not in rows:
                raise InputError(f"data {str(path)!r}: has no split 'train' but {', '.join(map(str, rows))}")
            rows = rows["train"]
        return cls(rows, {"dataset": path.name, "fingerprint": getattr(rows, "_fingerprint", None)})

    def __len__(self) -> int:
        return len(self._rows)

    def mark(self, index: int) -> None:
        """None: the data set's fingerprint covers its pictures."""

    def _row(self, index: int) -> tuple[str, Mapping[str, Any]]:
        try:
            return f"row {index}", self._rows[index]
        except Exception as error:  # decodes pictures
            raise InputError(f"row {index}: cannot be read ({first_line(error)})") from None


class ListSource(_RowSource):
    """Samples given in Python: `Sample`, ``(image, question)`` or ``{"image": ..., "question": ...}`` each.

    An image is a PIL image or a file. Two lists are told apart by their questions, and by pixels or contents of files.

    Raises:
        InputError: the list is empty.
    """

    def __init__(self, samples: Iterable[Any]) -> None:
        self._samples = list(samples)
        if not self._samples:
            raise InputError("samples: there are none")
        digest = hashlib.sha256()
        for given in self._samples:
            digest.update(repr(_described(given)).encode())
        self.identity = {"samples": "given in Python", "sha256": digest.hexdigest()}

    def __len__(self) -> int:
        return len(self._samples)

    def _row(self, index: int) -> tuple[str, Mapping[str, Any]]:
        given, name = self._samples[index], f"sample {index}"
        if isinstance(given, Sample):
            return given.id, vars(given)
        if isinstance(given, dict):
            return name, given
        if isinstance(given, (tuple, list)) and len(given) == 2:
            return name, {"images": given[0], "question": given[1]}
        raise InputError(f"{name}: must be a Sample, (image, question) or a dictionary, not {type(given)}")


def _described(given: Any) -> Any:
    """What is the same in every process about a sample given in Python; an image's size stands for it, see `mark`."""
    if isinstance(given, Image.Image):
        return given.size
    if isinstance(given, Sample):
        return given.id, given.question, _described(given.images)
    if isinstance(given, dict):
        return [(key, _described(value)) for key, value in given.items()]
    return [_described(each) for each in given] if isinstance(given, (tuple, list)) else given


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


def _loaded(how: str, shown: str, *args: str, **kwargs: str) -> Any:
    """Rows that a function of `datasets` reads."""
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError("data: Hugging Face data sets need the extra: pip install 'adaptinfer[datasets]'") from None
    try:
        return getattr(datasets, how)(*args, **kwargs)
    except Exception as error:  # a foreign data set may break its reader in any way
        raise InputError(f"data {shown!r}: cannot be loaded ({first_line(error)})") from None
