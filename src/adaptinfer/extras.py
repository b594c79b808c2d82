"""One sentence for a package that the base install leaves out: what is missing, and the pip command that brings it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from adaptinfer.errors import MissingExtraError


@contextmanager
def needs(extra: str, what: str = "this") -> Iterator[None]:
    """Around imports of third-party packages, to name the extra of ``adaptinfer`` that installs them.

        with needs("eval", "adaptinfer eval"):
            import scipy.stats

    Raises:
        MissingExtraError: a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{what} needs {error.name}, which is not installed: pip install 'adaptinfer[{extra}]'", name=error.name
        ) from error
