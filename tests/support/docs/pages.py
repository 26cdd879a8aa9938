"""Pages of the documentation, whose code blocks tests run as printed."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[3] / "docs"


def blocks(name, language="python"):
    """The code blocks of a page, in order."""
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / name).read_text(), flags=re.DOTALL)


def run(block, names, page):
    """Run a block in ``names``, as one goes on typing where the block before ended."""
    exec(compile(block, f"docs/{page}", "exec"), names)  # noqa: S102 - our own text
    return names
