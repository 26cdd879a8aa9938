"""Copy the results of the examples into the docs: ``make finetune smollm2``, then ``make examples``."""

import shutil
import sys
from pathlib import Path

from marks import put

ROOT = Path(__file__).parents[1]
PAGES = {"finetune": "README.md", "smollm2": "docs/lowbit.md"}


def main() -> None:
    """Copy each run's table into its page, between its marks, and its numbers to docs/examples."""
    kept = ROOT / "docs" / "examples"
    kept.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        run = ROOT / "runs" / name
        if not (run / "table.md").exists():
            sys.exit(f"there are no results in {run}: run `make {name}` first")
        put(ROOT / page, {name: (run / "table.md").read_text()})
        shutil.copy(run / "table.md", kept / f"{name}.md")
        shutil.copy(run / "result.json", kept / f"{name}.json")
        print(f"{page} and {kept.relative_to(ROOT)} now hold the results of {run.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
