"""``lingrad ...`` and ``python -m lingrad ...``."""

from __future__ import annotations

import sys

from lingrad.deprecated import command_line
from lingrad.errors import LingradError, optional


def main() -> None:
    """Run the command line. An error of lingrad is printed without a traceback, and the exit code is 2."""
    try:
        optional("typer", "the command line", "cli")
        from lingrad.cli import app

        app(command_line(sys.argv[1:]), prog_name="lingrad")
    except LingradError as error:
        sys.stderr.write(f"lingrad: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
