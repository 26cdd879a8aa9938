"""Texts to train on: the one in the package, or a file."""

from __future__ import annotations

import hashlib
import lzma
from importlib.resources import files
from pathlib import Path

from lingrad.errors import DataError
from lingrad.files.reading import open_plain

MOBY_DICK_SHA256 = "fe282a57094ed62e7144fb7c804a9748fc1c909bf3b49d06e7276015f9f67240"


def moby_dick() -> str:
    """The text of Moby-Dick in the package.

    Returns:
        1,204,997 bytes of UTF-8, decoded.

    Raises:
        DataError: The file is damaged or another one.
    """
    packed = (files("lingrad.research") / "data" / "moby-dick.txt.xz").read_bytes()
    try:
        raw = lzma.decompress(packed)
    except lzma.LZMAError as error:
        raise DataError(f"the packaged text moby-dick.txt.xz is damaged ({error}); install lingrad again") from error
    if hashlib.sha256(raw).hexdigest() != MOBY_DICK_SHA256:
        raise DataError("the packaged text moby-dick.txt.xz is not the original one; install lingrad again")
    return raw.decode()


def read_text(path: Path) -> str:
    """Read a text file.

    Args:
        path: A UTF-8 text file.

    Returns:
        Its contents.

    Raises:
        DataError: It is missing, empty, or not UTF-8.
    """
    try:
        with open_plain(path) as file:
            text = file.read().decode()
    except OSError as error:
        raise DataError(f"cannot read the text {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a UTF-8 text (byte {error.start}); convert it first") from error
    if not text.strip():
        raise DataError(f"the text {path} is empty")
    return text
