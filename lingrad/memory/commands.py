"""What the command line asks of memory: one run, several beside each other, the largest batch that fits."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch

from lingrad.config.rules import parse_rules
from lingrad.config.settings import Mode
from lingrad.config.sharing import Share
from lingrad.console import align
from lingrad.errors import DataError, DependencyError, MemoryModelError, SpecError, require, require_one_of
from lingrad.memory.estimate import ledger
from lingrad.memory.plots import draw_comparison
from lingrad.memory.report import MemoryReport
from lingrad.memory.runs import simulate
from lingrad.memory.units import parse_bytes, readable
from lingrad.methods import Full, GaloreTorch, Lingrad, Lora, Method
from lingrad.models import open_model

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
LARGEST = 2**16  # rows; no batch beyond is tried


@dataclass(frozen=True)
class Asked:
    """A question about memory.

    Args:
        model: A name, a config, or a folder that holds one; see `lingrad.models.open_model`.
        spec: The spec or rules.
        base: The base optimizer.
        mode: ``optimizer`` or ``adapter``.
        batch: Rows of a batch.
        length: Tokens in a row.
        dtype: The dtype of the model: bfloat16, float16 or float32.
        checkpointing: Recompute layers in the backward.
        layerwise: Step inside the backward.
        capacity: The device's memory, such as ``24GiB``; None for no verdict.
        expandable: Model expandable segments.
        share: Share right bases among layers that read one input.
        stagger: Refresh weights in turns.
    """

    model: str
    spec: str = "svd(rank=128)"
    base: str = "adamw"
    mode: str = "optimizer"
    batch: int = 1
    length: int = 256
    dtype: str = "bfloat16"
    checkpointing: bool = False
    layerwise: bool = False
    capacity: str | None = None
    expandable: bool = False
    share: bool = False
    stagger: bool = False

    def __post_init__(self) -> None:
        """Check what can be wrong."""
        require_one_of(self.mode, get_args(Mode), "mode")
        require_one_of(self.dtype, tuple(DTYPES), "dtype")
        require(self.batch >= 1, "batch", f"batch must be at least 1, not {self.batch}")
        require(self.length >= 2, "length", f"a row needs two tokens or more, not {self.length}")

    @property
    def method(self) -> Method:
        """The run of lingrad that is meant."""
        options = {"lr": 1e-4, "stagger": self.stagger, "share": "input" if self.share else None}
        return Lingrad(self.spec, self.base, cast("Mode", self.mode), options)

    def simulate(self, method: Method) -> MemoryReport:
        """The memory of a method under these circumstances."""
        return simulate(
            lambda: open_model(self.model),
            method,
            batch=self.batch,
            length=self.length,
            dtype=DTYPES[self.dtype],
            checkpointing=self.checkpointing,
            layerwise=self.layerwise,
            capacity=None if self.capacity is None else parse_bytes(self.capacity),
            expandable=self.expandable,
        )


@dataclass(frozen=True)
class Outputs:
    """Where to write what beside the text.

    Args:
        json: The report as JSON.
        plot: A picture: the run over time, or the comparison.
        snapshot: A snapshot for torch's memory visualiser.
    """

    json: Path | None = None
    plot: Path | None = None
    snapshot: Path | None = None

    def __post_init__(self) -> None:
        """Find out before anything is simulated whether files can be written there."""
        for name in ("json", "plot", "snapshot"):
            path: Path | None = getattr(self, name)
            if path is not None and not path.absolute().parent.is_dir():
                raise DataError(f"cannot write {path}: there is no folder {path.absolute().parent}")

    def refuse(self, what: str, *kinds: str) -> None:
        """Make sure that nothing was asked for that there is not.

        Args:
            what: What was asked.
            *kinds: The outputs it does not have.

        Raises:
            SpecError: One of them was asked for.
        """
        for kind in kinds:
            require(getattr(self, kind) is None, kind, f"--{kind} has no effect with {what}; leave it out")


def answer(
    asked: Asked, outputs: Outputs, *, compare_all: bool = False, max_batch: bool = False, closed_form: bool = False
) -> str:
    """Answer a question.

    Args:
        asked: The question.
        outputs: Where to write what.
        compare_all: Compare methods.
        max_batch: Find the largest batch.
        closed_form: Only what stays between steps; nothing is run.

    Returns:
        The text to print. Raises `SpecError` where two of these are asked for, or an output that one does not have.
    """
    chosen = [
        name for name, on in (("--compare", compare_all), ("--max-batch", max_batch), ("--closed-form", closed_form)) if on
    ]
    require(len(chosen) < 2, "compare", f"{' and '.join(chosen)} are different questions; ask one at a time")
    if max_batch:
        outputs.refuse("--max-batch", "json", "plot", "snapshot")
        return largest_batch(asked)[1]
    if compare_all:
        outputs.refuse("--compare", "json", "snapshot")
        return compare(asked, plot=outputs.plot)
    if closed_form:
        outputs.refuse("--closed-form", "plot", "snapshot")
        require(asked.capacity is None, "capacity", "--closed-form knows no peak, and gives no verdict; leave --capacity out")
        return closed(asked, json=outputs.json)
    report = asked.simulate(asked.method)
    _written(outputs.json, report.to_json)
    _written(outputs.plot, report.plot)
    _written(outputs.snapshot, report.to_snapshot)
    return str(report)


def closed(asked: Asked, *, json: Path | None = None) -> str:
    """Only what stays between steps, in closed form.

    Args:
        asked: The question.
        json: Where to write the ledger as JSON.

    Returns:
        A table.
    """
    model = open_model(asked.model).to(DTYPES[asked.dtype])
    tokens, mode = asked.batch * asked.length, cast("Mode", asked.mode)
    share: Share | None = "input" if asked.share else None
    found = ledger(model, asked.spec, asked.base, mode, tokens=tokens, layerwise=asked.layerwise, share=share, lr=1e-4)
    _written(json, found.to_json)
    return str(found)


def compare(asked: Asked, *, plot: Path | None = None) -> str:
    """Full training, galore_torch, both modes of lingrad and LoRA under the same circumstances.

    Args:
        asked: The question; its mode is left open.
        plot: Where to write a bar chart.

    Returns:
        A table.
    """
    reports: dict[str, MemoryReport] = {}
    missing = []
    for method in methods(asked):
        _say(f"simulating {method.label}")
        try:
            reports[method.label] = asked.simulate(method)
        except (DependencyError, MemoryModelError) as error:
            missing.append(f"left out: {method.label} ({error})")
    if plot is not None:
        _written(plot, lambda path: draw_comparison(reports, path))
    return "\n".join([table(reports), *missing])


def methods(asked: Asked) -> list[Method]:
    """What `compare` compares.

    Args:
        asked: The question.

    Returns:
        The methods.

    Raises:
        SpecError: The spec has no rank that the others could take.
    """
    transform = parse_rules(asked.spec)
    rank, every = getattr(transform, "rank", None), getattr(transform, "every", 200)
    if rank is None:
        raise SpecError(f"a comparison needs one rank for all methods; give one spec that has a rank, not '{asked.spec}'")
    galore = cast("Literal['adamw', 'adamw8bit']", asked.base if asked.base in ("adamw", "adamw8bit") else "adamw")
    ours = [replace(asked, mode=mode).method for mode in get_args(Mode)]
    return [Full("adamw"), GaloreTorch(rank, every, galore), *ours, Lora(rank, asked.base)]


def table(reports: Mapping[str, MemoryReport]) -> str:
    """Reports beside each other.

    Args:
        reports: Reports by name.

    Returns:
        Lines that line up.
    """
    rows = [("", "peak", "between steps", "reserved", "verdict")]
    for label, report in reports.items():
        verdict = "" if report.fits is None else "fits" if report.fits else "does NOT fit"
        reserved = "-" if report.reserved is None else readable(report.reserved)
        rows.append((label, readable(report.peak), readable(report.steady), reserved, verdict))
    return "\n".join("  ".join(row).rstrip() for row in align(rows, right=[False, True, True, True, False]))


def largest_batch(asked: Asked, method: Method | None = None) -> tuple[int, str]:
    """The largest batch that fits, by bisection.

    Args:
        asked: The question; its batch is not used, its capacity is.
        method: The method; None is that of the question.

    Returns:
        Rows, 0 where not even one fits, and a sentence.

    Raises:
        SpecError: No capacity was given.
    """
    if asked.capacity is None:
        raise SpecError("the largest batch is that which fits a memory; say how large that is, such as --capacity 24GiB")
    method = asked.method if method is None else method
    tried: dict[int, MemoryReport] = {}

    def fits(batch: int) -> bool:
        _say(f"simulating a batch of {batch}")
        tried[batch] = replace(asked, batch=batch).simulate(method)
        return bool(tried[batch].fits)

    found = _bisect(fits)
    if found == 0:
        return 0, f"not even one row of {asked.length} tokens fits in {asked.capacity}: {readable(tried[1].reserved or 0)}"
    taken = readable(tried[found].reserved or 0)
    least = "at least " if found == LARGEST else ""
    return found, f"{least}{found} rows of {asked.length} tokens fit in {asked.capacity} ({method.label}): {taken}"


def _bisect(fits: Callable[[int], bool]) -> int:
    """The largest whole number that fits, where all smaller ones do."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= LARGEST and fits(high):
        low, high = high, 2 * high
    high = min(high, LARGEST + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _written(path: Path | None, write: Callable[[Path], Any]) -> None:
    if path is None:
        return
    try:
        write(path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from error
    except ValueError as error:  # matplotlib knows pictures by their suffix
        raise DataError(f"cannot write {path}: {error}") from error


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - progress
