"""Reading files of others: what is no plain file, or far too large, is an error before anything is read."""

from __future__ import annotations

import ctypes
import errno
import io
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lingrad.errors import DataError

LARGEST_JSON = 64 * 2**20  # bytes; the index of a model with 10^5 tensors has 10 MB
MARK = "\ufeff"  # some editors, of Windows above all, write it at the start of a text; it is no part of it
_HALF = re.compile("[\ud800-\udfff]")  # one half of a pair that makes a character; no encoding of Unicode has it alone
_HALF_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")


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


class Stamp(NamedTuple):
    """What identifies a file and the state it is in, without reading it.

    Args:
        size: Its size in bytes.
        time: When it was last written, in ns.
        inode: Its number in the file system.
    """

    size: int
    time: int
    inode: int


def stamp(file: io.BufferedReader) -> Stamp:
    """What identifies an open file.

    Args:
        file: The file.

    Returns:
        Its stamp.
    """
    found = os.fstat(file.fileno())
    return Stamp(found.st_size, found.st_mtime_ns, found.st_ino)


@contextmanager
def open_same(path: Path, was: Stamp) -> Iterator[io.BufferedReader]:
    """Open a file again, of which a part has been read.

    Args:
        path: The file.
        was: Its stamp when it was first opened.

    Yields:
        The open file.

    Raises:
        OSError: It cannot be opened, or has changed by the end of the block.
    """
    with open_plain(path) as file:
        _require_same(file, was, path)
        yield file
        _require_same(file, was, path)


def _require_same(file: io.BufferedReader, was: Stamp, path: Path) -> None:
    if stamp(file) != was:
        raise OSError(errno.ESTALE, "it was changed while it was read; wait until it is written, and try again", str(path))


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, valid as long as the tensor; numpy is not needed, and has no bfloat16."""
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def read_text(path: Path, kind: str = "text", *, largest: int | None = None) -> str:
    """The content of a text file, without a byte order mark.

    Args:
        path: A UTF-8 text file.
        kind: What it is, for messages.
        largest: Bytes that it has at most; None for any number.

    Returns:
        The text.

    Raises:
        DataError: It is missing, empty, too large, or not UTF-8.
    """
    try:
        with open_plain(path) as file:
            data = file.read(-1 if largest is None else largest + 1)
    except OSError as error:
        raise DataError(f"cannot read the {kind} {path}: {error.strerror or error}") from error
    if largest is not None and len(data) > largest:
        raise DataError(f"the {kind} {path} is larger than {largest:,} bytes")
    try:
        text = data.decode().removeprefix(MARK)
    except UnicodeDecodeError as error:
        raise DataError(f"the {kind} {path} is not in UTF-8 (byte {error.start}); convert it first") from error
    if not text.strip():
        raise DataError(f"the {kind} {path} is empty")
    return text


def parse_json(text: str | bytes, *, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The content of a text of JSON, whose strings can all be written again.

    Args:
        text: The text; bytes are UTF-8, or UTF-16 or UTF-32 where they begin like it, and may begin with a byte order mark.
        pairs: See ``object_pairs_hook`` of `json.loads`.

    Returns:
        What it holds. Raises `ValueError` where it is not JSON or a string has half a character, a lone surrogate: JSON can
        spell it, and no tokenizer and no file takes it. Raises `RecursionError` where it is nested too deeply.
    """
    plain = text.decode(json.detect_encoding(text)) if isinstance(text, bytes) else text
    found = json.loads(plain, object_pairs_hook=pairs)
    if _HALF_ESCAPED.search(plain):
        _require_characters(found)
    return found


def _require_characters(found: Any) -> None:
    rest = [found]
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            rest += [*value, *value.values()]
        elif isinstance(value, list):
            rest += value
        elif isinstance(value, str) and (half := _HALF.search(value)):
            code = f"\\u{ord(half[0]):04x}"
            raise ValueError(f"a string has {code}, half a character, which no text can hold: write both halves, or none")


def read_json(path: Path, *, foreign: bool = False) -> Any:
    """The content of a JSON file.

    Args:
        path: The file.
        foreign: Whether it is read as `parse_json` does. A file of lingrad's own may hold a path that is not in UTF-8, which
            Python stores as lone surrogates.

    Returns:
        What it holds. Raises `ValueError` or `RecursionError` where it is not JSON.

    Raises:
        OSError: It cannot be read, or is larger than `LARGEST_JSON`.
    """
    with open_plain(path) as file:
        data = file.read(LARGEST_JSON + 1)
    if len(data) > LARGEST_JSON:
        raise OSError(errno.EFBIG, f"it is larger than {LARGEST_JSON:,} bytes", str(path))
    return parse_json(data) if foreign else json.loads(data)


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite; of any dtype, also those of 8 bits, for which torch cannot say it."""
    narrow = tensor.is_floating_point() and tensor.dtype.itemsize == 1
    return bool(torch.isfinite(tensor.float() if narrow else tensor).all())
