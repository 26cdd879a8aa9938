"""Autograd functions of linear layers: the weight gradient is computed in the small space, as project(dY^T X).

What a step costs, of T tokens, in multiplications and additions: the forward, 2 T m n, and the gradient of the input, 2 T m n,
as in the plain layer; in place of the weight gradient, 2 T m n, its projection: 2 T r (m + n) with a basis on one side,
2 T (n q + m p + p q) with bases on both. No m x n gradient exists, but where a refresh reads it; off refresh steps a right map
saves X Q [T, q] of the input instead of X [T, n]. Adapter mode adds the product with S z to the forward and to the gradient of
the input: by way of the coordinates, 2 T r (2 m + n) with a right basis, 2 T r (m + 2 n) with a left one, or by forming W + S z
twice, 4 m n r, one layer at a time, whichever is less (`LinearMap.lifts_cheaper`). Coordinates of a wider dtype than the
weight's are never rounded into it so: they go the first way.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from lingrad.adapters.base import applied, once, outside_of_graph
from lingrad.gradients import FactoredGradient
from lingrad.maps import LinearMap
from lingrad.subspaces.subspace import Subspace
from lingrad.tensors import cast


class _Reduced(NamedTuple):
    """An input that several layers read, reduced once."""

    given: weakref.ref[Tensor]
    version: int
    map: LinearMap
    reduced: Tensor
    waiting: set[str]  # layers that have not asked for it yet

    def matches(self, layer: str, current: LinearMap, x: Tensor, given: Tensor) -> bool:
        """Whether this is the same input, and the layer has not had it."""
        same = self.given() is given and self.version == given._version and self.map is current
        return same and layer in self.waiting and self.reduced.dtype == x.dtype


class SharedInput:
    """What layers with one right basis Q share in a forward: X Q, computed for the first of them that reads X.

    Args:
        layers: The names of their weights.
    """

    def __init__(self, layers: set[str]) -> None:
        self._layers = layers
        self._last: _Reduced | None = None

    def reduce(self, layer: str, current: LinearMap, x: Tensor, given: Tensor) -> Tensor:
        """All that the map needs of an input.

        Args:
            layer: The name of the weight that reads it.
            current: The map.
            x: The input, [..., n].
            given: The input in the dtype it was given in.

        Returns:
            ``current.reduce(x)``.
        """
        if given.is_inference():
            return current.reduce(x)
        last = self._last
        if last is None or not last.matches(layer, current, x, given):
            last = _Reduced(weakref.ref(given), given._version, current, current.reduce(x), self._layers - {layer})
        last.waiting.discard(layer)
        self._last = last if last.waiting else None
        return last.reduced

    def forget(self) -> None:
        """Free what not all layers have asked for."""
        self._last = None


class Projection(NamedTuple):
    """What the functions of one layer need besides tensors.

    Args:
        sub: The subspace of the layer's weight.
        shared: The input that it may share with other layers; None where it has that for itself.
    """

    sub: Subspace
    shared: SharedInput | None

    def reduce(self, current: LinearMap, x: Tensor, given: Tensor) -> Tensor:
        """All that the map needs of x, which is ``given`` in another dtype."""
        return current.reduce(x) if self.shared is None else self.shared.reduce(self.sub.name, current, x, given)


class _Saved:
    """What the backward of one layer's forward needs besides tensors."""

    def __init__(self, sub: Subspace, x: Tensor) -> None:
        self.sub, self.due, self.refreshes = sub, sub.basis.due, sub.basis.refreshes
        self.borrowed = x.is_leaf  # an input that no layer made may be a buffer that is filled again

    def map(self) -> LinearMap:
        """The map of the forward."""
        return self.sub.basis.map_after(self.refreshes, self.sub.name)

    def project(self, current: LinearMap, out_grad: Tensor, reduced_grad: Tensor, x: Tensor) -> Tensor:
        """The gradient of the coordinates; what a refresh reads of the gradient is recorded."""
        x = x.reshape(-1, x.shape[-1])
        reduced = current.reduce(x) if self.due else x
        projected = current.core.project(FactoredGradient(reduced_grad, reduced))
        if self.due:
            grad = FactoredGradient(out_grad, x)
            owned = (lambda: FactoredGradient(out_grad, x.clone())) if self.borrowed else None
            self.sub.record(grad, projected, owned)
        return cast(projected, self.sub.coords.dtype)


class Tied(torch.autograd.Function):
    """``out`` (+ x (S z)^T where ``active``), with project(dY^T X) as the gradient of z."""

    @staticmethod
    @override
    def forward(ctx: Any, out: Tensor, x: Tensor, coords: Tensor, layer: Projection, active: bool) -> Tensor:
        sub, current = layer.sub, layer.sub.basis.map()
        due = sub.basis.due
        given, x = x, cast(x, out.dtype)  # under autocast the layer computed in out's dtype, and so does its gradient
        reduced = layer.reduce(current, x, given) if active or not due else x
        ctx.saved = _Saved(sub, x)
        ctx.active = active
        ctx.save_for_backward(x if due else reduced, coords if active else None)
        # out.detach(): returned as it is, an input would come back as a view that later in-place layers must not touch
        return out + current.inner.apply(reduced, coords) if active else out.detach()

    @staticmethod
    @once
    @override
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
        current = ctx.saved.map()
        x, coords = ctx.saved_tensors
        grad = out_grad.reshape(-1, out_grad.shape[-1])
        reduced_grad = current.T.reduce(grad)
        x_grad = None
        if ctx.active and ctx.needs_input_grad[1]:
            x_grad = current.T.inner.apply(reduced_grad, coords.t())
            x_grad = x_grad.view(*out_grad.shape[:-1], x_grad.shape[-1])
        return out_grad, x_grad, ctx.saved.project(current, grad, reduced_grad, x), None, None


class Adapted(torch.autograd.Function):
    """x (W + S z)^T + b, with project(dY^T X) as the gradient of z and none of W."""

    @staticmethod
    @override
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, coords: Tensor, weight: Tensor, layer: Projection, trains: bool
    ) -> Tensor:
        sub, layout = layer.sub, layer.sub.weight.layout
        current, matrix, due = sub.basis.map(), layout.matrix(weight), sub.basis.due
        tokens = x.numel() // max(1, layout.shape[1])
        ctx.forms_sum = coords.dtype == weight.dtype and current.lifts_cheaper(tokens, layout.shape)
        out = nn.functional.linear(x, _sum(current, matrix, coords) if ctx.forms_sum else matrix, bias)
        given, x = x, cast(x, out.dtype)  # under autocast the layer computes in another dtype, and so does its gradient
        reduced = x if ctx.forms_sum and (due or not trains) else layer.reduce(current, x, given)
        if not ctx.forms_sum:
            current.inner.add_apply_(out, reduced, coords)
        ctx.saved = _Saved(sub, x)
        ctx.save_for_backward(x if due else reduced, coords, weight)
        return out.detach() if out._is_view() else out  # later in-place layers must not touch a view

    @staticmethod
    @once
    @override
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
        current, sub = ctx.saved.map(), ctx.saved.sub
        x, coords, weight = ctx.saved_tensors
        grad = out_grad.reshape(-1, out_grad.shape[-1])
        reduced_grad = current.T.reduce(grad)
        x_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            matrix = sub.weight.layout.matrix(weight)
            x_grad = grad @ cast(_sum(current, matrix, coords) if ctx.forms_sum else matrix, grad.dtype)
            if not ctx.forms_sum:
                current.T.inner.add_apply_(x_grad, reduced_grad, coords.t())
            x_grad = x_grad.view(*out_grad.shape[:-1], x_grad.shape[-1])
        if ctx.needs_input_grad[1]:
            bias_grad = grad.sum(0)
        coords_grad = ctx.saved.project(current, grad, reduced_grad, x) if ctx.needs_input_grad[2] else None
        return x_grad, bias_grad, coords_grad, None, None, None


def _sum(current: LinearMap, matrix: Tensor, coords: Tensor) -> Tensor:
    """W + S z as it is summed at a merge, in its own dtype even under autocast."""
    with torch.no_grad(), torch.autocast(matrix.device.type, enabled=False):
        return current.add_lift(matrix, coords)


def run(function: Any, *args: Any) -> Any:
    """Call an autograd function, outside of what is compiled."""
    return outside_of_graph(function, *args) if torch.compiler.is_dynamo_compiling() else applied(function, *args)
