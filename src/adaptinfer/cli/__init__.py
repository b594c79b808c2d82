"""The command ``adaptinfer``. `app` alone imports the commands; the library imports nothing from here."""

from __future__ import annotations

import sys

from adaptinfer.errors import MissingExtraError
from adaptinfer.extras import needs


def main() -> None:
    """The entry point ``adaptinfer``, also where the packages for it are not installed."""
    try:
        with needs("cli", "the command line"):
            import rich  # noqa: F401
            import typer  # noqa: F401
    except MissingExtraError as error:
        sys.exit(_refuse(error))
    from adaptinfer.cli.app import main

    main()


def _refuse(error: MissingExtraError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2
