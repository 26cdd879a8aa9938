"""Factors and values of an adapter, made when they are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Lazy(Mapping[str, T], Generic[T]):
    """A mapping that makes a value whenever it is looked up.

    Args:
        names: The keys to iterate over.
        make: Key -> value.
        known: More keys that have a value.
    """

    def __init__(self, names: list[str], make: Callable[[str], T], known: Mapping[str, Any] | None = None) -> None:
        self._names, self._make = names, make
        self._known = {*names, *(known or ())}

    def __getitem__(self, key: str) -> T:
        if key not in self._known:
            raise KeyError(key)
        return self._make(key)

    def __contains__(self, key: object) -> bool:
        return key in self._known

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
