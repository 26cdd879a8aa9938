"""Cards and their rates, and the time that a card takes for recorded operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from benchmarks.operators import Row


class Card(NamedTuple):
    """Rates of a card.

    Args:
        bfloat16: Products in half precision, FLOP/s, at 8192 x 8192 x 8192. Measured on such cards.
        float32: Products in float32 without TF32, FLOP/s. Assumed: 0.8 of the data sheet's 67 TFLOP/s.
        float64: Products in float64, FLOP/s. Assumed: 0.75 of the data sheet's.
        attention: Flash attention in half precision, forward and backward, FLOP/s. Assumed.
        copy: Bytes/s of a large copy, read and written. Measured on such cards; data sheets: 4.8 and 3.35 TB/s.
        pointwise: Bytes/s of eager pointwise kernels and reductions. Assumed: 0.72 of the copy's.
    """

    bfloat16: float
    float32: float
    float64: float
    attention: float
    copy: float
    pointwise: float


CARDS = {
    "H200": Card(790e12, 53e12, 50e12, 380e12, 4.3e12, 3.1e12),
    "H100": Card(650e12, 53e12, 50e12, 350e12, 2.9e12, 2.1e12),
}
FLOOR = 2.0e-6  # s, the least that a kernel takes; assumed
GAP = 1.0e-6  # s between two kernels of a CUDA graph; assumed; half of it between kernels that are queued in a stream
LAUNCH = 3.5e-6  # s of the host for a launch, beyond the same operator on a tiny CPU tensor; assumed: 5 us a launch, less 1.5
FUSED = 0.4  # share of pointwise bytes that is left where they are compiled; assumed
FEWER = 0.3  # share of pointwise kernels that is left where they are compiled; assumed
# share of the best rate that a product reaches by its narrowest side (up to this many rows or columns); assumed
NARROW = ((96, 0.45), (192, 0.6), (384, 0.75), (768, 0.85))
WIDE = 0.95

Phases = Mapping[str, Sequence[Row]]


def efficiency(narrow: int) -> float:
    """Share of the best rate that a product with this narrowest side reaches."""
    return next((share for limit, share in NARROW if narrow < limit), WIDE)


def seconds(row: Row, card: Card, *, compiled: bool = False) -> float:
    """Time that the card takes for an operator.

    Args:
        row: The operator.
        card: The card.
        compiled: Whether it has been fused with its neighbours, if it is pointwise.

    Returns:
        Seconds.
    """
    if not row.launches:
        return 0.0
    least = FLOOR * row.launches
    if row.kind == "pointwise":
        share, fewer = (FUSED, FEWER) if compiled else (1.0, 1.0)
        return max(share * row.nbytes / card.pointwise, fewer * least)
    rates = {torch.float32: card.float32, torch.float64: card.float64}
    rate = rates.get(row.dtype, card.attention if row.kind == "attention" else card.bfloat16)
    if row.kind == "product":
        rate *= efficiency(row.narrow)
    return max(row.flops / rate, row.nbytes / card.copy, least)


def eager(phases: Phases, card: Card, host_time: Mapping[str, float]) -> float:
    """Time of a step whose kernels the host launches one by one.

    Args:
        phases: Phase -> operators.
        card: The card.
        host_time: Phase -> seconds of the host without launches, spread evenly over its operators.

    Returns:
        Seconds until both host and card are done.
    """
    now = busy = 0.0  # of the host; until which the card has work
    for phase, rows in phases.items():
        each = host_time[phase] / max(1, len(rows))
        for row in rows:
            now += each + LAUNCH * row.launches
            if row.launches:
                busy = max(busy + GAP / 2, now) + seconds(row, card)
            if row.reads:
                now = max(now, busy)
    return max(now, busy)


def graph(phases: Phases, card: Card, *, compiled: bool = False) -> float:
    """Time of a step that is replayed as a CUDA graph.

    Args:
        phases: Phase -> operators.
        card: The card.
        compiled: Whether forward and backward have been compiled; the optimizer's step has not.

    Returns:
        Seconds.
    """
    total = 0.0
    for phase, rows in phases.items():
        fused = compiled and phase in ("forward", "backward")
        for row in rows:
            kernels = row.launches * (FEWER if fused and row.kind == "pointwise" else 1.0)
            total += seconds(row, card, compiled=fused) + GAP * kernels
    return total
