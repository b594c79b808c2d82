"""Pruning methods by name: ours, those that other packages bring, and any class by its address."""

from __future__ import annotations

import pkgutil
from importlib.metadata import EntryPoint, entry_points

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


def _installed() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}
