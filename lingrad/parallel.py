"""Data parallelism: what the processes of one run must agree on.

Coordinates are ordinary parameters, whose gradients DistributedDataParallel averages like any others. What it does not see is
averaged here: the gradient a refresh reads, and coordinate gradients that a hook projects. Every process belongs to the run
once ``torch.distributed`` is initialized with more than one; with one, or none, nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from lingrad.errors import ModeError


def ranks() -> int:
    """The number of processes that share each step."""
    return distributed.get_world_size() if together() else 1


def together() -> bool:
    """Whether torch.distributed runs, even with one process only."""
    return distributed.is_available() and distributed.is_initialized()


def average(tensor: Tensor) -> Tensor:
    """The mean over ranks, in the tensor's shape and dtype; the tensor itself in one process."""
    count = ranks()
    if count == 1:
        return tensor
    mean = (tensor / count).contiguous()  # divided first, as DistributedDataParallel does
    distributed.all_reduce(mean)
    return mean


def share(tensors: Iterable[Tensor]) -> None:
    """Give every rank the first one's values, in place: processes with other thread counts factorise in another order."""
    if ranks() > 1:
        for tensor in tensors:
            whole = tensor.contiguous()
            distributed.broadcast(whole, src=0)
            tensor.copy_(whole)


def refuse_wrapped(model: nn.Module) -> None:
    """Make sure that DistributedDataParallel is not round a model yet.

    Args:
        model: The model.

    Raises:
        ModeError: It is; it would wait for gradients of weights that are frozen now.
    """
    if isinstance(model, DistributedDataParallel):
        raise ModeError(
            "this model is in DistributedDataParallel already, which would wait for the gradients of weights that are frozen "
            "now; pass the model itself to lingrad first, then build DistributedDataParallel(model)"
        )


def exclude(model: nn.Module, params: Iterable[nn.Parameter]) -> None:
    """Tell a DistributedDataParallel that is built later to leave some parameters to us.

    Args:
        model: The model.
        params: Parameters whose gradients are averaged here; none to take it back.
    """
    if ranks() == 1:
        return
    chosen = {id(param) for param in params}
    names = [name for name, param in model.named_parameters(remove_duplicate=False) if id(param) in chosen]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
