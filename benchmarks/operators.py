"""Operators as CUDA would run them: what each launches, computes and moves, read off meta tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import flops
from lingrad.memory import kernels

# operators that only allocate, or only change what a tensor says of itself; views are recognised by torch's own flag
FREE = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_"),
    *("detach", "detach_", "alias", "lift_fresh", "_reshape_alias", "_unsafe_view"),
    *("is_same_size", "_local_scalar_dense", "equal"),
}
# launches of operators that are several kernels; by reading their sources, except for the factorisations, which are estimated
SEVERAL = {
    "embedding_dense_backward": 6,
    "_scaled_dot_product_flash_attention_backward": 3,
    "_scaled_dot_product_efficient_attention_backward": 3,
    "nll_loss_backward": 2,
    "slice_backward": 2,
    "select_backward": 2,
    "linalg_qr": 20,
    "_linalg_svd": 50,
    "_linalg_eigh": 50,
}
READS = {"_local_scalar_dense", "equal", "nonzero", "masked_select"}  # the host waits for a value
OVERWRITES = {"zero_", "fill_", "copy_", "normal_", "uniform_", "_foreach_zero_", "_foreach_copy_"}  # their target is not read
GATHERS = {"embedding", "index_select", "gather"}  # they read as much as they write
CHUNK = 65536  # elements that one block of a list kernel works on


class Cut(NamedTuple):
    """How ATen's multi_tensor_apply cuts lists of tensors into launches.

    Args:
        tensors: The most tensors of a launch, by the number of lists (1 to 5).
        blocks: The most blocks of a launch.
    """

    tensors: tuple[int, ...]
    blocks: int


CUDA_12 = Cut((110, 64, 48, 36, 30), 320)  # arguments of a kernel in 4 KB
CUDA_13 = Cut((770, 448, 336, 252, 210), 2240)  # in 32 KB; torch's default build from 2.11 on


class Row(NamedTuple):
    """One operator of a step.

    Args:
        name: Its name, without ``aten::``.
        kind: ``product``, ``attention``, ``list`` (of tensors: foreach and fused), ``pointwise`` (anything else that launches),
            or ``free``.
        launches: Kernels that it launches.
        flops: Floating-point operations of its products.
        nbytes: Bytes that it reads and writes.
        dtype: Of the operands of its products.
        narrow: The narrowest side of its product.
        reads: Whether the host waits for a value.
    """

    name: str
    kind: str
    launches: int
    flops: int = 0
    nbytes: int = 0
    dtype: torch.dtype = torch.float32
    narrow: int = 0
    reads: bool = False


class Recorder(TorchDispatchMode):
    """Runs operators on meta tensors, and records them.

    Args:
        cut: How lists of tensors are cut into launches.
    """

    def __init__(self, cut: Cut = CUDA_13) -> None:
        super().__init__()
        self.cut = cut
        self.rows: list[Row] = []
        self.phases: dict[str, list[Row]] = {}
        self.execute: Callable[..., Any] = kernels.answered(set())

    def lap(self, phase: str) -> None:
        """End a phase: the operators since the last one are its own."""
        self.phases[phase], self.rows = self.rows, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = self.execute(func, args, kwargs)
        self.rows.append(row_of(func, args, kwargs, out, self.cut))
        return out


def row_of(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any, cut: Cut) -> Row:
    """What one call of an operator would launch on CUDA, and its work.

    Args:
        func: The operator.
        args: Its positional arguments, meta tensors.
        kwargs: Its keyword arguments.
        out: Its result.
        cut: How lists of tensors are cut into launches.

    Returns:
        The row.
    """
    name = func._schema.name.removeprefix("aten::")
    reads = name in READS
    given, made = _tensors((args, kwargs)), _tensors(out)
    listed = name.startswith(("_foreach", "_fused"))
    on_host = all(t.device.type == "cpu" for t in (*given, *made))
    if name in FREE or func.is_view or on_host or not any(t.numel() for t in (*given, *made)):
        return Row(name, "free", 0, reads=reads)
    nbytes = _traffic(func, name, args, kwargs, given, made)
    if listed:
        return Row(name, "list", list_launches(func, args, out, cut), nbytes=nbytes, reads=reads)
    work = flops.of(func, args, kwargs, out)
    launches = SEVERAL.get(name, 1)
    if not work:
        return Row(name, "pointwise", launches, nbytes=nbytes, reads=reads)
    if "attention" in name:
        return Row(name, "attention", launches, work, nbytes, given[0].dtype)
    a, b = [t for t in args if isinstance(t, Tensor)][-2:]
    if name in ("addmm", "baddbmm") and args[0].dim() > 1 and kwargs.get("beta", 1):
        launches = 2  # what is added to is copied first
    return Row(name, "product", launches, work, nbytes, a.dtype, min(*a.shape[-2:], b.shape[-1]))


def list_launches(func: Any, args: Sequence[Any], out: Any, cut: Cut) -> int:
    """Launches of an operator on lists of tensors, as multi_tensor_apply makes them.

    Args:
        func: The operator.
        args: Its positional arguments.
        out: Its result: lists that it makes count among its lists.
        cut: The limits of a launch.

    Returns:
        Their number. Foreach lists of mixed dtypes take one for each tensor, as in ATen's slow path.
    """
    name = func._schema.name.removeprefix("aten::")
    named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
    named.pop("state_steps", None)  # of fused optimizers; goes with each tensor, not as a list
    lists = [value for value in (*named.values(), out) if isinstance(value, (list, tuple)) and value]
    lists = [each for each in lists if isinstance(each[0], Tensor)]
    sizes = [t.numel() for t in lists[0]]
    mixed = len({t.dtype for each in lists for t in each}) > 1
    if mixed and name.startswith("_foreach") and name != "_foreach_copy_":
        return len(sizes)
    return cut_into(sizes, cut.tensors[min(len(lists), 5) - 1], cut.blocks)


def cut_into(sizes: Iterable[int], tensors: int, blocks: int) -> int:
    """Launches that lists of tensors of some sizes are cut into.

    Args:
        sizes: Elements of each tensor.
        tensors: The most tensors of a launch.
        blocks: The most blocks of `CHUNK` elements of a launch.

    Returns:
        Their number.
    """
    launches = held = used = 0
    for size in sizes:
        chunks = ceil(size / CHUNK)
        held += bool(chunks)
        while chunks:
            taken = min(chunks, blocks - used)
            used, chunks = used + taken, chunks - taken
            if used == blocks or (not chunks and held == tensors):
                launches, used, held = launches + 1, 0, int(chunks > 0)
    return launches + (used > 0)


def _tensors(values: Any) -> list[Tensor]:
    return list({id(t): t for t in tree_leaves(values) if isinstance(t, Tensor)}.values())


def _traffic(func: Any, name: str, args: Any, kwargs: Any, given: list[Tensor], made: list[Tensor]) -> int:
    """Bytes that an operator reads and writes; a stride of 0 repeats what is in memory once."""
    schema = func._schema.arguments
    values = {argument.name: value for argument, value in zip(schema, args, strict=False)} | kwargs
    changed = {argument.name for argument in schema if argument.alias_info is not None and argument.alias_info.is_write}
    if name.startswith("_fused"):
        changed -= {"grads"}  # written only where a GradScaler is
    written = _tensors([values[key] for key in changed if key in values])
    aliases = {id(t) for t in written}
    written += [t for t in made if id(t) not in aliases]
    read = [t for t in given if not (name in OVERWRITES and id(t) in aliases)]
    if name in GATHERS:
        read = written
    return sum(_stored(t) for t in (*read, *written))


def _stored(tensor: Tensor) -> int:
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else min(size, 1)
    return elements * tensor.element_size()
