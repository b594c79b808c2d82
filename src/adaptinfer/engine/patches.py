"""Changes to a live model that undo themselves."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import nn


class Patches:
    """Hooks, replaced methods and replaced configs of one attached model; `undo` takes all of them off, last first."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def before(self, module: nn.Module, hook: Any, first: bool = False) -> None:
        """Call ``hook(module, args, kwargs)`` before a module's forward; ``first`` puts it before all other hooks."""
        self._stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=first).remove)

    def after(self, module: nn.Module, hook: Any) -> None:
        """Call ``hook(module, args, output)`` after a module's forward."""
        self._stack.callback(module.register_forward_hook(hook).remove)

    def config(self, module: Any, config: Any) -> None:
        """Give one module a config of its own."""
        self._stack.callback(setattr, module, "config", module.config)
        module.config = config

    def override(self, owner: Any, name: str, function: Any) -> None:
        """Replace a method of an object. If somebody replaces it again, `undo` leaves that in place."""
        before = vars(owner).get(name)
        vars(owner)[name] = function
        self._stack.callback(_restore, owner, name, function, before)

    def undo(self) -> None:
        """Take everything off again. Doing it twice is harmless."""
        self._stack.close()


def _restore(owner: Any, name: str, ours: Any, before: Any) -> None:
    if vars(owner).get(name) is ours:
        del vars(owner)[name]
        if before is not None:
            vars(owner)[name] = before
