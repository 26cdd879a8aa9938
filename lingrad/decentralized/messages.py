"""The tensors of a message as one buffer of bytes, and what comes before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lingrad.errors import ExchangeError


class Head(NamedTuple):
    """What a worker sends before its buffer, of which all have an equal size.

    Args:
        number: The worker's number.
        size: Bytes of its buffer.
        taken: 1 if what it sends is to be merged, 0 of a worker that joins.
    """

    number: int
    size: int
    taken: int = 1

    def to(self, device: torch.device) -> Tensor:
        """The same as int64 [3]."""
        return torch.tensor(self, dtype=torch.int64, device=device)


def packed(tensors: Sequence[Tensor], backend: str = "gloo") -> Tensor:
    """Tensors as one buffer.

    Args:
        tensors: Of any shapes, dtypes and devices.
        backend: The name of the process group's; what is not of NVIDIA's or Intel's sends memory of the CPU.

    Returns:
        uint8 [bytes].
    """
    on_device = any(name in backend for name in ("nccl", "xccl"))
    device = tensors[0].device if on_device else torch.device("cpu")
    return torch.cat([tensor.detach().contiguous().reshape(-1).view(torch.uint8).to(device) for tensor in tensors])


def unpacked(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of a buffer.

    Args:
        buffer: What `packed` gave.
        like: Tensors of their shapes and dtypes.

    Returns:
        New tensors, on the devices of ``like``.
    """
    sizes = [tensor.numel() * tensor.element_size() for tensor in like]
    parts = buffer.split(sizes)  # cloned, since a view of another dtype must begin at a multiple of its size
    found = (
        (part.clone().view(tensor.dtype).view(tensor.shape), tensor.device) for part, tensor in zip(parts, like, strict=True)
    )
    return [tensor.to(device) for tensor, device in found]


def check_heads(heads: Sequence[Head]) -> None:
    """Make sure that every number is one worker's, and that all whose coordinates are merged send equally much.

    Args:
        heads: Those of all workers.

    Raises:
        ExchangeError: They do not.
    """
    seen: set[int] = set()
    first = next((head for head in heads if head.taken), None)
    for head in heads:
        if head.number in seen:
            raise ExchangeError(
                f"two workers say that they are number {head.number}, and would train one slice twice; give each a number of "
                "its own, from 0"
            )
        seen.add(head.number)
        if first is not None and head.taken and head.size != first.size:
            raise ExchangeError(
                f"worker {first.number} sends {first.size} bytes and worker {head.number} sends {head.size}: their "
                "models, rules or options of Rounds differ; start all of them with the same"
            )


def by_number(heads: Sequence[Head], buffers: Sequence[Tensor], like: Sequence[Tensor]) -> Mapping[int, list[Tensor]]:
    """The tensors of the workers that take part.

    Args:
        heads: Those of all workers.
        buffers: Their buffers.
        like: Tensors of the shapes and dtypes.

    Returns:
        Number -> tensors, in the order of numbers.
    """
    pairs = sorted(zip(heads, buffers, strict=True), key=lambda pair: pair[0].number)
    return {head.number: unpacked(buffer, like) for head, buffer in pairs if head.taken}
