"""Config strings: ``svd(rank=128, every=200)`` to and from frozen dataclasses.

The grammar is ``name(option=value, ...)``; a value is a number, a bare word, a quoted word, or again a ``name(...)``. Python's
own parser reads it, and a whitelist of nodes is accepted; nothing is evaluated. `parse` and `format` are inverses: the string
that `format` returns is canonical (options in the order of their definition, defaults left out).
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable
from typing import Any, NoReturn, get_origin

from lingrad import optimizers
from lingrad.errors import SpecError, did_you_mean, shown
from lingrad.transforms import registry
from lingrad.transforms.base import Transform
from lingrad.transforms.options import default, format_value, kinds
from lingrad.transforms.schedules import AdaptiveSchedule, find_schedule, schedule_names

LONGEST = 4096  # characters of a config string
_WORDS = {"true": True, "false": False, "none": None}


def parse(text: str) -> Transform:
    """Read a transform from a config string.

    Args:
        text: For example ``svd(rank=128, every=200)`` or ``kron(left=svd(rank=64), right=random(rank=64))``.

    Returns:
        The transform, a frozen dataclass.

    Raises:
        SpecError: The string is malformed, or names an unknown transform, option or value. The message carries the string
            with a caret under the error, and the nearest valid name.
    """
    try:
        return _Reader(text).transform()
    except RecursionError:
        raise SpecError(f"this is nested too deeply for a config string: {shown(text)}") from None


def parse_choice(text: str) -> optimizers.Choice:
    """Read a word with options, of something that is no transform.

    Args:
        text: For example ``sgd(momentum=0.9)``.

    Returns:
        The word and its options, which are literals; what they mean is the caller's.

    Raises:
        SpecError: The string is malformed.
    """
    return _Reader(text).choice()


def format(transform: Transform | AdaptiveSchedule) -> str:  # noqa: A001 - the inverse of parse; read as spec.format
    """Write a transform as its canonical config string.

    Args:
        transform: Any registered transform, or its schedule.

    Returns:
        A string that `parse` reads back to an equal transform.

    Raises:
        SpecError: The transform's class is not registered.
    """
    if "name" not in vars(type(transform)):  # an inherited name is that of another class
        raise SpecError(
            f"{type(transform).__name__} is not registered, and has no name for config strings and checkpoints; put "
            "@lingrad.register('a_name') on the class"
        )
    options = []
    for option in dataclasses.fields(transform):
        value = getattr(transform, option.name)
        if value != default(option):
            options.append(f"{option.name}={_format_option(value)}")
    return f"{transform.name}({', '.join(options)})"


def _format_option(value: Any) -> str:
    if isinstance(value, Transform | AdaptiveSchedule):
        return format(value)
    if isinstance(value, optimizers.Choice):
        options = ", ".join(f"{key}={format_value(item)}" for key, item in value.options)
        return f"{value.name}({options})" if options else value.name
    return format_value(value)


def _is_too_large(value: Any) -> bool:
    """Whether a number is infinite, or a whole one that no count or seed is."""
    return value == float("inf") if isinstance(value, float) else isinstance(value, int) and value >= 2**63


class _Reader:
    """Reads one config string; an error points at its column."""

    def __init__(self, text: str) -> None:
        if not isinstance(text, str):
            raise SpecError(f"a config string was expected, such as 'svd(rank=128)', not {shown(text)}")
        if len(text) > LONGEST:
            raise SpecError(f"a config string has at most {LONGEST:,} characters, and this has {len(text):,}: {shown(text)}")
        self.text = text.replace("\n", " ").strip()  # one line, so that a column is a position

    def transform(self) -> Transform:
        return self._transform(self._tree())

    def choice(self) -> optimizers.Choice:
        return self._choice(self._tree())

    def _tree(self) -> ast.expr:
        try:
            return ast.parse(self.text, mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            column = max(getattr(error, "offset", None) or 1, 1) - 1
            self._fail("this is not a config string", column, 1, "expected name(option=value, ...)")

    def _transform(self, node: ast.expr) -> Transform:
        found: Transform = self._named(node, "transform", registry.find_transform, registry.transform_names)
        return found

    def _named(self, node: ast.expr, kind: str, find: Callable[[str], Any], known: Callable[[], list[str]]) -> Any:
        if isinstance(node, ast.Name):  # a bare name is one with its defaults
            return self._build(node, node, [], find)
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            self._fail_at(node, f"expected a {kind}, name(option=value, ...)", f"Known: {', '.join(known())}.")
        if node.args:
            self._fail_at(node.args[0], "options are written option=value")
        return self._build(node, node.func, node.keywords, find)

    def _build(self, whole: ast.expr, name: ast.Name, keywords: list[ast.keyword], find: Callable[[str], Any]) -> Any:
        try:
            cls = find(name.id)
        except SpecError as error:
            self._fail_at(name, str(error))
        options = {option.name: option for option in dataclasses.fields(cls)}
        takes = f"{name.id} takes: {', '.join(options) or 'no options'}."
        values: dict[str, Any] = {}
        nodes: dict[str, ast.AST] = {}
        for keyword in keywords:
            option = keyword.arg
            if option is None:
                self._fail_at(keyword.value, "options are written option=value")
            if option not in options:
                near = did_you_mean(option, options)
                self._fail(f"unknown option '{option}' of {name.id}{near}", self._column(keyword), len(option), takes)
            if option in values:
                self._fail(f"option '{option}' is given twice", self._column(keyword), len(option))
            values[option] = self._value(keyword.value, kinds(cls)[option])
            nodes[option] = keyword.value
        missing = [
            option.name for option in options.values() if default(option) is dataclasses.MISSING and option.name not in values
        ]
        if missing:
            self._fail_at(whole, f"{name.id} needs {' and '.join(missing)}", takes)
        try:
            return cls(**values)
        except SpecError as error:
            self._fail_at(nodes.get(error.option or "", whole), str(error))

    def _value(self, node: ast.expr, alternatives: tuple[Any, ...]) -> Any:
        plain = [kind for kind in alternatives if get_origin(kind) is None]  # tuple[int, int] is a type in Python 3.10 too
        if any(isinstance(kind, type) and issubclass(kind, Transform) for kind in plain):
            return self._transform(node)
        if AdaptiveSchedule in alternatives:
            none = isinstance(node, ast.Name | ast.Constant) and self._literal(node) is None
            return None if none else self._named(node, "schedule", find_schedule, schedule_names)
        if optimizers.Choice in alternatives:
            return self._choice(node)
        value = self._literal(node)
        return float(value) if float in alternatives and type(value) is int else value

    def _choice(self, node: ast.expr) -> optimizers.Choice:
        if isinstance(node, ast.Name):
            return optimizers.Choice(node.id)
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
            self._fail_at(node, "expected a word, or one with options, such as sgd(momentum=0.9)")
        options: list[tuple[str, Any]] = []
        for keyword in node.keywords:
            if keyword.arg is None:
                self._fail_at(keyword.value, "options are written option=value")
            if keyword.arg in dict(options):
                self._fail(f"option '{keyword.arg}' is given twice", self._column(keyword), len(keyword.arg))
            value = keyword.value
            # a word with options of its own is left to whoever reads it
            options.append((keyword.arg, ast.unparse(value) if isinstance(value, ast.Call) else self._literal(value)))
        return optimizers.Choice(node.func.id, tuple(options))

    def _literal(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Constant) and _is_too_large(node.value):
            self._fail_at(node, "this number is too large")
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float | str | None):
            return node.value
        if isinstance(node, ast.Name):
            return _WORDS.get(node.id, node.id)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            value = self._literal(node.operand)
            if isinstance(value, int | float) and not isinstance(value, bool):
                return -value if isinstance(node.op, ast.USub) else value
        if isinstance(node, ast.Tuple):
            return tuple(self._literal(item) for item in node.elts)
        return self._fail_at(node, "a value is a number, a word, or a nested name(...)")

    def _column(self, node: ast.AST) -> int:
        # ast counts bytes of the line; config strings are one line
        return len(self.text.encode()[: getattr(node, "col_offset", 0)].decode(errors="replace"))

    def _fail_at(self, node: ast.AST, message: str, hint: str = "") -> NoReturn:
        start = self._column(node)
        end = len(self.text.encode()[: getattr(node, "end_col_offset", start + 1)].decode(errors="replace"))
        self._fail(message, start, end - start, hint)

    def _fail(self, message: str, start: int, length: int, hint: str = "") -> NoReturn:
        lines = [message, f"  {self.text}", f"  {' ' * start}{'^' * max(length, 1)}", hint]
        raise SpecError("\n".join(line for line in lines if line)) from None
