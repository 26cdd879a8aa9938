"""Text for a terminal or a log: aligned columns, layer numbers collapsed, progress."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module
from threading import Timer

from lingrad.errors import optional

quiet = False  # whether a program shows results only, and no progress
_AFTER = 2.0  # seconds without a word, after which a program says that it is running
_silent = True  # whether nothing of progress was shown yet

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a part of a dotted name that is a number


def layers(name: str) -> str:
    """A dotted name with its layer numbers replaced by ``*``; names that differ in nothing else become equal."""
    return _NUMBER.sub("*", name)


def span(values: Sequence[float], form: str = "{:.6g}", between: str = " to ") -> str:
    """The smallest and the largest value as text, or the one value if all are equal."""
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low}{between}{high}"


def align(rows: Sequence[Sequence[str]], right: Sequence[bool]) -> list[list[str]]:
    """Pad the cells of every column to one width.

    Args:
        rows: Cells; all rows have the same length.
        right: Which columns are right-aligned.

    Returns:
        The padded cells.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [[c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)] for row in rows]


def columns(rows: Sequence[Sequence[str]], right: Sequence[bool], *, rule: bool = False) -> list[str]:
    """The lines of a table for a terminal, with two spaces between columns.

    Args:
        rows: Cells; all rows have the same length.
        right: Which columns are right-aligned.
        rule: Whether a line of dashes follows the first row, the header.

    Returns:
        A line per row.
    """
    cells = align(rows, right) if rows else []
    if rule:
        cells.insert(1, ["-" * len(cell) for cell in cells[0]])
    return ["  ".join(row).rstrip() for row in cells]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns.

    Args:
        rows: Cells; all rows have the same length, and the first is the header. The first column is
            left-aligned, the others are right-aligned.

    Returns:
        Lines with a final newline.
    """
    right = [i > 0 for i in range(len(rows[0]))]
    header, *rest = align([[cell.ljust(2) for cell in rows[0]], *rows[1:]], right)  # a rule is a dash and a colon at least
    rule = ["-" * (len(cell) - 1) + (":" if figures else "-") for cell, figures in zip(header, right, strict=True)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, rule, *rest))


def say(line: str) -> None:
    """Show what is being done, on standard error, unless `quiet`."""
    global _silent
    if not quiet:
        _silent = False
        sys.stderr.write(f"{line}\n")


@contextmanager
def alive(what: str) -> Iterator[None]:
    """Say on a terminal that something is running, where that takes more than two seconds and shows nothing else by then.

    Args:
        what: What is running.

    Yields:
        None.
    """

    def report() -> None:
        if _silent:
            say(f"{what}: running ...")

    timer = Timer(_AFTER, report)
    timer.daemon = True
    if sys.stderr.isatty():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


Tick = Callable[[int, int, str], None]  # done, total, a note


@contextmanager
def progress(title: str, unit: str, *, least: int = 1) -> Iterator[Tick]:
    """A progress bar with the time left; if standard error is not a terminal, a line for every tenth of the work.

    Args:
        title: What is being done.
        unit: What is counted.
        least: Fewest units for which lines are printed, if standard error is not a terminal.

    Yields:
        A function to call after each unit. Raises `DependencyError` if rich is not installed.
    """
    global _silent
    _silent = False
    console = optional("rich.console", "showing progress", "cli").Console(stderr=True)
    rich = import_module("rich.progress")
    parts = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(bar_width=24),
        rich.MofNCompleteColumn(),
        rich.TimeRemainingColumn(),
        rich.TextColumn("{task.fields[note]}"),
    )
    bar = rich.Progress(*parts, console=console, transient=True)
    with bar if console.is_terminal and not quiet else nullcontext():  # disabled, it may end with an empty line
        task = bar.add_task(title, total=None, note="")
        printed = 0

        def tick(done: int, total: int, note: str) -> None:
            nonlocal printed
            bar.update(task, completed=done, total=total, note=note)
            tenth = 10 * done // max(1, total)
            if not quiet and not console.is_terminal and tenth > printed and total >= least:
                printed = tenth
                console.print(f"{title}: {unit} {done} of {total}, {note}", soft_wrap=True, highlight=False)

        yield tick
