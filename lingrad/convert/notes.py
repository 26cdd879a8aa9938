"""What a reader of a conversion's report must know besides its figures."""

from __future__ import annotations

from collections.abc import Sequence

from lingrad.console import span
from lingrad.convert.lowrank import Goal
from lingrad.peft.report import ChangedTensor

NOISY = 0.02  # a remainder, as a share of the change, that is worth a note


def notes(
    rows: Sequence[ChangedTensor], goal: Goal, nbytes: int, model_bytes: int, ignored: Sequence[str] = ()
) -> tuple[str, ...]:
    """The notes of a report.

    Args:
        rows: The tensors that changed.
        goal: How much of their change was asked for.
        nbytes: Bytes of the adapter's weights.
        model_bytes: Bytes of the trained model's weights.
        ignored: Entries of the two configs that differ and were passed over.

    Returns:
        A sentence or two each.
    """
    found = []
    low = [row for row in rows if row.kind == "low_rank"]
    decayed = [row for row in low if row.decay != 1.0]
    if decayed:
        found.append(
            f"Decoupled weight decay: {len(decayed)} of {len(low)} low-rank weights are decay * START + low rank, decay being "
            f"{span([row.decay for row in decayed])}. PEFT adds an adapter to START without decay and cannot express that. If "
            "the weights of START are multiplied by decay, the residual is the one 'without decay'; --decayed-start DIR writes "
            "such a model. Or fit TUNED - START, decay included, at a larger rank, with --rank, --energy or --max-error."
        )
    left = [row.without_decay or 0.0 for row in low if not row.full_rank]
    noisy = [share for share in left if share > NOISY]
    if noisy and goal.exact:
        found.append(
            f"The factors of {len(noisy)} of {len(low)} weights leave up to {max(noisy):.1%} of their change, spread over all "
            "directions as rounding at every training step leaves it; only full rank would hold it."
        )
    full = sum(row.full_rank for row in low)
    if full:
        found.append(
            f"{full} of {len(low)} weights changed by a matrix of full rank: its factors are larger than the weight. TUNED was "
            "not trained in a few low-rank subspaces, or was rounded at every step. Give --rank, --energy or --max-error to "
            "keep a part, or use TUNED as it is."
        )
    if nbytes > model_bytes:
        found.append(f"The adapter is larger than the model: {nbytes:,} bytes, compared with {model_bytes:,}.")
    if ignored:
        found.append(
            f"The configs differ in {', '.join(ignored)}, which are about the task, or unknown to the model's class in "
            "transformers. The adapter carries none of these entries."
        )
    return tuple(found)
