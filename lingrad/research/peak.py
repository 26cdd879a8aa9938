"""The memory that each entry of a plan would take on a GPU, simulated from the task's own model and batch."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lingrad import console
from lingrad.files.atomic import write_whole
from lingrad.files.reading import read_json
from lingrad.methods import Method
from lingrad.research.plan import ResearchPlan
from lingrad.research.record import RESULT
from lingrad.research.task import Task, moved
from lingrad.research.ways import make_method

PEAK = "simulated_peak_bytes"  # key of a record's ``train_info``
Simulate = Callable[..., Any]  # `lingrad.memory.simulate`


def add_peaks(plan: ResearchPlan, out: Path, simulate: Simulate) -> None:
    """Simulate the peak of each entry, and note it in the records of its final runs that do not have it yet.

    Args:
        plan: The plan.
        out: The folder of its results.
        simulate: `lingrad.memory.simulate`.
    """
    known: dict[str, int | None] = {}
    for path, record in _unknown(out):
        job, info = record["run_info"]["job"], record["train_info"]
        key = json.dumps([job["entry"], job["values"]], sort_keys=True)
        if key not in known:
            entry = plan.entry(job["entry"])
            console.say(f"{plan.name}: simulating the peak of {entry.name}")
            method = make_method(entry, job["values"], seed=job["seed"], folder=plan.folder)
            dtype = getattr(torch, plan.of(entry).dtype)
            known[key] = simulated_peak(plan.task, method, simulate, dtype=dtype, seed=job["seed"])
        info[PEAK] = known[key]
        write_whole(path, (json.dumps(record, indent=1) + "\n").encode())


def _unknown(out: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(out.glob(f"runs/*/final-*/{RESULT}")):
        with suppress(ValueError, KeyError, TypeError):  # a damaged record, of which the report speaks
            record = read_json(path)
            if record["train_info"]["status"] == "success" and PEAK not in record["train_info"]:
                yield path, record


def simulated_peak(task: Task, method: Method, simulate: Simulate, *, dtype: torch.dtype, seed: int) -> int | None:
    """The most bytes of tensors at a time in two steps on a CUDA device: weights, gradients, state and activations.

    Args:
        task: The task, whose model, first batch and loss are simulated.
        method: How it is trained.
        simulate: `lingrad.memory.simulate`.
        dtype: Of the weights.
        seed: Of the model and the batch.

    Returns:
        Bytes; None where it cannot be simulated, such as a loss that reads values.
    """
    try:
        shell = skeleton(task.build(seed, dtype))
        batch = moved(next(iter(task.batches(1, seed))), "meta")
        peak: int = simulate(lambda: shell, method, loss=lambda model: task.loss(model, batch)).peak
    except Exception:  # code of others, which may need more than shapes
        return None
    return peak


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of a model on the meta device, which takes no memory.

    Args:
        model: The model.

    Returns:
        The copy; weights that are shared stay so.

    Raises:
        TypeError: Its parameters have types of their own, such as bitsandbytes' codes.
    """
    memo: dict[int, Any] = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if type(tensor) not in (nn.Parameter, Tensor):
            raise TypeError(f"a {type(tensor).__name__} cannot be simulated here; expected parameters and plain tensors")
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)
