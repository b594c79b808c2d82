"""Writing files whole or not at all."""

from __future__ import annotations

import contextlib
import uuid
from pathlib import Path

__all__ = ["write_whole"]


def write_whole(path: str | Path, data: bytes) -> None:
    """Write a file beside its place and move it there, so that a full disk leaves what was there before.

    Raises:
        OSError: it cannot be written; nothing is left behind.
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
