"""Replace text that a program writes, between two marks of a page: ``<!-- name:begin -->`` and ``<!-- name:end -->``."""

import re
from pathlib import Path

from lingrad.errors import DataError
from lingrad.files.atomic import write_whole


def put(page: Path, blocks: dict[str, str]) -> None:
    """Replace the text between marks.

    Args:
        page: The page.
        blocks: Name of the marks -> the new text, ending with a newline.

    Raises:
        DataError: The marks of a block are not on the page exactly once; nothing is changed.
    """
    text = page.read_text()
    for name, block in blocks.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        whole = f"{begin}\n{block}{end}"
        text, count = re.subn(f"{begin}.*?{end}", lambda _, whole=whole: whole, text, flags=re.DOTALL)
        if count != 1:
            raise DataError(f"{page} must contain {begin} and {end} exactly once")
    write_whole(page, text.encode())
