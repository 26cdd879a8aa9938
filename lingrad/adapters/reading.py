"""A layer in adapter mode whose attribute, a parameter, gives W + S z to whoever reads it.

What may be put in its place is said here too: the same weight once more, as by ``tie_weights()``, changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lingrad.adapters.effective import EffectiveWeight, refuse_other
from lingrad.subspaces.subspace import Subspace

_READ = "_lingrad_read_{}"  # in the dict of a module: gives the value of its attribute
_CLASSES: dict[tuple[type, str], type] = {}  # by the class and the attribute


def make_readable(module: nn.Module, attribute: str, give: Callable[[], Tensor], replaced: Callable[[], None]) -> None:
    """Have an attribute of one module, a parameter, give something else to whoever reads it.

    Args:
        module: The module, whose class becomes one of the same name that derives from it.
        attribute: The parameter's name. The parameter stays what it is for ``named_parameters`` and the like.
        give: What is called instead.
        replaced: What is called where another parameter is put in its place.
    """
    vars(module)[_READ.format(attribute)] = give, replaced
    module.__class__ = _readable(type(module), attribute)


def _readable(cls: type, attribute: str) -> type:
    """The class that derives from another one and has a property in the place of a parameter."""
    if (cls, attribute) not in _CLASSES:

        def value(self: nn.Module) -> Any:
            found = vars(self).get(_READ.format(attribute))
            return self.__getattr__(attribute) if found is None or attribute not in self._parameters else found[0]()

        def put(self: nn.Module, name: str, value: Any) -> None:
            read = vars(self).get(_READ.format(attribute)) if name == attribute else None
            if read is not None and isinstance(value, EffectiveWeight) and _is_same(read[0](), value):
                return  # as by tie_weights()
            other = name == attribute and self._parameters.get(name) is not value
            nn.Module.__setattr__(self, name, value)
            if other and read is not None:
                read[1]()

        def reduce(self: nn.Module, protocol: Any) -> Any:  # pickle finds classes by their name
            return _empty, (cls, attribute), vars(self)

        names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        own = {attribute: property(value), "__setattr__": put, "__reduce_ex__": reduce}
        _CLASSES[cls, attribute] = type(cls.__name__, (cls,), names | own)
    return _CLASSES[cls, attribute]


def keep_tied(module: nn.Module) -> None:
    """Have a module that was parametrized take its own effective weight, put back there as by ``tie_weights()``, as no change.

    Args:
        module: The module, of the class that torch has made for it alone.
    """
    type(module).__setattr__ = _put_back  # type: ignore[method-assign]


def _put_back(self: nn.Module, name: str, value: Any) -> None:
    held: Any = vars(self).get("_modules", {}).get("parametrizations", {})
    subs = [part.sub for part in held[name] if isinstance(getattr(part, "sub", None), Subspace)] if name in held else []
    if subs and isinstance(value, EffectiveWeight) and value.whole and value.subspace in subs:
        return
    if subs:
        refuse_other(subs[0], "is replaced by another tensor")
    nn.Module.__setattr__(self, name, value)


def _empty(cls: type, attribute: str) -> Any:
    made: Any = _readable(cls, attribute)
    return made.__new__(made)


def _is_same(one: Tensor, other: Tensor) -> bool:
    return isinstance(one, EffectiveWeight) and one.is_whole(other)


def make_plain(module: nn.Module, attribute: str) -> None:
    """Undo `make_readable`; another program's class on top of it stays, and gives the parameter."""
    vars(module).pop(_READ.format(attribute), None)
    for (cls, name), readable in _CLASSES.items():
        if readable is type(module) and name == attribute:
            module.__class__ = cls
