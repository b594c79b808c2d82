"""Answers on disk: one JSON line each, appended in whole blocks, read back exactly after a kill.

The first line of ``answers.jsonl`` is a header with the run's configuration; a folder with another configuration is
refused. A block is all answers of one batch under one condition and seed; each of its lines says how many are ``left``,
and what a kill left of an unfinished block is cut off when the file is opened again. Several processes write a file
each, and `Journal.merge` makes them one, in an order that depends on nothing but the configuration. No database: the
file is what users read, and its bytes are the same however a run was shared out or interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from adaptinfer.errors import InputError
from adaptinfer.files import write_whole

FORMAT, VERSION = "adaptinfer.answers", 1

Record = dict[str, Any]
"""One answer."""

Block = tuple[str, int, str, int]
"""Task, number of the batch, condition, seed."""


class Journal:
    """The answers of one run.

    Args:
        folder: of the run, made if missing.
        config: plain values; whatever would change an answer must be in it.
        part: number of this process among several; None writes ``answers.jsonl`` itself.

    Raises:
        InputError: the folder cannot be written, or holds answers of another run.
    """

    def __init__(self, folder: Path, config: dict[str, Any], part: int | None = None) -> None:
        self.folder, self._config = folder, json.loads(json.dumps(config))
        text = json.dumps(self._config, sort_keys=True)
        self._header = {
            "format": FORMAT,
            "version": VERSION,
            "hash": hashlib.sha256(text.encode()).hexdigest()[:16],
            "config": self._config,
        }
        self._path = folder / ("answers.jsonl" if part is None else f"answers.part{part}.jsonl")
        self._lock: Any = None

    @property
    def hash(self) -> str:
        """Of the configuration."""
        return self._header["hash"]

    def open(self) -> set[Block]:
        """Check what is there, cut off what a kill left unfinished, and tell which blocks are done.

        Raises:
            InputError: it is another run's, no such file at all, or cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self._files():
                self._cut_back(path)
            if not self._path.exists():
                write_whole(self._path, _line(self._header))
            self._lock = _locked(self._path)
        except BlockingIOError:
            raise InputError(f"{str(self._path)!r}: another process is writing to it; wait for it, or end it") from None
        except OSError as error:
            raise InputError(f"folder {str(self.folder)!r}: cannot be written ({error.strerror})") from None
        return self.done()

    def done(self) -> set[Block]:
        """Blocks that are on disk, whoever wrote them."""
        return {_place(block) for path in self._files() for block in _entries(path)[1]}

    def append(self, block: Sequence[Record]) -> None:
        """Add a whole block and wait until it is on disk.

        Raises:
            InputError: it cannot be written (a full disk); what was there before stays whole.
        """
        lines = b"".join(_line({**record, "left": len(block) - n}) for n, record in enumerate(block, 1))
        try:
            with self._path.open("r+b", buffering=0) as file:
                end = file.seek(0, 2)
                try:
                    if file.write(lines) != len(lines):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    _sync(file)
                except BaseException:
                    file.truncate(end)
                    raise
        except OSError as error:
            raise InputError(
                f"{str(self._path)!r}: cannot be written ({error.strerror}); the answers so far are safe; once "
                "that is fixed, run the same command again"
            ) from None

    def records(self) -> Iterator[Record]:
        """All answers, file by file."""
        for path in self._files():
            for block in _entries(path)[1]:
                yield from block

    def merge(self, tasks: Sequence[str], conditions: Sequence[str]) -> None:
        """Make all files one ``answers.jsonl``, in the order of tasks, batches, conditions, seeds.

        Raises:
            InputError: it cannot be written.
        """
        blocks: dict[Block, list[Record]] = {}
        for path in self._files():
            for block in _entries(path)[1]:
                blocks.setdefault(_place(block), block)

        def order(block: Block) -> tuple[int, int, int, int]:
            return tasks.index(block[0]), block[1], conditions.index(block[2]), block[3]

        lines = [_line(self._header)]
        lines += [_line(record) for block in sorted(blocks, key=order) for record in blocks[block]]
        parts = [path for path in self._files() if path.name != "answers.jsonl"]
        try:
            write_whole(self.folder / "answers.jsonl", b"".join(lines))
            for part in parts:
                part.unlink()
        except OSError as error:
            raise InputError(f"folder {str(self.folder)!r}: cannot be written ({error.strerror})") from None

    def _files(self) -> list[Path]:
        whole = self.folder / "answers.jsonl"
        return [*([whole] if whole.exists() else []), *sorted(self.folder.glob("answers.part*.jsonl"))]

    def _cut_back(self, path: Path) -> None:
        end, _, header = _entries(path)
        if header is None:
            raise InputError(f"{str(path)!r}: is no file of answers; give another folder")
        if header.get("hash") != self.hash:
            theirs, ours = header.get("config", {}), self._config
            odd = sorted(key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key))
            raise InputError(
                f"folder {str(self.folder)!r}: holds answers of another run (it differs in {', '.join(odd)}); give "
                "another folder, or the same settings to go on with that run"
            )
        if end < path.stat().st_size:
            with path.open("r+b") as file:
                file.truncate(end)
                _sync(file)


def _locked(path: Path) -> Any:
    """The file, open and ours alone for as long as the result lives; where there are no such locks, just open."""
    file = path.open("rb")
    with contextlib.suppress(ImportError):
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def _line(entry: dict[str, Any]) -> bytes:
    return (json.dumps(entry, ensure_ascii=False) + "\n").encode()


def _sync(file: Any) -> None:
    os.fsync(file.fileno())


def _place(block: Sequence[Record]) -> Block:
    first = block[0]
    return first["task"], first["batch"], first["condition"], first["seed"]


def _entries(path: Path) -> tuple[int, list[list[Record]], dict[str, Any] | None]:
    """Where the last whole block ends, the blocks up to there, and the header if there is one."""
    blocks: list[list[Record]] = []
    block: list[Record] = []
    header, end, position = None, 0, 0
    with path.open("rb") as file:
        for number, line in enumerate(file):
            position += len(line)
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                entry = None
            if not isinstance(entry, dict):
                break
            if number == 0:
                if entry.get("format") != FORMAT or entry.get("version") != VERSION:
                    break
                header, end = entry, position
                continue
            block.append(entry)
            if entry["left"] == 0:
                end = position
                blocks.append(block)
                block = []
    return end, blocks, header
