"""What people read on a terminal or in a log: columns that line up, layers of one kind on one line, progress."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from lingrad.errors import optional

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a part of a dotted name that is a number


def layers(name: str) -> str:
    """A dotted name with the numbers of layers replaced by ``*``: equal for parameters that differ in these alone."""
    return _NUMBER.sub("*", name)


def span(values: Sequence[float], form: str = "{:.6g}", between: str = " to ") -> str:
    """The smallest and the largest of some values, or the one they all are."""
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low}{between}{high}"


def align(rows: Sequence[Sequence[str]], right: Sequence[bool]) -> list[list[str]]:
    """Pad the cells of every column to one width.

    Args:
        rows: Cells, each row as long as the others.
        right: Which columns are figures, to stand at the right.

    Returns:
        The padded cells.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [[c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)] for row in rows]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up.

    Args:
        rows: Cells, each row as long as the others; the first is the header. The first column is text, the others are figures.

    Returns:
        Lines with a final newline.
    """
    right = [i > 0 for i in range(len(rows[0]))]
    header, *rest = align(rows, right)
    rule = ["-" * (len(cell) - 1) + (":" if figures else "-") for cell, figures in zip(header, right, strict=True)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, rule, *rest))


Tick = Callable[[int, int, str], None]  # how many are done, of how many, and what there is to say of it


@contextmanager
def progress(title: str, unit: str, *, least: int = 1) -> Iterator[Tick]:
    """A live bar with the time left; where the output is no terminal a line for every tenth.

    Args:
        title: What is being done.
        unit: What is counted.
        least: Work of fewer units is told of on a terminal only.

    Yields:
        What to call after each unit. Raises `DependencyError` where rich is not installed.
    """
    console = optional("rich.console", "showing progress", "cli").Console(stderr=True)
    rich = import_module("rich.progress")
    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(bar_width=24),
        rich.MofNCompleteColumn(),
        rich.TimeRemainingColumn(),
        rich.TextColumn("{task.fields[note]}"),
    )
    with rich.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None, note="")
        told = 0

        def tick(done: int, total: int, note: str) -> None:
            nonlocal told
            bar.update(task, completed=done, total=total, note=note)
            tenth = 10 * done // max(1, total)
            if not console.is_terminal and tenth > told and total >= least:
                told = tenth
                console.print(f"{title}: {unit} {done} of {total}, {note}", soft_wrap=True, highlight=False)

        yield tick
