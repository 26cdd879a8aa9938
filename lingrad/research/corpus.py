"""The text in the package that can be trained on."""

from __future__ import annotations

import hashlib
import lzma
from importlib.resources import files

from lingrad.errors import DataError

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
