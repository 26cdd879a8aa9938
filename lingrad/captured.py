"""The gradient of a refresh step, on its way from backward to step.

A refresh needs G itself, summed over micro-batches, beside the projections that autograd adds up in ``coords.grad``. Both
belong together: who zeroes one means the other, and who scales one (GradScaler, a clip from outside) means the other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lingrad.errors import ModeError
from lingrad.gradient import Gradient, accumulate
from lingrad.parallel import average, ranks


class Captured:
    """What one weight's backwards of a refresh step have found so far.

    Args:
        name: The parameter's name, for messages.

    Attributes:
        total: The sum over the micro-batches that are in ``coords.grad``, or None.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.forget()

    def forget(self) -> None:
        """Drop everything: it was used, or thrown away."""
        self.total: Gradient | None = None
        self._staged: Gradient | None = None  # of the backward that is running, not yet in coords.grad
        self._backward = -1
        self._grad: Tensor | None = None  # coords.grad as the last backward left it
        self._anew = True  # whether the running backward is the first since coords.grad was zeroed

    def stage(self, grad: Gradient) -> None:
        """Note what a layer's backward found; a layer used twice in a forward stages twice.

        Args:
            grad: G [m, n]; kept, and possibly written into.
        """
        # A backward that never reached coords.grad (it failed, or asked for other gradients) must not count.
        running = torch._C._current_graph_task_id()
        self._staged = accumulate(self._staged if running == self._backward else None, grad)
        self._backward = running

    def before_accumulate(self, coords: nn.Parameter) -> None:
        """Called when autograd, or a hook of ours, is about to add to ``coords.grad``."""
        # Somebody who zeroed coords.grad by hand meant the refresh gradient too.
        zeroed = coords.grad is not None and self._grad is not None and bool(self._grad.any() and not coords.grad.any())
        self._anew = coords.grad is None or zeroed

    def after_accumulate(self, coords: nn.Parameter) -> None:
        """Called when ``coords.grad`` holds one more backward; one that asked for other gradients never comes here."""
        if self._staged is not None:
            self.total = accumulate(None if self._anew else self.total, self._staged)
            self._staged = None
        self._grad = None if coords.grad is None else coords.grad.clone()

    def outside_factor(self, coords: nn.Parameter) -> float | None:
        """By how much other programs scaled ``coords.grad`` after backward.

        The gradient they scaled belongs to the old basis and is replaced by the refresh; the factor must be carried over.

        Args:
            coords: The coordinates.

        Returns:
            The factor, NaN where they made a finite gradient infinite or NaN; None where backward left zeros or no finite
            numbers, from which it cannot be read.

        Raises:
            ModeError: The gradient was set by hand, or changed by more than one factor.
        """
        now, left = coords.grad, self._grad
        if now is None:
            return None
        if ranks() > 1:  # the others may have found something where this rank did not
            left = average(torch.zeros_like(now) if left is None else left)
        elif left is None and not now.any():
            return None
        if left is None:
            raise ModeError(
                f"the gradient of {self.name} did not come from a backward since the last step. This step refreshes its basis, "
                "which needs the backward's own gradient; run forward and backward, then step"
            )
        if not left.any() or not left.isfinite().all():
            return None
        left = left.to(now.dtype)  # model.to casts gradients
        if torch.equal(now, left):
            return 1.0
        if not now.isfinite().all():  # a clip by a norm that another weight's gradient made infinite
            return math.nan
        factor = float((now.double() * left).sum() / left.double().square().sum())
        # one multiplication of each entry rounds it by at most eps; a clip after an unscale makes two. Ranks may have been
        # summed in another order, which rounds an entry by eps of the largest part
        rounding = 8 * torch.finfo(now.dtype).eps
        floor = float((factor * left).abs().max()) * rounding if ranks() > 1 else torch.finfo(now.dtype).tiny
        if not torch.allclose(now, factor * left, rtol=rounding, atol=floor):
            raise ModeError(
                f"the gradient of {self.name} was changed between backward and step in another way than by one factor. "
                "This step refreshes its basis, so the change cannot be carried over. Change the gradient by one factor, "
                "or use opt.clip_grad_norm_, which refreshes first."
            )
        return factor
