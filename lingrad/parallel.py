"""Data parallelism: what the processes of one run must agree on.

Coordinates are ordinary parameters, so DistributedDataParallel averages their gradients. It does not see the gradient that a
refresh reads, nor coordinate gradients that a hook projects: those are averaged here, over the processes of the run. Of a run
of one process nothing here has an effect.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from lingrad.errors import ModeError, SpecError


def initialized() -> bool:
    """Whether torch.distributed is initialized, even with one process only."""
    return distributed.is_available() and distributed.is_initialized()


@dataclass(frozen=True)
class Processes:
    """The processes that train one model together, each on its part of a batch.

    Args:
        group: Their ``torch.distributed.ProcessGroup``; None for all processes that torch.distributed has.
        alone: This process alone, whatever others torch.distributed has.
        adds: Whether each has the gradient of its part of one weight, which add up, and not that of its part of a batch.

    Raises:
        SpecError: This process is not in the group, or it is no group.
    """

    group: Any = None
    alone: bool = False
    adds: bool = False

    def __post_init__(self) -> None:
        """Make sure that this process is one of them."""
        if self.group is None:
            return
        known = distributed.is_available() and isinstance(self.group, distributed.ProcessGroup)
        if not known and not (initialized() and self.group is distributed.GroupMember.NON_GROUP_MEMBER):
            raise SpecError(
                f"process_group must be a group of torch.distributed (new_group(ranks), mesh.get_group()) or None, not a "
                f"{type(self.group).__name__}",
                option="process_group",
            )
        if not known or distributed.get_rank(self.group) < 0:
            raise SpecError(
                f"process_group is a group that this process, rank {distributed.get_rank()}, is not in; call lingrad with a "
                "group of the processes that train this model, this one among them, or not at all in this process",
                option="process_group",
            )

    def __reduce__(self) -> Any:
        """A copy of a model, which is for evaluation, has no group."""
        return Processes, ()

    @property
    def count(self) -> int:
        """How many there are."""
        return distributed.get_world_size(self.group) if initialized() and not self.alone else 1

    @property
    def ranks(self) -> list[int]:
        """Their ranks among all processes, in the order of the group."""
        if not initialized():
            return [0]
        return [distributed.get_rank()] if self.alone else distributed.get_process_group_ranks(self.group)

    def average(self, tensor: Tensor) -> Tensor:
        """The mean over processes, in the tensor's shape and dtype; the tensor itself in one process."""
        count = self.count
        if count == 1:
            return tensor
        mean = (tensor / count).contiguous()  # divided first, as DistributedDataParallel does
        distributed.all_reduce(mean, group=self.group)
        return mean

    def reduce(self, tensor: Tensor) -> Tensor:
        """What is linear in a gradient, of the whole gradient: the mean over processes, or the sum of parts of a weight."""
        if not self.adds:
            return self.average(tensor)
        total = tensor.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total, group=self.group)
        return total

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Give all the values of the first, in place: with another number of threads a factorization rounds differently."""
        if self.count > 1:
            source = self.ranks[0]
            for tensor in tensors:
                values = tensor.contiguous()
                distributed.broadcast(values, src=source, group=self.group)
                tensor.copy_(values)

    def require_equal(self, described: Sequence[str], device: torch.device) -> None:
        """Make sure that all processes train the same, before any of them waits for what another never sends.

        Args:
            described: What this process trains, in lines that are equal where they may be.
            device: Of its parameters, for the messages to travel on.

        Raises:
            ModeError: The processes differ; all of them raise, and name the first difference.
        """
        if self.count == 1:
            return
        digest = hashlib.sha256("\n".join(described).encode()).digest()[:8]
        mine = torch.tensor([int.from_bytes(digest, "big", signed=True)], device=device)
        every = [torch.empty_like(mine) for _ in range(self.count)]
        distributed.all_gather(every, mine, group=self.group)
        if all(bool(one == every[0]) for one in every):
            return
        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, list(described), group=self.group)
        other = next(i for i, lines in enumerate(found) if lines != found[0])
        first, second = found[0], found[other]
        at = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
        one, two = (lines[at] if at < len(lines) else "nothing more" for lines in (first, second))
        raise ModeError(
            f"the {self.count} processes of this run do not train the same: rank {self.ranks[0]} has {one}; rank "
            f"{self.ranks[other]} has {two}. Build the model and call lingrad alike in all of them; where processes hold "
            "different layers (pipeline stages), or train models of their own, give each set its group: process_group="
        )

    def exclude(self, model: nn.Module, params: Iterable[nn.Parameter]) -> None:
        """Have a DistributedDataParallel that is built later ignore some parameters.

        Args:
            model: The model.
            params: Parameters whose gradients are averaged here; they replace those of the last call.
        """
        if self.count == 1:
            return
        chosen = {id(param) for param in params}
        names = [name for name, param in model.named_parameters(remove_duplicate=False) if id(param) in chosen]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


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


def check_around(processes: Processes, refreshes: bool, sends: bool, *_: Any) -> None:
    """Make sure that a DistributedDataParallel around a model is one that its run can be in; a hook on the model's forward.

    Args:
        processes: The processes of the run.
        refreshes: Whether a basis changes now and then.
        sends: Whether the run averages what DistributedDataParallel does not.

    Raises:
        ModeError: It has other processes, or a communication hook that keeps something over a change of basis or leaves
            processes apart, or lets processes run out of batches.
    """
    around = None if torch.compiler.is_dynamo_compiling() else DistributedDataParallel._active_ddp_module
    if around is None:
        return
    if around.process_group is not processes.group:
        theirs, ours = distributed.get_process_group_ranks(around.process_group), processes.ranks
        if processes.alone:
            raise ModeError(
                f"this model is in a DistributedDataParallel of the ranks {theirs}, and trains in rounds, in which workers do "
                "not average gradients; leave DistributedDataParallel out"
            )
        if sorted(theirs) != sorted(ours):
            raise ModeError(
                f"this model is in a DistributedDataParallel of the ranks {theirs}, and its run is of {ours}: gradients "
                "would be averaged over the ones, and bases chosen by the others. Pass one group to both: "
                "lingrad.wrap(model, ..., process_group=group), DistributedDataParallel(model, process_group=group)"
            )
    states = {type(state).__name__: state for _, state in around._comm_hooks}
    power: Any = states.get("PowerSGDState")
    if power is not None and power.use_error_feedback and refreshes:
        raise ModeError(
            "PowerSGD's error feedback adds what it left out of a gradient to later ones, and after a refresh these are "
            "gradients in another basis; pass use_error_feedback=False to PowerSGDState, or keep the bases: every=0"
        )
    if "PostLocalSGDState" in states:
        raise ModeError(
            "post-local SGD lets the weights of subgroups part, and bases are chosen for one model; leave the hook out, "
            "or give each subgroup a run of its own: process_group="
        )
    if around._join_config.enable and sends:
        raise ModeError(
            "join() answers the messages of DistributedDataParallel for processes that have no batches left, and not those by "
            "which a refresh averages what it reads; give all processes as many batches, or use random bases in linear layers"
        )
