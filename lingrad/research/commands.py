"""The comparisons and studies of the command line: train with progress bars, write the results, print the table."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lingrad import api
from lingrad.console import progress
from lingrad.errors import DataError, optional, require_one_of
from lingrad.files.atomic import write_whole
from lingrad.files.reading import read_text
from lingrad.models import build_llama, next_token_loss
from lingrad.research import corpus, plans, rates, report, runner
from lingrad.research.bundle import pack, unpack
from lingrad.research.execution import execute
from lingrad.research.pages import write_report
from lingrad.research.plan import open_plan
from lingrad.research.results import against, read_results


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
    return _run(entries, setup, corpus.tokenize(text.name, read_text(text)), out)


def run(path: Path, out: Path, *, jobs: int = 1, storage: str | None = None, quick: bool = False) -> list[Path]:
    """Make all trials and final runs of a plan that are not made yet, and the report.

    Args:
        path: The plan.
        out: Folder of the results; made if missing.
        jobs: Runs at a time, each in a process.
        storage: A database that several machines share; None is a journal in ``out``.
        quick: Cut the plan down to see that it runs: a tenth of the steps, one trial, one seed.

    Returns:
        The files of the report.

    Raises:
        DataError: Every run failed.
    """
    plan = open_plan(path, quick=quick)
    with progress(plan.name, "run") as tick:
        execute(plan, out, jobs=jobs, storage=storage, tick=tick)
    files = report_of([out])
    _, runs = read_results([out])
    if runs and all(run.failed for run in runs):
        raise DataError(f"every run failed, the first with: {runs[0].error}\n{files[0]} lists them all")
    return files


def report_of(
    folders: Sequence[Path],
    *,
    x: str = "state MB",
    y: str = "",
    versus: str = "",
    files: Path | None = None,
    out: Path | None = None,
    publish: Path | None = None,
) -> list[Path]:
    """Write the report of a plan's results into the first of their folders.

    Args:
        folders: The folders; where several machines shared the trials, of all of them. Or one file of published results.
        x: What the picture of two measures is drawn over.
        y: What is drawn; the task's metric if empty.
        versus: The entry that others are compared with; the plan's first if empty.
        files: Where the files that the plan names are now; None is where they were.
        out: Where published results are unpacked; the report is written there.
        publish: A file that gets all results: see `lingrad.research.bundle`.

    Returns:
        The files.

    Raises:
        DataError: The folder cannot be written to, or published results have no ``out``.
    """
    if len(folders) == 1 and folders[0].suffix == ".json":
        if out is None:
            raise DataError(f"{folders[0]} holds published results: name a new folder for them and their report, --out FOLDER")
        files = folders[0].absolute().parent if files is None else files
        folders = [unpack(folders[0], out)]
    elif out is not None:
        raise DataError("--out is for published results, one file; the report of folders is written into the first of them")
    plan, runs = read_results(folders, files)
    plan = against(plan, versus) if versus else plan
    try:
        written = [] if publish is None else [pack(folders, publish)]
        return [*write_report(plan, runs, folders[0], x=x, y=y), *written]
    except OSError as error:
        raise DataError(f"cannot write the report to {folders[0]}: {error.strerror or error}") from error


def find_lr(
    text: Path, rules: str, out: Path, *, base: str, mode: str, scale: float, carry: str, length: int, **limits: Any
) -> rates.RateTest:
    """Test learning rates on a text file, with the model of `train`, and write ``find-lr.json`` and ``find-lr.png``.

    Args:
        text: A UTF-8 text file.
        rules: A config string or rules.
        out: Folder of the results; made if missing.
        base: The base optimizer, by name.
        mode: ``optimizer`` or ``adapter``.
        scale: Factor on the learning rate of the coordinates.
        carry: What happens to moments at a refresh: keep, reset, rotate or transport.
        length: Bytes in a window.
        **limits: ``low``, ``high`` and ``steps`` of `lingrad.find_lr`.

    Returns:
        The result.

    Raises:
        DataError: The text cannot be read or is too short, or the results cannot be written.
    """
    require_one_of(mode, ("optimizer", "adapter"), "mode")
    setup = replace(plans.Setup(), model=replace(plans.Setup().model, length=length))
    read = corpus.tokenize(text.name, read_text(text))
    corpus.check_length(read, length)
    model = build_llama(setup.model, seed=setup.seed)
    make, steps = api.adapt if mode == "adapter" else api.wrap, limits["steps"]
    opt = make(model, rules, base, lr=limits["low"], scale=scale, carry=carry, seed=setup.seed)  # type: ignore[arg-type]
    batches = corpus.training_batches(read, steps=steps, rows=setup.rows, length=length, seed=setup.seed)

    def step() -> Tensor:
        opt.zero_grad()
        loss = next_token_loss(model, next(batches))
        loss.backward()
        opt.step()
        return loss

    with _results_in(out), progress("learning rates", "step") as tick:
        found = rates.find_lr(opt, step, on_step=lambda done, loss: tick(done, steps, f"loss {loss:.3g}"), **limits)
    try:
        write_whole(out / "find-lr.json", found.to_json().encode())
        found.plot(out / "find-lr.png")
    except OSError as error:
        raise DataError(f"cannot write the results to {out}: {error.strerror}") from error
    return found


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
    started = time.perf_counter()
    with _results_in(out):
        with _progress(setup.steps, f"{len(entries)} methods, float32") as tick:
            records = runner.compare(entries, setup, text, on_step=tick)
        with _progress(short.steps, f"{len(exact)} of them, float64") as tick:
            double = runner.compare(exact, short, text, dtype=torch.float64, on_step=tick)
    result = report.make_result(text.name, setup, records, double, time.perf_counter() - started)
    report.save(result, out)
    return result


@contextmanager
def _results_in(out: Path) -> Iterator[None]:
    """Make a folder of results before anything is trained; where that is refused or fails, an empty one does not stay."""
    is_new = not out.exists()
    report.prepare(out)
    try:
        yield
    except BaseException:
        if is_new:
            with suppress(OSError):  # it holds something by now
                out.rmdir()
        raise


@contextmanager
def _progress(steps: int, title: str) -> Iterator[Callable[[int, list[runner.Record]], None]]:
    """A progress bar with the losses of all methods."""
    with progress(title, "step") as tick:

        def on_step(step: int, records: list[runner.Record]) -> None:
            tick(step, steps, "validation loss " + " ".join(f"{record.valid[-1][1]:.2f}" for record in records))

        yield on_step
