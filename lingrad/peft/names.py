"""How PEFT matches names in a config with those in a model, and lists of names that match the chosen ones and nothing else.

Its three rules differ (`peft.tuners.tuners_utils`, `peft.utils.other`): a target is a module whose name equals an entry or ends
with a dot and an entry; a saved module is one whose name ends with an entry, with or without a dot; and nothing inside a module
of a saved name is a target.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from lingrad.errors import ExportError
from lingrad.peft.patterns import is_bounded


def targeted(name: str, entry: str) -> bool:
    """Whether an entry of ``target_modules`` or ``target_parameters`` matches a name."""
    return name == entry or name.endswith(f".{entry}")


def saved(name: str, entry: str) -> bool:
    """Whether an entry of ``modules_to_save`` matches a module."""
    return name.endswith(entry)


def excluded(name: str, entry: str) -> bool:
    """Whether an entry of ``modules_to_save`` keeps a module from being a target."""
    return re.match(rf"(^|.*\.){entry}($|\..*)", name) is not None


def left_out_by(name: str, config: Mapping[str, Any]) -> str | None:
    """Which option of a config keeps PEFT from putting factors on a module, whatever the adapter's file holds.

    Args:
        name: The module's name.
        config: The adapter's config.

    Returns:
        The option's name; None for a module that is targeted.
    """
    exclude, targets = config.get("exclude_modules"), config.get("target_modules")
    if exclude and _matches(name, exclude):
        return "exclude_modules"
    if any(excluded(name, entry) for entry in config.get("modules_to_save") or ()):
        return "modules_to_save"
    if targets is None and config.get("target_parameters"):
        return "target_modules"
    if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
        return None  # PEFT's own choice
    if not _matches(name, targets):
        return "target_modules"
    layers = config.get("layers_to_transform")
    if layers in (None, []) or isinstance(targets, str) or name in targets:
        return None
    patterns = config.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    numbered = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    found = (re.match(pattern, name) for pattern in numbered)
    first = next((match for match in found if match), None)
    chosen = [layers] if isinstance(layers, int) else layers
    return None if first is not None and int(first[1]) in chosen else "layers_to_transform"


OF_MODULES = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "layers_to_transform")


def readable(option: str, value: Any) -> bool:
    """Whether an option that chooses modules has a value that PEFT can use."""
    if value is None:
        return True
    listed = value if isinstance(value, list) else [value]
    if option == "layers_to_transform":
        return all(type(index) is int for index in listed)
    if not all(isinstance(entry, str) for entry in listed):
        return False
    is_list_of_names = isinstance(value, list) and option in ("target_modules", "exclude_modules")
    return is_list_of_names or (len(listed) <= 64 and all(map(is_bounded, listed)))


def positive(value: Any) -> bool:
    """Whether a rank or an alpha is a number above 0."""
    return type(value) in (int, float) and 0 < value <= sys.float_info.max


def _matches(name: str, entries: Any) -> bool:
    """Whether a regular expression, or one of a list of names, matches a module."""
    if isinstance(entries, str):
        return re.fullmatch(entries, name) is not None
    return any(targeted(name, entry) for entry in entries)


def target_modules(chosen: Collection[str], every: Collection[str]) -> list[str] | str:
    """What to write as ``target_modules``.

    Args:
        chosen: Names of the chosen modules.
        every: Names of all modules of the model.

    Returns:
        Last parts of names where all modules of that name are chosen, full names elsewhere; a regular expression where a
        full name would match another module too.
    """
    entries = _entries(chosen, every)
    if entries is not None:
        return entries
    return "|".join(re.escape(name) for name in sorted(chosen))


def target_parameters(chosen: Collection[str], every: Collection[str]) -> list[str]:
    """What to write as ``target_parameters``.

    Args:
        chosen: Names of the chosen parameters.
        every: Names of all parameters of the model.

    Returns:
        Names, as for `target_modules`.

    Raises:
        ExportError: A full name would match another parameter too.
    """
    entries = _entries(chosen, every)
    if entries is None:
        raise ExportError(
            "PEFT's target_parameters cannot distinguish a parameter from another whose name ends with its name; "
            f"the parameters are {', '.join(sorted(chosen))}"
        )
    return entries


def modules_to_save(chosen: Collection[str], every: Collection[str], targets: Collection[str]) -> list[str]:
    """What to write as ``modules_to_save``.

    Args:
        chosen: Names of the chosen modules.
        every: Names of all modules, all names of a module that has several.
        targets: Names of modules with a low-rank change, which must not be excluded by it.

    Returns:
        Last parts of names where they match nothing else, full names elsewhere.

    Raises:
        ExportError: PEFT would take other modules too, or keep a target from being one.
    """

    def others(entry: str) -> list[str]:
        caught = [name for name in every if saved(name, entry) and name not in chosen]
        return caught + [name for name in targets if excluded(name, entry)]

    entries: set[str] = set()
    for name in chosen:
        last = name.rpartition(".")[2]
        entry = name if others(last) else last
        wrong = others(entry)
        if wrong:
            raise ExportError(
                f"'{name}' must be saved in full, and PEFT, which matches the ends of names, would take '{wrong[0]}' for it; "
                "rename one of the two modules"
            )
        entries.add(entry)
    return sorted(entries)


def rank_pattern(ranks: dict[str, int]) -> tuple[int, dict[str, int]]:
    """A default rank and the exceptions from it.

    Args:
        ranks: Name -> rank; at least one.

    Returns:
        The most frequent rank, and name -> rank of the others. Names are regular expressions, the longest first: the first
        that matches the end of a name wins.
    """
    found = Counter(ranks.values())
    default = max(sorted(found), key=found.__getitem__)
    # a name with the default rank may end with the name of an exception, so it is written too
    special = {name for name, rank in ranks.items() if rank != default}
    special |= {name for name in ranks if special.intersection(_ends(name))}
    return default, {name: ranks[name] for name in sorted(special, key=lambda name: (-len(name), name))}


def _entries(chosen: Collection[str], every: Collection[str]) -> list[str] | None:
    """Last parts of names, or full names, that match what is chosen and nothing else; None where there are none."""
    chosen = set(chosen)
    others = {end for name in every if name not in chosen for end in (name, *_ends(name))}
    entries = {next((e for e in (name.rpartition(".")[2], name) if e not in others), None) for name in chosen}
    return None if None in entries else sorted(entry for entry in entries if entry is not None)


def _ends(name: str) -> list[str]:
    """The shorter names that a name ends with: of a.b.c, b.c and c."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(1, len(parts))]
