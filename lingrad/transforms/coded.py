"""`coded`: another transform whose bases are kept in 8 or 4 bits between steps."""

from __future__ import annotations

from dataclasses import fields
from math import prod
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from typing_extensions import override

from lingrad.errors import SpecError, require
from lingrad.gradients.base import Gradient
from lingrad.maps import LinearMap
from lingrad.optimizers.codes import BLOCK
from lingrad.tensors import TensorSpec, wide
from lingrad.transforms.base import Probe, Ranks, Reads, Sketch, Transform, When
from lingrad.transforms.registry import register
from lingrad.transforms.schedules import AdaptiveSchedule


class Codes(NamedTuple):
    """A matrix in codes. The names are keys in checkpoints.

    Args:
        codes: uint8; two in a byte where they have 4 bits.
        scales: The largest magnitude of each 256 elements, in the dtype of the matrix.
        rows: Of the matrix.
        columns: Of the matrix.
    """

    codes: Tensor
    scales: Tensor
    rows: int
    columns: int

    @property
    def fixed(self) -> tuple[str, ...]:
        """The fields that a checkpoint must agree on: they are sizes of memory."""
        return ("rows", "columns")


@register("coded")
@final
class Coded(Transform):
    """Bases in 8 or 4 bits, evenly spaced and block-wise, two 4-bit codes in a byte; decoded at each use.

    A refresh rounds the basis that ``each`` chose to codes, and everything uses what they stand for, so that both modes see one
    basis. It is not quite orthonormal any more. (Q-GaLore: Zhang et al., 2024, arXiv 2407.08296, section 3.2. Its program keeps
    4 bits in a byte.)

    Args:
        each: The transform that chooses the basis.
        bits: Bits of an element: 8 or 4.

    Raises:
        SpecError: ``bits`` is neither, or ``each`` keeps no basis that can be coded.
    """

    uncoded = "it is coded already"

    each: Transform
    bits: int = 8

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        require(self.bits in (4, 8), "bits", f"bits must be 8 or 4, not {self.bits}")
        for transform in _parts(self.each):
            if transform.uncoded:
                raise SpecError(f"the basis of {transform.name} is not kept in codes: {transform.uncoded}", option="each")

    @override
    def ranks(self, shape: tuple[int, int]) -> Ranks:
        return self.each.ranks(shape)

    @override
    def coords_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        return self.each.coords_shape(shape)

    @override
    def basis_shapes(self, shape: tuple[int, int]) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
        return None, None  # no matrix stays in memory

    @override
    def storage(self, shape: tuple[int, int], dtype: torch.dtype) -> list[TensorSpec]:
        found: list[TensorSpec] = []
        for tensor in self.each.storage(shape, dtype):
            if len(tensor.shape) == 2 and tensor.dtype.is_floating_point:
                count = prod(tensor.shape)
                found.append(TensorSpec((-(-count * self.bits // 8),), torch.uint8))
                found.append(TensorSpec((-(-count // BLOCK),), tensor.dtype))
            else:
                found.append(tensor)
        return found

    @override
    def init(self, shape: tuple[int, int], *, seed: int, device: torch.device, dtype: torch.dtype) -> Any:
        return self._encoded(self.each.init(shape, seed=seed, device=device, dtype=dtype))

    @override
    def refresh(self, state: Any, grad: Gradient | None, when: When) -> Any:
        return self._encoded(self.each.refresh(self._decoded(state), grad, when))

    @override
    def probes(self, state: Any, when: When) -> tuple[Probe, ...]:
        return self.each.probes(self._decoded(state), when)

    @override
    def learn(self, state: Any, sketch: Sketch, when: When) -> Any:
        return self._encoded(self.each.learn(self._decoded(state), sketch, when))

    @override
    def map(self, state: Any) -> LinearMap:
        return self.each.map(self._decoded(state))

    @property
    @override
    def rule(self) -> AdaptiveSchedule | None:
        return self.each.rule

    @property
    @override
    def reads(self) -> Reads:
        return self.each.reads

    @property
    @override
    def stores_map(self) -> bool:
        return False

    @property
    @override
    def period(self) -> int:
        return self.each.period

    @override
    def due(self, step: int) -> bool:
        return self.each.due(step)

    def _encoded(self, state: Any) -> Any:
        if isinstance(state, Tensor) and state.dim() == 2 and state.is_floating_point():
            return encode(state, self.bits)
        return type(state)(*map(self._encoded, state)) if hasattr(state, "_asdict") else state

    def _decoded(self, state: Any) -> Any:
        if isinstance(state, Codes):
            return decode(state, self.bits)
        return type(state)(*map(self._decoded, state)) if hasattr(state, "_asdict") else state


def encode(matrix: Tensor, bits: int) -> Codes:
    """The nearest codes of a matrix.

    Args:
        matrix: [rows, columns]; an element that is not finite spoils its block.
        bits: 8, for multiples of 1/127 of a block's largest magnitude, or 4, for multiples of 1/7.

    Returns:
        The codes.
    """
    high, steps = wide(matrix.dtype), _STEPS[bits]
    flat = matrix.detach().reshape(-1)
    blocks = nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1)
    divisors = torch.where(scales == 0, torch.ones_like(scales), scales).to(high)
    codes = (blocks.to(high) / divisors[:, None] * steps).round_().add_(steps).to(torch.uint8).view(-1)[: len(flat)]
    if bits == 4:
        low, upper = nn.functional.pad(codes, (0, len(codes) % 2)).view(-1, 2).unbind(1)
        codes = low | (upper << 4)
    elif len(flat) % BLOCK:
        codes = codes.clone()  # in memory of its own size
    return Codes(codes, scales, *matrix.shape)


def decode(coded: Codes, bits: int) -> Tensor:
    """The matrix that codes stand for.

    Args:
        coded: The codes.
        bits: As for `encode`.

    Returns:
        [rows, columns], in the dtype of the scales.
    """
    count, high = coded.rows * coded.columns, wide(coded.scales.dtype)
    codes = coded.codes
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), 1).view(-1)[:count]
    blocks = nn.functional.pad(codes.to(high).sub_(_STEPS[bits]), (0, -count % BLOCK)).view(-1, BLOCK)
    values = blocks.div_(_STEPS[bits]).mul_(coded.scales.to(high)[:, None]).view(-1)[:count]
    # in memory of its own size
    return values.to(coded.scales.dtype, copy=count % BLOCK > 0).view(coded.rows, coded.columns)


_STEPS = {8: 127, 4: 7}  # on each side of zero


def _parts(transform: Transform) -> list[Transform]:
    """A transform and those that it is made of."""
    own = (getattr(transform, option.name) for option in fields(transform))
    return [transform, *(part for each in own if isinstance(each, Transform) for part in _parts(each))]
