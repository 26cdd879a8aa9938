"""What the pages hold between two marks, ``<!-- name:begin -->`` and ``<!-- name:end -->``: text that a program writes."""

import re
from pathlib import Path

from lingrad.errors import DataError
from lingrad.files.atomic import write_whole


def put(page: Path, blocks: dict[str, str]) -> None:
    """Replace what stands between marks.

    Args:
        page: The page.
        blocks: Name of the marks -> the new text, which ends its line.

    Raises:
        DataError: The page does not hold the marks of a block once; nothing is changed.
    """
    text = page.read_text()
    for name, block in blocks.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        whole = f"{begin}\n{block}{end}"
        text, count = re.subn(f"{begin}.*?{end}", lambda _, whole=whole: whole, text, flags=re.DOTALL)
        if count != 1:
            raise DataError(f"{page} must hold {begin} and {end} once")
    write_whole(page, text.encode())
