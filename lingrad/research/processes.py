"""A run of several processes: torchrun starts them, each computes with its rows of every batch, and the first one writes."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from lingrad.errors import SpecError
from lingrad.research.task import Task, mapped

_STARTED = "TORCHELASTIC_RUN_ID"  # set by torchrun


def launch(job: str, out: str, count: int) -> int:
    """Run a job in several processes, and wait until they have ended.

    Args:
        job: The file of the job.
        out: The folder it writes.
        count: How many processes.

    Returns:
        The exit status of torchrun.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    words = [sys.executable, *torchrun, "-m", "lingrad.research.trial", job, out, str(os.getpid())]
    return subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=False).returncode  # noqa: S603


def is_launched() -> bool:
    """Whether torchrun has started this process."""
    return _STARTED in os.environ


def rank() -> int:
    """The number of this process among those of the run, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def count() -> int:
    """How many processes the run has."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Join the other processes of the run, where torchrun has started this one.

    Args:
        device: Where the run trains.

    Yields:
        Where this process does: of several GPUs its own.
    """
    if not is_launched():
        yield device
        return
    own = device
    if torch.device(device).type == "cuda":
        own = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(own)
    distributed.init_process_group("gloo" if own == device else "nccl")
    try:
        yield own
    except BaseException as error:
        _free_frames(error)
        raise
    finally:
        if distributed.is_initialized():
            # a DistributedDataParallel that is freed later, as the last that holds the group, waits with the interpreter's lock
            # for gloo's threads, which may wait for that lock
            gc.collect()
            distributed.destroy_process_group()


def _free_frames(error: BaseException | None) -> None:
    """Free what the ended calls hold in which an error was raised, or one that led to it: the model and all that trains it."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def replicated(model: nn.Module) -> nn.Module:
    """The model whose gradients are averaged over the processes; itself where there is one process."""
    return model if count() == 1 else DistributedDataParallel(model)


def share(task: Task, batch: Any) -> tuple[Any, float]:
    """This process's rows of a batch.

    Args:
        task: The task.
        batch: The batch, the same in all processes.

    Returns:
        The rows, and a factor: the mean over processes of the loss of their rows, times their factors, is that of the batch.
    """
    if count() == 1:
        return batch, 1.0
    parts = [rows_of(batch, number, count()) for number in range(count())]
    weights = [task.weight(part) for part in parts]
    return parts[rank()], weights[rank()] * count() / sum(weights)


def rows_of(batch: Any, number: int, of: int) -> Any:
    """A part of a batch.

    Args:
        batch: A tensor with rows in front, or a mapping or list of such.
        number: Which part, from 0.
        of: How many parts.

    Returns:
        The part.

    Raises:
        SpecError: The rows cannot be cut into parts of one size.
    """

    def cut(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0 or len(tensor) % of:
            why = f"a tensor of shape {list(tensor.shape)} in a batch cannot be cut for {of} processes"
            raise SpecError(f"{why}; expected as many rows, or a multiple", option="processes")
        return tensor.chunk(of)[number]

    return mapped(batch, cut)


def mean_of_all(value: Tensor) -> float:
    """The mean of a number over the processes, 0-d."""
    found = value.detach().clone()
    if count() > 1:
        distributed.all_reduce(found)
    return float(found) / count()


def agreed(value: Any) -> Any:
    """The first process's value, in all of them."""
    found = [value]
    if count() > 1:
        distributed.broadcast_object_list(found)
    return found[0]
