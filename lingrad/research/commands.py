"""Whole jobs, as the command line runs them: compare, show progress, write and print the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from lingrad.console import progress
from lingrad.errors import optional
from lingrad.research import corpus, plans, report, runner


def demo(out: Path, *, steps: int | None = None) -> report.Result:
    """Train on Moby-Dick with every method.

    Args:
        out: Folder of the results.
        steps: Training steps; None is the demo's own number.

    Returns:
        What was measured.
    """
    setup = plans.Setup() if steps is None else replace(plans.Setup(), steps=steps)
    return _job(plans.demo_methods(), setup, corpus.tokenize("Moby-Dick", corpus.moby_dick()), out)


def train(
    text: Path, spec: str, out: Path, *, base: str, lr: float, scale: float, carry: str, steps: int, length: int
) -> report.Result:
    """Train on a text of the user's: one transform in both modes, beside full rank.

    Args:
        text: A UTF-8 text.
        spec: The config string.
        out: Folder of the results.
        base: The base optimizer, by name.
        lr: Learning rate.
        scale: Factor on that of the coordinates.
        carry: keep, reset or rotate.
        steps: Training steps.
        length: Bytes in a window.

    Returns:
        What was measured.
    """
    shape = replace(plans.Setup().model, length=length)
    setup = replace(plans.Setup(), steps=steps, model=shape)
    methods = [
        plans.full_rank(lr, scale, base),
        *plans.both_modes(spec, spec, base=base, lr=lr, scale=scale, carry=carry),
    ]
    return _job(methods, setup, corpus.tokenize(text.name, corpus.read_text(text)), out)


def _job(methods: list[plans.Method], setup: plans.Setup, text: corpus.Corpus, out: Path) -> report.Result:
    twins, short = plans.in_float64(methods, setup)
    corpus.check_length(text, setup.model.length)
    report.prepare(out)
    started = time.perf_counter()
    with _progress(setup.steps, f"{len(methods)} methods, float32") as tick:
        records = runner.compare(methods, setup, text, on_step=tick)
    with _progress(short.steps, f"{len(twins)} of them, float64") as tick:
        double = runner.compare(twins, short, text, dtype=torch.float64, on_step=tick)
    result = report.make_result(text.name, setup, records, double, time.perf_counter() - started)
    files = report.save(result, out)
    _show(result, files)
    return result


@contextmanager
def _progress(steps: int, title: str) -> Iterator[Callable[[int, list[runner.Record]], None]]:
    """Progress with the losses of all methods."""
    with progress(title, "step") as tick:

        def on_step(step: int, records: list[runner.Record]) -> None:
            tick(step, steps, "loss " + " ".join(f"{record.valid[-1][1]:.2f}" for record in records))

        yield on_step


def _show(result: report.Result, files: list[Path]) -> None:
    console = _console()
    if console.is_terminal:
        title = f"{result.text}: {result.setup['steps']} steps, {result.seconds:.0f} s in all"
        table = import_module("rich.table").Table(title=title, box=None, padding=(0, 1))
        for i, header in enumerate(report.HEADERS):
            table.add_column(header, justify="right" if i else "left", no_wrap=i > 1)
        for row in report.rows(result):
            table.add_row(*row)
        console.print(table)
    else:
        console.print(report.markdown(result), soft_wrap=True, highlight=False)
    console.print("Written: " + ", ".join(map(str, files)), soft_wrap=True, highlight=False)


def _console() -> Any:
    return optional("rich.console", "showing progress", "cli").Console()
