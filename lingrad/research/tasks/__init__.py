"""The tasks that plans may name, and those of files."""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from lingrad.errors import SpecError, did_you_mean, in_short
from lingrad.research.objects import is_object, load_object
from lingrad.research.schema import Table
from lingrad.research.task import Task
from lingrad.research.tasks.chat import Chat
from lingrad.research.tasks.classify import Classify
from lingrad.research.tasks.metamath import MetaMath
from lingrad.research.tasks.text import Text

TASKS: dict[str, type[Task]] = {"text": Text, "classify": Classify, "chat": Chat, "metamathqa": MetaMath}

_LISTS = (list[str], list[int], list[float], list[Any])
_KINDS = {"str": str, "int": int, "float": float, "bool": bool, "list": list}


def make_task(kind: str, table: Table, folder: Path) -> Task:
    """A task of a plan.

    Args:
        kind: A key of `TASKS`, or ``FILE.py:CLASS``.
        table: The plan's ``[task]``, of which every key that is left is one of the task's fields.
        folder: What names of files are relative to.

    Returns:
        The task.

    Raises:
        SpecError: There is no such task, a field is missing, unknown or of another kind, or the task refuses one.
    """
    found: Any = load_object(kind, folder) if is_object(kind) else TASKS.get(kind)
    if found is None:
        near = did_you_mean(kind, TASKS)
        raise SpecError(
            f"{table.where}: there is no task '{kind}'{near} Known: {', '.join(TASKS)}, FILE.py:CLASS", option="kind"
        )
    if not _is_task(found):
        raise SpecError(f"'{kind}' is no task: it must be a dataclass derived from lingrad.research.Task", option="kind")
    hints, values = get_type_hints(found), dict[str, Any]()
    for option in fields(found):
        kind_of = _KINDS.get(getattr(hints[option.name], "__name__", ""))
        if kind_of is None or hints[option.name] not in (*_KINDS.values(), *_LISTS):
            raise SpecError(
                f"task '{kind}': its field '{option.name}' is a {hints[option.name]}; expected str, int, float, bool or list"
            )
        default: dict[str, Any] = {}
        if option.default is not MISSING:
            default = {"default": option.default}
        elif option.default_factory is not MISSING:
            default = {"default": option.default_factory()}
        values[option.name] = table.take(option.name, kind_of, **default)
    table.end()
    try:
        task: Task = found(**values)
    except SpecError:
        raise
    except Exception as error:  # code of others
        raise SpecError(f"task '{kind}' refuses its options: {in_short(error)}", option="kind") from error
    object.__setattr__(task, "folder", folder)
    return task


def _is_task(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, Task) and is_dataclass(found)
