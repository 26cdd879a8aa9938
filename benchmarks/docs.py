"""The way of results into docs/performance.md and docs/methods.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks import plots, report, roofline
from benchmarks.gpu import tables
from benchmarks.plan import GOALS
from lingrad.errors import LingradError
from lingrad.files.atomic import write_whole
from tools.marks import put


class Block(NamedTuple):
    """Results that the page shows between marks.

    Args:
        folder: In benchmarks/out, where the command writes ``latest.json``.
        command: What writes it.
        markdown: Makes the text.
        whole: Whether they are of a whole run.
        plots: Whether pictures go into the folder of the page.
        page: The name of the page, in the folder of docs/performance.md.
    """

    folder: str
    command: str
    markdown: Callable[[dict[str, Any]], str]
    whole: Callable[[dict[str, Any]], bool]
    plots: bool = False
    page: str = report.DOCS.name


def _all_goals(found: dict[str, Any]) -> bool:
    return found["plan"] != "quick" and found["figures"].keys() >= {goal.figure for goal in GOALS}


BLOCKS = {
    "cpu": Block("", "make bench", report.markdown, _all_goals, plots=True),
    "cuda": Block("cuda", "make gpu", tables.markdown, lambda found: not found["dry"]),
    "predicted": Block(
        "predicted",
        "python -m benchmarks.roofline",
        roofline.markdown,
        lambda found: len(found["rows"]) == len(roofline.WORKLOADS),
    ),
    "policies": Block(
        "policies",
        "python -m benchmarks --only policies --out benchmarks/out/policies",
        lambda found: report.policies_table(found["policies"]),
        lambda found: found["plan"] != "quick",
        page="methods.md",
    ),
}


def into_docs() -> None:
    """Put the last results into their pages, between their marks, and into a folder of each page.

    Raises:
        LingradError: There are none, they are not of a whole run, or the page has no place for them.
    """
    paths = {name: report.OUT / block.folder / "latest.json" for name, block in BLOCKS.items()}
    results = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    if not results:
        raise LingradError(f"there are no results in {report.OUT}; run 'make bench' first")
    for name, found in results.items():
        if not BLOCKS[name].whole(found):
            raise LingradError(
                f"{paths[name]} is of a quick run or of some suites, and the docs show whole runs; "
                f"run '{BLOCKS[name].command}' first"
            )
    for page in {BLOCKS[name].page for name in results}:
        blocks = {name: BLOCKS[name].markdown(found) for name, found in results.items() if BLOCKS[name].page == page}
        put(report.DOCS.with_name(page), blocks)
    for name in results:
        folder = report.DOCS.with_name(BLOCKS[name].page).with_suffix("") / name
        folder.mkdir(parents=True, exist_ok=True)
        if BLOCKS[name].plots:
            plots.draw(results[name], folder)
        write_whole(folder / "result.json", paths[name].read_bytes())
