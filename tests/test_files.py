"""Files are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from adaptinfer.files import write_whole


def test_new_replaced_and_through_a_link(tmp_path):
    file, link = tmp_path / "a.bin", tmp_path / "link.bin"
    write_whole(file, b"one")
    file.chmod(0o640)
    link.symlink_to(file)
    write_whole(link, b"two")
    assert file.read_bytes() == b"two" and link.is_symlink() and file.stat().st_mode & 0o777 == 0o640
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "link.bin"]


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    file = tmp_path / "a.bin"
    file.write_bytes(b"old")
    write = Path.write_bytes

    def half(self, data):
        write(self, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space left"):
        write_whole(file, b"something new")
    assert file.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a.bin"]
