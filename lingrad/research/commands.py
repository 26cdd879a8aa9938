"""The comparisons and studies of the command line: train with a progress bar, and write what came of it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lingrad import api, console
from lingrad.errors import DataError, optional, require_one_of
from lingrad.files.atomic import write_whole
from lingrad.research import rates
from lingrad.research.bundle import pack, unpack
from lingrad.research.execution import execute
from lingrad.research.objects import brought
from lingrad.research.pages import write_report
from lingrad.research.peak import Simulate, add_peaks
from lingrad.research.plan import ResearchPlan, make_plan, open_plan, read_plan
from lingrad.research.results import against, read_results
from lingrad.research.tasks.text import Text

SMALL: dict[str, Any] = {"rows": 4, "hidden": 256, "layers": 3}  # of `train` and `find_lr`, as in the demo
SEED = 1  # of `find_lr`
GAPS = ("gap", "gap_switched", "gap_control")  # the diagnostics that compare modes


def demo(out: Path, *, steps: int | None = None, jobs: int = 1, simulate: Simulate | None = None) -> list[Path]:
    """Run the plan of the demo: a small Llama on Moby-Dick, trained by several methods.

    Args:
        out: Folder of the results; made if missing.
        steps: Training steps; None is the plan's.
        jobs: Runs at a time, each in a process.
        simulate: `lingrad.memory.simulate`, by which the peaks of final runs on a GPU are simulated; None leaves them out.

    Returns:
        The files of the report.
    """
    with as_file(files("lingrad.research") / "data" / "demo.toml") as file:
        content = read_plan(file)
    given = {} if steps is None else {"steps": steps}
    content = {**content, "task": {**content["task"], **given}}
    return _run(make_plan(content, "the demo", Path.cwd()), out, jobs=jobs, simulate=simulate)


def train(
    text: Path,
    rules: str,
    out: Path,
    *,
    base: str,
    lr: float,
    scale: float,
    carry: str,
    steps: int,
    length: int,
    jobs: int = 1,
    simulate: Simulate | None = None,
) -> list[Path]:
    """Compare one method in both modes with full rank, on the user's own text.

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
        jobs: Runs at a time, each in a process.
        simulate: `lingrad.memory.simulate`, by which the peaks of final runs on a GPU are simulated; None leaves them out.

    Returns:
        The files of the report.
    """
    shared: dict[str, Any] = {"base": base, "lr": lr, "scale": scale}
    own = {"method": rules, "options": {**shared, "carry": carry}}
    content = {
        "name": text.name,
        "seeds": [1],
        "imports": list(brought),
        "task": {"kind": "text", "data": text.name, "steps": steps, "length": length, **SMALL},
        "run": {"diagnostics": []},
        "entries": [
            # the base on every weight; the coordinates of the full map are the weight itself
            {"name": f"{base}, full rank", "method": "full()", "options": shared},
            {"name": "optimizer mode", **own, "diagnostics": list(GAPS)},
            {"name": "adapter mode", **own, "mode": "adapter"},
            {"name": "float64", **own, "dtype": "float64", "diagnostics": list(GAPS)},
        ],
    }
    return _run(make_plan(content, "lingrad train", text.absolute().parent), out, jobs=jobs, simulate=simulate)


def run(
    path: Path,
    out: Path,
    *,
    jobs: int = 1,
    storage: str | None = None,
    quick: bool = False,
    simulate: Simulate | None = None,
) -> list[Path]:
    """Make all trials and final runs of a plan that are not made yet, and the report.

    Args:
        path: The plan.
        out: Folder of the results; made if missing.
        jobs: Runs at a time, each in a process.
        simulate: `lingrad.memory.simulate`, by which the peaks of final runs on a GPU are simulated; None leaves them out.
        storage: A database that several machines share; None is a journal in ``out``.
        quick: Cut the plan down to see that it runs: a tenth of the steps, one trial, one seed.

    Returns:
        The files of the report.

    Raises:
        DataError: Every run failed.
    """
    return _run(open_plan(path, quick=quick), out, jobs=jobs, storage=storage, simulate=simulate)


@contextmanager
def _results_in(out: Path) -> Iterator[None]:
    """Make a folder of results before anything is trained; where that is refused or fails, an empty one does not stay."""
    is_new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise DataError(f"cannot write the results to {out}: {error.strerror}") from error
    try:
        yield
    except BaseException:
        if is_new:
            with suppress(OSError):  # it holds something by now
                out.rmdir()
        raise


def _run(plan: ResearchPlan, out: Path, *, jobs: int, simulate: Simulate | None, storage: str | None = None) -> list[Path]:
    optional("matplotlib", "plotting", "plot")  # before anything trains
    made = 0

    def tick(done: int, total: int, note: str) -> None:
        nonlocal made
        made += 1
        show(done, total, note)

    with console.progress(plan.name, "run") as show:
        execute(plan, out, jobs=jobs, storage=storage, tick=tick)
    if not made:
        console.say(f"{out} holds all runs of this plan already; to make them again, name another folder, or remove this one")
    try:
        if simulate is not None:
            add_peaks(plan, out, simulate)
    except OSError as error:
        raise DataError(f"cannot write results to {out}: {error.strerror or error}") from error
    written = report_of([out])
    _, runs = read_results([out])
    if runs and all(run.failed for run in runs):
        raise DataError(f"every run failed, the first with: {runs[0].error}\n{written[0]} lists them all")
    return written


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
    if publish is not None and publish.resolve().parent == folders[0].resolve():
        raise DataError(f"{publish} is in the folder of the results, beside the report; publish into another folder")
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
    task = Text(data=str(text.absolute()), length=length, **SMALL)
    task.check()
    optional("matplotlib", "plotting", "plot")
    model = task.build(SEED, torch.float32)
    make, steps = api.adapt if mode == "adapter" else api.wrap, limits["steps"]
    opt = make(model, rules, base, lr=limits["low"], scale=scale, carry=carry, seed=SEED)  # type: ignore[arg-type]
    batches = task.batches(steps, SEED)

    def step() -> Tensor:
        opt.zero_grad()
        loss = task.loss(model, next(batches))
        loss.backward()
        opt.step()
        return loss

    with _results_in(out), console.progress("learning rates", "step") as tick:
        found = rates.find_lr(opt, step, on_step=lambda done, loss: tick(done, steps, f"loss {loss:.3g}"), **limits)
    try:
        write_whole(out / "find-lr.json", found.to_json().encode())
        found.plot(out / "find-lr.png")
    except OSError as error:
        raise DataError(f"cannot write the results to {out}: {error.strerror}") from error
    return found
