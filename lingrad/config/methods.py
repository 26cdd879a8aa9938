"""Published methods by name: each is a combination of a transform, a base optimizer and options of a run.

A name is written like a config string, ``galore(rank=128)``, wherever rules for a whole model are taken. In the brackets are
options of its transform, and ``base`` and options of `lingrad.wrap` in place of the method's own.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar, cast

from lingrad import optimizers
from lingrad.config import spec
from lingrad.config.published import DEFAULT, METHODS
from lingrad.config.settings import Settings
from lingrad.errors import LingradError, SpecError, did_you_mean, require, require_options
from lingrad.transforms import registry

F = TypeVar("F", bound=Callable[..., Any])

_OF_RUNS = frozenset(Settings.names())
_NAME = re.compile(r"\s*([A-Za-z_][\w-]*)\s*(\(|$)")


@dataclass(frozen=True)
class Chosen:
    """A method with its options filled in.

    Args:
        rules: The config string.
        base: The base.
        base_options: Options of the base.
        settings: Options of the run.
    """

    rules: str
    base: Any
    base_options: Mapping[str, Any]
    settings: Mapping[str, Any]

    def given(self, options: Mapping[str, Any]) -> Chosen:
        """With other options in place of the method's own.

        Args:
            options: ``base``, as a name, a name with options, a class or a factory; ``moments``; options of a run.

        Returns:
            The method; of its base's options those that another base takes.
        """
        base, of_base = options.get("base", self.base), dict(self.base_options)
        if base != self.base:
            base, more = _named_base(base)
            of_base = {key: value for key, value in of_base.items() if _accepts(base, key, value)} | more
        of_base |= {key: value for key, value in options.items() if key == "moments"}
        own = {key: value for key, value in options.items() if key not in ("base", "moments")}
        return Chosen(self.rules, base, of_base, {**self.settings, **own})

    def __str__(self) -> str:
        options = {**self.settings, **self.base_options}
        base = optimizers.base.name_of(self.base)
        return ", ".join([f'"{self.rules}"', f'"{base}"', *(f"{key}={value!r}" for key, value in options.items())])


def method_of(rules: object) -> Chosen | None:
    """The method that rules name.

    Args:
        rules: Rules of any form.

    Returns:
        The method; None where they are no name of one.

    Raises:
        SpecError: An option is unknown, or one is missing; or a name is nearly that of a method.
    """
    found = _NAME.match(rules) if isinstance(rules, str) else None
    name = "" if found is None else found[1].lower().replace("-", "_")
    if name not in METHODS or not isinstance(rules, str) or found is None:
        known = registry.transform_names()
        near = did_you_mean(name, [*METHODS, *known])
        if name and name not in known and any(f"'{method}'" in near for method in METHODS):
            raise SpecError(f"unknown transform or method '{name}'{near}")
        return None
    method = METHODS[name]
    given = dict(spec.parse_choice(name + rules[found.end(1) :]).options)
    any_values = {key: 1 if value is None else value for key, value in method.options.items()}
    sample: Any = spec.parse(method.spec.format(**any_values))
    own = [option.name for option in fields(getattr(sample, "each", sample))]  # of bases in codes those of the bases
    takes = list(dict.fromkeys([*method.options, *own, "base", "moments", *Settings.names()]))
    require_options(given, takes, f"method '{name}'")
    filled = {key: given.get(key, value) for key, value in method.options.items()}
    for key, entry in filled.items():
        require(entry is not None, key, f"method '{name}' needs {key}, as in {name}({key}=...)")
    transform: Any = spec.parse(method.spec.format(**filled))
    inner: Any = getattr(transform, "each", transform)
    more = {key: value for key, value in given.items() if key in own and key not in method.options and key not in _OF_RUNS}
    if more:
        inner = replace(inner, **more)
        transform = replace(transform, each=inner) if hasattr(transform, "each") else inner
    chosen = Chosen(spec.format(transform), method.base, method.base_options, method.settings)
    return chosen.given({key: value for key, value in given.items() if key not in method.options and key not in more})


def takes_methods(function: F) -> F:
    """Have a function whose arguments are ``rules``, ``base`` and options of a run take the name of a method as rules.

    Args:
        function: The function. What its caller gives replaces what the method has of its own.

    Returns:
        The function, of the same signature.
    """
    signature = inspect.signature(function)
    rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")

    @functools.wraps(function)
    def taking(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind_partial(*args, **kwargs).arguments
        base, options = _named_base(bound.get("base"))
        if options:
            more = {**{key: value for key, value in bound.items() if key != rest}, **bound.get(rest, {}), "base": base}
            return taking(**{**options, **more})
        chosen = method_of(bound.get("rules", signature.parameters["rules"].default))
        if chosen is None:
            return function(*args, **kwargs)
        given = {**{key: value for key, value in bound.items() if key != rest}, **bound.get(rest, {}), "rules": chosen.rules}
        chosen = chosen.given({"base": given["base"]} if "base" in given else {})
        own = {"base": chosen.base, **chosen.base_options, **chosen.settings}
        try:
            return function(**{**own, **given})
        except LingradError as error:
            hint = _set_by_method(str(error), bound.get("rules", ""), {key: own[key] for key in own if key not in given})
            if hint:
                error.args = (f"{error}{hint}", *error.args[1:])
            raise

    return cast("F", taking)


def _set_by_method(message: str, name: object, own: Mapping[str, Any]) -> str:
    """What a message about an option that nobody gave should end with: where it comes from.

    Args:
        message: The message.
        name: The method as it was given.
        own: The options that the method set.

    Returns:
        The end of the message; empty where it speaks of no such option.
    """
    named = [key for key, value in own.items() if key != "base" and re.search(rf"\b{key}\b", message.partition("\n")[0])]
    if not named:
        return ""
    method = str(name).partition("(")[0].strip() or DEFAULT.partition("(")[0]
    given = ", ".join(f"{key}={own[key]!r}" for key in named)
    return f"\nMethod '{method}' sets {given}; another value can be given beside the method, as an option of the run"


def _named_base(base: Any) -> tuple[Any, dict[str, Any]]:
    """A base and its options, of a string such as ``sgd(momentum=0.9)``."""
    if not isinstance(base, str) or "(" not in base:
        return base, {}
    choice = spec.parse_choice(base)
    return choice.name, dict(choice.options)


def _accepts(base: Any, option: str, value: Any) -> bool:
    try:
        optimizers.find(base, {option: value}, decay=False)
    except LingradError:
        return False
    return True


def long_rules(rules: Any) -> Any:
    """The config string of the method that rules name, or the rules themselves."""
    chosen = method_of(rules)
    return rules if chosen is None else chosen.rules


def refuse_method(text: str) -> None:
    """Refuse the name of a method where a config string of one transform is expected.

    Args:
        text: The string.

    Raises:
        SpecError: It names a method.
    """
    chosen = method_of(text)
    if chosen is not None:
        raise SpecError(
            f"'{text.strip()}' is a method, which sets options of the whole run, and no transform. Give it alone, in place of "
            f"rules, or its parts: {chosen}"
        )
