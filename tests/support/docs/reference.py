"""The pages of docs/reference/: the public names, the command line and what config strings may hold.

Names come from the packages' ``__init__`` files, commands from typer, config strings from the registries, all of them with
the texts of the source.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

import typer

from lingrad import cli
from lingrad.config.published import METHODS
from lingrad.config.residual import OPTIONS as RESIDUALS
from lingrad.optimizers import Choice
from lingrad.optimizers.table import BUILT_IN
from lingrad.transforms import registry
from lingrad.transforms.options import default, format_value, kinds
from lingrad.transforms.schedules import find_schedule, schedule_names

# every module with public names, in the order in which a page is read; what an earlier one has, a later one refers to
MODULES = (
    "lingrad",
    "lingrad.transforms",
    "lingrad.optimizers",
    "lingrad.config.spec",
    "lingrad.hf",
    "lingrad.peft",
    "lingrad.convert",
    "lingrad.memory",
    "lingrad.methods",
    "lingrad.models",
    "lingrad.research",
    "lingrad.decentralized",
    "lingrad.adapters",
    "lingrad.maps",
    "lingrad.gradients",
    "lingrad.testing",
    "lingrad.errors",
)
LAZY = {  # names that a module's __getattr__ makes
    "lingrad": {"find_lr": "lingrad.research.rates.find_lr"},
    "lingrad.hf": {"LingradTrainer": "", "LingradSFTTrainer": ""},
}
MADE = {
    "LingradTrainer": "`class LingradTrainer(TrainerMixin, Trainer)`: transformers' Trainer with `lingrad.hf.TrainerMixin`.",
    "LingradSFTTrainer": "`class LingradSFTTrainer(TrainerMixin, SFTTrainer)`: TRL's, with `lingrad.hf.TrainerMixin`.",
}


def public(module: ModuleType) -> dict[str, str]:
    """The public names of a module.

    Args:
        module: A package, whose ``__init__`` imports them, or a file, which defines them.

    Returns:
        Name -> where it is defined, as a dotted path; a module's own path for a module.
    """
    text = inspect.getsource(module)
    if module.__name__ in ("lingrad.errors", "lingrad.config.spec"):
        names = re.findall(r"^(?:class|def) ([A-Za-z]\w*)", text, flags=re.MULTILINE)
        return {name: f"{module.__name__}.{name}" for name in names}
    found = {}
    for origin, name, alias in re.findall(r"^from ([\w.]+) import (\w+) as (\w+)$", text, flags=re.MULTILINE):
        if name == alias and not name.startswith("_"):
            found[name] = f"{origin}.{name}"
    own = re.findall(r"^(?:class|def) ([A-Za-z]\w*)", text, flags=re.MULTILINE)
    return found | {name: f"{module.__name__}.{name}" for name in own} | LAZY.get(module.__name__, {})


def api_pages() -> dict[str, str]:
    """One page for each module, with a directive of mkdocstrings for each name that no earlier page has.

    Returns:
        File name -> text.
    """
    home: dict[str, str] = {}
    pages = {}
    for path in MODULES:
        module = import_module(path)
        lines = [f"# {path}", "", _text(module), ""]
        for name, origin in sorted(public(module).items(), key=lambda item: item[0].lower()):
            if name in MADE:
                lines += [f"## `{name}`", "", MADE[name], ""]
            elif inspect.ismodule(getattr(module, name)):
                target = f"[`{origin}`]({origin}.md)" if origin in MODULES else f"`{origin}`"
                lines += [f"## `{name}`", "", f"The module {target}.", ""]
            elif (one := canonical(module, name, origin)) in home:
                lines += [f"## `{name}`", "", f"See [`{home[one]}`][{home[one]}].", ""]
            else:
                home[one] = origin if name in LAZY.get(path, ()) else f"{path}.{name}"
                lines += [f"::: {home[one]}", ""]
        pages[f"{path}.md"] = "\n".join(lines)
    return pages


def canonical(module: ModuleType, name: str, origin: str) -> str:
    """Where a public name is defined, the same for every module that has it."""
    thing = getattr(module, name)
    defined = inspect.isclass(thing) or inspect.isfunction(thing)
    return f"{thing.__module__}.{thing.__qualname__}" if defined else origin


def commands(command: Any = None, path: tuple[str, ...] = ("lingrad",)) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that runs something, with the words that call it."""
    command = typer.main.get_command(cli.app) if command is None else command
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name, child in command.commands.items():
        yield from commands(child, (*path, name))


def command_line() -> str:
    """The page of the command line."""
    lines = [
        "# Command line",
        "",
        "Generated from the program. `lingrad COMMAND --help` prints the same.",
        "",
        cli.EXIT_CODES,
        "",
    ]
    for path, command in commands():
        lines += [f"## `{' '.join(path)}`", "", " ".join(command.help.split()), ""]
        example = command.epilog.split("Example:\n")[1].splitlines()[0].strip()
        lines += ["```sh", example, "```", "", "| option | default | |", "|---|---|---|"]
        for param in command.params:
            name = param.metavar or param.opts[0]
            shown = "required" if param.required else "" if param.default in (None, False) else f"`{param.default}`"
            lines.append(f"| `{name}` | {shown} | {_cell(param.help)} |")
        lines.append("")
    return "\n".join(lines)


def config_strings() -> str:
    """The page of what config strings may hold."""
    lines = [
        "# What config strings may hold",
        "",
        "Generated from the registries. How strings are written: [config strings and rules](../config.md).",
        "What the transforms do: [transforms](../transforms.md).",
        "",
        "## Transforms",
        "",
    ]
    for name in registry.transform_names():
        cls = registry.find_transform(name)
        if cls.__module__.startswith("lingrad.transforms"):
            lines += _options(name, cls)
    lines += ["## Schedules", "", "Values of the option `schedule`.", ""]
    for name in schedule_names():
        lines += _options(name, find_schedule(name))
    lines += ["## Methods", "", "| name and options | stands for | source |", "|---|---|---|"]
    for name, method in METHODS.items():
        options = ", ".join(k if v is None else f"{k}={format_value(v)}" for k, v in method.options.items())
        more = {**method.base_options, **method.settings}
        stands = [f"`{method.spec}`", *([f"base `{method.base}`"] if method.base != "adamw" else [])]
        stands += [f"`{key}={value!r}`" for key, value in more.items()]
        lines.append(f"| `{name}({options})` | {_cell(', '.join(stands))} | {_cell(method.paper.removeprefix('of none: '))} |")
    lines += ["", "## Residuals", "", "Values of the option `residual` of `lingrad.wrap`.", ""]
    for name, option in RESIDUALS.items():
        lines.append(f"- `{name}{'' if option is None else f'({option}=...)'}`")
    lines += ["", "## Base optimizers", "", "| name | class | what trains in full |", "|---|---|---|"]
    for name, base in BUILT_IN.items():
        lines.append(f"| `{name}` | `{base.path}` | {'the same' if base.fallback is None else f'`{base.fallback}`'} |")
    return "\n".join([*lines, ""])


def _options(name: str, cls: type) -> list[str]:
    """A section about a dataclass that a config string names."""
    fields = dataclasses.fields(cls)
    lines = [f"### `{name}`", "", _text(cls).partition("\n\n")[0], ""]
    if not fields:
        return lines
    documented = arguments(cls)
    lines += ["| option | default | |", "|---|---|---|"]
    for option in fields:
        value = default(option)
        shown = "required" if value is dataclasses.MISSING else f"`{_value(value)}`"
        choices = [one for kind in kinds(cls)[option.name] for one in getattr(kind, "__args__", ()) if isinstance(one, str)]
        text = documented.get(option.name, "")
        words = f" One of {', '.join(f'`{word}`' for word in choices)}." if choices and choices[0] not in text else ""
        lines.append(f"| `{option.name}` | {shown} | {_cell(text + words)} |")
    return [*lines, ""]


def _value(value: Any) -> str:
    return value.name if isinstance(value, Choice) else format_value(value)


def arguments(cls: type) -> Mapping[str, str]:
    """The ``Args:`` of a class, its bases' where it does not name them itself.

    Args:
        cls: The class.

    Returns:
        Name -> text, on one line.
    """
    found: dict[str, str] = {}
    for one in reversed(cls.__mro__):
        match = re.search(r"^Args:\n((?: .*\n?|\n)*)", inspect.cleandoc(one.__dict__.get("__doc__") or ""), flags=re.MULTILINE)
        for name, text in re.findall(r"^    (\w+): (.*(?:\n     .*)*)", match[1] if match else "", flags=re.MULTILINE):
            found[name] = " ".join(text.split())
    return found


def _text(thing: Any) -> str:
    """The docstring without its sections, in Markdown: code in single backticks."""
    text = (inspect.getdoc(thing) or "").partition("\nArgs:")[0].partition("\nRaises:")[0].strip()
    return text.replace("``", "`")


def _cell(text: str) -> str:
    return " ".join(text.replace("``", "`").replace("|", "\\|").split()) if text else ""


def pages() -> dict[str, str]:
    """Every page of docs/reference/: file name -> text."""
    return {**api_pages(), "cli.md": command_line(), "config-strings.md": config_strings()}
