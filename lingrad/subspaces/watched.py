"""Parameters of a run that other programs may write into: by their methods, or through ``data``, the run learns of it first.

A clamp, SAM, an average that is put back: what the weight of the forward is, W + S z, must stay known. Functions of torch that
write (``torch._foreach_add_`` and the like, ``out=``), and writes into a view, are found afterwards, by the version that
autograd counts.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn, final

import torch
from torch import Tensor, nn
from typing_extensions import override

from lingrad import parallel
from lingrad.errors import ModeError
from lingrad.tensors import is_sharded, own

_DATA: Any = torch.Tensor.data
# torch's compiler asks for ``data`` to see of which type it is, also while a compiled model runs
_READERS = tuple(f"torch.{part}." for part in ("_dynamo", "_functorch", "_inductor", "_subclasses", "_higher_order_ops", "fx"))
_NOT_WRITES = {"requires_grad_", "detach_"}
_MEMORY = {"__setitem__", "numpy", "__array__", "__dlpack__"}  # the last three give memory that is written into elsewhere
_MOVES = "torch.nn.modules.module"  # gives ``data`` that was computed from the parameter, as it was
_ANNOUNCED, _UNKNOWN = -1, -2  # no versions: a write for which z was merged, and one for which it was not


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
        if sys._getframe(1).f_globals.get("__name__") != _MOVES:
            self.before_replace()
        _DATA.__set__(self, value)

    def before_replace(self) -> None:
        """Called before another program gives it other memory."""

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
    if _method or _name in _MEMORY or (_name.startswith("__i") and f"__{_name[3:]}" in dir(torch.Tensor)):
        setattr(_Watched, _name, _writer(_name))


@final
class ReleasedCoords(_Watched):
    """Coordinates that are zero, as in optimizer mode between steps: one zero in memory stands for all. See `release`.

    Attributes:
        zero: Zeros of their shape without memory.
    """

    zero: Tensor

    @override
    def before_write(self) -> None:
        allocate([self])


@final
class SummedWeight(_Watched):
    """The W of a sum W + S z, as in adapter mode: it becomes the sum, and z zero, before it is written into.

    Attributes:
        sums: Merges the coordinates into it.
        known: Its version where it and the coordinates belonged together last; another one where it was written into.
    """

    sums: weakref.WeakMethod[Callable[[], None]]
    known: int

    @override
    def before_write(self) -> None:
        sums = self.sums()
        if sums is not None:
            sums()
            self.known = _ANNOUNCED

    @override
    def set_(self, *args: Any, **kwargs: Any) -> Any:
        self.before_replace()
        return super(_Watched, self).set_(*args, **kwargs)

    @override
    def before_replace(self) -> None:
        if self.known != _ANNOUNCED:  # what is put there may have been computed from W alone, or be the whole weight
            self.known = _UNKNOWN


def watch(param: nn.Parameter, sums: Callable[[], None]) -> None:
    """Have the W of a sum say when it is written into.

    Args:
        param: The parameter.
        sums: A method that merges the coordinates into it; its object is not kept alive.
    """
    if is_sharded(param):  # a write is found afterwards: our own go to the part, and do not raise its version
        vars(param)["written_at"] = _versions(param)
    elif type(param) is nn.Parameter:
        param.__class__ = SummedWeight
        vars(param).update(sums=weakref.WeakMethod(sums), known=param._version)


def _versions(param: Tensor) -> tuple[int, int]:
    """Of a DTensor and of its part, each of which other programs may write into."""
    return param._version, own(param)._version


def was_written(param: Tensor) -> bool:
    """Whether another program has written into the W of a sum since this was asked last.

    Args:
        param: The parameter.

    Returns:
        Whether it has; never where it is not watched. Where torch.distributed is initialized only of writes that were
        announced: DistributedDataParallel writes W and z of one process into all.
    """
    if not isinstance(param, SummedWeight):
        seen = vars(param).get("written_at")
        if seen is None or seen == _versions(param):
            return False
        vars(param)["written_at"] = _versions(param)
        return True
    known, now = param.known, param._version
    param.known = now
    return known < 0 or (known != now and not parallel.initialized())


def is_touched(param: Tensor) -> bool:
    """Whether `was_written` has something to look at: the W of a sum is not of the version that is known."""
    return type(param) is SummedWeight and param._version != param.known


def settle(param: Tensor, *, known: bool = True) -> None:
    """Have what was written into the W of a sum just now be the run's own.

    Args:
        param: The parameter.
        known: Whether it is; else it counts as another program's.
    """
    if type(param) is SummedWeight and (param.known >= 0 or not known):
        param.known = param._version if known else _UNKNOWN


def refuse_written(name: str, param: Tensor) -> NoReturn:
    """Refuse a sum that is none any more; it stays an error until a state is loaded.

    Args:
        name: The parameter's name.
        param: The parameter.

    Raises:
        ModeError: Always.
    """
    settle(param, known=False)
    raise ModeError(
        f"another program has written into {name} and into its coordinates (an average of the model's parameters that was put "
        "back?), or into it alone by a function that does not say so (torch._foreach_*, out=, a view, data = ...); in adapter "
        "mode only their sum, W + S z, means anything across refreshes. Average opt.weights(), write by "
        "layer.weight.copy_(average), or use optimizer mode; to go on now, load a state"
    )


def unwatch(param: nn.Parameter) -> None:
    """Undo `watch`."""
    vars(param).pop("written_at", None)
    if isinstance(param, SummedWeight):
        param.__class__ = nn.Parameter  # type: ignore[assignment]
        for name in ("sums", "known"):
            vars(param).pop(name, None)


def release(coords: Iterable[nn.Parameter]) -> None:
    """Give back the memory of coordinates; what they hold is forgotten, and they are zero.

    Where torch.distributed is initialized they keep it: DistributedDataParallel writes into it without asking.

    Args:
        coords: The coordinates.
    """
    keep = parallel.initialized()
    for one in coords:
        if is_sharded(one):  # of a DTensor the class cannot be changed: it is marked, until it is written into
            own(one).zero_()
            vars(one)["released"] = one._version  # that of the DTensor: operations on it do not raise its part's
            continue
        zero = vars(one).get("zero")
        if keep:
            _DATA.__get__(one).zero_()
        elif zero is None or zero.dtype != one.dtype or zero.device != one.device:
            vars(one)["zero"] = zero = one.detach().new_zeros(()).expand(one.shape)
            _DATA.__set__(one, zero)
        else:
            _DATA.__set__(one, zero)
        one.__class__ = ReleasedCoords


@torch.no_grad()
def allocate(coords: Sequence[nn.Parameter], *, together: bool = False) -> list[Tensor]:
    """Give released coordinates memory, all zero.

    Args:
        coords: Coordinates; what is not released stays as it is.
        together: In one tensor for each dtype and device, until they are released again; else each its own.

    Returns:
        Those tensors, where the coordinates are views of one each: one after the other, in the order given.
    """
    fresh: list[Tensor] = []
    for param in coords:
        vars(param).pop("released", None)
        if type(param) is ReleasedCoords:
            if param.stride() == (0, 0):
                fresh.append(param)
            param.__class__ = nn.Parameter  # type: ignore[assignment]
    if not together:
        for one in fresh:
            vars(one).pop("zero", None)
            _DATA.__set__(one, one.new_empty(one.shape))
        if fresh:
            torch._foreach_zero_(fresh)
        return []
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for one in fresh:
        groups.setdefault((one.dtype, one.device), []).append(one)
    flats = []
    for members in groups.values():
        flat = members[0].new_zeros(sum(one.numel() for one in members))
        for one, view in zip(members, views(flat, members), strict=True):
            _DATA.__set__(one, view)
        flats.append(flat)
    return flats


def is_released(coords: Tensor) -> bool:
    """Whether coordinates are all zero, and nothing has been written to them since."""
    return isinstance(coords, ReleasedCoords) or vars(coords).get("released", -1) == coords._version


def views(flat: Tensor, like: Sequence[Tensor]) -> Sequence[Tensor]:
    """One tensor as several, one after the other, of the shapes of some others."""
    found: Sequence[Tensor] = torch._utils._unflatten_dense_tensors(flat, like)
    return found
