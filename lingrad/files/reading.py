"""Opening files of others: what is no plain file, or far too large, is an error before anything is read."""

from __future__ import annotations

import errno
import io
import json
import os
import stat
from pathlib import Path
from typing import Any

LARGEST_JSON = 64 * 2**20  # bytes; the index of a model with 10^5 tensors has 10 MB


def open_plain(path: str | Path) -> io.BufferedReader:
    """Open a file to read; never waits, as for a pipe that nobody writes into.

    Args:
        path: The file.

    Returns:
        The open file, binary.

    Raises:
        OSError: It cannot be opened, or is a pipe or a device.
        IsADirectoryError: It is a folder.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise OSError(errno.EINVAL, "it is a pipe or a device; expected a file", str(path))
    return open(handle, "rb")  # noqa: PTH123 - a handle is no path


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Args:
        path: The file.

    Returns:
        What it holds. Raises `ValueError` or `RecursionError` where it is not JSON.

    Raises:
        OSError: It cannot be read, or is larger than `LARGEST_JSON`.
    """
    with open_plain(path) as file:
        data = file.read(LARGEST_JSON + 1)
    if len(data) > LARGEST_JSON:
        raise OSError(errno.EFBIG, f"it is larger than {LARGEST_JSON:,} bytes", str(path))
    return json.loads(data)
