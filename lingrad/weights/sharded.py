"""Weights of which each process holds a part (``fully_shard``, tensor parallelism)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

from torch import Tensor, nn
from typing_extensions import override

from lingrad.maps import LinearMap
from lingrad.tensors import is_sharded, own, whole
from lingrad.weights.base import Weight
from lingrad.weights.layout import Layout
from lingrad.weights.sharding import LayerSharding, Sharding


@final
class ShardedWeight(Weight):
    """A parameter that is a DTensor; a merge writes this process's part.

    Args:
        layout: How it is read as a matrix [m, n], which is as it is.
        param: The parameter.
        owners: The (module, attribute) that holds it; in its forward, and after one without a backward, the module holds the
            gathered weight instead.
        sharding: How it is cut.
    """

    def __init__(
        self, layout: Layout, param: nn.Parameter, owners: Sequence[tuple[nn.Module, str]], sharding: Sharding
    ) -> None:
        super().__init__(layout)
        self.sharding: Sharding = sharding
        self.owners = tuple(owners)
        self._param = param

    @property
    @override
    def param(self) -> nn.Parameter:
        for module, attribute in self.owners[:1]:
            found = module._parameters.get(attribute)
            if found is not None and found is not self._param and is_sharded(found):
                self._param = found  # another program has put it there, as a move to a device does
        return self._param

    @property
    @override
    def dtype(self) -> Any:
        return self.param.dtype

    @override
    def dense(self) -> Tensor:
        return self.param.detach()

    @override
    def sum(self, current: LinearMap, coords: Tensor, weight: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        part, taken = self._part(current, coords)
        found = own(weight) + part.lift(taken).to(weight.dtype)
        given: Any = weight
        return DTensor.from_local(
            found, given.device_mesh, given.placements, run_check=False, shape=weight.shape, stride=weight.stride()
        )

    @override
    def add_(self, current: LinearMap, coords: Tensor) -> None:
        part, taken = self._part(current, coords)
        if self.rounding is None:
            part.add_lift_(own(self.param.detach()), taken)
        else:
            self.rounding.add_(own(self.param.detach()), part.lift(taken.detach().float()))

    def _part(self, current: LinearMap, coords: Tensor) -> tuple[LinearMap, Tensor]:
        """The map to this process's part, and the coordinates that it takes."""
        if isinstance(self.sharding, LayerSharding):  # the map does not act along the dimension that is cut
            return current, own(coords)
        rows = self.sharding.rows(self.layout.shape[0])
        return current.part(rows, own(coords) if current.aligned else whole(coords))

    @override
    def scales(self) -> list[Tensor]:
        return [own(self.param.detach())] if self.rounding is None else []

    @override
    def decay_(self, factor: float | Tensor) -> None:
        assert self.rounding is not None  # noqa: S101 - it has scales otherwise
        self.rounding.add_(own(self.param.detach()), None, factor)

    @override
    def tensors(self) -> list[Tensor]:
        return [own(self.param.detach())]

    @override
    def state(self) -> dict[str, Tensor]:
        return {"weight": self.param.detach()}
