"""Put the table and the plots of a finished demo into the README: ``make demo``, then ``make readme``."""

import re
import sys
from pathlib import Path

from lingrad.research import report

ROOT = Path(__file__).parents[1]


def main(folder: Path) -> None:
    """Copy the results to docs/demo and the table to README.md, between its two marks."""
    result = report.load(folder)
    kept = ROOT / "docs" / "demo"
    kept.mkdir(parents=True, exist_ok=True)
    report.save(result, kept)
    readme = ROOT / "README.md"
    block = f"<!-- demo:begin -->\n{report.markdown(result)}\n{report.caption(result)}<!-- demo:end -->"
    text, count = re.subn(r"<!-- demo:begin -->.*<!-- demo:end -->", lambda _: block, readme.read_text(), flags=re.DOTALL)
    if count != 1:
        sys.exit("README.md must hold <!-- demo:begin --> and <!-- demo:end --> once")
    readme.write_text(text)
    print(f"README.md and {kept.relative_to(ROOT)} now hold the results of {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
