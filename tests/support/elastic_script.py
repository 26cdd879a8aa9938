"""A sharded run under torchrun that saves after each step, goes on from the last save, and may lose a process in mid-step.

Arguments: a folder; the step in which rank 1 kills itself, or -1.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import lingrad
from tests.support.models import llama, text_batches, text_loss

STEPS = 7


def main(folder, killed):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    model = llama()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    start = lingrad.wrap if "optimizer" in folder.name else lingrad.adapt
    optimizer = start(model, "power(rank=4, every=3)", lr=1e-2, weight_decay=0.1)

    def state():
        model_state, optimizer_state = get_state_dict(model, optimizer)
        return {"model": model_state, "optimizer": optimizer_state}

    done = max((int(path.name) for path in folder.glob("[0-9]*")), default=0)
    if done:
        states = state()
        checkpoint.load(states, checkpoint_id=folder / f"{done}")
        set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    for step, (batch,) in enumerate(text_batches(STEPS, micro=1, rows=6)):
        if step < done:
            continue
        optimizer.zero_grad()
        text_loss(model, batch.chunk(world)[rank]).backward()
        if step == killed and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        checkpoint.save(state(), checkpoint_id=folder / "part")
        distributed.barrier()
        if rank == 0:
            (folder / "part").rename(folder / f"{step + 1}")
        distributed.barrier()
    weights = {name: weight.detach().full_tensor() for name, weight in optimizer.weights().items()}
    if rank == 0:
        torch.save(weights, folder / "weights.pt")
    distributed.destroy_process_group()
    os._exit(0)  # gloo's threads sometimes abort a process that ends in the ordinary way


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
