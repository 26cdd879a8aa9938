"""Weights that are parameters of floating-point numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from typing_extensions import override

from lingrad.errors import ModeError
from lingrad.maps import LinearMap
from lingrad.tensors import on_tensor_cores, storage
from lingrad.weights.base import Weight
from lingrad.weights.layout import Layout

Merge = Literal["auto", "exact", "fast"]  # the products that add S z to a weight in 16 bits


@final
class DenseWeight(Weight):
    """A parameter as it is.

    Args:
        layout: How it is read as a matrix [m, n].
        param: The parameter.
        owners: Every (module, attribute) that holds it; several for tied weights, none where only the parameter is known.
        merge: How S z is added to bfloat16 and float16: ``exact``, ``fast``, or ``auto``, fast for bfloat16 on a device with
            tensor cores.
    """

    def __init__(
        self, layout: Layout, param: nn.Parameter, owners: Sequence[tuple[nn.Module, str]] = (), merge: Merge = "auto"
    ) -> None:
        super().__init__(layout)
        self.merge = merge
        self.owners = tuple(owners)
        self._param = None if owners else param
        self._embeddings = [(module, module.num_embeddings) for module, _ in owners if isinstance(module, nn.Embedding)]

    @property
    @override
    def param(self) -> nn.Parameter:
        if self._param is not None:
            return self._param
        module, attribute = self.owners[0]
        found = module._parameters.get(attribute)
        return _parametrized(module, attribute) if found is None else found

    @property
    @override
    def dtype(self) -> torch.dtype:
        return self.param.dtype

    @property
    @override
    def shape(self) -> tuple[int, ...]:
        shape = self.param.shape
        if shape == self.layout.weight_shape:
            # a program that resizes a parametrized weight reaches a computed tensor, and only the layer's own number of rows
            resized = [module.num_embeddings for module, given in self._embeddings if module.num_embeddings != given]
            return (resized[0], *shape[1:]) if resized else shape
        return shape

    @property
    def merges_in(self) -> torch.dtype | None:
        """The dtype that z is rounded to for a merge, so that products run in it; None where z is not rounded."""
        param = self.param
        if (
            self.rounding is not None
            or param.dtype == torch.float32
            or self.merge == "exact"
            or param.dtype not in (torch.bfloat16, torch.float16)
        ):
            return None
        # a coordinate may be too large for float16, and to find that out would wait for the device
        fast = self.merge == "fast" or (param.dtype == torch.bfloat16 and on_tensor_cores(param))
        return param.dtype if fast else None

    @property
    def untied(self) -> bool:
        """Whether the layers that held one parameter hold several now."""
        return any(_held(*owner) is not _held(*self.owners[0]) for owner in self.owners[1:])

    @override
    def dense(self) -> Tensor:
        return self.param.detach()

    @override
    def add_(self, current: LinearMap, coords: Tensor) -> None:
        weight: Tensor = self.param
        if type(weight) is not nn.Parameter and self.owners and not isinstance(weight, nn.Parameter):
            module, attribute = self.owners[0]
            raise ModeError(
                f"the {attribute} of a {type(module).__name__} is not a parameter any more (weight_norm and the like turn it "
                "into a computed tensor), and its updates would be lost; make it an nn.Parameter again first"
            )
        weight = weight.detach()  # a parameter that is watched asks for a merge where others write into it
        if self.rounding is not None:
            self._round_(current.lift(coords.detach().float()))
            return
        matrix = self.layout.matrix(weight)
        view = matrix is weight or storage(matrix) == storage(weight)
        if self.merges_in is not None:
            current.add_rounded_lift_(matrix, coords)
            if not view:
                weight.copy_(self.layout.restore(matrix))
        elif view:
            current.add_lift_(matrix, coords)
        else:  # the strides allowed no view, as in a channels_last convolution
            weight.add_(self.layout.restore(current.lift(coords)))

    def add_matrix_(self, matrix: Tensor) -> None:
        """``W += M``, in place.

        Args:
            matrix: M [m, n], of the weight's dtype or wider.
        """
        if self.rounding is None:
            self.param.detach().add_(self.layout.restore(matrix))
        else:
            self._round_(matrix)

    @override
    def scales(self) -> list[Tensor]:
        return [self.param] if self.rounding is None else []

    @override
    def decay_(self, factor: float | Tensor) -> None:
        self._round_(None, factor)

    def _round_(self, change: Tensor | None, factor: float | Tensor = 1.0) -> None:
        """``W = round(factor * W + change)``, in place."""
        assert self.rounding is not None  # noqa: S101 - the callers have looked
        weight = self.param.detach()
        matrix = self.layout.matrix(weight)
        self.rounding.add_(matrix, change, factor)
        if matrix is not weight and storage(matrix) != storage(weight):
            weight.copy_(self.layout.restore(matrix))

    @override
    def tensors(self) -> list[Tensor]:
        return [self.param]

    @override
    def state(self) -> dict[str, Tensor]:
        return {"weight": self.param.detach()}


def _held(module: nn.Module, attribute: str) -> nn.Parameter:
    found = module._parameters.get(attribute)
    return _parametrized(module, attribute) if found is None else found


def _parametrized(module: nn.Module, attribute: str) -> nn.Parameter:
    """The tensor behind a parametrization of one tensor, such as adapter mode's; behind any other, what it computes."""
    held: Any = getattr(module, "parametrizations", {})
    original = getattr(held[attribute], "original", None) if attribute in held else None
    found: nn.Parameter | None = getattr(module, attribute, None) if original is None else original
    if found is None:
        raise ModeError(
            f"the {attribute} of a {type(module).__name__} that is being trained was removed (by weight_norm, or del); put it "
            "back, or call detach() before such a change"
        )
    return found
