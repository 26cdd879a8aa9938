"""Run a step on meta tensors with the operators that a real device would use.

Which operators a step runs depends on the device: attention kernels, dropout, and whether an optimizer is fused or uses
foreach. The meta device chooses otherwise than CUDA, so these contexts make CUDA's choices, and the report lists them. Values
that a program reads back from the device are answered by fixed rules, which the report lists too.
"""

from __future__ import annotations

import math
import sys
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

from lingrad import tensors
from lingrad.errors import MemoryModelError

Attention = Literal["flash", "efficient", "math"]
Answer = TypeVar("Answer")

_HALF = (torch.bfloat16, torch.float16)
_AUTOCAST = (
    "autocast does nothing on the meta device, and the copies it makes would be missing; simulate the model in the dtype that "
    "it computes in (dtype=torch.bfloat16), or measure on a real device"
)


@contextmanager
def as_on_cuda(attention: Attention, assumed: set[str]) -> Iterator[None]:
    """Choose operators as PyTorch does on CUDA, on meta tensors.

    Args:
        attention: The kernel of ``scaled_dot_product_attention``. Flash attention does not apply with a mask, in float32, and
            where values have another width than keys; ``flash`` then means ``efficient``.
        assumed: Receives a sentence for each choice.

    Yields:
        None. Functions of torch are replaced while the context is open; function modes would not reach the autograd engine,
        which recomputes checkpointed layers.
    """
    original, dropout = functional.scaled_dot_product_attention, functional.dropout

    def attend(*args: Any, **kwargs: Any) -> Tensor:
        return _attend(original, attention, assumed, *args, **kwargs)

    def drop(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: A002
        if not training or p == 0.0 or inplace:
            return dropout(input, p, training, inplace)
        assumed.add("dropout is native_dropout, which saves a mask of one byte per element")
        dropped: Tensor = torch.native_dropout(input, p, True)[0]
        return dropped

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(functional, "scaled_dot_product_attention", attend))
        stack.enter_context(mock.patch.object(functional, "dropout", drop))
        stack.enter_context(mock.patch.object(torch.cuda, "synchronize"))
        stack.enter_context(mock.patch.object(tensors, "TENSOR_CORES", {*tensors.TENSOR_CORES, "meta"}))
        for kind in ("fused", "foreach"):
            name = f"_get_{kind}_kernels_supported_devices"
            devices = [*getattr(torch_optimizer, name)(), "meta"]
            stack.enter_context(mock.patch.object(torch_optimizer, name, partial(list, devices)))
        yield


def answered(assumed: set[str]) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]:
    """How a simulation runs an operator: unchanged, except where it reads the values of tensors, which meta tensors lack.

    Args:
        assumed: Receives a sentence for each kind of answer.

    Returns:
        A function of (operator, positional arguments, keyword arguments). It raises `MemoryModelError` where the memory
        depends on values: a shape that does, an integer that is read back, an operator without a meta kernel.
    """
    read = torch.ops.aten._local_scalar_dense.default
    equal = torch.ops.aten.equal.default
    product = torch.ops.aten.mm.dtype  # whose meta kernel in torch 2.9 takes no dtype

    def execute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is read and args[0].is_meta:
            return _read(args[0].dtype, assumed)
        if func is equal and args[0].is_meta:
            assumed.add("tensors that are compared are assumed to be equal")
            return True
        if func is product and args[0].is_meta:
            return args[0].new_empty(args[0].shape[0], args[1].shape[1], dtype=args[2])
        try:
            return func(*args, **kwargs)
        except NotImplementedError as error:
            raise MemoryModelError(
                f"{func} cannot run on meta tensors ({str(error).splitlines()[0]}), and its memory is unknown; measure on a "
                "real device, or leave out the module that calls it"
            ) from error

    return execute


def _read(dtype: torch.dtype, assumed: set[str]) -> bool | float:
    if dtype is torch.bool:
        assumed.add("a bool that is read back is True (all finite, any nonzero)")
        return True
    if dtype.is_floating_point:
        assumed.add("a float that is read back is 1.0 (norms are finite and not zero)")
        return 1.0
    raise MemoryModelError(
        f"the program reads an integer ({str(dtype).removeprefix('torch.')}) back from the device, and what it does next may "
        "depend on its value; measure on a real device"
    )


def _attend(
    original: Callable[..., Tensor],
    attention: Attention,
    assumed: set[str],
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
        options = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
        if query.is_meta:
            assumed.add("attention is the plain formula (math), which forms the matrix of attention weights")
        return original(query, key, value, **options, enable_gqa=enable_gqa)
    flash = attention == "flash" and attn_mask is None and query.dtype in _HALF and query.shape[-1] == value.shape[-1]
    if not flash and enable_gqa and key.shape[-3] != query.shape[-3]:
        assumed.add("attention is the plain formula (math): of the other kernels only flash takes fewer key and value heads")
        return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=True)
    assumed.add(f"attention is the {'flash' if flash else 'memory-efficient'} kernel")
    size = query.shape[-1]
    scale = 1 / math.sqrt(size) if scale is None else scale
    if flash:
        query, key, value = (functional.pad(t, (0, -size % 8)) if size % 8 else t for t in (query, key, value))
        attended: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )[0]
        return attended[..., :size] if size % 8 else attended
    if attn_mask is not None:
        if attn_mask.dtype is torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask.logical_not(), -math.inf)
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    made: Tensor = kernel(query, key, value, attn_mask, needs_grad, dropout_p, is_causal, scale=scale)[0]
    return made


@contextmanager
def norms_answered(assumed: set[str]) -> Iterator[None]:
    """Answer the norm that bitsandbytes' kernel of 32-bit moments reads back where an optimizer limits its updates by it.

    Args:
        assumed: Receives a sentence where it is read.

    Yields:
        None. The operator is replaced while the context is open, if bitsandbytes is imported by then.
    """
    if "bitsandbytes" not in sys.modules:
        yield
        return
    kernel = torch.ops.bitsandbytes.optimizer_update_32bit
    floats = [argument.type.kind() == "FloatType" for argument in kernel.default._schema.arguments]

    def update(*args: Any, **kwargs: Any) -> Any:
        known = (
            _read(value.dtype, assumed) if is_float and isinstance(value, Tensor) and value.is_meta else value
            for is_float, value in zip(floats, args, strict=False)
        )
        return kernel(*known, **kwargs)

    update.__dict__.update({name: getattr(kernel, name) for name in kernel.overloads()})  # which torch looks up by this name
    with mock.patch.object(torch.ops.bitsandbytes, "optimizer_update_32bit", update):
        yield


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn errors that come from meta tensors into a `MemoryModelError` that says so.

    Args:
        what: The name of what is run, for the message.

    Yields:
        None.

    Raises:
        MemoryModelError: Something cannot run on the meta device.
        AssertionError: An error of the program itself, unchanged.
        RuntimeError: An error of the program itself, unchanged.
        TypeError: An error of the program itself, unchanged.
    """
    try:
        yield
    except MemoryModelError:
        raise
    except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
        if of_meta(error):
            reason = (str(error) or type(error).__name__).rstrip(".")
            raise MemoryModelError(f"{what} cannot run on meta tensors: {reason}. Measure on a real device instead") from error
        raise


def of_meta(error: BaseException) -> bool:
    """Whether an error comes from meta tensors.

    Args:
        error: An error of a program that was run on them.

    Returns:
        Whether it does.
    """
    if isinstance(error, AssertionError) or "meta" in str(error):  # packages without support for them fail their own assertions
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return any(Path(frame.filename).name == "_meta_registrations.py" for frame in frames)


@contextmanager
def without_autocast() -> Iterator[None]:
    """Refuse autocast, which without CUDA would switch itself off with only a warning.

    Yields:
        None. Entering autocast inside raises `MemoryModelError`.

    Raises:
        MemoryModelError: Autocast is on already.
    """
    if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
        raise MemoryModelError(_AUTOCAST)
    original_init: Any = torch.autocast.__init__
    original_enter: Any = torch.autocast.__enter__

    def init(self: Any, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, **options: Any) -> None:
        original_init(self, "cuda" if device_type == "meta" else device_type, dtype, enabled, **options)
        self.requested = enabled

    def enter(self: Any) -> Any:
        if getattr(self, "requested", self._enabled):
            raise MemoryModelError(_AUTOCAST)
        return original_enter(self)

    with mock.patch.object(torch.autocast, "__init__", init), mock.patch.object(torch.autocast, "__enter__", enter):
        yield


@contextmanager
def as_on_cpu(assumed: set[str]) -> Iterator[None]:
    """Choose operators as PyTorch does on a CPU, on meta tensors.

    Args:
        assumed: Receives a sentence for each choice.

    Yields:
        None. Functions of torch are replaced while the context is open.
    """
    original = functional.scaled_dot_product_attention

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **options: Any
    ) -> Tensor:
        if not query.is_meta or dropout_p or query.shape[-1] != value.shape[-1]:  # torch too takes the formula then
            return original(query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, **options)
        options.pop("enable_gqa", None)  # this kernel takes fewer key and value heads without it
        assumed.add("attention is the CPU's flash kernel")
        attended: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, options.pop("is_causal", False), attn_mask=attn_mask, **options
        )[0]
        return attended

    name = "_get_fused_kernels_supported_devices"
    devices = [*getattr(torch_optimizer, name)(), "meta"]
    with (
        mock.patch.object(functional, "scaled_dot_product_attention", attend),
        mock.patch.object(torch_optimizer, name, partial(list, devices)),
    ):
        yield
