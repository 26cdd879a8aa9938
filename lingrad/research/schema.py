"""Reading a table of TOML or JSON key by key; values of another kind, missing keys and unknown ones are errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from lingrad.errors import SpecError, did_you_mean, shown

T = TypeVar("T")

_REQUIRED: Any = object()
_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", list: "a list", dict: "a table"}


class Table:
    """A table, read key by key.

    Args:
        content: The table.
        where: What messages call it, such as ``plan.toml, [search]``.

    Raises:
        SpecError: It is no table.
    """

    def __init__(self, content: Any, where: str) -> None:
        if not isinstance(content, Mapping):
            raise SpecError(f"{where} must be a table, not {shown(content)}")
        self.where = where
        self._left: dict[str, Any] = dict(content)
        self._known: list[str] = []

    def take(self, key: str, kind: type[T], default: Any = _REQUIRED) -> T:
        """The value of a key.

        Args:
            key: The key.
            kind: What it must be; a whole number is a number, too.
            default: Its value where the table has none; without it the key must be there.

        Returns:
            The value.

        Raises:
            SpecError: It is missing, or of another kind.
        """
        self._known.append(key)
        if key not in self._left:
            if default is _REQUIRED:
                near = [left for left in self._left if did_you_mean(left, [key]) != "."]
                meant = f"; did you mean it by '{near[0]}'?" if near else ""
                raise SpecError(f"{self.where}: '{key}' is missing, {_WORDS[kind]}{meant}", option=key)
            return default  # type: ignore[no-any-return]
        value = self._left.pop(key)
        whole = kind is float and type(value) is int
        if not (whole or type(value) is kind):
            raise SpecError(f"{self.where}: '{key}' must be {_WORDS[kind]}, not {shown(value)}", option=key)
        return kind(value) if whole else value  # type: ignore[call-arg]

    def texts(self, key: str, default: list[str] | None) -> Any:
        """A list of texts.

        Args:
            key: The key.
            default: Its value where the table has none.

        Returns:
            The list, or the default.

        Raises:
            SpecError: It is none.
        """
        found = self.take(key, list, default)
        for value in found or ():
            if not isinstance(value, str):
                raise SpecError(f"{self.where}: '{key}' must be texts, not {shown(value)}", option=key)
        return found

    def table(self, key: str) -> Table:
        """A table inside; empty where there is none."""
        return Table(self.take(key, dict, {}), f"{self.where}, [{key}]")

    def tables(self, key: str) -> list[Table]:
        """A list of tables inside, which must not be empty.

        Args:
            key: The key.

        Returns:
            The tables.

        Raises:
            SpecError: There is none.
        """
        found = self.take(key, list)
        if not found:
            raise SpecError(f"{self.where}: '{key}' is empty; give one [[{key}]] at least", option=key)
        return [Table(one, f"{self.where}, [[{key}]] {number}") for number, one in enumerate(found, start=1)]

    def rest(self) -> dict[str, Any]:
        """All that was not taken yet; nothing is left after it."""
        found, self._left = self._left, {}
        return found

    def end(self) -> None:
        """Refuse what nobody asked for.

        Raises:
            SpecError: A key is left.
        """
        for key in self._left:
            near = did_you_mean(key, self._known)
            raise SpecError(f"{self.where}: unknown key '{key}'{near} Known: {', '.join(self._known)}", option=key)
