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
    settings = {field.name: getattr(pruner, field.name) for field in dataclasses.fields(pruner)}
    if pruner.schedule is not None:
        settings["schedule"] = json.loads(pruner.schedule.to_json())
    return {"format": _FORMAT, "version": _VERSION, "method": pruner.name, **settings}


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
    return from_document(content, file)


def from_document(content: dict[str, Any], where: str | Path) -> Pruner:
    """A pruner from the JSON object that `to_document` made; format and version may be missing.

    Args:
        content: the object.
        where: what to call it in an error.

    Raises:
        PrunerError: an unknown method or setting, or a newer version.
        ScheduleError: its schedule is malformed.
    """
    from adaptinfer.pruners import METHODS

    settings = dict(content)
    if settings.pop("format", _FORMAT) != _FORMAT:
        raise PrunerError(f"{where}: format: not an AdaptInfer pruner (expected {_FORMAT!r})")
    version = settings.pop("version", _VERSION)
    if version != _VERSION:
        raise PrunerError(f"{where}: version: {version!r} is not readable here ({_VERSION} is); upgrade adaptinfer")
    name = settings.pop("method", None)
    if name not in METHODS:
        raise PrunerError(f"{where}: method: unknown {name!r}; known are {', '.join(METHODS)}")
    method = METHODS[name]
    unknown = set(settings) - {field.name for field in dataclasses.fields(method)}
    if unknown:
        raise PrunerError(f"{where}: {sorted(unknown)[0]}: no setting of {name}")
    if settings.get("schedule") is not None:
        settings["schedule"] = Schedule.from_json(json.dumps(settings["schedule"]))
    return method(**settings)
