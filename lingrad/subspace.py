"""The engine: one weight's subspace, and the four things that happen to it.

A step of either mode is (`refresh` where due, else the gradient that `capture` gathered) -> clip -> `decay` -> base -> `merge`
in optimizer mode. Everything here is about one weight W [m, n] and its coordinates z [p, q]; the weights of an adapter-mode
forward are W + S z.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lingrad.errors import DualityError, ModeError
from lingrad.gradient import Gradient, accumulate, wide
from lingrad.layout import Layout
from lingrad.maps import LinearMap
from lingrad.transforms.base import Transform
from lingrad.transforms.factorize import derive_seed

Carry = Literal["keep", "reset", "rotate"]


@dataclass(eq=False)
class Subspace:
    """One weight's transform, its state and its coordinates.

    Args:
        name: The parameter's name.
        layout: How the weight is read as a matrix [m, n].
        transform: How the basis is chosen.
        state: The transform's state.
        coords: z [p, q], zero at the start, float32 unless the weight is float64.
        refreshes: How many refreshes succeeded.
        due: Whether the step being prepared refreshes the basis.
    """

    name: str
    layout: Layout
    transform: Transform
    state: Any
    coords: nn.Parameter
    refreshes: int = 0
    due: bool = True

    # The gradient of a refresh step, between backward and step.
    pending: Gradient | None = None  # the sum over micro-batches
    staged: Gradient | None = None  # of the backward that is running
    left: Tensor | None = None  # coords.grad as backward left it, to see what other programs did to it since

    _map: LinearMap | None = None
    _warned: bool = False

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
            The subspace; its coordinates are float32, or float64 for a float64 weight.
        """
        own = derive_seed(seed, name)
        state = transform.init(layout.shape, seed=own, device=weight.device, dtype=weight.dtype)
        zeros = torch.zeros(transform.coords_shape(layout.shape), device=weight.device, dtype=wide(weight.dtype))
        return cls(name, layout, transform, state, nn.Parameter(zeros), due=transform.due(0))

    def __post_init__(self) -> None:
        """Follow what autograd adds to the coordinates' gradient, where a layer's backward produces it."""
        self.coords.register_hook(self._before_accumulate)
        self.coords.register_post_accumulate_grad_hook(self._after_accumulate)

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
        held = [*_tensors(self.state), *(self._map.tensors if self._map is not None else ())]
        return list({t.untyped_storage().data_ptr(): t for t in held if t.numel()}.values())

    def replace_state(self, state: Any, refreshes: int) -> None:
        """Take over a state from a refresh or a checkpoint."""
        self.state, self.refreshes, self._map = state, refreshes, None

    def stage(self, grad: Gradient) -> None:
        """Note a gradient that a layer's backward found on a refresh step; a layer used twice stages twice."""
        self.staged = accumulate(self.staged, grad)

    def forget(self) -> None:
        """Drop the gradient of a refresh step: it was used, or `zero_grad` threw it away."""
        self.pending = self.staged = self.left = None

    def _before_accumulate(self, _: Tensor | None = None) -> None:
        if self.staged is None:
            return
        # Somebody who zeroed coords.grad by hand meant the refresh gradient too.
        fresh = self.coords.grad is None or (not self.coords.grad.any() and self.left is not None and self.left.any())
        self.pending = accumulate(None if fresh else self.pending, self.staged)
        self.staged = None

    def _after_accumulate(self, coords: Tensor) -> None:
        if self.due and coords.grad is not None:
            self.left = coords.grad.clone()

    def warn_once(self, message: str) -> None:
        """Warn about this weight, the first time only."""
        if not self._warned:
            self._warned = True
            warnings.warn(f"{self.name}: {message}", RuntimeWarning, stacklevel=3)


def capture(sub: Subspace, grad: Gradient) -> None:
    """``coords.grad += project(grad)``: linear, so that micro-batches accumulate in the small space.

    Args:
        sub: The subspace.
        grad: G [m, n] of one micro-batch; kept until the step where a refresh is due.
    """
    if sub.due:
        sub.stage(grad)
        sub._before_accumulate()
    projected = sub.map().project(grad).to(sub.coords.dtype)
    if sub.coords.grad is None:
        sub.coords.grad = projected
    else:
        sub.coords.grad.add_(projected)
    sub._after_accumulate(sub.coords)


def refresh(
    sub: Subspace,
    weight: Tensor,
    step: int,
    *,
    carry: Carry,
    factor: float,
    moments: dict[str, Any],
    degrees: Mapping[str, int],
) -> bool:
    """Choose a new basis from the captured gradient and move everything over to it.

    The coordinates are merged through the old map, ``coords.grad`` becomes the projection by the new one, and the moments are
    carried. A gradient that is not finite, or a basis that would not be, leaves the old basis in place and says so once; a
    zero gradient leaves it silently.

    Args:
        sub: The subspace; ``sub.pending`` holds G [m, n].
        weight: The weight, in its own shape.
        step: Steps finished so far.
        carry: What happens to the moments: keep, reset or rotate.
        factor: The factor by which other programs scaled ``coords.grad`` since backward.
        moments: The base optimizer's state of the coordinates; changed in place.
        degrees: For ``rotate``, which of the moments are means (1) and which are squares (2).

    Returns:
        Whether the basis was replaced.
    """
    grad = sub.pending
    if grad is None:
        return False
    norm = float(grad.norm())
    if norm == 0.0:
        return False
    if not torch.isfinite(torch.tensor(norm)):
        sub.warn_once("the gradient at a refresh is not finite; the old basis stays until the next one")
        return False
    state = sub.transform.refresh(sub.state, grad, step)
    if not all(bool(t.isfinite().all()) for t in sub.transform.map(state).tensors if t.is_floating_point()):
        sub.warn_once(f"{sub.transform.name} gave a basis that is not finite; the old one stays until the next refresh")
        return False
    merge(sub, weight)
    old = sub.map()
    sub.replace_state(state, sub.refreshes + 1)
    projected = sub.map().project(grad).to(sub.coords.dtype)
    sub.coords.grad = projected if factor == 1.0 else projected * factor
    _carry(sub, old, carry, moments, degrees)
    sub.forget()
    sub.due = False
    return True


def decay(sub: Subspace, weight: Tensor, factor: float) -> None:
    """Decoupled weight decay of W + S z: ``weight *= factor`` and ``coords *= factor``."""
    weight.mul_(factor)
    sub.coords.mul_(factor)


def merge(sub: Subspace, weight: Tensor) -> None:
    """``weight += lift(coords)``, then ``coords = 0``: the weight of the forward stays what it was.

    Args:
        sub: The subspace.
        weight: The weight, in its own shape; written in place.
    """
    matrix = sub.layout.matrix(weight)
    if matrix.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr():
        sub.map().add_lift_(matrix, sub.coords)
    else:  # the strides allowed no view, as in a channels_last convolution
        weight.add_(sub.layout.restore(sub.map().lift(sub.coords)))
    sub.coords.zero_()


def lifted(sub: Subspace, weight: Tensor) -> Tensor:
    """The weight of the forward, W + S z, in the weight's shape; the weight itself where the coordinates are zero."""
    if not sub.coords.any():
        return weight
    return weight + sub.layout.restore(sub.map().lift(sub.coords)).to(weight.dtype)


def outside_factor(sub: Subspace) -> float | None:
    """By how much other programs scaled ``coords.grad`` after backward (GradScaler, a clip from outside).

    On a refresh step the gradient they scaled belongs to the old basis and is replaced, so the factor must be carried over.

    Args:
        sub: A subspace whose refresh is due.

    Returns:
        The factor; None where backward left zeros, from which it cannot be read.

    Raises:
        ModeError: The gradient was set by hand, or changed by more than one factor.
    """
    now, left = sub.coords.grad, sub.left
    if now is not None and left is None and now.any():
        raise ModeError(
            f"the gradient of {sub.name} did not come from a backward since the last step. This step refreshes its basis, "
            "which needs the backward's own gradient; run forward and backward, then step"
        )
    if now is None or left is None or not left.any() or not left.isfinite().all():
        return None
    if torch.equal(now, left):
        return 1.0
    factor = float((now.double() * left).sum() / left.double().square().sum())
    # one multiplication of each entry rounds it by at most eps; a clip after an unscale makes two
    if not torch.allclose(now, factor * left, rtol=8 * torch.finfo(now.dtype).eps, atol=torch.finfo(now.dtype).tiny):
        raise ModeError(
            f"the gradient of {sub.name} was changed between backward and step in another way than by one factor. "
            "This step refreshes its basis, so the change cannot be carried over. Change the gradient by one factor, "
            "or use opt.clip_grad_norm_, which refreshes first."
        )
    return factor


def _carry(sub: Subspace, old: LinearMap, carry: Carry, moments: dict[str, Any], degrees: Mapping[str, int]) -> None:
    if carry == "reset":
        moments.clear()
    if carry != "rotate":
        return
    new = sub.map()
    for key, value in moments.items():
        if not isinstance(value, Tensor) or value.numel() == 1:
            continue
        if key not in degrees or value.shape != sub.coords.shape:
            raise DualityError(f"carry='rotate' cannot rotate the state '{key}' of {sub.name}; use keep or reset")
        moved = new.transport(old, value) if degrees[key] == 1 else new.transport_squares(old, value)
        value.copy_(moved)


def _tensors(state: Any) -> list[Tensor]:
    """The tensors of a transform's state, at any depth."""
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, dict):
        state = state.values()
    if isinstance(state, str) or not hasattr(state, "__iter__"):
        return []
    return [t for item in state for t in _tensors(item)]
