"""Copy the results of a finished demo to docs/demo, and its tables into the README: ``make demo``, then ``make readme``."""

import sys
import tempfile
from pathlib import Path

from lingrad.files.atomic import write_whole
from lingrad.research import pictures
from lingrad.research.bundle import pack, unpack
from lingrad.research.pages import as_markdown
from lingrad.research.results import read_results, summarize
from tools.marks import put

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "docs" / "demo"


def tables(results: Path) -> tuple[str, bytes, bytes]:
    """What is shown of published results.

    Args:
        results: Their file.

    Returns:
        The tables in Markdown, and two pictures: the training losses, and how far weights differ.
    """
    with tempfile.TemporaryDirectory() as folder:
        plan, runs = read_results([unpack(results, Path(folder) / "demo")], ROOT)
    found = summarize(plan, runs)
    text = as_markdown(plan, found).partition("\n")[2].strip()
    return f"{text}\n", pictures.curves(found), pictures.diagnostics(found)


def main(folder: Path) -> None:
    """Copy the results to docs/demo and the tables to README.md, between its marks."""
    KEPT.mkdir(parents=True, exist_ok=True)
    text, losses, gaps = tables(pack([folder], KEPT / "result.json"))
    for name, data in {"table.md": text.encode(), "loss.png": losses, "gap.png": gaps}.items():
        write_whole(KEPT / name, data)
    put(ROOT / "README.md", {"demo": text})
    print(f"README.md and {KEPT.relative_to(ROOT)} now hold the results of {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
