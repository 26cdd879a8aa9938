"""The optimizer inside a trainer, its metrics, and the plain model at the end."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from lingrad.engine.optimizer import SubspaceOptimizer
from lingrad.errors import ModeError
from lingrad.tensors import distinct


def find_optimizer(trainer: Any) -> SubspaceOptimizer | None:
    """Lingrad's optimizer, without accelerate's wrapper; None where there is none.

    Args:
        trainer: A Trainer.

    Returns:
        The optimizer.
    """
    found = getattr(trainer, "optimizer", None)
    while found is not None and not isinstance(found, SubspaceOptimizer):
        found = getattr(found, "optimizer", None)
    return found


def optimizer_of(trainer: Any) -> SubspaceOptimizer:
    """Lingrad's optimizer in a trainer, without accelerate's wrapper.

    Args:
        trainer: A Trainer whose ``train()`` has begun, or that was given an optimizer.

    Returns:
        The optimizer.

    Raises:
        ModeError: There is none.
    """
    found = find_optimizer(trainer)
    if found is None:
        other = getattr(trainer, "optimizer", None)
        why = (
            "it has none yet: the Trainer makes it when train() begins"
            if other is None
            else f"it has a {type(getattr(other, 'optimizer', other)).__name__}; pass it **lingrad.hf.trainer_kwargs(...)"
        )
        raise ModeError(f"this trainer has no lingrad optimizer; {why}")
    return found


def finish(trainer: Any) -> nn.Module:
    """End the training: merge all coordinates and restore the plain model.

    The trainer can still evaluate, predict and save; another ``train()`` starts a new run. Call ``save_model`` for an adapter
    before this, not after.

    Args:
        trainer: A Trainer that has trained with lingrad's optimizer.

    Returns:
        Its model.
    """
    optimizer_of(trainer).detach()
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.model_wrapped = trainer.model  # DistributedDataParallel still has the removed coordinates
    model: nn.Module = trainer.model
    return model


@torch.no_grad()
def metrics(optimizer: SubspaceOptimizer) -> dict[str, float]:
    """The figures that `TrainerMixin` adds to the logs of training.

    Args:
        optimizer: The optimizer.

    Returns:
        ``lingrad/refreshes``: changes of basis so far, mean over weights. ``lingrad/captured_energy``: the share of the
        gradient that a basis captured when it was chosen, mean over weights; left out where none was measured.
        ``lingrad/coords_norm``: the norm of all coordinates together, in adapter mode alone; optimizer mode has merged them.
        ``lingrad/state_bytes``: bytes of coordinates, bases and moments.
    """
    subs = optimizer.subspaces
    norms = [sub.coords.norm() for sub in subs if not sub.released]
    held = distinct(tensor for tensor, kind in optimizer.held() if kind != "weight")
    energy = list(optimizer.captured_energy().values())
    found = {
        "lingrad/refreshes": sum(optimizer.refreshes().values()) / max(1, len(subs)),
        "lingrad/state_bytes": sum(tensor.untyped_storage().nbytes() for tensor in held),
    }
    if optimizer.mode == "adapter" and norms:
        found["lingrad/coords_norm"] = float(torch.stack(norms).norm())
    if energy:
        found["lingrad/captured_energy"] = math.fsum(energy) / len(energy)
    return found
