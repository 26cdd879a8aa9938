"""One process of several on meta tensors: the model under ``fully_shard``, with a process group that sends nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

from torch import distributed, nn

from lingrad.errors import MemoryModelError, ModeError

Shard = Callable[[nn.Module], nn.Module]


@contextmanager
def first_of(ranks: int, assumed: set[str]) -> Iterator[Shard]:
    """Be the first of several processes, as far as ``fully_shard`` and torch.distributed can tell.

    Args:
        ranks: How many.
        assumed: Receives a sentence for each choice.

    Yields:
        What shards a model on the meta device: each repeated layer, then the rest.

    Raises:
        ModeError: This process is one of several already.
        MemoryModelError: This version of torch has no collectives on meta tensors.
    """
    if ranks == 1:
        yield lambda model: model
        return
    if distributed.is_initialized():
        raise ModeError(
            "this process is one of a torch.distributed run, and ranks=... simulates a run of its own; simulate in a process "
            "without torch.distributed, or take this run's memory with lingrad.memory.track"
        )
    try:
        import torch.distributed._tools.fake_collectives  # collectives on meta tensors
        from torch.distributed.fsdp._fully_shard import _fsdp_param_group, _fully_shard
        from torch.testing._internal.distributed.fake_pg import FakeStore
    except ImportError as error:
        raise MemoryModelError(
            f"this torch ({torch.__version__}) cannot simulate several processes: {error}; memory.estimate counts what each of "
            "them holds between steps"
        ) from error

    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    group, meta = _fsdp_param_group.FSDPParamGroup, torch.device("meta")
    try:
        with ExitStack() as stack:
            # it asks for weights with values, gathers them on the mesh's device, and orders its work by that device's streams
            stack.enter_context(mock.patch.object(group, "_validate_no_meta_params"))
            stack.enter_context(mock.patch.object(_fully_shard, "_get_device_from_mesh", return_value=meta))
            stack.enter_context(mock.patch.object(torch, "meta", torch.cpu, create=True))
            yield lambda model: _shard(model, ranks, assumed)
    finally:
        distributed.destroy_process_group()


def _shard(model: nn.Module, ranks: int, assumed: set[str]) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (ranks,))
    layers = [layer for held in model.modules() if isinstance(held, nn.ModuleList) for layer in held]
    # of lists inside each other the outer one's: an expert is not a layer
    inner = {id(part) for layer in layers for part in layer.modules() if part is not layer}
    layers = [layer for layer in layers if id(layer) not in inner]
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    kinds = sorted({type(layer).__name__.removeprefix("FSDP") for layer in layers})
    each = "".join(f"each {kind}, " for kind in kinds)
    assumed.add(
        f"the first of {ranks} processes; fully_shard of {each}{'then of ' if each else ''}the model; memory that streams hold "
        "back from each other is not counted"
    )
    fully_shard(model, mesh=mesh)
    return model
