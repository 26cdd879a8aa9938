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

from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lingrad.adapters.compiled import Gathering, Sinks
from lingrad.adapters.functions import once
from lingrad.adapters.shared import SharedInput
from lingrad.errors import ModeError
from lingrad.gradients import FactoredGradient
from lingrad.gradients.local import formed
from lingrad.maps import LinearMap
from lingrad.subspaces.products import products
from lingrad.subspaces.subspace import Subspace
from lingrad.tensors import cast

# How z takes part in a layer: W + S z is formed, or S z is applied to the tokens; None where z is zero.
Way = Literal["sum", "apply"] | None


class Projection:
    """What the functions of one layer need besides tensors.

    Args:
        sub: The subspace of the layer's weight.
        shared: The input that it may share with other layers; None where it has that for itself.
        gathering: What the layers of its run have in common.

    Attributes:
        traceable: Whether torch.compile can go through its functions: the basis is not drawn at each use, no step reads the
            gradient itself, and the weight is not stepped inside the backward.
        sinks: The leaves of the step that is being prepared; None unless the layer is compiled.
    """

    def __init__(self, sub: Subspace, shared: SharedInput | None, gathering: Gathering) -> None:
        self.sub = sub
        self.shared = shared
        self.gathering = gathering
        self.sharding = sub.weight.sharding
        basis = sub.basis
        self.traceable = basis.stores_map and not basis.chance and not gathering.layerwise and self.sharding is None
        self.sinks: Sinks | None = None
        gathering.join(self)

    def __getstate__(self) -> dict[str, Any]:
        """Without the leaves of a step that is being prepared."""
        return {**vars(self), "sinks": None}

    def reduce(self, current: LinearMap, x: Tensor, given: Tensor) -> Tensor:
        """All that the map needs of x, which is ``given`` in another dtype."""
        if self.shared is None or torch.compiler.is_dynamo_compiling():  # a compiler finds equal products by itself
            return current.reduce(x)
        return self.shared.reduce(self.sub.name, current, x, given)

    def whole(self, coords: Tensor) -> Tensor:
        """The coordinates that the layer's products take; gathered anew in the backward, where the weight is sharded."""
        return coords if self.sharding is None else self.sharding.taken(coords)

    def prepare(self) -> None:
        """Make what a compiled forward of the next step reads: the map, and the sinks where a basis is refreshed in it."""
        basis, wanted = self.sub.basis, self.traceable and self.gathering.traced
        if wanted:
            basis.map()
            basis.make_seal(self.sub.coords)
        gathers = wanted and self.gathering.due and not basis.transform.before_step
        self.sinks = Sinks(self.sub) if gathers else None

    def trace(self) -> None:
        """Called once for each graph that the layer is traced into, before anything else of it is."""
        self.gathering.trace()

    # what torch.compiler.assume_constant_result sets, without importing the compiler: it is run, and not traced
    vars()["trace"]._dynamo_marked_constant = True

    def leaves(self) -> tuple[Tensor, ...]:
        """What the backward gives gradients to besides the coordinates: in a compiled layer, where a basis is refreshed."""
        if not torch.compiler.is_dynamo_compiling() or not self.gathering.due or self.sinks is None:
            return ()
        return self.sinks.leaves if self.sub.coords.requires_grad else ()

    def require_read(self) -> None:
        """Make sure that what a refresh reads came out of the backwards of a compiled layer.

        Raises:
            ModeError: It did not.
        """
        sub = self.sub
        if self.sinks is not None and sub.basis.due and sub.coords.grad is not None and sub.pending.total is None:
            raise ModeError(
                f"the basis of {sub.name} is refreshed in this step, and the backward of its compiled layer has left nothing "
                "to choose it from: it was called with inputs=. Call backward() without, or do not compile the model"
            )

    def seal(self) -> Tensor | None:
        """What a compiled backward saves, for autograd's check of versions to find a basis that was changed since the forward.

        Returns:
            A zero, to be added to the gradient of the coordinates where the backward reads nothing else that a refresh writes
            into, such as the weight; None in eager mode, whose backward asks the basis.
        """
        return self.sub.basis.seal if torch.compiler.is_dynamo_compiling() else None

    def project(self, ctx: Any, current: LinearMap, out_grad: Tensor, reduced_grad: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """The gradients of the coordinates and of the sinks; in eager mode, what a refresh reads is recorded instead.

        Args:
            ctx: The autograd function's; its ``whole`` says whether ``x`` is the input itself, as at a refresh.
            current: The map.
            out_grad: dY [T, m].
            reduced_grad: ``current.reduce_grad(dY)``.
            x: X [..., n], or ``current.reduce(X)``.

        Returns:
            [p, q] in the coordinates' dtype; of a compiled layer then one for each sink.
        """
        x = x.reshape(-1, x.shape[-1])
        reduced, dtype = current.reduce(x) if ctx.whole else x, self.sub.coords.dtype
        projected = current.project_reduced(reduced_grad, reduced, dtype)
        found: tuple[Tensor, ...] = ()
        if ctx.whole and torch.compiler.is_dynamo_compiling():
            assert self.sinks is not None  # noqa: S101 - the forward was traced with them
            grad = FactoredGradient(out_grad, x)
            found = products(grad, self.sinks.probes, self.sinks.known, projected) if self.sinks.probes else (formed(grad),)
            found = tuple(cast(one, leaf.dtype) for one, leaf in zip(found, self.sinks.leaves, strict=True))
        elif ctx.whole:
            owned = (lambda: FactoredGradient(out_grad, x.clone())) if ctx.borrowed else None
            self.sub.record(FactoredGradient(out_grad, x), projected, owned)
        return projected if self.sharding is None else self.sharding.reduce(projected, self.sub.coords), *found


def _mark(layer: Projection, ctx: Any, x: Tensor, sinks: tuple[Tensor, ...]) -> None:
    """Note for the backward what it needs besides tensors."""
    ctx.layer = layer
    if torch.compiler.is_dynamo_compiling():  # a basis that is refreshed in between is for autograd's own check of versions
        ctx.whole = len(sinks) > 0
        return
    basis = layer.sub.basis
    ctx.whole, ctx.refreshes = basis.gathers, basis.refreshes
    ctx.borrowed = ctx.whole and (
        x.is_leaf or layer.sharding is not None
    )  # an input that no layer made may be a buffer that is filled again


def _map_of(ctx: Any) -> LinearMap:
    """The map of the forward."""
    sub: Subspace = ctx.layer.sub
    return sub.map() if torch.compiler.is_dynamo_compiling() else sub.basis.map_after(ctx.refreshes, sub.name)


class Tied(torch.autograd.Function):
    """``out`` (+ x (S z)^T where ``active``), with project(dY^T X) as the gradient of z."""

    @staticmethod
    @override
    def forward(ctx: Any, out: Tensor, x: Tensor, coords: Tensor, layer: Projection, active: bool, *sinks: Tensor) -> Tensor:
        current = layer.sub.basis.map()
        _mark(layer, ctx, x, sinks)
        given, x = x, cast(x, out.dtype)  # under autocast the layer computed in out's dtype, and so does its gradient
        reduced = layer.reduce(current, x, given) if active or not ctx.whole else x
        ctx.active = active
        ctx.save_for_backward(x if ctx.whole else reduced, coords if active else None, layer.seal())
        # out.detach(): returned as it is, an input would come back as a view that later in-place layers must not touch
        return out + current.inner.apply(reduced, layer.whole(coords)) if active else out.detach()

    @staticmethod
    @once
    @override
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
        current = _map_of(ctx)
        x, coords, seal = ctx.saved_tensors
        grad = out_grad.reshape(-1, out_grad.shape[-1])
        reduced_grad = current.reduce_grad(grad)
        x_grad = None
        if ctx.active and ctx.needs_input_grad[1]:
            x_grad = current.T.inner.apply(reduced_grad, ctx.layer.whole(coords).t())
            x_grad = x_grad.view(*out_grad.shape[:-1], x_grad.shape[-1])
        coords_grad, *of_sinks = ctx.layer.project(ctx, current, grad, reduced_grad, x)
        return out_grad, x_grad, coords_grad if seal is None else coords_grad + seal, None, None, *of_sinks


class Projected(torch.autograd.Function):
    """x (W + S z)^T + b, with project(dY^T X) as the gradient of z and none of W: a whole layer, in both modes."""

    @staticmethod
    @override
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        coords: Tensor,
        matrix: Tensor,
        layer: Projection,
        way: Way,
        trains: bool,
        *sinks: Tensor,
    ) -> Tensor:
        current = layer.sub.basis.map()
        _mark(layer, ctx, x, sinks)
        coords_whole = coords if way is None else layer.whole(coords)
        out = nn.functional.linear(x, _sum(current, matrix, coords_whole) if way == "sum" else matrix, bias)
        given, x = x, cast(x, out.dtype)  # under autocast the layer computes in another dtype, and so does its gradient
        reduced = x if way != "apply" and (ctx.whole or not trains) else layer.reduce(current, x, given)
        if way == "apply":
            out = _add_apply(current.inner, out, reduced, coords_whole)
        ctx.way = way
        ctx.save_for_backward(x if ctx.whole else reduced, coords if way is not None else None, matrix, layer.seal())
        # later in-place layers must not touch a view
        return out if torch.compiler.is_dynamo_compiling() or not out._is_view() else out.detach()

    @staticmethod
    @once
    @override
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
        current = _map_of(ctx)
        x, coords, matrix, seal = ctx.saved_tensors
        grad = out_grad.reshape(-1, out_grad.shape[-1])
        reduced_grad = current.reduce_grad(grad)
        x_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            coords = coords if ctx.way is None else ctx.layer.whole(coords)
            x_grad = grad @ cast(_sum(current, matrix, coords, again=True) if ctx.way == "sum" else matrix, grad.dtype)
            if ctx.way == "apply":
                x_grad = _add_apply(current.T.inner, x_grad, reduced_grad, coords.t())
            x_grad = x_grad.view(*out_grad.shape[:-1], x_grad.shape[-1])
        if ctx.needs_input_grad[1]:
            bias_grad = grad.sum(0)
        if not ctx.needs_input_grad[2]:
            return x_grad, bias_grad, *(None for _ in ctx.needs_input_grad[2:])
        coords_grad, *of_sinks = ctx.layer.project(ctx, current, grad, reduced_grad, x)
        if seal is not None and not ctx.needs_input_grad[0]:
            coords_grad = coords_grad + seal
        return x_grad, bias_grad, coords_grad, None, None, None, None, *of_sinks


def _add_apply(current: LinearMap, out: Tensor, x: Tensor, coords: Tensor) -> Tensor:
    """``out + apply(x, z)``, in the memory of ``out``."""
    if torch.compiler.is_dynamo_compiling():  # writes inside of a traced function gave wrong gradients in torch 2.11
        return out + current.apply(x, coords)
    current.add_apply_(out, x, coords)
    return out


def _sum(current: LinearMap, matrix: Tensor, coords: Tensor, *, again: bool = False) -> Tensor:
    """W + S z as it is summed at a merge, in its own dtype even under autocast."""
    # in a compiled backward it is written in another way than in the forward: torch would take the two for one, and keep it
    with torch.no_grad(), torch.autocast(matrix.device.type, enabled=False):
        if again and torch.compiler.is_dynamo_compiling():
            return matrix + cast(current.lift(coords), matrix.dtype)
        return current.add_lift(matrix, coords)
