"""The index of a checkpoint of torch.distributed.checkpoint, read as text: it is a pickle, and none of it is run."""

from __future__ import annotations

import pickletools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from lingrad.errors import DataError
from lingrad.files.reading import open_plain


def check_shards(index: Path) -> None:
    """Make sure that the files of a distributed checkpoint are as long as its index says.

    Args:
        index: The index, ``.metadata``.

    Raises:
        DataError: A file is missing or shorter, or the index is damaged.
    """
    ends: dict[str, int] = {}
    try:
        with open_plain(index) as file:
            found = _constants(file.read())
        for word in found:
            if word == "relative_path":  # of a part: its file, its first byte there, its length
                name, _, first, _, length = (next(found) for _ in range(5))
                ends[name] = max(ends.get(name, 0), first + length)
    except OSError as error:
        raise DataError(f"cannot read {index}: {error.strerror or error}") from error
    except (ValueError, TypeError, RuntimeError, IndexError) as error:  # at its end, a generator raises RuntimeError
        raise DataError(f"damaged index: {error}") from error
    if not ends:
        raise DataError("the index names no file")
    for name, end in ends.items():
        path = index.parent / name
        if not path.is_file():
            raise DataError(f"there is no {name}")
        size = path.stat().st_size
        if size < end:
            raise DataError(f"{name} has {size} of {end} bytes")


def _constants(data: bytes) -> Iterator[Any]:
    """The words and numbers of a pickle, in its order."""
    memo: dict[int, Any] = {}
    last: Any = None
    for operation, given, _ in pickletools.genops(data):
        code, argument = operation.name, cast("Any", given)
        if code == "MEMOIZE":
            memo[len(memo)] = last
        elif "PUT" in code:
            memo[argument] = last
        elif "GET" in code:
            last = memo.get(argument)
            yield last
        elif "UNICODE" in code or "INT" in code or "LONG" in code:
            last = argument
            yield last
        else:
            last = None
