"""Pickles that torch.save writes, interpreted: plain values and descriptions of tensors come out, and nothing is called.

Only the few operations and names that an optimizer's state needs are known; whatever else a pickle asks for is an error. The
time and the memory that it takes are linear in its length.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Collection
from math import prod
from typing import Any, NamedTuple

import torch

_MOST_DIMENSIONS = 64  # torch's own limit
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
_PUT = {"BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"}
_GET = {"BINGET", "LONG_BINGET", "GET"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}


class PickleError(ValueError):
    """A pickle holds something else than plain values and tensors."""


class Inert:
    """An object of another program: its saved attributes, without its code."""


class StoredStorage(NamedTuple):
    """Where the elements of tensors are.

    Args:
        key: The name of the record.
        dtype: Of its elements; None where each tensor says it.
        size: How many elements, or bytes where there is no dtype.
    """

    key: str
    dtype: torch.dtype | None
    size: int


class StoredTensor(NamedTuple):
    """A tensor that has not been read.

    Args:
        storage: Where its elements are.
        dtype: Its dtype.
        offset: Its first element.
        shape: Its shape.
        strides: Its strides.
    """

    storage: StoredStorage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def span(self) -> int:
        """How many elements lie between its first and its last."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))

    @property
    def nbytes(self) -> int:
        """The size of the record that it is in."""
        return self.storage.size * (1 if self.storage.dtype is None else self.dtype.itemsize)


def interpret(data: bytes, inert: Collection[str] = ()) -> Any:
    """The content of a pickle.

    Args:
        data: The pickle.
        inert: Full names of classes whose objects become `Inert`.

    Returns:
        Dicts, lists, tuples, plain values and `StoredTensor`; what occurs twice in the pickle may be one object here.

    Raises:
        PickleError: It asks for anything else.
    """
    machine = _Machine({*inert})
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.do(opcode.name, argument)
    except PickleError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
        raise PickleError(f"damaged pickle ({type(error).__name__}: {error})") from error
    raise PickleError("damaged pickle (no end)")


class Name(NamedTuple):
    """A name of a module, not imported."""

    path: str


class _Machine:
    """The stack and the memo of one pickle."""

    def __init__(self, inert: set[str]) -> None:
        self.stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._inert = inert

    def do(self, name: str, argument: Any) -> None:
        """One operation."""
        if name in _VALUES:
            self.stack.append(argument)
        elif name in _PUT:
            self._memo[len(self._memo) if name == "MEMOIZE" else argument] = self.stack[-1]
        elif name in _GET:
            self.stack.append(self._memo[argument])
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            count = _TUPLES[name]
            found = tuple(self.stack[-count:])
            if len(found) < count:
                raise PickleError("damaged pickle (a short tuple)")
            self.stack[-count:] = [found]
        elif name == "GLOBAL":
            found = Name(argument.replace(" ", ".", 1))
            self.stack.append(_dtype(found) or found)
        elif name not in ("PROTO", "FRAME"):
            method = getattr(self, f"_{name.lower()}", None)
            if method is None:
                raise PickleError(f"Unsupported operation {name}")
            method()

    def _mark(self) -> None:
        self._below.append(self.stack)
        self.stack = []

    def _since_mark(self) -> list[Any]:
        found, self.stack = self.stack, self._below.pop()
        return found

    def _tuple(self) -> None:
        found = tuple(self._since_mark())
        self.stack.append(found)

    def _append(self) -> None:
        item = self.stack.pop()
        _of(self.stack[-1], list).append(item)

    def _appends(self) -> None:
        items = self._since_mark()
        _of(self.stack[-1], list).extend(items)

    def _setitem(self) -> None:
        key, value = self.stack[-2:]
        del self.stack[-2:]
        _of(self.stack[-1], dict)[_key(key)] = value

    def _setitems(self) -> None:
        items = self._since_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            _of(self.stack[-1], dict)[_key(key)] = value

    def _binpersid(self) -> None:
        word, kind, key, _, count = self.stack.pop()
        path = _of(kind, Name).path
        dtype = None if path == "torch.storage.UntypedStorage" else _STORAGES.get(path.removeprefix("torch."))
        if word != "storage" or (dtype is None) != (path == "torch.storage.UntypedStorage"):
            raise PickleError(f"Unsupported storage {path}")
        self.stack.append(StoredStorage(_of(key, str), dtype, _size(count)))

    def _newobj(self) -> None:
        arguments, cls = self.stack.pop(), self.stack.pop()
        if _of(cls, Name).path not in self._inert or arguments != ():
            raise PickleError(f"Unsupported GLOBAL {cls.path}")
        self.stack.append(Inert())

    def _build(self) -> None:
        state = self.stack.pop()
        if type(self.stack[-1]) is dict and isinstance(state, dict):
            return  # attributes of an OrderedDict, such as the versions in a model's state_dict
        if not (isinstance(self.stack[-1], Inert) and isinstance(state, dict) and all(type(key) is str for key in state)):
            raise PickleError("Unsupported object state")
        vars(self.stack[-1]).update(state)

    def _reduce(self) -> None:
        arguments, function = _of(self.stack.pop(), tuple), self.stack.pop()
        make = _CALLS.get(_of(function, Name).path)
        if make is None:
            raise PickleError(f"Unsupported GLOBAL {function.path}")
        self.stack.append(make(*arguments))


def _of(value: Any, kind: type[Any]) -> Any:
    if type(value) is not kind:
        raise PickleError(f"damaged pickle (a {type(value).__name__} where a {kind.__name__} belongs)")
    return value


def _key(value: Any) -> Any:
    if type(value) not in (str, int, float, bool, type(None)):
        raise PickleError(f"a {type(value).__name__} as a key")
    return value


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise PickleError("damaged pickle (a size)")
    return value


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, dtype: torch.dtype | None) -> StoredTensor:
    sizes, steps = (tuple(map(_size, _of(part, tuple))) for part in (shape, strides))
    if type(storage) is not StoredStorage or dtype is None or len(sizes) != len(steps) or len(sizes) > _MOST_DIMENSIONS:
        raise PickleError("damaged pickle (a tensor)")
    found = StoredTensor(storage, dtype, _size(offset), sizes, steps)
    count = found.nbytes // dtype.itemsize
    if 0 not in sizes and (found.offset + found.span > count or prod(sizes) > count):
        raise PickleError(f"a tensor of {prod(sizes):,} elements in {found.nbytes:,} bytes")
    return found


def _dtype(name: Name) -> torch.dtype | None:
    found = getattr(torch, name.path.removeprefix("torch."), None) if name.path.startswith("torch.") else None
    return found if isinstance(found, torch.dtype) else None


def _of_typed(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> StoredTensor:
    return _tensor(storage, offset, shape, strides, getattr(storage, "dtype", None))


def _of_untyped(storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any) -> Any:
    return _tensor(storage, offset, shape, strides, _of(dtype, torch.dtype))


def _ordered(*items: Any) -> dict[Any, Any]:
    return {_key(key): value for key, value in (items[0] if items else ())}


_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered,
    "torch._utils._rebuild_tensor_v2": _of_typed,
    "torch._utils._rebuild_tensor_v3": _of_untyped,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch.Size": lambda sizes: tuple(map(_size, sizes)),
}
