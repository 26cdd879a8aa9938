"""The comparisons of the command line: train with progress bars, write the results, print the table."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch

from lingrad.console import progress
from lingrad.errors import optional
from lingrad.research import corpus, plans, report, runner


def demo(out: Path, *, steps: int | None = None) -> report.Result:
    """Train on Moby-Dick with every method of the demo, and write the results.

    Args:
        out: Folder of the results; made if missing.
        steps: Training steps; None is the number of `plans.Setup`.

    Returns:
        The result.
    """
    setup = plans.Setup() if steps is None else replace(plans.Setup(), steps=steps)
    return _run(plans.demo_entries(), setup, corpus.tokenize("Moby-Dick", corpus.moby_dick()), out)


def train(
    text: Path, rules: str, out: Path, *, base: str, lr: float, scale: float, carry: str, steps: int, length: int
) -> report.Result:
    """Train on a text file: one method in both modes, compared with full rank; and write the results.

    Args:
        text: A UTF-8 text file.
        rules: A config string or rules.
        out: Folder of the results; made if missing.
        base: The base optimizer, by name.
        lr: Learning rate.
        scale: Factor on the learning rate of the coordinates.
        carry: What happens to moments at a refresh: keep, reset, rotate or transport.
        steps: Training steps.
        length: Bytes in a window.

    Returns:
        The result.
    """
    shape = replace(plans.Setup().model, length=length)
    setup = replace(plans.Setup(), steps=steps, model=shape)
    entries = [
        plans.full_rank(lr, scale, base),
        *plans.both_modes(rules, rules, base=base, lr=lr, scale=scale, carry=carry),
    ]
    return _run(entries, setup, corpus.tokenize(text.name, corpus.read_text(text)), out)


def show(result: report.Result, out: Path) -> None:
    """Print the table of a result, and which files were written.

    Args:
        result: The result.
        out: The folder it was written to.
    """
    console = optional("rich.console", "printing a table", "cli").Console()
    if console.is_terminal:
        title = f"{result.text}: {result.setup['steps']} steps, {result.seconds:.0f} s in total"
        table = import_module("rich.table").Table(title=title, box=None, padding=(0, 1))
        for i, header in enumerate(report.HEADERS):
            table.add_column(header, justify="right" if i else "left", no_wrap=i > 1)
        for row in report.rows(result):
            table.add_row(*row)
        console.print(table)
    else:
        console.print(report.markdown(result), soft_wrap=True, highlight=False)
    files = ", ".join(str(out / name) for name in report.FILES)
    console.print(f"Written: {files}", soft_wrap=True, highlight=False)


def _run(entries: list[plans.Entry], setup: plans.Setup, text: corpus.Corpus, out: Path) -> report.Result:
    exact, short = plans.in_float64(entries, setup)
    corpus.check_length(text, setup.model.length)
    report.prepare(out)
    started = time.perf_counter()
    with _progress(setup.steps, f"{len(entries)} methods, float32") as tick:
        records = runner.compare(entries, setup, text, on_step=tick)
    with _progress(short.steps, f"{len(exact)} of them, float64") as tick:
        double = runner.compare(exact, short, text, dtype=torch.float64, on_step=tick)
    result = report.make_result(text.name, setup, records, double, time.perf_counter() - started)
    report.save(result, out)
    return result


@contextmanager
def _progress(steps: int, title: str) -> Iterator[Callable[[int, list[runner.Record]], None]]:
    """A progress bar with the losses of all methods."""
    with progress(title, "step") as tick:

        def on_step(step: int, records: list[runner.Record]) -> None:
            tick(step, steps, "validation loss " + " ".join(f"{record.valid[-1][1]:.2f}" for record in records))

        yield on_step
