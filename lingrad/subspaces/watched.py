"""Parameters of a run that other programs may write into: by their methods, or through ``data``, the run learns of it first.

A clamp, SAM, an average that is put back: what the weight of the forward is, W + S z, must stay known. Functions of torch that
write (``torch._foreach_add_`` and the like) are not seen.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn
from typing_extensions import override

from lingrad import parallel

_DATA: Any = torch.Tensor.data
# torch's compiler asks for ``data`` to see of which type it is, also while a compiled model runs
_READERS = tuple(f"torch.{part}." for part in ("_dynamo", "_functorch", "_inductor", "_subclasses", "_higher_order_ops", "fx"))
_NOT_WRITES = {"requires_grad_", "detach_"}


class _Watched(nn.Parameter):
    """A parameter that says so before it is written into."""

    def before_write(self) -> None:
        """Called before another program writes into it, or asks for ``data``."""
        raise NotImplementedError

    @property
    def data(self) -> Tensor:
        """The numbers, which may be written into."""
        if not sys._getframe(1).f_globals.get("__name__", "").startswith(_READERS):
            self.before_write()
        found: Tensor = _DATA.__get__(self)
        return found

    @data.setter
    def data(self, value: Tensor) -> None:
        _DATA.__set__(self, value)

    @override
    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        made = nn.Parameter(self.detach().clone(memory_format=torch.contiguous_format), self.requires_grad)
        memo[id(self)] = made
        return made

    @override
    def __reduce_ex__(self, protocol: Any) -> Any:
        return torch._utils._rebuild_parameter, (self.detach().clone(), self.requires_grad, {})


def _writer(name: str) -> Callable[..., Any]:
    def write(self: _Watched, *args: Any, **kwargs: Any) -> Any:
        self.before_write()
        return getattr(torch.Tensor, name)(self, *args, **kwargs)

    return write


for _name in dir(torch.Tensor):
    _method = _name.endswith("_") and not _name.startswith("_") and _name not in _NOT_WRITES
    if _method or _name == "__setitem__" or (_name.startswith("__i") and f"__{_name[3:]}" in dir(torch.Tensor)):
        setattr(_Watched, _name, _writer(_name))


@final
class ReleasedCoords(_Watched):
    """Coordinates that are zero, as in optimizer mode between steps: one zero in memory stands for all. See `release`."""

    @override
    def before_write(self) -> None:
        allocate([self])


@final
class SummedWeight(_Watched):
    """The W of a sum W + S z, as in adapter mode: it becomes the sum, and z zero, before it is written into.

    Attributes:
        sums: Merges the coordinates into it.
        written: Whether another program has written into it since `was_written` was asked.
    """

    sums: weakref.WeakMethod[Callable[[], None]]
    written: bool

    @override
    def before_write(self) -> None:
        sums = self.sums()
        if sums is not None:
            sums()
            self.written = True


def watch(param: nn.Parameter, sums: Callable[[], None]) -> None:
    """Have the W of a sum say when it is written into.

    Args:
        param: The parameter.
        sums: A method that merges the coordinates into it; its object is not kept alive.
    """
    if type(param) is nn.Parameter:
        param.__class__ = SummedWeight
        vars(param).update(sums=weakref.WeakMethod(sums), written=False)


def was_written(param: Tensor) -> bool:
    """Whether another program has written into the W of a sum since this was asked last.

    Args:
        param: The parameter.

    Returns:
        Whether it has; never where it is not watched.
    """
    if not isinstance(param, SummedWeight):
        return False
    found, param.written = param.written, False
    return found


def unwatch(param: nn.Parameter) -> None:
    """Undo `watch`."""
    if isinstance(param, SummedWeight):
        param.__class__ = nn.Parameter  # type: ignore[assignment]
        for name in ("sums", "written"):
            vars(param).pop(name, None)


def release(coords: nn.Parameter, zero: Tensor | None) -> Tensor | None:
    """Give back the memory of coordinates.

    Args:
        coords: The coordinates; what they hold is forgotten.
        zero: What this gave for them before.

    Returns:
        Zeros of their shape without memory, which they are now; None where they keep theirs: DistributedDataParallel writes
        into it without asking.
    """
    if parallel.initialized():
        _DATA.__get__(coords).zero_()
        zero = None
    else:
        if zero is None or zero.dtype != coords.dtype or zero.device != coords.device:
            zero = coords.new_zeros(()).expand(coords.shape)
        _DATA.__set__(coords, zero)
    coords.__class__ = ReleasedCoords
    return zero


@torch.no_grad()
def allocate(coords: list[nn.Parameter]) -> None:
    """Give released coordinates memory of their own, all zero.

    Args:
        coords: Coordinates; what is not released stays as it is.
    """
    fresh: list[Tensor] = []
    for one in coords:
        if isinstance(one, ReleasedCoords):
            if one.stride() == (0, 0):
                _DATA.__set__(one, one.new_empty(one.shape))
                fresh.append(one)
            one.__class__ = nn.Parameter  # type: ignore[assignment]
    if fresh:
        torch._foreach_zero_(fresh)
