"""The report of a comparison: JSON, a table and plots."""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lingrad import console, plotting
from lingrad.errors import DataError, optional
from lingrad.files.atomic import write_whole
from lingrad.files.reading import read_json
from lingrad.research.plans import Setup
from lingrad.research.runner import Record

HEADERS = (
    "method",
    "validation loss",
    "state MB",
    "gradients MB",
    "at refresh MB",
    "ms/step",
    "weights differ",
    "in float64",
)


FILES = ("result.json", "table.md", "loss.png", "gap.png")


@dataclass
class Result:
    """What one comparison measured.

    Args:
        text: The name of the text.
        setup: The sizes.
        records: The float32 runs, one per entry.
        double: The short float64 runs of the entries that should have equal weights.
        machine: Versions and threads.
        seconds: Total wall time.
    """

    text: str
    setup: dict[str, Any]
    records: list[Record]
    double: list[Record]
    machine: dict[str, Any]
    seconds: float


def make_result(text: str, setup: Setup, records: list[Record], double: list[Record], seconds: float) -> Result:
    """Build a result.

    Args:
        text: The name of the text.
        setup: The sizes.
        records: The float32 runs.
        double: The float64 runs.
        seconds: Wall time.

    Returns:
        The result, with the versions of this machine.
    """
    machine = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
    }
    return Result(text, asdict(setup), records, double, machine, seconds)


def rows(result: Result) -> list[tuple[str, ...]]:
    """The cells of the table, one row per entry, in the columns of `HEADERS`.

    Args:
        result: The result.

    Returns:
        Text cells. ``gradients`` is the memory of gradients between backward and step in a typical step, ``at refresh`` the
        maximum over all steps. ``ms/step`` is the median time of forward, backward and step. ``weights differ`` is the largest
        difference of any element of any weight, at any step, from the reference entry.
    """
    exact = {record.label: record for record in result.double}
    table: list[tuple[str, ...]] = []
    for record in result.records:
        typical, most = int(median(record.gradient_bytes)), max(record.gradient_bytes)
        table.append(
            (
                record.label,
                f"{record.valid[0][1]:.2f} → {record.valid[-1][1]:.3f}",
                megabytes(record.state_bytes),
                megabytes(typical),
                megabytes(most) if most != typical else "",
                f"{1e3 * median(record.seconds):.1f}",
                largest_gap(record),
                largest_gap(exact.get(record.label)),
            )
        )
    return table


def largest_gap(record: Record | None) -> str:
    """The largest difference of any weight over a run; empty without a reference."""
    return f"{max(gap[1] for gap in record.gaps):.1e}" if record is not None and record.gaps else ""


def megabytes(count: int) -> str:
    """Bytes in units of 10^6."""
    return f"{count / 1e6:.2f}"


def markdown(result: Result) -> str:
    """The table in Markdown, with aligned columns.

    Args:
        result: The result.

    Returns:
        Lines with a final newline.
    """
    return console.markdown([HEADERS, *rows(result)])


def caption(result: Result) -> str:
    """Model, text, options and machine in a few lines of Markdown."""
    setup, model, machine = result.setup, result.setup["model"], result.machine
    lines = [
        f"A Llama of width {model['hidden']} with {model['layers']} layers and {model['vocabulary']} byte tokens, "
        f"{setup['steps']} steps of {setup['rows']} x {model['length']} bytes of {result.text}, "
        f"{setup['warmup']:.0%} warm-up, then a cosine to a tenth.",
        "",
    ]
    methods = {record.label.split(",")[0]: record for record in reversed(result.records)}
    for label, record in reversed(methods.items()):
        options = ", ".join(f"{key}={value}" for key, value in record.options.items())
        lines.append(f"- {label}: {f'`{record.rules}`' if record.rules else 'every weight in full'}; {options}")
    versions = f"torch {machine['torch']}, {machine['threads']} threads, {machine['processor']}"
    lines += ["", f"{result.seconds:.0f} s for all of it; {versions}."]
    return "\n".join(lines) + "\n"


def to_json(result: Result) -> str:
    """The result as JSON, as `load` reads it."""
    return json.dumps(asdict(result), indent=1)


def save(result: Result, folder: Path) -> list[Path]:
    """Write the `FILES` of a result, each atomically.

    Args:
        result: The result.
        folder: The folder; made if missing.

    Returns:
        The files.

    Raises:
        DataError: The folder cannot be written.
    """
    contents: tuple[Callable[[], bytes], ...] = (
        lambda: to_json(result).encode(),
        lambda: markdown(result).encode(),
        lambda: _plot_losses(result),
        lambda: _plot_gaps(result),
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return [write_whole(folder / name, make()) for name, make in zip(FILES, contents, strict=True)]
    except OSError as error:
        raise DataError(f"cannot write the results to {folder}: {error.strerror}") from error


def load(folder: Path) -> Result:
    """Read a result that `save` wrote.

    Args:
        folder: Its folder.

    Returns:
        The result.

    Raises:
        DataError: There is no result there.
    """
    try:
        raw = read_json(folder / "result.json")
        records, double = ([Record(**record) for record in raw.pop(key)] for key in ("records", "double"))
        return Result(records=records, double=double, **raw)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} holds no result of a lingrad comparison: {error}") from error


def prepare(folder: Path) -> None:
    """Check, before anything is trained, that the results can be plotted and written.

    Args:
        folder: The folder; made if missing.

    Raises:
        DataError: The folder cannot be written. A missing matplotlib raises `DependencyError`.
    """
    optional("matplotlib", "plotting", "plot")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DataError(f"cannot write the results to {folder}: {error.strerror}") from error


def _figure(title: str, ylabel: str) -> tuple[Any, Any]:
    figure, (axes,) = plotting.figure((8.0, 4.5))
    axes.set(title=title, xlabel="step", ylabel=ylabel)
    axes.grid(visible=True, alpha=0.3)
    return figure, axes


def _plot_losses(result: Result) -> bytes:
    figure, axes = _figure(f"Validation loss on {result.text}", "nats a byte")
    styles = ["-", "-", "--", ":", (0, (1, 4)), "-", "-"]
    for record, style in zip(result.records, styles * len(result.records), strict=False):
        axes.plot(*zip(*record.valid, strict=True), linestyle=style, label=record.label, linewidth=1.8)
    axes.legend()
    return plotting.picture(figure)


def _plot_gaps(result: Result) -> bytes:
    figure, axes = _figure("Largest difference of any weight from the optimizer-mode run", "absolute difference")
    colors: dict[str, str] = {}
    for records, dtype, style in ((result.records, "float32", "-"), (result.double, "float64", "--")):
        for record in records:
            if record.gaps:
                steps, gaps, _ = zip(*record.gaps, strict=True)
                color = colors.setdefault(record.label, f"C{len(colors)}")
                # a logarithmic axis cannot show a difference of exactly zero
                heights = [gap or float("nan") for gap in gaps]
                axes.plot(steps, heights, style, color=color, label=f"{record.label}, {dtype}", linewidth=1.8)
    axes.set_yscale("log")
    axes.legend(fontsize="small")
    return plotting.picture(figure)
