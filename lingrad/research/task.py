"""Tasks: a model, its data, and how it is judged. A task of one's own is a class in a file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lingrad.models import loss_of

Part = Literal["tuning", "final"]  # of what a model is judged by: for choosing among trials, and for results


class Task(ABC):
    """A model, its data, and how it is judged.

    A subclass is a frozen dataclass whose fields, all of them texts, numbers, true or false, or lists, are keys of a plan's
    ``[task]``. Everything random must come from the seed.
    """

    metric: ClassVar[str] = "loss"  # that results are compared by, a key of what `judge` gives
    greater: ClassVar[bool] = False  # whether a greater one is better
    folder: Path = Path()  # of the plan, which names of files are relative to
    cache_folder: Path | None = None  # for what every run of a plan computes alike; None where there is none

    def use_cache(self, folder: Path) -> None:
        """Keep in a folder, made where it is needed, what every run computes alike.

        Args:
            folder: The folder.
        """
        object.__setattr__(self, "cache_folder", folder)

    def check(self) -> None:  # noqa: B027 - a task may have nothing to see to
        """See that what it needs is there, such as files, before anything trains; raises `DataError` where it is not."""

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

    def weight(self, batch: Any) -> float:
        """What the loss of a batch is a mean over; read where several processes share a batch.

        Args:
            batch: Some rows of one of `batches`.

        Returns:
            By default 1, which is right where every row counts the same.
        """
        return 1.0


def digests_of(task: Task) -> dict[str, str]:
    """What a task's files hold, so that results are not taken for those of other data.

    Args:
        task: The task; its fields that name a file or a folder are looked at.

    Returns:
        Field -> SHA-256 of a file; of a folder, which may be a model of many gigabytes, of names and sizes.
    """
    found: dict[str, str] = {}
    for option in fields(task):  # type: ignore[arg-type]  # a task is a dataclass
        value = getattr(task, option.name)
        path = task.folder / value if isinstance(value, str) and value else None
        if path is not None and path.is_file():
            state = sha256()
            with path.open("rb") as file:
                while piece := file.read(2**20):
                    state.update(piece)
            found[option.name] = state.hexdigest()
        elif path is not None and path.is_dir():
            inner = sorted((str(one.relative_to(path)), one.stat().st_size) for one in path.rglob("*") if one.is_file())
            found[option.name] = sha256(repr(inner).encode()).hexdigest()
    return found


def mapped(batch: Any, change: Callable[[Tensor], Any]) -> Any:
    """A batch with each of its tensors replaced.

    Args:
        batch: A tensor, or mappings, lists and tuples of such; other values stay. Mappings become plain ones.
        change: Gives what stands in a tensor's place.

    Returns:
        The batch.
    """
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: mapped(value, change) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        parts = [mapped(value, change) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)  # a named tuple takes them one by one
    return batch


def tensors_of(batch: Any) -> list[Tensor]:
    """The tensors of a batch, in its order."""
    found: list[Tensor] = []
    mapped(batch, found.append)
    return found


def moved(batch: Any, device: str) -> Any:
    """A batch on a device; see `mapped`."""
    return mapped(batch, lambda tensor: tensor.to(device))
