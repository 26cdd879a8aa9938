"""Operations whose meaning for a weight of fused experts is known: its parts, and products with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lingrad.adapters.grouped import Rows, Use


def _one(func: Any, weight: Any, index: Any) -> Any:
    """``weight[e]``."""
    if isinstance(index, Tensor) and index.dim() == 0 and not index.is_meta and index.dtype in _INDICES:
        index = index.item()
    if type(index) is not int or not is_asked(weight) or weight.part.expert is not None:
        return NotImplemented
    count = len(weight.frozen)
    if not -count <= index < count:
        return NotImplemented
    return weight.reader.give(weight.part._replace(expert=index % count))


def _each(func: Any, weight: Any, dim: int = 0) -> Any:
    """``weight.unbind()``, and so iteration."""
    if dim != 0 or weight.part.expert is not None:
        return NotImplemented
    return tuple(_one(func, weight, expert) for expert in range(len(weight.frozen)))


def _iterated(func: Any, weight: Any) -> Any:
    found = _each(func, weight)
    return found if found is NotImplemented else iter(found)


def _select(func: Any, weight: Any, dim: int, index: int) -> Any:
    return _one(func, weight, index) if dim == 0 else NotImplemented


def _turned(func: Any, weight: Any, *dims: int) -> Any:
    """The last two dimensions swapped."""
    most = weight.dim()
    if dims and not all(-most <= dim < most for dim in dims):
        return NotImplemented
    if dims and {dim % most for dim in dims} != {most - 1, most - 2}:
        return NotImplemented
    return weight.reader.give(weight.part._replace(turned=not weight.part.turned))


def _matrix_turned(func: Any, weight: Any) -> Any:
    return NotImplemented if weight.part.expert is None else _turned(func, weight)


def _linear(func: Any, x: Any, weight: Any, bias: Any = None) -> Any:
    """``x @ weight.T + bias`` of one expert."""
    if not _meets(x, weight) or weight.part.expert is None or is_asked(bias):
        return NotImplemented
    out = func(x, weight.frozen, bias)
    return weight.reader.tie(out, x, Use(weight.reader.sub, Rows([_rows(x)]), *weight.part))


def _times(func: Any, x: Any, weight: Any) -> Any:
    """``x @ weight`` of one expert, or of as many rows for each."""
    if not _meets(x, weight):
        return NotImplemented
    count = len(weight.frozen)
    if weight.part.expert is None and (x.dim() != 3 or len(x) != count):
        return NotImplemented
    ends = [_rows(x)] if weight.part.expert is not None else [x.shape[1] * (e + 1) for e in range(count)]
    out = func(x, weight.frozen)
    return weight.reader.tie(out, x, Use(weight.reader.sub, Rows(ends), weight.part.expert, not weight.part.turned))


def _times_from_right(func: Any, weight: Any, x: Any) -> Any:
    return _times(torch.matmul, x, weight)


def _grouped(func: Any, x: Any, weight: Any, offs: Any = None, **more: Any) -> Any:
    """``x @ weight`` of rows that are sorted by expert."""
    if (
        not _meets(x, weight)
        or weight.part.expert is not None
        or x.dim() != 2
        or offs is None
        or any(value is not None for value in more.values())
    ):
        return NotImplemented
    out = func(x, weight.frozen, offs=offs)
    return weight.reader.tie(out, x, Use(weight.reader.sub, Rows(offs), None, not weight.part.turned))


def is_asked(value: Any) -> bool:
    """Whether a value is the weight of fused experts, or a part of it."""
    return hasattr(type(value), "part")


def _meets(x: Any, weight: Any) -> bool:
    plain = isinstance(x, Tensor) and not is_asked(x) and x.dim() >= 2
    return plain and is_asked(weight)


def _rows(x: Tensor) -> int:
    return x.numel() // max(1, x.shape[-1])


class _Product(NamedTuple):
    """What is done where an operation meets the weight.

    Args:
        act: Called with the operation and its arguments; returns NotImplemented where it is of another kind.
        most: How many arguments without a name it takes.
        options: The names of those it takes by name.
    """

    act: Callable[..., Any]
    most: int
    options: frozenset[str] = frozenset()


_INDICES = (torch.int64, torch.int32, torch.int16, torch.int8)  # of no dimension; uint8 is a mask
FACTS = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_meta", "is_cpu")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.element_size, Tensor.is_floating_point, Tensor.__len__),
}
KNOWN = {
    Tensor.__getitem__: _Product(_one, 2),
    **dict.fromkeys((Tensor.select, torch.select), _Product(_select, 3)),
    **dict.fromkeys((Tensor.unbind, torch.unbind), _Product(_each, 2)),
    Tensor.__iter__: _Product(_iterated, 1),
    **dict.fromkeys((Tensor.transpose, torch.transpose), _Product(_turned, 3)),
    Tensor.mT.__get__: _Product(_turned, 1),  # type: ignore[attr-defined]
    Tensor.T.__get__: _Product(_matrix_turned, 1),  # type: ignore[attr-defined]
    Tensor.t: _Product(_matrix_turned, 1),
    nn.functional.linear: _Product(_linear, 3, frozenset({"weight", "bias"})),
    **dict.fromkeys(
        (Tensor.matmul, torch.matmul, Tensor.__matmul__, Tensor.mm, torch.mm, Tensor.bmm, torch.bmm), _Product(_times, 2)
    ),
    Tensor.__rmatmul__: _Product(_times_from_right, 2),
    **{
        getattr(at, name): _Product(_grouped, 2, frozenset({"offs", "bias", "out_dtype"}))
        for at, name in ((torch, "_grouped_mm"), (nn.functional, "grouped_mm"))
        if hasattr(at, name)
    },
}
