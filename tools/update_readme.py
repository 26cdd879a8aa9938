"""Copy the table and the plots of a finished demo into the README: ``make demo``, then ``make readme``."""

import sys
from pathlib import Path

from marks import put

from lingrad.research import report

ROOT = Path(__file__).parents[1]


def main(folder: Path) -> None:
    """Copy the results to docs/demo and the table to README.md, between its marks."""
    result = report.load(folder)
    kept = ROOT / "docs" / "demo"
    kept.mkdir(parents=True, exist_ok=True)
    report.save(result, kept)
    put(ROOT / "README.md", {"demo": f"{report.markdown(result)}\n{report.caption(result)}"})
    print(f"README.md and {kept.relative_to(ROOT)} now hold the results of {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
