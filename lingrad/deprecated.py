"""Names of the version before. They keep working for one version, with a warning, and then this file goes."""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

from lingrad.errors import require

T = TypeVar("T")


def renamed_option(where: str, old: str, given: Any, new: str, value: T) -> T:
    """The value of an option that may still be given under its old name.

    Args:
        where: The function that has it, by its public name.
        old: The old name.
        given: The value under the old name; None where it was not given.
        new: The new name.
        value: The value under the new name; None likewise.

    Returns:
        The one that was given, with a ``DeprecationWarning`` where it was the old one.

    Raises:
        SpecError: Both were given.
    """
    if given is None:
        return value
    require(value is None, new, f"{where} got {new} and {old}, which is its old name; leave {old} out")
    warnings.warn(f"{where}({old}=...) is deprecated; use {new}=", DeprecationWarning, stacklevel=3)
    renamed: T = given
    return renamed
