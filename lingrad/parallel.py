"""Data parallelism: what the processes of one run must agree on.

Coordinates are ordinary parameters, so DistributedDataParallel averages their gradients. It does not see the gradient that a
refresh reads, nor coordinate gradients that a hook projects: those are averaged here. All processes of ``torch.distributed``
belong to the run; with one process, nothing here has an effect.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from lingrad.errors import ModeError


def ranks() -> int:
    """The number of processes of the run."""
    return distributed.get_world_size() if initialized() else 1


def initialized() -> bool:
    """Whether torch.distributed is initialized, even with one process only."""
    return distributed.is_available() and distributed.is_initialized()


def average(tensor: Tensor) -> Tensor:
    """The mean over ranks, in the tensor's shape and dtype; the tensor itself in one process."""
    count = ranks()
    if count == 1:
        return tensor
    mean = (tensor / count).contiguous()  # divided first, as DistributedDataParallel does
    distributed.all_reduce(mean)
    return mean


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Give every rank the values of rank 0, in place: with another number of threads a factorization rounds differently."""
    if ranks() > 1:
        for tensor in tensors:
            values = tensor.contiguous()
            distributed.broadcast(values, src=0)
            tensor.copy_(values)


def refuse_wrapped(model: object) -> None:
    """Make sure that a model is not in DistributedDataParallel yet, in the first FullyShardedDataParallel, nor DeepSpeed's.

    Args:
        model: The model, or its parameters.

    Raises:
        ModeError: It is; DistributedDataParallel would wait for gradients of weights that are frozen now, and the others make
            flat vectors of weights.
    """
    if any(kind.__name__ == "DeepSpeedEngine" for kind in type(model).__mro__):
        raise ModeError(
            "this model is in DeepSpeed's engine, which trains it with an optimizer of its own; leave DeepSpeed out, and shard "
            "the model by torch.distributed.fsdp.fully_shard (FSDP2), then call lingrad"
        )
    if isinstance(model, DistributedDataParallel):
        raise ModeError(
            "this model is in DistributedDataParallel already, which would wait for gradients of weights that are frozen "
            "now; pass the model itself to lingrad first, then build DistributedDataParallel(model)"
        )
    if isinstance(model, nn.Module) and any(type(part).__name__ == "FullyShardedDataParallel" for part in model.modules()):
        raise ModeError(
            "this model is in FullyShardedDataParallel, which makes flat vectors of its weights, in which there are no "
            "subspaces; shard it by torch.distributed.fsdp.fully_shard (FSDP2, fsdp_version: 2), then call lingrad"
        )


def exclude(model: nn.Module, params: Iterable[nn.Parameter]) -> None:
    """Have a DistributedDataParallel that is built later ignore some parameters.

    Args:
        model: The model.
        params: Parameters whose gradients are averaged here; they replace those of the last call.
    """
    if ranks() == 1:
        return
    chosen = {id(param) for param in params}
    names = [name for name, param in model.named_parameters(remove_duplicate=False) if id(param) in chosen]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
