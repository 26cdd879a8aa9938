"""What a written adapter may lack of the change: checked tensor by tensor before the folder gets its name."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from lingrad.convert.notes import NOISY
from lingrad.convert.output import Output
from lingrad.convert.tensors import TensorPair
from lingrad.convert.work import ChangeRecord
from lingrad.errors import ExportError
from lingrad.peft.fit import largest_rank, rounded_up
from lingrad.peft.report import ChangedTensor


def require_reached(output: Output, pair: TensorPair, record: ChangeRecord, left: tuple[float, float, torch.dtype]) -> None:
    """Make sure that what was written reaches the goal, and leaves what was found, but for the rounding of its factors.

    Args:
        output: The goal, and what the adapter is for.
        pair: The tensor.
        record: Its change, as it was found.
        left: What the file leaves of the change, of the change without decay, and the dtype of its factors.

    Raises:
        ExportError: It does not.
    """
    goal, (residual, without_decay, dtype) = output.goal, left
    reached = without_decay if goal.exact else residual
    if is_cut(output, record.rank):
        return  # the loss is measured, and has to be allowed
    if goal.lost and not reached <= goal.lost**0.5 * (1 + 1e-6):  # nor NaN
        raise ExportError(
            f"'{pair.name}': factors in {dtype} leave {reached:.2e} of the change, and at most {goal.lost**0.5:.2e} was "
            "asked for; write them in fp32 (leave --dtype out), or allow a larger error"
        )
    if not reached <= record.residual + 2 * torch.finfo(dtype).eps:
        raise ExportError(
            f"'{pair.name}': the written file leaves {reached:.2e} of the change, and {record.residual:.2e} was found; "
            "a folder was changed during the conversion, or the disk is failing"
        )


def is_cut(output: Output, rank: int) -> bool:
    """Whether a change has a larger rank than the adapter's target has room for."""
    most = largest_rank(output.target, None)
    return most is not None and rank > most


def require_allowed(output: Output, rows: Sequence[ChangedTensor], cut: Collection[str]) -> None:
    """Make sure that no tensor lacks more of its change than needs no permission, or than was allowed.

    Args:
        output: The goal, and what was allowed.
        rows: The tensors that changed.
        cut: Names of those whose rank was cut to what the target takes.

    Raises:
        ExportError: One does.
    """
    goal = output.goal
    limit = output.allow_residual
    if limit is None:
        limit = goal.lost**0.5 * (1 + 1e-6) if goal.lost else NOISY
    worst = max(rows, key=lambda row: _left(output, row))
    left = _left(output, worst)
    if left <= limit:
        return
    if worst.name in cut:
        why = f"its rank is cut to {worst.rank}, the largest that {output.target} takes"
    elif not goal.exact:
        why = f"the goal is {goal.words}"
    elif worst.decay != 1.0 and (worst.without_decay or 0.0) <= limit:
        why = "the weight was decayed, and PEFT adds to START as it is; --decayed-start DIR writes a model to add it to"
    else:
        why = "it is spread over all directions, as rounding at every training step leaves it, and only full rank would hold it"
    raise ExportError(
        f"'{worst.name}': the adapter leaves {left:.2g} of its change, over {limit:.2g}: {why}. "
        f"allow_residual={rounded_up(left)} (--allow-residual {rounded_up(left)}) accepts it; what was found is kept for it"
    )


def words(output: Output, rows: Sequence[ChangedTensor], norms: Sequence[float]) -> str:
    """How much of the change was asked for, and what is left out where that was all of it and is not.

    Args:
        output: The goal.
        rows: The tensors with factors.
        norms: Their |TUNED - START|_F.

    Returns:
        A phrase.
    """
    total = sum(norm**2 for norm in norms)
    lost = sum((_left(output, row) * norm) ** 2 for row, norm in zip(rows, norms, strict=True))
    left = (lost / total) ** 0.5 if total else 0.0
    if not output.goal.exact or left <= NOISY:
        return output.goal.words
    return f"a part of the change: {left:.2g} of it is left out"


def _left(output: Output, row: ChangedTensor) -> float:
    """What an adapter lacks of a change, on the model that it is for."""
    return row.residual if output.decayed_start is None or row.without_decay is None else row.without_decay
