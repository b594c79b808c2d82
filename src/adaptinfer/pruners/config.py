"""A pruner as a small JSON file, ``adaptinfer_config.json``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from adaptinfer.pruners.before import Composed
from adaptinfer.pruners.contracts import CONFIG_NAME, FORMAT, VERSION, Pruner, PrunerError
from adaptinfer.pruners.registry import find
from adaptinfer.schedule import Schedule


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
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise PrunerError(f"{file}: format: not an AdaptInfer pruner (expected {FORMAT!r})")
    return from_document(content, str(file))


def from_document(content: dict[str, Any], where: str) -> Pruner:
    """A pruner from the JSON object that `Pruner.to_document` made; format and version may be missing.

    Args:
        content: the object.
        where: what to call it in an error.

    Raises:
        PrunerError: an unknown method or setting, or a newer version.
        ScheduleError: its schedule is malformed.
    """
    settings = dict(content)
    if settings.pop("format", FORMAT) != FORMAT:
        raise PrunerError(f"{where}: format: not an AdaptInfer pruner (expected {FORMAT!r})")
    version = settings.pop("version", VERSION)
    if version != VERSION:
        raise PrunerError(f"{where}: version: {version!r} is not readable here ({VERSION} is); upgrade adaptinfer")
    return _read(settings, where)


def _read(content: dict[str, Any], where: str) -> Pruner:
    """A pruner from its name and settings; ``where`` they stand, for messages."""
    settings = dict(content)
    name = settings.pop("method", None)
    try:
        method = Composed if name == Composed.name else find(name)
    except PrunerError as error:
        raise PrunerError(f"{where}: {error}") from error
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
