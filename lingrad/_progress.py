"""Progress of long work, for whoever waits at a terminal or reads a log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module

from lingrad.errors import optional

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
