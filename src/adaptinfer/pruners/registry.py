"""Pruning methods by name: ours, those that other packages bring, and any class by its address."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import pkgutil
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from adaptinfer.pruners.contracts import Pruner, PrunerError

METHODS: dict[str, type[Pruner]] = {}
"""The methods of this package by name, which `adaptinfer.pruners` fills in."""

GROUP = "adaptinfer.pruners"
"""The entry-point group in which another package names its methods."""


def names() -> list[str]:
    """All methods that have a name: ours first, then those of installed packages."""
    return [*METHODS, *sorted(_installed().keys() - METHODS.keys())]


def find(name: str) -> type[Pruner]:
    """The method of a name.

    Args:
        name: one of `names`, or the address ``package.module:Class`` of any subclass of `Pruner`.

    Raises:
        PrunerError: there is no such method, or it cannot be imported.
    """
    if name in METHODS:
        return METHODS[name]
    entry = _installed().get(name) if isinstance(name, str) else None
    if entry is None and not (isinstance(name, str) and ":" in name):
        raise PrunerError(
            f"method: there is no method {name!r}; there are {', '.join(names())}, and package.module:Class"
        )
    try:
        method = pkgutil.resolve_name(name) if entry is None else entry.load()
    except (ImportError, AttributeError, ValueError) as error:
        raise PrunerError(f"method: {name!r} cannot be imported ({error})") from error
    if not (isinstance(method, type) and issubclass(method, Pruner)):
        raise PrunerError(f"method: {name!r} must be a subclass of adaptinfer.Pruner, not {method!r}")
    return method


def code_digest(pruner: Pruner) -> str | None:
    """A digest of the modules that define a pruner and its parts outside this package; None if all of it is ours.

    Work that is stopped and goes on later must not mix the answers of two versions of a method.
    """
    parts, files = [pruner], set()
    while parts:
        part = parts.pop()
        if not type(part).__module__.startswith("adaptinfer."):
            with contextlib.suppress(TypeError):  # typed into an interpreter, so there is no file
                files.add(inspect.getfile(type(part)))
        values = (getattr(part, field.name) for field in dataclasses.fields(part))
        parts += [value for value in values if isinstance(value, Pruner)]
    if not files:
        return None
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()


def _installed() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}
