"""Weights of which each process holds some rows, as ``fully_shard`` (FSDP2) makes them.

The coordinates of such a weight are a DTensor too, cut along their first dimension as the weight is along its own. With a basis
on the right they are the coordinates of the very rows that a process holds, and a merge sends nothing; with one on the left
every row needs all of them, and a merge gathers r-sized numbers. A gradient of coordinates is born whole in each process, from
its part of the batch, and is reduced to shards there and then: r-sized numbers as well.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

from torch import Tensor, nn
from typing_extensions import override

from lingrad.errors import ModeError
from lingrad.tensors import is_sharded, own, whole


def refuse_late(name: str) -> NoReturn:
    """Refuse a weight that was sharded after a run was made of it.

    Args:
        name: The weight's name.

    Raises:
        ModeError: Always.
    """
    raise ModeError(
        f"{name} was sharded after lingrad was called (fully_shard, parallelize_module, an FSDP plugin), and its coordinates "
        "with it; shard the model first, then call lingrad on it (with accelerate: lingrad.hf.prepare)"
    )


def refuse_reader(name: str) -> NoReturn:
    """Refuse a sharded weight that is read without its layer.

    Args:
        name: The weight's name.

    Raises:
        ModeError: Always.
    """
    raise ModeError(
        f"{name} is sharded and read by another than its layer's own call (or has a gradient that another program assigned); "
        "leave it out by a rule, 'none', or train it unsharded"
    )


def reshard(model: nn.Module) -> None:
    """Have the modules hold their shards that hold gathered weights, as after a forward without a backward.

    Args:
        model: The model.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # takes long to import, and is, where anything is sharded by it
    if fsdp is None:
        return
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def refuse_factors(model: nn.Module) -> None:
    """Make sure that fully_shard takes the mean of gradients over processes, as coordinates do.

    Args:
        model: The model.

    Raises:
        ModeError: A factor of the user's own was set on a part of it.
    """
    from torch.distributed.fsdp import FSDPModule

    for name, module in model.named_modules():
        group = module._get_fsdp_state()._fsdp_param_group if isinstance(module, FSDPModule) else None
        if getattr(group, "gradient_divide_factor", None) is not None:
            raise ModeError(
                f"set_gradient_divide_factor was called on {name or 'the model'}, which the gradients of coordinates do not "
                "follow: they are means over processes. Leave it out, and multiply the loss by the number of processes"
            )


@dataclass(frozen=True)
class Sharding:
    """How a weight, and its coordinates, are spread over processes, each of which has its part of a batch.

    Args:
        mesh: The processes, a ``DeviceMesh``.
        placements: For each dimension of the mesh ``Shard(0)``, or ``Replicate()`` where several have the same rows.

    Attributes:
        dim: The dimension that is cut.
    """

    mesh: Any
    placements: tuple[Any, ...]

    dim: ClassVar[int] = 0

    def spread(self, tensor: Tensor) -> Tensor:
        """This process's part of what every process has; nothing is sent.

        Args:
            tensor: The same in every process.

        Returns:
            A DTensor.
        """
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor.detach(), self.mesh, self.placements, src_data_rank=None)

    def taken(self, coords: Tensor) -> Tensor:
        """The coordinates that the layer's own products take: all of them, gathered."""
        return whole(coords)

    def reduce(self, part: Tensor, like: Tensor) -> Tensor:
        """The gradient of the coordinates, of what each process has: the mean; a reduce-scatter for each dimension of the mesh.

        Args:
            part: What this process has, of the whole shape.
            like: The coordinates.

        Returns:
            A DTensor.
        """
        from torch.distributed.tensor import DTensor, Partial

        # divided first, as in DistributedDataParallel
        summed = DTensor.from_local(part / self.mesh.size(), self.mesh, [Partial()] * self.mesh.ndim, run_check=False)
        return summed.redistribute(self.mesh, self.placements)

    def rows(self, count: int) -> slice:
        """The rows, or columns, that this process holds of a weight of so many."""
        start, size = 0, count
        for dim, placement in enumerate(self.placements):
            if placement.is_shard():
                chunk = -(-size // self.mesh.size(dim))
                first = min(self.mesh.get_local_rank(dim) * chunk, size)
                start, size = start + first, min(chunk, size - first)
        return slice(start, start + size)


@dataclass(frozen=True)
class LayerSharding(Sharding):
    """How a layer is spread over processes, each of which computes a part of it for the whole batch (tensor parallelism).

    By rows each has some of its outputs, by columns it takes some of its inputs. The basis is on the other side, so that a part
    of the coordinates belongs to a part of the weight: products, gradients and merges send nothing.
    """

    @property
    def dim(self) -> int:  # type: ignore[override]
        """The dimension that is cut: rows (``ColwiseParallel``) or columns (``RowwiseParallel``)."""
        found: int = self.placements[0].dim
        return found

    @override
    def taken(self, coords: Tensor) -> Tensor:
        return own(coords)

    @override
    def reduce(self, part: Tensor, like: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(part, self.mesh, self.placements, run_check=False, shape=like.shape, stride=like.stride())


def sharding_of(param: Tensor, name: str, model: object, ranks: Sequence[int]) -> Sharding | None:
    """How a parameter is spread.

    Args:
        param: The parameter.
        name: Its name, for messages.
        model: The model, or what was given in its place.
        ranks: The processes of the run.

    Returns:
        None where every process has all of it.

    Raises:
        ModeError: It is cut in another way than by rows, or over other processes than those of the run.
    """
    if not is_sharded(param):
        return None
    from torch.distributed.fsdp import FSDPModule

    given: Any = param
    mesh, placements = given.device_mesh, tuple(given.placements)
    by_fully_shard = isinstance(model, nn.Module) and any(isinstance(module, FSDPModule) for module in model.modules())
    plain = all(p.is_replicate() or type(p).__name__ == "Shard" for p in placements) and param.dim() == 2
    if by_fully_shard:
        fits = plain and all(p.is_replicate() or p.is_shard(0) for p in placements)
    else:
        fits = plain and len(placements) == 1 and placements[0].is_shard()
    if not fits:
        raise ModeError(
            f"{name} {tuple(param.shape)} is cut as {placements}; only matrices that fully_shard has cut by rows, or "
            "ColwiseParallel or RowwiseParallel over a mesh of one dimension, not both together, can be trained in a subspace. "
            "Leave it out by a rule: 'none'"
        )
    spread = sorted(mesh.mesh.flatten().tolist())
    if spread != sorted(ranks):
        raise ModeError(
            f"{name} is spread over the ranks {spread}, and the processes of this run are {sorted(ranks)}; they must train one "
            "model together. Shard over a mesh of all of them, or pass the mesh's group: process_group=mesh.get_group()"
        )
    return (Sharding if by_fully_shard else LayerSharding)(mesh, placements)
