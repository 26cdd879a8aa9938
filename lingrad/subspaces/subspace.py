"""The engine: one weight's subspace, and what happens to it in every step.

A step of either mode is (a new basis, where the transform reads the gradient) -> clip -> decay -> base -> `merge` in
optimizer mode -> (a new basis, where it reads a sketch, or nothing); `lingrad.engine.refresh` tells how a basis changes.
Everything here is about one weight W [m, n] and its coordinates z [p, q]; the weight of an adapter-mode forward is W + S z.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lingrad import parallel
from lingrad.errors import ModeError
from lingrad.maps import LinearMap
from lingrad.subspaces import trees as trees
from lingrad.subspaces.ledger import Ledger
from lingrad.subspaces.pending import Captured
from lingrad.tensors import distinct, storage, wide
from lingrad.transforms.base import Transform, When
from lingrad.transforms.linalg import derive_seed
from lingrad.weights.base import MergeLoss
from lingrad.weights.layout import Layout


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
        state: The transform's state; None where another subspace has it, which then leads.
        coords: z [p, q], zero at the start, float32 unless the weight is float64; see `release`.
        when: The step being prepared, as its refresh would see it.
        offset: Steps by which its refreshes are late, where weights take turns.
        refreshes: How many refreshes were committed.
        due: Whether the step being prepared gathers what a refresh needs.
        stale: Whether ``coords.grad`` may still be that of a step before a refresh.
        captured: What the backwards of a refresh step found, between backward and step.
        proposal: A refresh chosen and not yet committed; ``coords.grad`` is its projection.
        arrived: Called when ``coords.grad`` holds the gradient of one more backward.
        energy: |S S^T G| / |G| of the last refresh; None where it was not measured.
        merged: Whether coordinates that were not zero have been merged.
        ledger: What was merged, where the run keeps that.
        loss: What merges have lost, where the weight is quantised.
        replaced: Whether the weight was loaded anew after it had changed, so that what is known of its change is of another.
        leader: The subspace whose right basis this one shares.
        members: Those that share this one's basis, itself first; their weights are stacked to one of shape ``when.shape``.
    """

    name: str
    layout: Layout
    transform: Transform
    state: Any
    coords: nn.Parameter
    when: When
    offset: int = 0
    refreshes: int = 0
    due: bool = False
    stale: bool = False
    captured: Captured = field(init=False)
    proposal: Proposal | None = None
    arrived: Callable[[], None] | None = None
    energy: float | None = None
    merged: bool = False
    ledger: Ledger | None = None
    loss: MergeLoss | None = None
    replaced: bool = False
    leader: Subspace | None = None
    memo: Any = None  # of the input that members share in the forward that is running
    members: list[Subspace] = field(init=False)

    _map: LinearMap | None = None
    _zero: Tensor | None = None  # what released coordinates are
    _said: set[str] = field(default_factory=set)

    @classmethod
    def create(
        cls, name: str, layout: Layout, transform: Transform, weight: Tensor, seed: int, *, stacked: int = 0
    ) -> Subspace:
        """The subspace of a weight before its first step: zero coordinates, the transform's starting basis.

        Args:
            name: The parameter's name; with ``seed`` it seeds everything random about this weight.
            layout: How the weight is read as a matrix.
            transform: How the basis is chosen.
            weight: The weight, for device and dtype.
            seed: The run's seed.
            stacked: Rows of the other weights that will share its right basis, by `join`.

        Returns:
            The subspace.
        """
        own, (m, n) = derive_seed(seed, name), layout.shape
        shape = m + stacked, n
        state = transform.init(shape, seed=own, device=weight.device, dtype=weight.dtype)
        p, q = transform.coords_shape(shape)
        zeros = torch.zeros((p - stacked, q), device=weight.device, dtype=wide(weight.dtype))
        return cls(name, layout, transform, state, nn.Parameter(zeros), When(0, 0, own, shape, seed))

    def join(self, name: str, layout: Layout, weight: Tensor) -> Subspace:
        """The subspace of another weight, on the right basis of this one.

        Args:
            name: The other parameter's name.
            layout: How it is read as a matrix.
            weight: The weight, for device and dtype.

        Returns:
            Its subspace, with coordinates of its own.
        """
        zeros = torch.zeros((layout.shape[0], self.coords.shape[1]), device=weight.device, dtype=wide(weight.dtype))
        joined = Subspace(name, layout, self.transform, None, nn.Parameter(zeros), self.when, leader=self)
        self.members.append(joined)
        return joined

    def __post_init__(self) -> None:
        """Follow what autograd adds to the coordinates' gradient, where a layer's backward produces it."""
        self.captured = Captured(self.name)
        self.members = [self] if self.leader is None else []
        # a cycle through a tensor's hooks would never be freed
        before, after = weakref.WeakMethod(self._before_accumulate), weakref.WeakMethod(self._after_accumulate)
        self.coords.register_hook(lambda _: call(before))
        self.coords.register_post_accumulate_grad_hook(lambda _: call(after))

    def map(self) -> LinearMap:
        """The map S of the current basis."""
        if self.leader is not None:
            return self.leader.map()
        if self._map is not None:
            return self._map
        current = self.transform.map(self.state)
        if self.transform.stores_map:
            self._map = current
        return current

    def tensors(self) -> list[Tensor]:
        """The tensors that hold the basis between steps: of the transform's state, and of the map where it is kept."""
        held = [*trees.tensors(self.state), *(self._map.tensors if self._map is not None else ())]
        return distinct(held)

    @property
    def released(self) -> bool:
        """Whether the coordinates, all zero, hold no memory."""
        return self.coords.stride() == (0, 0)

    def release(self) -> None:
        """Give back the memory of coordinates that are zero: one zero stands for all. They can be read, not written."""
        if not parallel.together():  # DistributedDataParallel writes into parameters
            zero = self._zero
            if zero is None or zero.dtype != self.coords.dtype or zero.device != self.coords.device:
                zero = self._zero = self.coords.new_zeros(()).expand(self.coords.shape)
            self.coords.data = zero

    def replace_state(self, state: Any, refreshes: int, chosen: LinearMap | None = None) -> None:
        """Take over a state from a refresh or a checkpoint, and its map if that was made."""
        self.state, self.refreshes = state, refreshes
        self._map = chosen if self.transform.stores_map and self.leader is None else None

    def move(self, device: torch.device) -> None:
        """Follow the coordinates to a device; the basis keeps its dtype."""
        if any(t.device != device for t in trees.tensors(self.state)):
            self.replace_state(trees.moved(self.state, device), self.refreshes)

    def schedule(self, step: int) -> bool:
        """Look ahead to the step after ``step`` finished ones.

        Args:
            step: Steps finished.

        Returns:
            Whether the basis must be redrawn before its forward. A refresh that needs something of that step's gradient sets
            ``due`` instead; a weight that has seen no usable gradient yet stays due until it does.
        """
        self.forget()
        clock = step - self.offset
        now = clock >= 0 and (self.transform.due(clock) or (self.refreshes == 0 and self.transform.due(0)))
        # a basis learned from a sketch has changed at the end of the last step, any other changes in this one
        changes = self.refreshes != self.when.refreshes if self.transform.reads == "sketch" else now
        self.stale = changes and self.coords.grad is not None
        self.when = When(clock, self.refreshes, self.when.seed, self.when.shape, self.when.run_seed)
        self.due = now and self.transform.reads != "nothing"
        return now and not self.due

    def forget(self) -> None:
        """Drop the gradient of a refresh step and what was chosen from it."""
        self.captured.forget()
        self.proposal = self.memo = None

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
            self.captured.after_accumulate(self.coords, compare=self.transform.reads == "gradient")
        if self.arrived is not None:
            self.arrived()


def call(method: weakref.WeakMethod[Callable[..., None]] | None, *args: Any) -> None:
    """Call a method whose object a hook does not keep alive, if that lives."""
    found = None if method is None else method()
    if found is not None:
        found(*args)


@torch.no_grad()
def hold(subs: Iterable[Subspace]) -> None:
    """Give released coordinates memory of their own."""
    released: list[Tensor] = [sub.coords for sub in subs if sub.released]
    for coords in released:
        coords.data = coords.new_empty(coords.shape)
    if released:
        torch._foreach_zero_(released)


def decaying(sub: Subspace, weight: Tensor) -> list[Tensor]:
    """What a decoupled weight decay of W + S z multiplies: the weight, and the coordinates where they are not zero."""
    return [weight] if sub.released else [weight, sub.coords]


def merge(sub: Subspace, weight: Tensor, *, release: bool = False) -> None:
    """``weight += lift(coords)``, then ``coords = 0``: the weight of the forward stays what it was.

    Args:
        sub: The subspace.
        weight: The weight, in its own shape; written in place.
        release: Give the coordinates' memory back.
    """
    if sub.released:
        return
    sub.merged = sub.merged or release or bool(sub.coords.any())  # what is released has been stepped
    if sub.ledger is not None:
        sub.ledger.merged(sub.coords)
    matrix = sub.layout.matrix(weight)
    if storage(matrix) == storage(weight):
        sub.map().add_lift_(matrix, sub.coords)
    else:  # the strides allowed no view, as in a channels_last convolution
        weight.add_(sub.layout.restore(sub.map().lift(sub.coords)))
    if release:
        sub.release()
    if not sub.released:
        sub.coords.zero_()


def lifted(sub: Subspace, weight: Tensor) -> Tensor:
    """The weight of the forward, W + S z, in the weight's shape; the weight itself where the coordinates are zero."""
    if sub.released or not sub.coords.any():
        return weight
    return weight + sub.layout.restore(sub.map().lift(sub.coords)).to(weight.dtype)
