"""Running a step on meta tensors with the choices a real device would make.

Which operators a step consists of depends on the device: attention kernels, dropout, and whether an optimizer's loop is fused
or runs over lists of tensors. On the meta device none of it is chosen as on CUDA, so that it is chosen here, for the length of
a context, and said in the report. What a program reads back from the device is answered by a stated policy.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim import optimizer as torch_optimizer

from lingrad.errors import MemoryModelError

Attention = Literal["flash", "efficient", "math"]
Answer = TypeVar("Answer")

_HALF = (torch.bfloat16, torch.float16)
_AUTOCAST = (
    "autocast does nothing on the meta device, so that its copies would be missing; simulate the model in the dtype it "
    "computes in (dtype=torch.bfloat16), or measure on a real device"
)


@contextmanager
def as_on_cuda(attention: Attention, noted: set[str]) -> Iterator[None]:
    """Choose operators as PyTorch does on CUDA, on meta tensors.

    Args:
        attention: The kernel of ``scaled_dot_product_attention``; ``flash`` becomes ``efficient`` where flash attention does
            not apply, which is with a mask or in float32.
        noted: Gets a sentence for each choice that was made.

    Yields:
        None, while the choices hold. Functions are replaced in torch itself: the autograd engine, where checkpointed layers
        are recomputed, sees no function modes.
    """
    plain, dropout = functional.scaled_dot_product_attention, functional.dropout

    def attend(*args: Any, **kwargs: Any) -> Tensor:
        return _attend(plain, attention, noted, *args, **kwargs)

    def drop(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: A002
        if not training or p == 0.0 or inplace:
            return dropout(input, p, training, inplace)
        noted.add("dropout is native_dropout, which keeps a mask of one byte a number")
        dropped: Tensor = torch.native_dropout(input, p, True)[0]
        return dropped

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(functional, "scaled_dot_product_attention", attend))
        stack.enter_context(mock.patch.object(functional, "dropout", drop))
        stack.enter_context(mock.patch.object(torch.cuda, "synchronize"))
        for kind in ("fused", "foreach"):
            name = f"_get_{kind}_kernels_supported_devices"
            devices = [*getattr(torch_optimizer, name)(), "meta"]
            stack.enter_context(mock.patch.object(torch_optimizer, name, partial(list, devices)))
        yield


def answered(noted: set[str]) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]:
    """How a simulation runs an operator: as it is, but for questions about numbers, which meta tensors do not have.

    Args:
        noted: Gets a sentence for each kind of answer that was given.

    Returns:
        A function of (operator, positional arguments, keyword arguments). It raises `MemoryModelError` where nothing can be
        said: a shape that depends on numbers, an integer that is read back, autocast, an operator without a meta kernel.
    """
    read = torch.ops.aten._local_scalar_dense.default
    equal = torch.ops.aten.equal.default

    def execute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is read and args[0].is_meta:
            return _read(args[0].dtype, noted)
        if func is equal and args[0].is_meta:
            noted.add("tensors that are compared are taken to be equal")
            return True
        try:
            return func(*args, **kwargs)
        except NotImplementedError as error:
            raise MemoryModelError(
                f"{func} cannot run without numbers ({str(error).splitlines()[0]}); its memory is unknown. Measure on a real "
                "device, or leave the module that calls it out"
            ) from error

    return execute


def _read(dtype: torch.dtype, noted: set[str]) -> bool | float:
    if dtype is torch.bool:
        noted.add("a question about a tensor is answered yes (all finite, any nonzero)")
        return True
    if dtype.is_floating_point:
        noted.add("a float that is read back is 1.0 (norms are finite and not zero)")
        return 1.0
    raise MemoryModelError(
        f"the program reads an integer ({str(dtype).removeprefix('torch.')}) back from the device and may go on by it in ways "
        "that cannot be foreseen without numbers; measure on a real device"
    )


def _attend(
    plain: Callable[..., Tensor],
    attention: Attention,
    noted: set[str],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if not query.is_meta or attention == "math":
        rest = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
        if query.is_meta:
            noted.add("attention is the plain formula (math), which holds the matrix of weights")
        return plain(query, key, value, **rest, enable_gqa=enable_gqa)
    flash = attention == "flash" and attn_mask is None and query.dtype in _HALF
    if not flash and enable_gqa and key.shape[-3] != query.shape[-3]:
        noted.add("attention is the plain formula (math): of the other kernels only flash takes fewer heads of keys and values")
        return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=True)
    noted.add(f"attention is the {'flash' if flash else 'memory-efficient'} kernel")
    size = query.shape[-1]
    scale = 1 / math.sqrt(size) if scale is None else scale
    if flash:
        query, key, value = (functional.pad(t, (0, -size % 8)) if size % 8 else t for t in (query, key, value))
        made: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )[0]
        return made[..., :size] if size % 8 else made
    if attn_mask is not None:
        if attn_mask.dtype is torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask.logical_not(), -math.inf)
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    made = kernel(query, key, value, attn_mask, needs_grad, dropout_p, is_causal, scale=scale)
    attended: Tensor = made[0]
    return attended


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Say of an error about missing numbers what it means.

    Args:
        what: What is run.

    Yields:
        None.

    Raises:
        MemoryModelError: Something could not be run on the meta device.
        AssertionError: The program's own errors come as they are.
        RuntimeError: The same.
        TypeError: The same.
    """
    try:
        yield
    except MemoryModelError:
        raise
    except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
        # packages that do not know the meta device fail their own assertions on it
        if isinstance(error, AssertionError) or "meta" in str(error) or _in_meta_kernel(error):
            message = (
                f"{what} cannot be run without numbers: {str(error) or type(error).__name__} Measure on a real device instead"
            )
            raise MemoryModelError(message) from error
        raise


def _in_meta_kernel(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return any(Path(frame.filename).name == "_meta_registrations.py" for frame in frames)


@contextmanager
def without_autocast() -> Iterator[None]:
    """Refuse autocast, which where there is no CUDA switches itself off with a warning.

    Yields:
        None; `MemoryModelError` is raised where it is entered, or holds already.

    Raises:
        MemoryModelError: It holds already.
    """
    if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
        raise MemoryModelError(_AUTOCAST)
    plain_init: Any = torch.autocast.__init__
    plain_enter: Any = torch.autocast.__enter__

    def init(self: Any, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, **rest: Any) -> None:
        plain_init(self, "cuda" if device_type == "meta" else device_type, dtype, enabled, **rest)
        self.asked = enabled

    def enter(self: Any) -> Any:
        if getattr(self, "asked", self._enabled):
            raise MemoryModelError(_AUTOCAST)
        return plain_enter(self)

    with mock.patch.object(torch.autocast, "__init__", init), mock.patch.object(torch.autocast, "__enter__", enter):
        yield


@contextmanager
def as_on_cpu(noted: set[str]) -> Iterator[None]:
    """Choose operators as PyTorch does on a CPU, on meta tensors.

    Args:
        noted: Gets a sentence for each choice that was made.

    Yields:
        None, while the choices hold.
    """
    plain = functional.scaled_dot_product_attention

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **rest: Any
    ) -> Tensor:
        if not query.is_meta or dropout_p:
            return plain(query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, **rest)
        rest.pop("enable_gqa", None)  # the kernel takes fewer heads of keys and values as they are
        noted.add("attention is the CPU's flash kernel")
        made: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, rest.pop("is_causal", False), attn_mask=attn_mask, **rest
        )[0]
        return made

    name = "_get_fused_kernels_supported_devices"
    devices = [*getattr(torch_optimizer, name)(), "meta"]
    with (
        mock.patch.object(functional, "scaled_dot_product_attention", attend),
        mock.patch.object(torch_optimizer, name, partial(list, devices)),
    ):
        yield
