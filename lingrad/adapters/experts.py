"""What a layer of fused experts reads as its weight: products with it have a projected gradient.

transformers multiplies experts one by one, ``linear(x, weight[e])``, in one grouped product over rows that are sorted by
expert, or in a batched one with as many rows for each. These are known here; whatever else is done with the weight, such as a
gather of one matrix for each token, is done with the plain weight, whose gradient is formed and projected.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from typing_extensions import override

from lingrad.adapters.base import applied
from lingrad.adapters.grouped import ExpertProduct, Rows, Tokens, Use
from lingrad.adapters.reading import read
from lingrad.maps.stacked import BatchedMap
from lingrad.subspaces.subspace import Subspace


def fuses_experts(sub: Subspace) -> bool:
    """Whether a weight is that of fused experts, one under the other in its first dimension, whose products are known.

    Args:
        sub: Its subspace.

    Returns:
        Whether it is. A weight of two dimensions is a matrix, which a model may read in any way.
    """
    return sub.weight.param.dim() == 3 and isinstance(sub.map(), BatchedMap)


class ExpertsReader:
    """Gives a layer its weight.

    Args:
        sub: The subspace.
        adapter: Whether the weight is that of adapter mode, W + S z.
    """

    def __init__(self, sub: Subspace, *, adapter: bool) -> None:
        self.sub = sub
        self.adapter = adapter
        self._tokens: tuple[tuple[Any, ...], tuple[Tensor, ...]] = ((), ())

    def __getstate__(self) -> dict[str, Any]:
        """Without the tensors of a running forward."""
        return {**vars(self), "_tokens": ((), ())}

    def plain(self) -> Tensor:
        """The weight as everybody else sees it: its gradient is formed, and projected."""
        return read(self.sub, averages=True) if self.adapter else self.sub.weight.param

    def read(self) -> Tensor:
        """The weight [count, m, n]."""
        sub = self.sub
        usable = (
            torch.is_grad_enabled()
            and sub.coords.requires_grad
            and (self.adapter or sub.weight.param.requires_grad)
            and not torch.compiler.is_compiling()
            and not torch._C._are_functorch_transforms_active()
        )
        if not usable:
            return self.plain()
        sub.require_intact()
        return ExpertsWeight(self, sub.weight.param.detach(), None, turned=False)

    def tie(self, out: Tensor, x: Tensor, use: Use) -> Tensor:
        """A product with W tied to the coordinates, which are added to it where they are not zero."""
        sub = self.sub
        token = sub.coords if use.expert is None else self._token(use.expert)
        tied: Tensor = applied(ExpertProduct, out, x, token, use, not sub.released)
        return tied

    def _token(self, expert: int) -> Tensor:
        """What stands for one expert's coordinates, the same for all uses, so that their gradient is put together once."""
        coords = self.sub.coords
        key = (coords.device, coords.dtype, id(coords))
        if self._tokens[0] != key:
            count = self.sub.weight.param.shape[0]
            self._tokens = key, applied(Tokens, coords, count)
        return self._tokens[1][expert]


@final
class ExpertsWeight(Tensor):
    """The weight W of fused experts, or one of them, for the products that are known.

    Attributes:
        reader: Where it comes from.
        numbers: W, or what of it this is.
        expert: Which expert's matrix this is; None for all.
        turned: Whether its last two dimensions are swapped.
    """

    reader: ExpertsReader
    numbers: Tensor
    expert: int | None
    turned: bool
    _is_param = True  # for isinstance: to its readers it is the layer's nn.Parameter

    @staticmethod
    def __new__(cls: Any, reader: ExpertsReader, numbers: Tensor, expert: int | None, *, turned: bool) -> ExpertsWeight:
        """Make one that has the memory of W."""
        made: ExpertsWeight = Tensor._make_subclass(cls, numbers)
        made.reader, made.numbers, made.expert, made.turned = reader, numbers, expert, turned
        return made

    @classmethod
    @override
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _FACTS:
                return func(args[0].numbers, *args[1:], **kwargs)
            known = _KNOWN.get(func)
            if known is not None:
                found = known(func, *args, **kwargs)
                if found is not NotImplemented:
                    return found
            return func(*tree_map_only(cls, _plain, args), **tree_map_only(cls, _plain, kwargs))


def _plain(weight: ExpertsWeight) -> Tensor:
    """The weight, or the part of it that was asked for, tied to the coordinates in its own way."""
    found = weight.reader.plain()
    found = found if weight.expert is None else found[weight.expert]
    return found.transpose(-2, -1) if weight.turned else found


def _one(func: Any, weight: Any, index: Any) -> Any:
    """``weight[e]``."""
    if isinstance(index, Tensor) and index.dim() == 0 and not index.is_meta and not index.is_floating_point():
        index = index.item()
    if type(index) is not int or not isinstance(weight, ExpertsWeight) or weight.expert is not None:
        return NotImplemented
    count = len(weight.numbers)
    if not -count <= index < count:
        return NotImplemented
    return ExpertsWeight(weight.reader, weight.numbers[index], index % count, turned=weight.turned)


def _each(func: Any, weight: Any, dim: int = 0) -> Any:
    """``weight.unbind()``, and so iteration."""
    if dim != 0 or weight.expert is not None:
        return NotImplemented
    return tuple(_one(func, weight, expert) for expert in range(len(weight.numbers)))


def _iterated(func: Any, weight: Any) -> Any:
    found = _each(func, weight)
    return found if found is NotImplemented else iter(found)


def _select(func: Any, weight: Any, dim: int, index: int) -> Any:
    return _one(func, weight, index) if dim == 0 else NotImplemented


def _turned(func: Any, weight: Any, *dims: int) -> Any:
    """The last two dimensions swapped."""
    last = {weight.numbers.dim() - 1, weight.numbers.dim() - 2}
    if dims and {dim % weight.numbers.dim() for dim in dims} != last:
        return NotImplemented
    return ExpertsWeight(weight.reader, weight.numbers.transpose(-2, -1), weight.expert, turned=not weight.turned)


def _matrix_turned(func: Any, weight: Any) -> Any:
    return NotImplemented if weight.expert is None else _turned(func, weight)


def _linear(func: Any, x: Any, weight: Any, bias: Any = None) -> Any:
    """``x @ weight.T + bias`` of one expert."""
    if not _meets(x, weight) or weight.expert is None or isinstance(bias, ExpertsWeight):
        return NotImplemented
    out = func(x, weight.numbers, bias)
    return weight.reader.tie(out, x, Use(weight.reader.sub, Rows([_rows(x)]), weight.expert, weight.turned))


def _times(func: Any, x: Any, weight: Any) -> Any:
    """``x @ weight`` of one expert, or of as many rows for each."""
    if not _meets(x, weight):
        return NotImplemented
    count = len(weight.numbers)
    if weight.expert is None and (x.dim() != 3 or len(x) != count):
        return NotImplemented
    ends = [_rows(x)] if weight.expert is not None else [x.shape[1] * (e + 1) for e in range(count)]
    out = func(x, weight.numbers)
    return weight.reader.tie(out, x, Use(weight.reader.sub, Rows(ends), weight.expert, not weight.turned))


def _times_from_right(func: Any, weight: Any, x: Any) -> Any:
    return _times(torch.matmul, x, weight)


def _grouped(func: Any, x: Any, weight: Any, offs: Any = None, **more: Any) -> Any:
    """``x @ weight`` of rows that are sorted by expert."""
    if (
        not _meets(x, weight)
        or weight.expert is not None
        or x.dim() != 2
        or offs is None
        or any(v is not None for v in more.values())
    ):
        return NotImplemented
    out = func(x, weight.numbers, offs=offs)
    return weight.reader.tie(out, x, Use(weight.reader.sub, Rows(offs), None, not weight.turned))


def _given(options: dict[str, Any]) -> bool:
    """Whether any option is not None."""
    return any(value is not None for value in options.values())


def _meets(x: Any, weight: Any) -> bool:
    plain = isinstance(x, Tensor) and not isinstance(x, ExpertsWeight) and x.dim() >= 2
    return plain and isinstance(weight, ExpertsWeight)


def _rows(x: Tensor) -> int:
    return x.numel() // max(1, x.shape[-1])


_FACTS = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_meta", "is_cpu")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.element_size, Tensor.is_floating_point, Tensor.__len__),
}
_KNOWN: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: _one,
    Tensor.select: _select,
    torch.select: _select,
    Tensor.unbind: _each,
    torch.unbind: _each,
    Tensor.__iter__: _iterated,
    Tensor.transpose: _turned,
    torch.transpose: _turned,
    Tensor.mT.__get__: _turned,  # type: ignore[attr-defined]
    Tensor.T.__get__: _matrix_turned,  # type: ignore[attr-defined]
    Tensor.t: _matrix_turned,
    nn.functional.linear: _linear,
    **dict.fromkeys((Tensor.matmul, torch.matmul, Tensor.__matmul__, Tensor.mm, torch.mm, Tensor.bmm, torch.bmm), _times),
    Tensor.__rmatmul__: _times_from_right,
    **{
        getattr(at, name): _grouped for at, name in ((torch, "_grouped_mm"), (nn.functional, "grouped_mm")) if hasattr(at, name)
    },
}
