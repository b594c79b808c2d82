"""A pruner as a small JSON file, ``adaptinfer_config.json``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from adaptinfer.files import write_whole
from adaptinfer.pruners.base import Pruner, PrunerError
from adaptinfer.schedule import Schedule

__all__ = ["CONFIG_NAME", "from_document", "from_pretrained", "save", "to_document"]

CONFIG_NAME = "adaptinfer_config.json"
_FORMAT, _VERSION = "adaptinfer.pruner", 1


def save(pruner: Pruner, path: str | Path) -> None:
    """Write a pruner into the folder ``path`` (made if missing)."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / CONFIG_NAME, (json.dumps(to_document(pruner), indent=2) + "\n").encode())


def to_document(pruner: Pruner) -> dict[str, Any]:
    """A pruner as the JSON object that `save` writes."""
    return {"format": _FORMAT, "version": _VERSION, **_plain(pruner)}


def from_pretrained(path: str | Path) -> Pruner:
    """Read the pruner that `Pruner.save_pretrained` wrote.

    Args:
        path: the folder, or the file itself.

    Raises:
        PrunerError: no such file, not such a file, an unknown method or setting, or a newer version.
        ScheduleError: its schedule is malformed.
    """
    file = Path(path)
    file = file / CONFIG_NAME if file.is_dir() else file
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise PrunerError(f"{file}: cannot be read ({error})") from None
    except json.JSONDecodeError as error:
        raise PrunerError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise PrunerError(f"{file}: format: not an AdaptInfer pruner (expected {_FORMAT!r})")
    return from_document(content, str(file))


def from_document(content: dict[str, Any], where: str) -> Pruner:
    """A pruner from the JSON object that `to_document` made; format and version may be missing.

    Args:
        content: the object.
        where: what to call it in an error.

    Raises:
        PrunerError: an unknown method or setting, or a newer version.
        ScheduleError: its schedule is malformed.
    """
    settings = dict(content)
    if settings.pop("format", _FORMAT) != _FORMAT:
        raise PrunerError(f"{where}: format: not an AdaptInfer pruner (expected {_FORMAT!r})")
    version = settings.pop("version", _VERSION)
    if version != _VERSION:
        raise PrunerError(f"{where}: version: {version!r} is not readable here ({_VERSION} is); upgrade adaptinfer")
    return _read(settings, where)


def _plain(value: Any) -> Any:
    """A setting as JSON takes it; the parts of a composition are written as pruners of their own."""
    if isinstance(value, Pruner):
        settings = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
        return {"method": value.name, **settings}
    return json.loads(value.to_json()) if isinstance(value, Schedule) else value


def _read(content: dict[str, Any], where: str) -> Pruner:
    """A pruner from its name and settings; ``where`` they stand, for messages."""
    from adaptinfer.pruners import METHODS
    from adaptinfer.pruners.composed import Composed

    known: dict[str, type[Pruner]] = {**METHODS, Composed.name: Composed}
    settings = dict(content)
    name = settings.pop("method", None)
    if name not in known:
        raise PrunerError(f"{where}: method: unknown {name!r}; known are {', '.join(known)}")
    method = known[name]
    unknown = set(settings) - {field.name for field in dataclasses.fields(method) if field.init}
    if unknown:
        raise PrunerError(f"{where}: {sorted(unknown)[0]}: no setting of {name}")
    if settings.get("schedule") is not None:
        settings["schedule"] = Schedule.from_json(json.dumps(settings["schedule"]))
    for part in ("before", "inside"):
        if isinstance(settings.get(part), dict):
            settings[part] = _read(settings[part], f"{where}: {part}")
    try:
        return method(**settings)
    except TypeError as error:  # a part of a composition is missing
        raise PrunerError(f"{where}: {error}") from None
