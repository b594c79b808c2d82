"""Output files: refused before any work if they cannot be written, and written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path

from adaptinfer.errors import InputError


def write_whole(path: str | Path, data: bytes) -> None:
    """Write a file beside its place and move it there, so that a full disk leaves what was there before.

    Raises:
        OSError: it cannot be written; nothing is left over.
    """
    target = Path(path)
    if target.exists() and not target.is_file():  # /dev/stdout and its like cannot be moved onto
        target.write_bytes(data)
        return
    target = target.resolve()  # a link stays one
    part = target.with_name(f".{uuid.uuid4().hex}.part")
    try:
        part.write_bytes(data)
        if target.exists():
            part.chmod(target.stat().st_mode & 0o777)
        part.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def check_output(what: str, path: Path, suffixes: tuple[str, ...] = (), error: type[InputError] = InputError) -> None:
    """Raise an error, before any work, for a file that cannot be written.

    Args:
        what: the option or argument that named it; the message starts with it.
        path: the file; it may exist.
        suffixes: how its name has to end, in lower case; none: in any way.
        error: what is raised.
    """
    if suffixes and path.suffix.lower() not in suffixes:
        raise error(f"{what} {str(path)!r}: must end in one of {', '.join(suffixes)}")
    try:
        if path.is_dir():
            raise error(f"{what} {str(path)!r}: is a folder")
        if not path.parent.is_dir():
            raise error(f"{what} {str(path)!r}: there is no folder {str(path.parent)!r}")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise error(f"{what} {str(path)!r}: no permission to write there")
    except OSError as reason:  # a name that is too long
        raise error(f"{what} {str(path)!r}: cannot be written ({reason.strerror})") from None


def write_output(what: str, path: Path, data: bytes, error: type[InputError] = InputError) -> None:
    """`write_whole` that raises ``error`` in one line instead of an OSError."""
    try:
        write_whole(path, data)
    except OSError as reason:
        raise error(f"{what} {str(path)!r}: cannot be written ({reason.strerror})") from None
