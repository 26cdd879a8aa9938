"""Build the documentation as a site, into site/: ``python tools/build_site.py``, or ``make docs``. Dead links fail.

Zensical is the maintained successor of Material for MkDocs and reads mkdocs.yml. It gets a copy of docs/ in build/docs/, with
the pages that lie outside docs/, and with lists as Python-Markdown reads them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE, COPY, SITE, CONFIG = ROOT / "docs", ROOT / "build" / "docs", ROOT / "site", ROOT / "mkdocs.yml"
OUTSIDE = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}  # file at the top -> page
FRAGMENTS = {"examples"}  # folders of text that programs put into other pages
_ITEM = re.compile(r"(?:[-*]|\d+\.) ")
_FENCE = re.compile(r"\s*(```+|~~~+)")


def pages() -> dict[str, str]:
    """The pages of the site.

    Returns:
        Path in the site -> Markdown, as Python-Markdown reads it.
    """
    found = {}
    for path in sorted(SOURCE.rglob("*.md")):
        name = path.relative_to(SOURCE)
        if name.parts[0] not in FRAGMENTS:
            text = path.read_text()
            for outside, page in OUTSIDE.items():
                text = text.replace(f"](../{outside}", f"]({page}")
            found[name.as_posix()] = indented(text)
    for outside, page in OUTSIDE.items():
        found[page] = indented((ROOT / outside).read_text().replace("](docs/", "]("))
    return found


def indented(markdown: str) -> str:
    """A page in which what belongs to an item of a list is indented by four, which GitHub does not ask for.

    Args:
        markdown: The page; its lists may be indented by two or three.

    Returns:
        The same page for Python-Markdown.
    """
    lines, width, fence = [], 0, ""
    for line in markdown.split("\n"):
        marks = _FENCE.match(line)
        if not fence:
            if item := _ITEM.match(line):
                width = len(item[0])
            elif line.strip() and not line.startswith(" "):
                width = 0
        inside = 0 < width < 4 and line.startswith(" " * width)
        lines.append(" " * (4 - width) + line if (inside and not line.startswith("    ")) or (inside and fence) else line)
        if marks:
            fence = "" if fence else marks[1]
    return "\n".join(lines)


def navigation() -> list[str]:
    """The pages that mkdocs.yml's navigation names, in its order."""
    text = CONFIG.read_text()
    return re.findall(r"^ +- .*?: ([\w./-]+\.md)$", text[text.index("\nnav:") :], flags=re.MULTILINE)


def copy() -> None:
    """Make build/docs/ anew: the pages, and every other file of docs/ as it is."""
    shutil.rmtree(COPY, ignore_errors=True)
    shutil.copytree(SOURCE, COPY, ignore=lambda folder, names: FRAGMENTS if Path(folder) == SOURCE else ())
    for name, text in pages().items():
        (COPY / name).write_text(text)


def outside(site: Path) -> Iterator[str]:
    """What pages of a site would load from elsewhere.

    Args:
        site: Its folder.

    Yields:
        Page and address.
    """
    for page in sorted(site.rglob("*.html")):
        # links to follow are no part of the page; what loads is src, and the href of a stylesheet, an icon or a script
        for address in re.findall(r'(?:\bsrc="|<link\b[^>]*\bhref=")((?:https?:)?//[^"]+)"', page.read_text()):
            yield f"{page.relative_to(site)}: {address}"


def main() -> None:
    """Build, and fail where a page is in no menu, a link leads nowhere, or a page needs a network."""
    if missing := sorted(pages().keys() ^ set(navigation())):
        sys.exit(f"pages and the navigation in mkdocs.yml differ: {', '.join(missing)}")
    copy()
    build = subprocess.run([sys.executable, "-m", "zensical", "build", "--strict", "--clean"], cwd=ROOT, check=False)
    if build.returncode:
        sys.exit(build.returncode)
    if found := list(outside(SITE)):
        sys.exit("pages load from elsewhere:\n" + "\n".join(found))
    print(f"{SITE}/index.html")


if __name__ == "__main__":
    main()
