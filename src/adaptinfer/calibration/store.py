"""Readings on disk: a description of what was recorded, and parts of a few samples, each there whole or not at all.

A part is written under another name and moved to its place, so whatever ends a run (a kill, a full disk) costs the part
in hand and nothing else. Which samples make a part is fixed beforehand, so nothing is lost, and nothing counts twice,
whoever records which part.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from adaptinfer.calibration.record import Reader, Reading
from adaptinfer.calibration.samples import Source, mark_of
from adaptinfer.errors import InputError
from adaptinfer.files import write_whole

FORMAT, VERSION = "adaptinfer.recording", 1
PART = 8
"""Samples in a part: what a kill can cost, and what is held in memory."""

MOST_SKIPPED = 0.1
"""Share of samples that may be unusable before the whole data set is taken for a mistake."""

_HEADER = "adaptinfer"
_WHAT = {"model": "another model", "method": "another method's scores", "data": "other data"}


@dataclass(frozen=True)
class Skipped:
    """A sample that could not be used, and why."""

    index: int
    reason: str


def about(reader: Reader, model: dict[str, Any], method: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """What a recording is of, in JSON. ``model`` holds its name, dtype and fingerprint."""
    layers = {"num_layers": reader.shape.num_layers, "scoring": list(reader.scoring)}
    return {
        "format": FORMAT,
        "version": VERSION,
        "part": PART,
        "model": {**model, **layers},
        "method": method,
        "data": data,
    }


class Recording:
    """A folder with the readings of one model on one source of samples.

    Args:
        folder: made if missing; a recording of the same content is resumed.
        content: from `about`.

    Raises:
        InputError: the folder cannot be written, or holds a recording of something else.
    """

    def __init__(self, folder: Path, content: dict[str, Any]) -> None:
        self.folder, self.about = folder, content
        self._digest = digest_of(content)
        description = folder / "recording.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if description.exists():
                self._check(description)
            else:
                write_whole(description, (json.dumps(content, indent=2) + "\n").encode())
        except OSError as error:
            raise InputError(f"{str(folder)!r}: cannot be written ({error.strerror})") from None

    def missing(self, count: int) -> list[range]:
        """The parts of the first ``count`` samples that have yet to be recorded."""
        return [part for part in _parts(count) if not self._is_there(part)]

    def with_skips(self, count: int) -> list[range]:
        """The parts of the first ``count`` samples that are there, but hold samples that could not be used."""
        return [part for part in _parts(count) if self._is_there(part) and self.skipped_in(part)]

    def check_pictures(self, source: Source, count: int) -> None:
        """Refuse to go on with readings of other pictures. Pictures that can no longer be read count as the same.

        Raises:
            InputError: names the first sample whose pictures have changed.
        """
        for part in _parts(count):
            if self._is_there(part):
                with self._open(part) as file:
                    rows = _header(file)["samples"]
                for row in rows:
                    mark = None if "reason" in row else mark_of(source, row["index"])
                    if mark is not None and mark != row.get("mark"):
                        raise InputError(
                            f"{str(self.folder)!r}: holds a recording of other data ({row['id']} had another picture); "
                            "take another folder, or delete this one"
                        )

    def write(self, part: range, data: bytes) -> None:
        """Put a part from `record_part` in its place. Raises InputError if the disk is full or cannot be written."""
        try:
            write_whole(self._path(part), data)
        except OSError as error:
            raise InputError(
                f"{str(self.folder)!r}: cannot be written ({error.strerror}); what was recorded so far is kept, so "
                "make room and run the same again"
            ) from None

    def readings(self, count: int) -> Iterator[Reading]:
        """The readings of the first ``count`` samples in order, a part at a time in memory; skipped ones left out.

        Raises:
            InputError: a part is missing or damaged.
        """
        for part in _parts(count):
            with self._open(part) as file:
                for row in _header(file)["samples"]:
                    if "reason" not in row:
                        index = row["index"]
                        mass, score = (file.get_tensor(f"{name}.{index}") for name in ("mass", "score"))
                        yield Reading(index, row["id"], row["kind"], mass, score, row["text_tokens"])

    def skipped(self, count: int) -> list[Skipped]:
        """The samples among the first ``count`` that could not be used."""
        return [each for part in _parts(count) for each in self.skipped_in(part)]

    def skipped_in(self, part: range) -> list[Skipped]:
        """Those of one part."""
        with self._open(part) as file:
            rows = _header(file)["samples"]
        return [Skipped(row["index"], row["reason"]) for row in rows if "reason" in row]

    def _path(self, part: range) -> Path:
        return self.folder / f"part-{part.start // PART:06d}.safetensors"

    def _is_there(self, part: range) -> bool:
        """Whether a part is whole, of this recording, and ends where it should (it may have been the last of fewer)."""
        try:
            with safe_open(self._path(part), framework="np") as file:
                header = _header(file)
        except (OSError, SafetensorError):
            return False
        return (header.get("about"), header.get("stop")) == (self._digest, part.stop)

    def _open(self, part: range) -> Any:
        if not self._is_there(part):
            raise InputError(f"{str(self._path(part))!r}: is missing or damaged; record again")
        return safe_open(self._path(part), framework="np")

    def _check(self, description: Path) -> None:
        try:
            there = json.loads(description.read_text(encoding="utf-8"))
            before, now = _compared(there), _compared(self.about)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{str(description)!r}: is no description of a recording; take another folder") from None
        for key in now:
            if before.get(key) != now[key]:
                what = _WHAT.get(key, "another version of adaptinfer")
                name = there["model"].get("name") if key == "model" else before.get(key)
                if key == "model" and before[key].get("dtype") != now[key]["dtype"]:
                    what = f"this model in {before[key].get('dtype')}, not in {now[key]['dtype']},"
                    if name != self.about["model"]["name"]:
                        what = f"another model, or of this one in {before[key].get('dtype')}"
                raise InputError(
                    f"{str(self.folder)!r}: holds a recording of {what} ({_short(name)}); take another folder, or "
                    "delete this one"
                )


def digest_of(content: dict[str, Any]) -> str:
    """What ties a part to its recording."""
    return hashlib.sha256(json.dumps(_compared(content), sort_keys=True).encode()).hexdigest()


def record_part(
    reader: Reader, source: Source, part: range, digest: str, progress: Callable[[int], None] = lambda _: None
) -> bytes:
    """Read the samples of one part. Those that cannot be used are noted with their reason.

    Args:
        reader: of the model.
        source: of the samples.
        part: their numbers.
        digest: of the recording, from `digest_of`.
        progress: told each sample's number before it is read.

    Returns:
        The part as a safetensors file, the same bytes for the same readings.
    """
    readings: list[Reading] = []
    rows: list[dict[str, Any]] = []
    for index in part:
        progress(index)
        try:
            reading = reader.read(index, source[index])
        except InputError as error:
            rows.append({"index": index, "reason": str(error)})
            continue
        readings.append(reading)
        row = {"index": index, "id": reading.id, "kind": reading.kind, "text_tokens": reading.text_tokens}
        mark = mark_of(source, index)
        rows.append(row if mark is None else {**row, "mark": mark})
    tensors = {f"{name}.{each.index}": getattr(each, name) for each in readings for name in ("mass", "score")}
    header = json.dumps({"about": digest, "stop": part.stop, "samples": rows})
    # One entry, since safetensors writes several in any order, and the same readings are to be the same bytes.
    return save(tensors or {"none": np.zeros(0, dtype=np.float32)}, metadata={_HEADER: header})


def check_skipped(skipped: Sequence[Skipped], count: int) -> None:
    """Refuse data of which too much is unusable.

    Raises:
        InputError: more than `MOST_SKIPPED` of the samples; names the first few.
    """
    if len(skipped) > MOST_SKIPPED * count:
        first = "; ".join(each.reason for each in skipped[:3])
        raise InputError(
            f"data: {len(skipped)} of {count} samples cannot be used, more than {MOST_SKIPPED:.0%}: {first}"
            + ("; ..." if len(skipped) > 3 else "")
        )


def _header(file: Any) -> dict[str, Any]:
    return json.loads((file.metadata() or {}).get(_HEADER, "{}"))


def _parts(count: int) -> list[range]:
    return [range(start, min(start + PART, count)) for start in range(0, count, PART)]


def _compared(content: dict[str, Any]) -> dict[str, Any]:
    """What must be equal to go on; a model may have moved or been renamed."""
    model = {key: value for key, value in content["model"].items() if key != "name"}
    return {**content, "model": model}


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 100 else text[:100] + "..."
