"""Workers that are the processes of torch.distributed: a fixed set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, distributed
from typing_extensions import override

from lingrad.config.rounds import Workers
from lingrad.decentralized.messages import Head, by_number, check_heads, packed
from lingrad.errors import ExchangeError, ModeError


class ProcessWorkers(Workers):
    """The processes of a group, one worker each.

    All of them must be there at each exchange; it fails where one has died, or is later than the group's timeout.

    Args:
        group: The group of torch.distributed; None for all processes.

    Raises:
        ModeError: torch.distributed is not initialized, or this process is not in the group.
    """

    def __init__(self, group: distributed.ProcessGroup | None = None) -> None:
        if not (distributed.is_available() and distributed.is_initialized()):
            raise ModeError(
                "ProcessWorkers are processes of torch.distributed, which is not initialized: start them with torchrun, and "
                "call torch.distributed.init_process_group first"
            )
        rank = distributed.get_rank(group)
        if rank < 0:
            raise ModeError("this process is not in the group that ProcessWorkers was given; give it one that it is in")
        super().__init__(rank)
        self._group = group

    @override
    def gather(self, give: Callable[[], Sequence[Tensor]]) -> Mapping[int, Sequence[Tensor]]:
        own = give()
        count, buffer = distributed.get_world_size(self._group), packed(own, distributed.get_backend(self._group))
        try:
            sizes = self._gather(Head(self.number, len(buffer)).to(buffer.device), count)
            heads = [Head(*head.tolist()) for head in sizes]
            check_heads(heads)
            found = self._gather(buffer, count)
        except ExchangeError:
            raise
        except RuntimeError as error:
            raise ExchangeError(
                f"an exchange of {count} workers failed; one of them has died or is late: {error}. A fixed set cannot go on "
                "without one: start again from a checkpoint, or use lingrad.decentralized.TorchftWorkers"
            ) from error
        return by_number(heads, found, own)

    def _gather(self, buffer: Tensor, count: int) -> list[Tensor]:
        found = [torch.empty_like(buffer) for _ in range(count)]
        distributed.all_gather(found, buffer, group=self._group)
        self.sent += buffer.numel() * buffer.element_size() * (count - 1)
        return found
