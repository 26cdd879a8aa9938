"""Atomic writes of files and folders: a path has the complete new content, or what was there before."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lingrad.errors import DataError

_OPEN = ("/dev/stdout", "/dev/stderr", "/dev/fd/", "/proc/")  # what a process has open already, under a path


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file through a temporary one next to it, which is renamed when the block ends without an error.

    A link is followed, and stays. Into a pipe, a device or a terminal (``/dev/stdout``) the bytes are written as they come.

    Args:
        path: The file; replaced if it exists, by one of the same mode. A new one has the mode that the umask allows.

    Yields:
        The temporary file, open. It is removed if the block fails; errors of the operating system are not translated.
    """
    mode = path.stat().st_mode if path.exists() else None
    if mode is not None and (not stat.S_ISREG(mode) or path.as_posix().startswith(_OPEN)):
        with path.open("wb") as stream:
            yield stream
        return
    path = Path(os.path.realpath(path))
    temporary = _beside(path)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else mode & 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        if mode is not None:
            temporary.chmod(mode & 0o777)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _beside(path: Path) -> Path:
    """A hidden name next to a path that nothing has."""
    return path.parent / f".{path.name[:200]}.{secrets.token_hex(4)}"


def write_whole(path: Path, data: bytes) -> Path:
    """Write a file atomically; see `new_file`.

    Args:
        path: The file; replaced if it exists.
        data: Its content.

    Returns:
        The path.
    """
    with new_file(path) as file:
        file.write(data)
    return path


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Write a folder through a hidden one next to it, which is renamed when the block ends without an error.

    Args:
        path: The folder; must not exist, so that nothing is overwritten.

    Yields:
        The hidden folder, empty. It is removed if the block fails; a killed process leaves it, hidden.

    Raises:
        DataError: The path exists.
    """
    refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    temporary.mkdir()
    try:
        yield temporary
        publish(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def refuse_existing(path: Path) -> None:
    """Make sure that a path does not exist.

    Args:
        path: The path.

    Raises:
        DataError: It exists.
    """
    try:
        there = path.exists() or path.is_symlink()
    except OSError as error:
        raise DataError(f"cannot write '{path}': {error.strerror}; name another folder") from error
    if there:
        raise DataError(f"'{path}' exists, and nothing is overwritten; name another folder, or remove it first")


def publish(finished: Path, path: Path) -> None:
    """Rename a finished folder, after its contents have been flushed to disk.

    Args:
        finished: The folder, next to ``path``.
        path: Its new name; raises `DataError` if it has come into existence meanwhile.
    """
    for file in (*finished.rglob("*"), finished):
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    refuse_existing(path)  # a rename would replace an empty folder
    finished.rename(path)
