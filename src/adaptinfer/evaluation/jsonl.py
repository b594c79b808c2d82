"""A task of one's own: a JSONL file, and pictures in the folder beside it.

Each line is an object::

    {"id": "7", "image": "photos/7.jpg", "question": "Is there a dog?", "answer": "yes", "kind": "exists"}

``image`` or ``images`` (a list; paths from the file's folder), ``question``, ``answer`` or ``answers`` (a list). ``id``
defaults to the line's number, ``kind`` to "all". Lines about the same pictures are one group. Everything that can be
known without decoding pictures is checked before a run begins.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from adaptinfer.errors import InputError
from adaptinfer.evaluation.samples import SampleError, TaskSample, Turn
from adaptinfer.pictures import read_pictures

_FIELDS = {"id", "image", "images", "question", "answer", "answers", "kind"}


class JsonlTask:
    """Questions from a file.

    Args:
        path: of the JSONL file.
        metric: a name in `METRICS`.

    Raises:
        InputError: the file cannot be read, or a line is malformed; names file, line and field.
    """

    max_new_tokens = 16
    grid: tuple[int, int] | None = None

    def __init__(self, path: str, metric: str) -> None:
        self._path, self.metric = Path(path), metric
        self.name = self._path.stem
        try:
            data = self._path.read_bytes()
            lines = data.decode("utf-8-sig").split("\n")  # JSON strings may hold the other ends of lines
        except UnicodeDecodeError as error:
            raise InputError(f"task {path!r}: is not UTF-8 text (byte {error.start})") from None
        except OSError as error:
            raise InputError(f"task {path!r}: cannot be read ({error.strerror})") from None
        self._digest = hashlib.sha256(data).hexdigest()
        self._samples: list[TaskSample] = []
        self._pictures: dict[str, tuple[str, ...]] = {}
        for number, line in enumerate(lines, 1):
            if line.strip():
                self._add(number, line)
        if not self._samples:
            raise InputError(f"task {path!r}: is empty")

    def samples(self, count: int | None) -> Sequence[TaskSample]:
        return self._samples[:count]

    def pictures(self, sample: TaskSample) -> list[Image.Image]:
        folder = self._path.parent
        try:
            found = read_pictures([folder / name for name in self._pictures[sample.id]])
        except InputError as error:
            raise SampleError(str(error)) from None
        return [picture.image for picture in found]

    def identity(self) -> str:
        return f"{self._digest}/{self.metric}/{self._pictures_digest}"

    @cached_property
    def _pictures_digest(self) -> str:
        """Of the pictures' bytes, so that answers about another picture of the same name are another run's.

        By the names in the file and not by whole paths: a folder that is copied elsewhere stays the same task.
        """
        digest = hashlib.sha256()
        for name in sorted({name for names in self._pictures.values() for name in names}):
            try:
                content = hashlib.sha256((self._path.parent / name).read_bytes()).hexdigest()
            except (OSError, ValueError):  # as `read_pictures` has it; such samples are left out and say why
                content = "missing"
            digest.update(f"{json.dumps(name)} {content}\n".encode())
        return digest.hexdigest()

    def _add(self, number: int, line: str) -> None:
        def refuse(reason: str) -> InputError:
            return InputError(f"task {str(self._path)!r}, line {number}: {reason}")

        try:
            entry: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise refuse(f"not JSON ({error.msg}, column {error.colno})") from None
        except (ValueError, RecursionError) as error:
            raise refuse(f"not JSON that can be read ({error})") from None
        if not isinstance(entry, dict):
            raise refuse("not an object")
        unknown = sorted(set(entry) - _FIELDS)
        if unknown:
            raise refuse(f"{unknown[0]}: no such field; there are {', '.join(sorted(_FIELDS))}")
        images = _texts(entry, "image", "images", refuse)
        answers = _texts(entry, "answer", "answers", refuse)
        question, kind = entry.get("question"), entry.get("kind", "all")
        if not isinstance(question, str) or not question.strip():
            raise refuse("question: must be text")
        if not isinstance(kind, str) or not kind:
            raise refuse("kind: must be text")
        name = str(entry.get("id", number))
        if name in self._pictures:
            raise refuse(f"id: {name!r} stands on an earlier line already")
        self._pictures[name] = images
        self._samples.append(TaskSample(name, "+".join(images), (Turn(question.strip(), answers, kind),)))


def _texts(entry: dict[str, Any], one: str, many: str, refuse: Any) -> tuple[str, ...]:
    """One text or a list of them, from whichever of two fields is there."""
    if (one in entry) == (many in entry):
        raise refuse(f"give exactly one of {one} and {many}")
    value = entry.get(one, entry.get(many))
    values = value if many in entry and isinstance(value, list) else [value]
    texts = [str(each) for each in values if isinstance(each, (str, int)) and not isinstance(each, bool)]
    if not texts or len(texts) < len(values):
        raise refuse(f"{one if one in entry else many}: must be {'text' if one in entry else 'a list of texts'}")
    return tuple(texts)
