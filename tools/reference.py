"""Write docs/reference/ and the tables of docs/support.md: ``python tools/reference.py``, or make reference."""

import argparse
import sys
from pathlib import Path

from lingrad.files.atomic import write_whole

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.docs import matrix, reference
from tools.marks import put

DOCS = Path(__file__).parents[1] / "docs"


def main() -> None:
    """Write the pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("reference", "support"), help="one of the two")
    only = parser.parse_args().only
    if only != "support":
        pages = reference.pages()
        folder = DOCS / "reference"
        folder.mkdir(exist_ok=True)
        for name, text in pages.items():
            write_whole(folder / name, text.encode())
        if other := [path.name for path in folder.glob("*.md") if path.name not in pages]:
            sys.exit(f"docs/reference/ has pages that this program does not write; remove them: {', '.join(other)}")
    if only != "reference":
        put(DOCS / "support.md", matrix.sections())


if __name__ == "__main__":
    main()
