"""What torch's operators do to the values of a parameter: which results are linear in it, and with which factors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

_COPIES = {"clone", "_to_copy", "contiguous", "alias_copy", "detach_copy", "view_copy", "_reshape_copy", "lift_fresh_copy"}
_OVERWRITES = {"zero", "fill", "normal", "uniform", "random", "bernoulli", "exponential"}  # in place, of any value before
_ADDED_TO = {"index_add", "scatter_add", "index_put", "_index_put_impl"}  # the first argument plus others
_PRODUCT_ADDED_TO = {"addmm", "addmv", "addr", "addbmm", "baddbmm"}

# What operators over lists call the arguments that those over tensors call otherwise
_RENAMED = {
    **{name: {"scalar": "other", "scalars": "other"} for name in ("add", "sub", "mul", "div")},
    **{name: {"scalars": "value"} for name in ("addcmul", "addcdiv")},
    "lerp": {"tensors1": "end", "weights": "weight"},
}

Terms = list[tuple[Any, float]]


class Read(NamedTuple):
    """What a tensor holds of a parameter.

    Args:
        param: Which parameter.
        factor: The tensor is this times the parameter plus what is made of gradients; None if it is any other function of it.
        at: Which elements of the parameter, as indices say it; empty for all.
        by: The operator that read the parameter; empty for the parameter itself.
    """

    param: int
    factor: float | None
    at: tuple[Any, ...] = ()
    by: str = ""

    def like(self, other: Read | None) -> bool:
        """Whether another tensor holds the same of the parameter."""
        return other is not None and self[:3] == other[:3]


Held = Callable[[Any], Read | None]  # what a value holds of a parameter; None if nothing


def terms(name: str, given: Mapping[str, Any], held: Held) -> Terms | None:
    """An operator's result as a sum of multiples of its arguments, where constants are left out.

    Args:
        name: The operator's name, without the underscore of those in place.
        given: Its arguments by name.
        held: What a value holds of a parameter.

    Returns:
        Arguments and factors; None if the result is not linear in what holds values of a parameter.
    """

    def unread(*keys: str) -> bool:
        return all(held(tensor) is None for tensor in tensors(given[key] for key in keys if key in given))

    def scaled(value: Any, by: Any, *, sign: float = 1.0) -> Terms | None:
        scale = _number(by, held)
        return None if scale is None else [(value, sign * scale)]

    this, other = given.get("self"), given.get("other")
    one: Terms = [(this, 1.0)]
    found: Terms | None = None
    if name in ("add", "sub", "rsub"):
        added = scaled(this if name == "rsub" else other, given.get("alpha", 1), sign=1.0 if name == "add" else -1.0)
        found = None if added is None else [(other if name == "rsub" else this, 1.0), *added]
    elif name == "mul":
        found = scaled(other, this) if unread("self") else scaled(this, other)
    elif name == "div":
        scale = _number(other, held)
        found = [(this, 1 / scale)] if scale and given.get("rounding_mode") is None else None
    elif name == "neg":
        found = [(this, -1.0)]
    elif name == "lerp":
        scale = _number(given["weight"], held)
        found = None if scale is None else [(this, 1 - scale), (given["end"], scale)]
    elif name in ("addcmul", "addcdiv"):
        found = one if _number(given["value"], held) == 0 or unread("tensor1", "tensor2") else None
    elif name == "copy":
        found = [(given["src"], 1.0)]
    elif name in _COPIES:
        found = one
    elif name in _OVERWRITES:
        found = [] if unread("value") else None
    elif name == "where":
        read = held(this)
        found = one if unread("condition") and read is not None and read.like(held(other)) else None
    elif name in _ADDED_TO:
        found = one if given.get("accumulate", True) and unread("index", "indices", "source", "src", "values") else None
    elif name in _PRODUCT_ADDED_TO and unread("mat1", "mat2", "mat", "vec", "vec1", "vec2", "batch1", "batch2"):
        found = scaled(this, given["beta"])
    return found


def _number(value: Any, held: Held) -> float | None:
    """A number, or the only element of a tensor that holds nothing of a parameter."""
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 and held(value) is None and not value.is_complex() else None
    return float(value) if isinstance(value, bool | int | float) else None


def tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Find tensors in arguments.

    Args:
        values: The arguments.

    Yields:
        Those that are tensors, and those in lists and dicts.
    """
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors(value)
        elif isinstance(value, dict):
            yield from tensors(value.values())


def elementwise(name: str, given: Mapping[str, Any], result: Any) -> Iterator[tuple[dict[str, Any], Any]]:
    """Take an operator over lists apart.

    Args:
        name: Its name, without the prefix of such operators.
        given: Its arguments by name.
        result: Its result.

    Yields:
        For one element of the lists after another the arguments, by the names that the operator over tensors has for them, and
        the result.
    """
    count, renamed = len(given["self"]), _RENAMED.get(name, {})

    def at(value: Any, i: int) -> Any:
        return value[i] if isinstance(value, list | tuple) and len(value) == count else value

    for i in range(count):
        yield {renamed.get(key, key): at(value, i) for key, value in given.items()}, at(result, i)
