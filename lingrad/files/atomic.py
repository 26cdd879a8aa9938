"""Writing files and folders whole: what is there is complete, or what was there before."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lingrad.errors import DataError


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file by way of a temporary one beside it, which takes its name when the block ends without an error.

    Args:
        path: The file; replaced if it is there.

    Yields:
        The temporary file, open. It is removed where the block fails; errors of the operating system come as they are.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_whole(path: Path, data: bytes) -> Path:
    """Write a file as a whole; see `new_file`.

    Args:
        path: The file; replaced if it is there.
        data: What it shall hold.

    Returns:
        The path.
    """
    with new_file(path) as file:
        file.write(data)
    return path


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Write a folder by way of a hidden one beside it, which takes its name when the block ends without an error.

    Args:
        path: The folder; must not exist, so that nothing is overwritten.

    Yields:
        The hidden folder, empty. It is removed where the block fails; a process that is killed leaves it, hidden.

    Raises:
        DataError: There is something at the path.
    """
    refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        temporary.chmod(0o755)
        publish(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def refuse_existing(path: Path) -> None:
    """Make sure that there is nothing at a path.

    Args:
        path: The path.

    Raises:
        DataError: There is.
    """
    try:
        there = path.exists() or path.is_symlink()
    except OSError as error:
        raise DataError(f"cannot write '{path}': {error.strerror}; name another folder") from error
    if there:
        raise DataError(f"'{path}' exists, and nothing is overwritten; name another folder, or remove it first")


def publish(finished: Path, path: Path) -> None:
    """Give a finished folder its name, its contents on the disk first.

    Args:
        finished: The folder, beside ``path``.
        path: Its name to be; raises `DataError` where somebody made it in the meantime.
    """
    for file in (*finished.rglob("*"), finished):
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    refuse_existing(path)  # a rename would replace an empty folder
    finished.rename(path)
