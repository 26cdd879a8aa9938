"""Several processes of torch.distributed on this machine: what each of them returns, or the error of the first that fails."""

import faulthandler
import multiprocessing
import os
from pathlib import Path

import torch
from torch import distributed, nn
from torch.multiprocessing.spawn import ProcessException
from torch.nn.parallel import DistributedDataParallel

from lingrad.errors import LingradError
from tests.support.runs import MODES

# what most tests import: the processes are forks of one that has it, which starts nothing and computes nothing
IMPORTED = (
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
    "transformers.pytorch_utils",
    "lingrad.testing",
    "lingrad.memory",
)


class Attempts(list):
    """The messages of what is called, one after the other, for a process to return."""

    def __call__(self, function):
        """Call a function and keep its error of lingrad's."""
        try:
            function()
        except LingradError as error:
            self.append(str(error))
        else:
            self.append("nothing was raised")


def _entry(rank, function, world, folder, args):
    died = Path(folder, f"died-{rank}").open("w")  # noqa: SIM115 - where each thread was, if a signal ends the process
    faulthandler.enable(died)
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store-{world}", rank=rank, world_size=world)
    found = function(rank, world, *args)
    torch.save(found, f"{folder}/found-{rank}.pt")
    # what held the group has gone, or is never freed: where a DistributedDataParallel is the last that holds it, it waits, with
    # the interpreter's lock, for gloo's threads, which may wait for that lock
    distributed.destroy_process_group()
    os._exit(0)  # gloo's threads sometimes abort a process that ends in the ordinary way


def each_rank(function, world, folder, *args):
    """Run ``function(rank, world, *args)`` in so many processes; what they return, in the order of ranks.

    What a test changes in the environment after the first of them has started does not reach the later ones.

    The error of a process that a signal ended has what each of its threads was doing.
    """
    multiprocessing.set_forkserver_preload(list(IMPORTED))
    for file in folder.glob("died-*"):
        file.unlink()
    given = (function, world, str(folder), args)
    try:
        torch.multiprocessing.start_processes(_entry, given, nprocs=world, start_method="forkserver")
    except ProcessException as error:  # of the process that ended so, or of another, to which its connection was closed
        error.add_note("\n".join(file.read_text() for file in sorted(folder.glob("died-*"))))
        raise
    (folder / f"store-{world}").unlink(missing_ok=True)
    return [torch.load(folder / f"found-{rank}.pt", weights_only=True) for rank in range(world)]


def train(build, rules, batches, loss, mode, options=None, rank=None, world=2):
    """Micro-batches, a clip from outside and a switch before the last two steps; with a rank in DistributedDataParallel.

    ``options`` are those of the run; its ``process_group`` is DistributedDataParallel's too. Returns the weights.
    """
    model, options = build(), options or {}
    # eps: S^T G of both-sided singular vectors is diagonal but for rounding, which Adam divides by rounding plus eps
    optimizer = MODES[mode](model, rules, "adamw", lr=1e-2, weight_decay=0.1, eps=1e-4, **options)
    inner = model
    if rank is not None:
        model = DistributedDataParallel(model, process_group=options.get("process_group"))
    for step, micro_batches in enumerate(batches):
        if step == len(batches) - 2:
            optimizer.switch("adapter" if optimizer.mode == "optimizer" else "optimizer")
        optimizer.zero_grad()
        *early, last = micro_batches
        for batch in early:
            if rank is None:
                loss(model, batch).backward()
            else:
                with model.no_sync():
                    loss(model, batch.chunk(world)[rank]).backward()
        loss(model, last if rank is None else last.chunk(world)[rank]).backward()
        nn.utils.clip_grad_norm_(inner.parameters(), 0.5)
        optimizer.step()
    return {name: w.detach().clone() for name, w in optimizer.weights().items()}
