"""The engine: one weight's subspace, and what happens to it in a step.

A step of either mode is (`choose` and `commit` where a refresh is due, else the gradient that `capture` gathered) -> clip ->
`decay` -> base -> `merge` in optimizer mode. Everything here is about one weight W [m, n] and its coordinates z [p, q]; the
weight of an adapter-mode forward is W + S z.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lingrad import parallel
from lingrad import state as trees
from lingrad.captured import Captured
from lingrad.errors import ModeError
from lingrad.gradient import FactoredGradient, Gradient, wide
from lingrad.layout import Layout
from lingrad.maps import LinearMap
from lingrad.moments import Moments
from lingrad.parallel import average, averaged, ranks, share
from lingrad.transforms.base import Transform, When
from lingrad.transforms.factorize import derive_seed


class Proposal(NamedTuple):
    """A refresh that is chosen but not yet committed."""

    state: Any
    map: LinearMap


@dataclass(eq=False)
class Subspace:
    """One weight's transform, its state and its coordinates.

    Args:
        name: The parameter's name.
        layout: How the weight is read as a matrix [m, n].
        transform: How the basis is chosen.
        state: The transform's state.
        coords: z [p, q], zero at the start, float32 unless the weight is float64; see `release`.
        seed: The seed of everything random about this weight.
        refreshes: How many refreshes were committed.
        due: Whether the step being prepared refreshes the basis from its gradient.
        stale: Whether ``coords.grad`` may still be that of a step before a refresh.
        captured: The gradient of a refresh step, between backward and step.
        proposal: A refresh chosen and not yet committed; ``coords.grad`` is its projection.
        arrived: Called when ``coords.grad`` holds the gradient of one more backward.
    """

    name: str
    layout: Layout
    transform: Transform
    state: Any
    coords: nn.Parameter
    seed: int
    refreshes: int = 0
    due: bool = False
    stale: bool = False
    captured: Captured = field(init=False)
    proposal: Proposal | None = None
    arrived: Callable[[], None] | None = None

    _map: LinearMap | None = None
    _said: set[str] = field(default_factory=set)

    @classmethod
    def create(cls, name: str, layout: Layout, transform: Transform, weight: Tensor, seed: int) -> Subspace:
        """The subspace of a weight before its first step: zero coordinates, the transform's starting basis.

        Args:
            name: The parameter's name; with ``seed`` it seeds everything random about this weight.
            layout: How the weight is read as a matrix.
            transform: How the basis is chosen.
            weight: The weight, for device and dtype.
            seed: The run's seed.

        Returns:
            The subspace.
        """
        own = derive_seed(seed, name)
        state = transform.init(layout.shape, seed=own, device=weight.device, dtype=weight.dtype)
        zeros = torch.zeros(transform.coords_shape(layout.shape), device=weight.device, dtype=wide(weight.dtype))
        return cls(name, layout, transform, state, nn.Parameter(zeros), own)

    def __post_init__(self) -> None:
        """Follow what autograd adds to the coordinates' gradient, where a layer's backward produces it."""
        self.captured = Captured(self.name)
        # a cycle through a tensor's hooks would never be freed
        before, after = weakref.WeakMethod(self._before_accumulate), weakref.WeakMethod(self._after_accumulate)
        self.coords.register_hook(lambda _: call(before))
        self.coords.register_post_accumulate_grad_hook(lambda _: call(after))

    def map(self) -> LinearMap:
        """The map S of the current basis."""
        if self._map is not None:
            return self._map
        current = self.transform.map(self.state)
        if self.transform.stores_map:
            self._map = current
        return current

    def tensors(self) -> list[Tensor]:
        """The tensors that hold the basis between steps: of the transform's state, and of the map where it is kept."""
        held = [*trees.tensors(self.state), *(self._map.tensors if self._map is not None else ())]
        return list({t.untyped_storage()._cdata: t for t in held if t.numel()}.values())

    @property
    def released(self) -> bool:
        """Whether the coordinates, all zero, hold no memory."""
        return self.coords.stride() == (0, 0)

    def release(self) -> None:
        """Give back the memory of coordinates that are zero: one zero stands for all. They can be read, not written."""
        if not parallel.together():  # DistributedDataParallel writes into parameters
            self.coords.data = self.coords.new_zeros(()).expand(self.coords.shape)

    def hold(self) -> None:
        """Give released coordinates memory of their own."""
        if self.released:
            self.coords.data = self.coords.new_zeros(self.coords.shape)

    def replace_state(self, state: Any, refreshes: int) -> None:
        """Take over a state from a refresh or a checkpoint."""
        self.state, self.refreshes, self._map = state, refreshes, None

    def move(self, device: torch.device) -> None:
        """Follow the coordinates to a device; the basis keeps its dtype."""
        if any(t.device != device for t in trees.tensors(self.state)):
            self.replace_state(trees.moved(self.state, device), self.refreshes)

    def schedule(self, step: int) -> bool:
        """Look ahead to the step after ``step`` finished ones.

        Args:
            step: Steps finished.

        Returns:
            Whether the basis must be redrawn before its forward, by `redraw`. A refresh that needs that step's gradient sets
            ``due`` instead; a weight that has seen no usable gradient yet stays due until it does.
        """
        self.forget()
        now = self.transform.due(step) or (self.refreshes == 0 and self.transform.due(0))
        self.due = now and self.transform.reads_gradient
        self.stale = now and self.coords.grad is not None
        return now and not self.due

    def forget(self) -> None:
        """Drop the gradient of a refresh step and what was chosen from it."""
        self.captured.forget()
        self.proposal = None

    def refuse_stale(self) -> None:
        """Make sure that ``coords.grad`` is not left from before a refresh.

        Raises:
            ModeError: It is: neither its sum with a new gradient nor a step along it would mean anything.
        """
        if self.stale and self.coords.grad is not None and bool(self.coords.grad.any()):
            raise ModeError(
                f"the gradient of {self.name} is from before its basis was refreshed; call zero_grad() after each step"
            )
        self.stale = False

    def warn_once(self, message: str) -> None:
        """Warn about this weight, once for each message."""
        if message not in self._said:
            self._said.add(message)
            warnings.warn(f"{self.name}: {message}", RuntimeWarning, stacklevel=3)

    def _before_accumulate(self) -> None:
        self.refuse_stale()
        if self.proposal is not None and self.coords.grad is not None:
            raise ModeError(
                f"a backward reached {self.name} between clip_grad_norm_ and step, but its new basis is chosen, from the "
                "gradient so far; clip after the last backward of a step"
            )
        self.proposal = None
        self.captured.before_accumulate(self.coords)

    def _after_accumulate(self) -> None:
        if self.due:
            self.captured.after_accumulate(self.coords)
        if self.arrived is not None:
            self.arrived()


def call(method: weakref.WeakMethod[Callable[..., None]] | None, *args: Any) -> None:
    """Call a method whose object a hook does not keep alive, if that lives."""
    found = None if method is None else method()
    if found is not None:
        found(*args)


def capture(sub: Subspace, grad: Gradient) -> None:
    """``coords.grad += project(grad)``: linear, so that micro-batches, and ranks, add up in the small space.

    Args:
        sub: The subspace.
        grad: G [m, n] of one micro-batch; kept until the step where a refresh is due.
    """
    sub._before_accumulate()
    if sub.due:
        sub.captured.stage(grad)
    projected = average(sub.map().project(grad).to(sub.coords.dtype))
    if sub.coords.grad is None:
        sub.coords.grad = projected
    else:
        sub.coords.grad.add_(projected)
    sub._after_accumulate()


def choose(sub: Subspace, step: int, factor: float) -> None:
    """Choose a new basis from the captured gradient; ``coords.grad`` becomes its projection.

    A gradient that is not finite, or a basis that would not be, leaves the old basis in place and says so once; a zero gradient
    leaves it silently.

    Args:
        sub: The subspace, ``due``.
        step: Steps finished so far.
        factor: The factor by which other programs scaled ``coords.grad`` since backward.
    """
    grad = sub.captured.total
    if sub.proposal is not None:
        return
    if grad is None:
        if ranks() == 1:
            return
        m, n = sub.layout.shape  # the other ranks found something
        grad = FactoredGradient(sub.coords.new_empty(0, m), sub.coords.new_empty(0, n))
    norm = float(average(grad.norm())) * factor  # of the parts, which is not that of their mean, but zero or not finite with it
    grad = averaged(grad)
    if not math.isfinite(norm):
        sub.warn_once("the gradient at a refresh is not finite; the old basis stays until the next one")
    if norm == 0.0 or not math.isfinite(norm):
        return
    proposal = _propose(sub, grad, step)
    if not all(bool(t.isfinite().all()) for t in proposal.map.tensors if t.is_floating_point()):
        sub.warn_once(f"{sub.transform.name} gave a basis that is not finite; the old one stays until the next refresh")
        return
    projected = proposal.map.project(grad).to(sub.coords.dtype)
    sub.coords.grad = projected if factor == 1.0 else projected * factor
    sub.captured.forget()
    sub.proposal = proposal


def redraw(sub: Subspace, weight: Tensor, step: int, moments: Moments) -> None:
    """Refresh a basis that no gradient decides, before the forward that will use it.

    Args:
        sub: The subspace.
        weight: The weight, in its own shape.
        step: Steps finished so far.
        moments: The base optimizer's memory of the coordinates.
    """
    sub.proposal = _propose(sub, None, step)
    commit(sub, weight, moments)


def commit(sub: Subspace, weight: Tensor, moments: Moments) -> None:
    """Move over to the basis that was chosen, if one was: merge through the old map, carry the moments.

    Args:
        sub: The subspace.
        weight: The weight, in its own shape.
        moments: The base optimizer's memory of the coordinates.
    """
    if sub.proposal is None:
        return
    carried = moments.rotated(sub.map(), sub.proposal.map, sub.name, sub.coords.shape)
    merge(sub, weight)
    if moments.carry == "reset":
        moments.state.clear()
        moments.state.update(moments.initial())
    for key, value in carried.items():
        moments.state[key].copy_(value)
    state, chosen = sub.proposal
    sub.replace_state(state, sub.refreshes + 1)
    sub._map = chosen if sub.transform.stores_map else None
    sub.proposal, sub.due = None, False


def decay(sub: Subspace, weight: Tensor, factor: float) -> None:
    """Decoupled weight decay of W + S z: ``weight *= factor`` and ``coords *= factor``."""
    weight.mul_(factor)
    if not sub.released:
        sub.coords.mul_(factor)


def merge(sub: Subspace, weight: Tensor) -> None:
    """``weight += lift(coords)``, then ``coords = 0``: the weight of the forward stays what it was.

    Args:
        sub: The subspace.
        weight: The weight, in its own shape; written in place.
    """
    if sub.released:
        return
    matrix = sub.layout.matrix(weight)
    if matrix.untyped_storage()._cdata == weight.untyped_storage()._cdata:
        sub.map().add_lift_(matrix, sub.coords)
    else:  # the strides allowed no view, as in a channels_last convolution
        weight.add_(sub.layout.restore(sub.map().lift(sub.coords)))
    sub.coords.zero_()


def lifted(sub: Subspace, weight: Tensor) -> Tensor:
    """The weight of the forward, W + S z, in the weight's shape; the weight itself where the coordinates are zero."""
    if sub.released or not sub.coords.any():
        return weight
    return weight + sub.layout.restore(sub.map().lift(sub.coords)).to(weight.dtype)


def _propose(sub: Subspace, grad: Gradient | None, step: int) -> Proposal:
    state = sub.transform.refresh(sub.state, grad, When(step, sub.refreshes, sub.seed))
    if grad is not None:
        share(trees.tensors(state))
    return Proposal(state, sub.transform.map(state))
