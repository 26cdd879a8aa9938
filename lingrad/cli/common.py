"""What every command has: -h, --quiet, --import, an example, exit codes, and a sign of life on a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typing_extensions import override

from lingrad import console
from lingrad.research.objects import bring

DOES_NOT_FIT = 3  # an exit code
EXIT_CODES = (
    "Exit codes: 0 done; 1 an unexpected error, with a traceback; 2 wrong input, or a request that cannot be met: the message "
    f"says why; {DOES_NOT_FIT} what lingrad memory simulate or fit was asked about does not fit in --capacity; 130 interrupted."
)


def group(help: str, epilog: str) -> typer.Typer:  # noqa: A002 - as typer calls it
    """A group of commands.

    Args:
        help: What they are for.
        epilog: An example.

    Returns:
        The group.
    """
    return typer.Typer(
        cls=Group,
        help=help,
        epilog=epilog,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def require_fits(fits: bool | None) -> None:
    """End the program with `DOES_NOT_FIT` where something does not; None is not known.

    Raises:
        Exit: It does not.
    """
    if fits is False:
        raise typer.Exit(DOES_NOT_FIT)


def _silence(ctx: typer.Context, value: bool) -> None:
    console.quiet = value or (console.quiet and ctx.parent is not None)  # before or after the command's name


def _bring(ctx: typer.Context, value: list[Path] | None) -> None:
    bring(value or (), to_plan=ctx.command_path == "lingrad run")


_shared = typer.Typer(add_completion=False)


@_shared.command()
def _options(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", callback=_silence, help="Show results, and no progress.")] = False,
    brought: Annotated[
        list[Path] | None,
        typer.Option(
            "--import",
            metavar="FILE.py",
            is_eager=True,  # before rules are read
            callback=_bring,
            help="Run this file first, such as one that registers a transform. May be given several times.",
        ),
    ] = None,
) -> None: ...


def _params() -> list[Any]:
    made = typer.main.get_command(_shared).params
    for param in made:
        param.expose_value = False
    return made


class Command(TyperCommand):
    """A command with the options that all have."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params = [*self.params, *_params()]

    @override
    def invoke(self, ctx: Any) -> Any:
        with console.alive(ctx.command_path):
            return super().invoke(ctx)


class Group(TyperGroup):
    """A group of commands with the options that all have, for those who write them first."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params = [*self.params, *_params()]
