"""Tasks: a model, its data, and how it is judged. A task of one's own is a class in a file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_type_hints

import torch
from torch import Tensor, nn

from lingrad.errors import SpecError, did_you_mean, in_short
from lingrad.models import loss_of
from lingrad.research.objects import is_object, load_object
from lingrad.research.schema import Table

Part = Literal["tuning", "final"]  # of what a model is judged by: for choosing among trials, and for results
_KINDS = {"str": str, "int": int, "float": float, "bool": bool, "list": list}


class Task(ABC):
    """A model, its data, and how it is judged.

    A subclass is a frozen dataclass whose fields, all of them texts, numbers, true or false, or lists, are keys of a plan's
    ``[task]``. Everything random must come from the seed.
    """

    metric: ClassVar[str] = "loss"  # that results are compared by, a key of what `judge` gives
    greater: ClassVar[bool] = False  # whether a greater one is better
    folder: Path = Path()  # of the plan, which names of files are relative to

    @abstractmethod
    def build(self, seed: int, dtype: torch.dtype) -> nn.Module:
        """The model before training.

        Args:
            seed: Of its weights, as far as they are random.
            dtype: Of its weights.
        """

    @abstractmethod
    def batches(self, steps: int, seed: int) -> Iterator[Any]:
        """The batches of a run.

        Args:
            steps: How many.
            seed: Of their order.

        Yields:
            Tensors, or mappings of tensors, which are moved to the model's device.
        """

    @abstractmethod
    def judge(self, model: nn.Module, part: Part) -> Mapping[str, float]:
        """Judge a model that was trained, in evaluation mode and without gradients.

        Args:
            model: The model.
            part: By which part of the data that no run trains on: trials by ``tuning``, results by ``final``.

        Returns:
            ``metric`` and others.
        """

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of a batch, 0-d.

        Args:
            model: The model.
            batch: One of `batches`.

        Returns:
            By default the ``loss`` of what the model gives for a mapping.
        """
        return loss_of(model(**batch))

    def tokens(self, batch: Any) -> int:
        """How many tokens, or other pieces, a batch has.

        Args:
            batch: One of `batches`.

        Returns:
            By default the numbers in its largest tensor.
        """
        parts = batch.values() if isinstance(batch, Mapping) else [batch]
        return max(part.numel() for part in parts if isinstance(part, Tensor))


def make_task(kind: str, table: Table, folder: Path) -> Task:
    """A task of a plan.

    Args:
        kind: One of `task_names`, or ``FILE.py:CLASS``.
        table: The plan's ``[task]``, of which every key that is left is one of the task's fields.
        folder: What names of files are relative to.

    Returns:
        The task.

    Raises:
        SpecError: There is no such task, a field is missing, unknown or of another kind, or the task refuses one.
    """
    found: Any = load_object(kind, folder) if is_object(kind) else _built_in().get(kind)
    if found is None:
        near = did_you_mean(kind, _built_in())
        raise SpecError(
            f"{table.where}: there is no task '{kind}'{near} Known: {', '.join(_built_in())}, FILE.py:CLASS", option="kind"
        )
    if not _is_task(found):
        raise SpecError(f"'{kind}' is no task: it must be a dataclass derived from lingrad.research.Task", option="kind")
    hints, values = get_type_hints(found), dict[str, Any]()
    for option in fields(found):
        kind_of = _KINDS.get(getattr(hints[option.name], "__name__", ""), str)
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


def task_names() -> list[str]:
    """The tasks that plans may name."""
    return list(_built_in())


def _is_task(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, Task) and is_dataclass(found)


def _built_in() -> dict[str, type[Task]]:
    from lingrad.research.tasks import TASKS  # they derive from `Task`

    return TASKS
