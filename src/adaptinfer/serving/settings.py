"""Which pruner a server is to use, from what a user can put into an environment variable or on a command line."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adaptinfer.pruners import Pruner, PrunerError
from adaptinfer.pruners.config import from_document, from_pretrained
from adaptinfer.pruners.contracts import CONFIG_NAME
from adaptinfer.schedule import Budget, Schedule, ScheduleError, preset

_MANY = 4096  # vision tokens; what share the first layers take does not depend on how many there are


def pruner_from(value: str | dict[str, Any], source: str) -> Pruner:
    """The pruner that a setting describes.

    Args:
        value: a folder with ``adaptinfer_config.json``, such a file, or a JSON object: ``{"budget": 64}``,
            ``{"method": "random", "schedule": "schedule.json"}``, ``{"preset": "llava-1.5-7b/64"}``. ``method`` is
            ``adaptinfer`` by default; a schedule may be a file or an object.
        source: what to call the setting in an error.

    Raises:
        PrunerError: it describes no pruner; the message names the setting.
        ScheduleError: its schedule is malformed, or there is no such preset; the message names the setting.
    """
    with named(source):
        return _pruner(value, source)


@contextlib.contextmanager
def named(source: str) -> Iterator[None]:
    """Put the setting's name before the messages of errors that do not know it."""
    try:
        yield
    except (PrunerError, ScheduleError) as error:
        if str(error).startswith(source):
            raise
        raise type(error)(f"{source}: {error}") from None


def check_share(pruner: Pruner, num_layers: int) -> None:
    """Refuse a budget that no picture can meet, before one comes. One in tokens depends on the picture.

    Raises:
        ScheduleError: the budget is a share that layers up to the first stage exceed by themselves.
    """
    if pruner.budget is None or not Budget(pruner.budget).is_share:
        return
    try:
        pruner.plan(num_layers, _MANY)
    except ScheduleError:
        raise ScheduleError(
            f"budget: no picture can meet a share of {pruner.budget}: all vision tokens pass through the layers up to "
            f"the first stage, and this model has {num_layers} layers; take a larger budget"
        ) from None


def _pruner(value: str | dict[str, Any], source: str) -> Pruner:
    if isinstance(value, str) and not value.lstrip().startswith(("{", "[")):
        path = Path(value)
        if not path.exists():
            raise PrunerError(
                f"{source}: {value!r} is neither a folder with {CONFIG_NAME}, nor such a file, nor a JSON object"
            )
        return from_pretrained(path)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise PrunerError(f"{source}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise PrunerError(f"{source}: must be a folder, a file or a JSON object, not {value!r}")
    settings = {"method": "adaptinfer", **value}
    if "preset" in settings:
        if "schedule" in settings:
            raise PrunerError(f"{source}: give a preset or a schedule, not both")
        if not isinstance(settings["preset"], str):
            raise PrunerError(f"{source}: preset: must be a name such as 'llava-1.5-7b/64', not {settings['preset']!r}")
        settings["schedule"] = json.loads(preset(settings.pop("preset")).to_json())
    elif isinstance(settings.get("schedule"), str):
        settings["schedule"] = json.loads(Schedule.load(settings["schedule"]).to_json())
    return from_document(settings, source)


def to_json(pruner: Pruner) -> str:
    """A pruner as one line that `pruner_from` reads back, here or in another process."""
    return json.dumps(pruner.to_document(), separators=(",", ":"))
