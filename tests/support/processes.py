"""Several processes of torch.distributed on this machine: what each of them returns, or the error of the first that fails."""

import os

import torch
from torch import distributed


def _entry(rank, function, world, folder, args):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store-{world}", rank=rank, world_size=world)
    found = function(rank, world, *args)
    torch.save(found, f"{folder}/found-{rank}.pt")
    distributed.destroy_process_group()
    os._exit(0)  # gloo's threads sometimes abort a process that ends in the ordinary way


def each_rank(function, world, folder, *args):
    """Run ``function(rank, world, *args)`` in so many processes; what they return, in the order of ranks."""
    torch.multiprocessing.spawn(_entry, (function, world, str(folder), args), nprocs=world)
    (folder / f"store-{world}").unlink(missing_ok=True)
    return [torch.load(folder / f"found-{rank}.pt", weights_only=True) for rank in range(world)]
