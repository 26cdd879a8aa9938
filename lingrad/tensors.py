"""Helpers for tensors: a shape and a dtype without data, casts, sizes in bytes, storages, parts of several processes, hooks."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

_DTENSOR = "torch.distributed.tensor"  # imported where a DTensor is known to exist: it takes as long as torch itself


class TensorSpec(NamedTuple):
    """The shape and the dtype of a stored tensor.

    Args:
        shape: Its shape.
        dtype: Its dtype.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return prod(self.shape) * self.dtype.itemsize


TENSOR_CORES = {"cuda"}  # types of devices that multiply bfloat16 many times faster than float32


def on_tensor_cores(tensor: Tensor) -> bool:
    """Whether a tensor's device multiplies bfloat16 many times faster than float32."""
    return tensor.device.type in TENSOR_CORES


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, without the cost of a call that changes nothing."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to factorise or sum in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def nbytes(*tensors: Tensor) -> int:
    """Bytes of the elements of some tensors; memory that two of them share is counted twice."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def storage(tensor: Tensor) -> int:
    """A key of its storage: equal for tensors that share memory, different for any others that are alive."""
    key: int = tensor.untyped_storage()._cdata
    return key


def distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    """One tensor per storage, in the order of first appearance: the last of those that share it. Empty tensors are dropped."""
    return list({storage(tensor): tensor for tensor in tensors if tensor.numel()}.values())


def dense(tensor: Tensor) -> Tensor:
    """The tensor, or, of a sparse one, as an embedding's gradient may be, a dense copy."""
    return tensor.to_dense() if tensor.is_sparse else tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which each process holds a part."""
    if type(tensor) is Tensor or type(tensor) is nn.Parameter:
        return False
    module = sys.modules.get(_DTENSOR)
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The tensor, all of it, in every process; a collective where it is sharded."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def own(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, sharing memory with it."""
    return tensor._local_tensor if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def is_zero(value: Any, shape: torch.Size) -> bool:
    """Whether something is a tensor of a shape whose elements are all zero; a collective where it is sharded."""
    return isinstance(value, Tensor) and value.shape == shape and not bool(whole(value).any())


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors, or this process's parts of two, begin at one address, or have no elements."""
    return is_sharded(a) == is_sharded(b) and own(a).data_ptr() == own(b).data_ptr()


def call(method: weakref.WeakMethod[Callable[..., None]] | None, *args: Any) -> None:
    """Call a method whose object a hook does not keep alive, if that is alive."""
    found = None if method is None else method()
    if found is not None:
        found(*args)


_HOST: dict[int, weakref.ref[Any]] = {}  # storages that `host_like` has made, by `storage`


def host_like(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """Memory of the host for a copy of a tensor, uninitialized, with its shape, dtype and strides; see `on_host`.

    Args:
        tensor: The tensor.
        device: The device that uses it; None is the tensor's. For CUDA the memory is pinned, so that copies need not wait; on
            the meta device, where a run is simulated, the result is on it too.

    Returns:
        The memory.
    """
    kind = (device or tensor.device).type
    with _disable_current_modes():  # a memory report would take it for memory of the device, before it is known here
        made = torch.empty_like(tensor, device=kind if kind == "meta" else "cpu", pin_memory=kind == "cuda")
    key, held = storage(made), made.untyped_storage()
    _HOST[key] = weakref.ref(held, lambda _: _HOST.pop(key, None))
    return made


def on_host(tensor: Tensor) -> bool:
    """Whether a tensor is in memory that `host_like` has made."""
    return storage(tensor) in _HOST


def to_host(tensor: Tensor, memory: Tensor | None = None, device: torch.device | None = None, *, wait: bool = True) -> Tensor:
    """A copy of a tensor in host memory.

    Args:
        tensor: The tensor.
        memory: A result of this function for an earlier tensor, whose memory is used again if it fits.
        device: The device that uses it; None is the tensor's.
        wait: Return when the copy is complete; else it may be under way.

    Returns:
        The copy.
    """
    if memory is None or _layout(memory) != _layout(tensor):
        memory = host_like(tensor, device)
    return memory.copy_(tensor, non_blocking=not wait)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on a device, with the strides of the tensor; the host does not wait for it where that is pinned."""
    return torch.empty_like(tensor, device=device).copy_(tensor, non_blocking=True)


def _layout(tensor: Tensor) -> tuple[torch.Size, torch.dtype, tuple[int, ...]]:
    return tensor.shape, tensor.dtype, tensor.stride()
