"""What torch.compile asks of the layers of a run: no side effect in a backward, and few variants of a graph.

What a refresh reads of the gradient becomes the gradient of leaf tensors that hold no memory (sinks). So autograd carries it
out of a compiled backward, summed over all uses of the layer. Whether layers gather is one flag for the whole run: a compiled
model has a graph for ordinary steps, and one for steps in which some basis is refreshed.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lingrad.gradients import DenseGradient
from lingrad.subspaces.products import is_projection
from lingrad.subspaces.subspace import Subspace
from lingrad.tensors import call, wide


class Gathering:
    """What all layers of a run have in common in the step that is being prepared.

    Args:
        layerwise: Whether weights are stepped inside the backward, from which a compiled one has no gain.

    Attributes:
        due: Whether the basis of some layer is refreshed in it from what its backwards leave.
        traced: Whether a layer was compiled; sinks are made for no other runs.
    """

    def __init__(self, *, layerwise: bool = False) -> None:
        self.due = False
        self.traced = False
        self.layerwise = layerwise
        self._layers: list[weakref.ref[Any]] = []

    def __getstate__(self) -> dict[str, Any]:
        """Without the layers, which are this run's: a copy is for evaluation."""
        return {**vars(self), "_layers": []}

    def join(self, layer: Any) -> None:
        """Prepare a layer with the others once one of them is compiled.

        Args:
            layer: An object with a method ``prepare``, not kept alive.
        """
        self._layers.append(weakref.ref(layer))

    def trace(self) -> None:
        """A layer is being compiled: from now on all are prepared for it, so that equal ones get one graph."""
        if not self.traced:
            self.traced = True
            for ref in self._layers:
                layer = ref()
                if layer is not None:
                    layer.prepare()


class Sinks:
    """The leaves whose gradients are what the next refresh of one weight reads.

    Args:
        sub: The subspace of the weight.

    Attributes:
        probes: What the gradient is multiplied with, in the rows of this weight; none where the refresh reads the gradient.
        known: For each of them whether its product is the gradient of the coordinates.
        leaves: A leaf of stride 0 for each product, or one [m, n] for the gradient.
    """

    def __init__(self, sub: Subspace) -> None:
        self._sub = weakref.ref(sub)
        m, n = sub.weight.layout.shape
        like, dtype = sub.coords.detach(), wide(sub.weight.dtype)
        self.probes = sub.probes() if sub.basis.transform.reads == "sketch" else []
        self.known = tuple(is_projection(sub.map(), probe) for probe in self.probes)
        shapes = [(m if left is None else left.shape[1], n if right is None else right.shape[1]) for left, right in self.probes]
        if sub.basis.transform.reads == "gradient":  # stored as it is formed, and of float16 in a dtype that holds its sums
            shapes, dtype = [(m, n)], dtype if sub.weight.dtype == torch.float16 else sub.weight.dtype
        zero = like.new_zeros((), dtype=dtype)
        self.leaves = tuple(nn.Parameter(zero.expand(shape)) for shape in shapes)
        arrived = weakref.WeakMethod(self._arrived)
        for i, leaf in enumerate(self.leaves):
            leaf.register_post_accumulate_grad_hook(partial(call, arrived, i))
        self._found: dict[int, Tensor] = {}
        self._backward = -1

    def _arrived(self, i: int, leaf: Tensor) -> None:
        """One product of a backward is complete; once all are, they are recorded."""
        running = torch._C._current_graph_task_id()
        if running != self._backward:
            self._found, self._backward = {}, running
        grad, leaf.grad = leaf.grad, None
        if grad is None:  # torch calls it for what a backward leaves out, too
            return
        self._found[i] = grad
        if len(self._found) < len(self.leaves):
            return
        found, self._found = self._found, {}
        sub = self._sub()
        if sub is not None and sub.basis.due:
            products = tuple(found[k] for k in range(len(self.leaves)))
            sub.pending.record(products if self.probes else DenseGradient(products[0]))
