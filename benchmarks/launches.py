"""Kernel launches of a step, counted on meta tensors with the operators that CUDA would run: ``python -m benchmarks.launches``.

The model, autograd and the optimizer are the real ones; no GPU is needed, and nothing is timed.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from benchmarks import measure
from benchmarks.operators import CUDA_12, CUDA_13, Cut, Recorder, Row
from benchmarks.plan import COUNTED, ENTRIES, FROZEN, PERIOD, SIZES, Workload
from benchmarks.steps import PHASES, build, run_step
from lingrad.console import markdown as tabulate
from lingrad.memory import kernels
from lingrad.methods import Method
from lingrad.models import LlamaShape


class Counts(NamedTuple):
    """Counts of a step, or of one phase of it.

    Args:
        launches: Kernels that are launched.
        operators: Operators that are dispatched.
        reads: Times that the host waits for a value of the device.
    """

    launches: int
    operators: int
    reads: int


class StepCounts(NamedTuple):
    """Counts of the phases of a step that refreshes nothing."""

    zero_grad: Counts
    forward: Counts
    backward: Counts
    step: Counts

    @property
    def total(self) -> Counts:
        """Counts of the whole step."""
        return Counts(*map(sum, zip(*self, strict=True)))


def count(method: Method, shape: LlamaShape, dtype: torch.dtype, tokens: int, *, cut: Cut = CUDA_13) -> StepCounts:
    """Count the launches, operators and host reads of a step that refreshes nothing.

    Args:
        method: How the model is trained.
        shape: The Llama's shape.
        dtype: Of its weights.
        tokens: In a batch, in rows of at most ``shape.length``.
        cut: How lists of tensors are cut into launches.

    Returns:
        The counts of each phase.
    """
    rows = record(method, shape, dtype, tokens, cut=cut)
    return StepCounts(*(summed(rows[phase]) for phase in PHASES))


def summed(rows: Iterable[Row]) -> Counts:
    """The counts of some operators."""
    rows = list(rows)
    return Counts(sum(row.launches for row in rows), len(rows), sum(row.reads for row in rows))


def record(method: Method, shape: LlamaShape, dtype: torch.dtype, tokens: int, *, cut: Cut = CUDA_13) -> dict[str, list[Row]]:
    """Record the operators of a step that refreshes nothing; arguments as of `count`.

    Returns:
        Phase -> its operators, in order.
    """
    length = min(shape.length, tokens)
    workload = Workload("", replace(shape, length=length), max(1, tokens // length), dtype=dtype)
    with kernels.as_on_cuda("flash", set()), kernels.without_autocast(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = build(workload, "meta")
        ids = torch.zeros(workload.rows, length, dtype=torch.int64, device="meta")
        with Recorder(cut) as recorder:
            training = method.prepare(model)
            for _ in range(2):  # the first step refreshes and makes the moments
                recorder.rows = []
                run_step(training, ids, recorder.lap)
    return recorder.phases


def table(workload: Workload, cut: Cut, keys: Sequence[str] = COUNTED) -> str:
    """The launches of a step of each method, as Markdown; in brackets a linear layer's, beyond the frozen layer's."""
    base: StepCounts | None = None
    rows = [("method", *PHASES, "launches", "operators", "host reads")]
    linears = 7 * workload.model.layers
    for key in keys:
        found = count(ENTRIES[key].make(workload.rank, PERIOD), workload.model, workload.dtype, workload.tokens, cut=cut)
        base = found if key == FROZEN else base
        each = [f"{part.launches}" for part in found]
        if base is not None and key != FROZEN:
            per = [(part.launches - least.launches) / linears for part, least in zip(found, base, strict=True)]
            each = [f"{text} ({more:+.2f})" for text, more in zip(each, per, strict=True)]
        rows.append((key, *each, *map(str, found.total)))
    return tabulate(rows)


def main() -> None:
    """Read the command line, count, and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches", description=__doc__)
    parser.add_argument("--model", choices=sorted(SIZES), default="llama1024")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--cuda", type=int, choices=(12, 13), default=13, help="lists of tensors as builds for it cut them")
    chosen = parser.parse_args()
    shape = SIZES[chosen.model]
    workload = Workload(chosen.model, shape, max(1, chosen.tokens // shape.length), chosen.rank, getattr(torch, chosen.dtype))
    measure.say(f"{chosen.model}, {chosen.dtype}, rank {chosen.rank}, {workload.tokens} tokens: launches of a step")
    sys.stdout.write(table(workload, CUDA_12 if chosen.cuda == 12 else CUDA_13))
    sys.stdout.write("\nIn brackets: launches for each linear layer, beyond those of the frozen model.\n")


if __name__ == "__main__":
    main()
