"""``lingrad ...`` and ``python -m lingrad ...``."""

from __future__ import annotations

import sys

from lingrad.errors import LingradError, optional


def main() -> None:
    """Run the command line; errors of lingrad are printed without a traceback and exit with status 2."""
    try:
        optional("typer", "the command line", "cli")
        from lingrad.cli import app

        app()
    except LingradError as error:
        sys.stderr.write(f"lingrad: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
