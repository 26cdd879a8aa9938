"""The options of ``lingrad memory`` that make up a question: one list for all of its commands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING
from functools import wraps
from inspect import Parameter, Signature, get_annotations, signature
from typing import Any, get_args

from lingrad.cli import options
from lingrad.memory.commands import Question

OPTIONS: Mapping[str, Any] = {  # field of a question -> its option
    "model": options.Model,
    "rules": options.Rules,
    "base": options.Base,
    "mode": options.Mode,
    "batch": options.Batch,
    "length": options.Length,
    "dtype": options.Dtype,
    "checkpointing": options.Checkpointing,
    "layerwise": options.Layerwise,
    "capacity": options.Capacity,
    "context": options.Context,
    "share": options.Share,
    "stagger": options.Stagger,
    "expandable": options.Expandable,
    "ranks": options.Ranks,
    "offload": options.Offload,
}


def asks(*without: str, **own: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of a question, which is then its first argument, checked.

    Args:
        *without: Fields that the command has no option for.
        **own: Options of its own for fields. One that takes no None must be given.

    Returns:
        A decorator, to be applied before typer's.
    """
    asked = {name: option for name, option in {**OPTIONS, **own}.items() if name not in without}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_annotations(command, eval_str=True)  # get_type_hints of Python 3.10 changes those whose default is None
        others = list(signature(command).parameters.values())[1:]

        @wraps(command)
        def run(**given: Any) -> None:
            command(Question(**{name: given.pop(name) for name in asked}), **given)

        run.__annotations__ = {**asked, **{param.name: hints[param.name] for param in others}}
        params = [
            *(Parameter(name, Parameter.KEYWORD_ONLY, default=_default(name, option)) for name, option in asked.items()),
            *(param.replace(kind=Parameter.KEYWORD_ONLY) for param in others),
        ]
        plain: Any = run
        plain.__signature__ = Signature([param.replace(annotation=run.__annotations__[param.name]) for param in params])
        return run

    return decorate


def _default(name: str, option: Any) -> Any:
    default = Question.__dataclass_fields__[name].default
    return Parameter.empty if default is MISSING or (default is None and get_args(option)[0] is str) else default
