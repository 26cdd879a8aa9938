"""``override`` for checkers and linters; nothing at run time, so that Python 3.10 needs no extra package."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from typing_extensions import override as override
else:
    F = TypeVar("F")

    def override(method: F, /) -> F:
        """Mark a method that implements one of its base class."""
        return method
