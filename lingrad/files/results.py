"""Results that a command prints and writes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from lingrad.errors import DataError
from lingrad.files.atomic import write_whole


def example(command: str) -> str:
    """A command as the end of a help text, which is not wrapped."""
    return f"\b\nExample:\n  {command}"


def check_folders(*paths: Path | None) -> None:
    """Make sure, before anything is computed, that the folders of files to write exist.

    Args:
        *paths: The files; None is none, and ``-`` is standard output.

    Raises:
        DataError: One does not.
    """
    for path in paths:
        if path is not None and not path.absolute().parent.is_dir():
            raise DataError(f"cannot write {path}: there is no folder {path.absolute().parent}")


def written(path: Path | None, write: Callable[[Path], object]) -> None:
    """Write a file, if one was asked for.

    Args:
        path: The file.
        write: Writes it.

    Raises:
        DataError: It cannot be written.
    """
    try:
        if path is not None:
            write(path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from error
    except ValueError as error:  # matplotlib does not know the suffix
        raise DataError(f"cannot write {path}: {error}") from error


def finish(json: Path | None, to_json: Callable[[], str], show: Callable[[], object]) -> None:
    """Print a result, and write its JSON if asked to.

    Args:
        json: The file; ``-`` prints the JSON and nothing else.
        to_json: Gives it.
        show: Prints the result.
    """
    if json == Path("-"):
        sys.stdout.write(to_json().rstrip() + "\n")
        return
    written(json, lambda path: write_whole(path, to_json().encode()))
    show()
