"""The gradient of one weight's coordinates on its way from the backward to the step.

Of a step that refreshes, it comes with the gradient that the refresh reads, or a sketch of it, summed over micro-batches like
the projections that autograd adds up in ``coords.grad``. Both belong together: zeroing one means the other too, and so does
scaling one (GradScaler, a clip by another program).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lingrad.errors import ModeError
from lingrad.gradients import Gradient, accumulate
from lingrad.parallel import Processes
from lingrad.tensors import call, is_sharded, nbytes, whole

Seen = Gradient | tuple[Tensor, ...]


class PendingGradient:
    """What the backwards of one weight have left for its step.

    Args:
        name: The parameter's name, for messages.
        processes: The processes of the run.

    Attributes:
        total: In a step that refreshes, the sum over the micro-batches that are in ``coords.grad``: a gradient, or the
            products of a sketch; or None.
        stale: Whether ``coords.grad`` may be left from before a refresh.
        factor: By how much ``coords.grad`` was scaled, compared with ``total``, when it was last compared with its copy.
        fed: Whether what earlier steps have left is in ``coords.grad`` and in ``total``.
        proposed: Whether ``coords.grad`` is the projection by a basis that is chosen and not committed yet.
    """

    def __init__(self, name: str, processes: Processes) -> None:
        self.name = name
        self.processes = processes
        self.stale = False
        self.proposed = False
        self._hooks: list[Any] = []
        self._clear()

    def __getstate__(self) -> dict[str, Any]:
        """Without the reference to the gradient, which belongs to this process; a copy takes its gradient as changed."""
        return {**vars(self), "_written": None, "_hooks": []}

    def listen(self, coords: nn.Parameter, methods: tuple[Callable[[], None], Callable[[], None]] | None) -> None:
        """Have autograd call two methods, or none, before and after it adds to ``coords.grad``.

        Args:
            coords: The coordinates.
            methods: The methods, whose object the hooks do not keep alive: a cycle through them would never be freed.
        """
        if methods is None:
            while self._hooks:
                self._hooks.pop().remove()
        elif not self._hooks:
            before, after = (weakref.WeakMethod(method) for method in methods)
            trains = coords.requires_grad
            coords.requires_grad_(True)  # else torch takes no hook
            self._hooks.append(coords.register_hook(lambda _: call(before)))
            self._hooks.append(coords.register_post_accumulate_grad_hook(lambda _: call(after)))
            coords.requires_grad_(trains)

    def forget(self) -> None:
        """Drop everything: it was used, or dropped by the caller."""
        self.proposed = False
        if self._backward >= 0 or self._written is not None:  # else there is nothing
            self._clear()

    def _clear(self) -> None:
        self.total: Seen | None = None
        self.fed, self.factor = False, 1.0
        self._staged: Seen | None = None  # of the backward that is running, not yet in coords.grad
        self._backward = -1
        self._accepted = -1  # the backward that was added to coords.grad last
        self._left: Tensor | None = None  # a copy of coords.grad as the last backward left it
        self._reduced: Tensor | None = (
            None  # and as DistributedDataParallel did, with whatever its communication hook makes of it
        )
        self._written: tuple[weakref.ref[Tensor], int] | None = None  # coords.grad itself, and its version then
        self._asked = 0  # how often a gradient was computed that autograd has not added to coords.grad
        self._first = True  # whether the running backward is the first since coords.grad was zeroed

    @property
    def nbytes(self) -> int:
        """Bytes of what the refresh reads."""
        if isinstance(self.total, tuple):
            return nbytes(*self.total)
        return 0 if self.total is None else self.total.nbytes

    def record(self, seen: Seen) -> None:
        """Keep what a refresh reads of one layer's backward; a layer used twice in a forward records twice.

        Args:
            seen: G [m, n] or products of it; stored, and possibly written into.
        """
        # A backward that never reached coords.grad (it failed, or asked for other gradients) must not count.
        running = torch._C._current_graph_task_id()
        if running == self._accepted != -1:  # out of a compiled backward it may come after the gradient of the coordinates
            self.total = _plus(self.total, seen)
            return
        self._staged = _plus(self._staged if running == self._backward else None, seen)
        self._backward = running

    def before_accumulate(self, coords: nn.Parameter) -> None:
        """Called when autograd, or a hook of lingrad's, is about to add to ``coords.grad``.

        Args:
            coords: The coordinates.

        Raises:
            ModeError: The gradient that is there belongs to another basis than the one that is about to be added.
        """
        self.refuse_stale(coords)
        if self.proposed and coords.grad is not None:
            raise ModeError(
                f"a backward reached {self.name} between clip_grad_norm_ and step, but its new basis is chosen, from the "
                "gradient so far; clip after the last backward of a step"
            )
        self.proposed = False
        # zeroing coords.grad by hand means what was recorded for the refresh too
        self._first = coords.grad is None or (self._changed(coords.grad) and self._zeroed(coords.grad))
        self._asked += 1

    def after_accumulate(self, coords: nn.Parameter, *, compare: bool) -> None:
        """Called when ``coords.grad`` holds one more backward; one that asked for other gradients never comes here.

        Args:
            coords: The coordinates.
            compare: Keep a copy of their gradient, for `outside_factor`.
        """
        self._asked = 0 if self._first else self._asked - 1
        if self._first:
            self.total, self.fed, self.factor = None, False, 1.0
        if self._staged is not None:
            self.total = _plus(self.total, self._staged)
            self._staged = None
        self._accepted = torch._C._current_graph_task_id()
        grad = coords.grad
        self._left = grad.clone() if compare and grad is not None else None
        self._written = None if grad is None else (weakref.ref(grad), grad._version)
        self._reduced = None
        if self._left is not None and self._accepted != -1 and self.processes.count > 1:
            engine: Any = torch.autograd.Variable._execution_engine  # which calls DistributedDataParallel first
            engine.queue_callback(lambda: engine.queue_callback(partial(self._copy_reduced, coords)))

    def _copy_reduced(self, coords: nn.Parameter) -> None:
        self._reduced = None if coords.grad is None else coords.grad.clone()

    def replace(self, total: Gradient, coords: nn.Parameter, *, factor: float = 1.0) -> None:
        """Take another gradient, or another projection of it, for what the backwards have left.

        Args:
            total: The gradient.
            coords: The coordinates, whose gradient is the projection times ``factor``.
            factor: The factor.
        """
        grad = coords.grad
        self.total, self.factor, self._reduced = total, factor, None
        self._left = None if grad is None else grad.clone()
        self._written = None if grad is None else (weakref.ref(grad), grad._version)

    def scaled_by(self, coords: nn.Parameter) -> float | None:
        """By how much other programs have scaled ``coords.grad``, compared with ``total``; see `outside_factor`."""
        outside = self.outside_factor(coords)
        return None if outside is None else self.factor * outside

    def refuse_stale(self, coords: nn.Parameter) -> None:
        """Make sure that ``coords.grad`` is not left from before a refresh.

        Args:
            coords: The coordinates.

        Raises:
            ModeError: It is: neither its sum with a new gradient nor a step along it would mean anything.
        """
        if self.stale and coords.grad is not None and bool(whole(coords.grad).any()):
            raise ModeError(
                f"the gradient of {self.name} is from before its basis was refreshed; call zero_grad() after each step"
            )
        self.stale = False

    def require_read(self, coords: nn.Parameter) -> None:
        """Make sure that a refresh reads of all that is in ``coords.grad``.

        Args:
            coords: The coordinates, in a step that refreshes their basis.

        Raises:
            ModeError: A part of it was put there by another program, or all of it.
        """
        grad = coords.grad
        if grad is None or self.proposed or not self._changed(grad):  # proposed: it has been read
            return
        if self._asked > 0:
            raise ModeError(
                f"the gradient of {self.name} came, in part, from torch.autograd.grad, which leaves nothing for the refresh of "
                "this step to read; zero-bubble schedules of pipelines compute it so. Use backward(), a schedule of whole "
                "backwards (GPipe, 1F1B, Interleaved1F1B), or bases that read nothing (random)"
            )
        if self.total is None and self.processes.count == 1 and bool(whole(grad).any()):
            self._refuse_foreign()

    def _refuse_foreign(self) -> NoReturn:
        raise ModeError(
            f"the gradient of {self.name} did not come from a backward since the last step. This step refreshes its basis, "
            "which needs the backward's own gradient; run forward and backward, then step"
        )

    def _changed(self, grad: Tensor) -> bool:
        """Whether another program has written into the gradient, or replaced it, since the last backward."""
        return self._written is None or self._written[0]() is not grad or self._written[1] != grad._version

    def _zeroed(self, grad: Tensor) -> bool:
        had = self.total is not None if self._left is None else bool(whole(self._left).any())
        return had and not whole(grad).any()

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
        now, left = coords.grad, self._left
        if now is None:
            return None
        if is_sharded(now):  # its mean over ranks is taken in the backward
            now = whole(now)
            left = torch.zeros_like(now) if left is None else whole(left)
        elif self.processes.count > 1:  # the others may have found something where this one did not
            left = self.processes.average(torch.zeros_like(now) if left is None else left)
        elif left is None and not now.any():
            return None
        if left is None:
            self._refuse_foreign()
        if not left.any() or not left.isfinite().all():
            return None
        left = left.to(now.dtype)  # model.to casts gradients
        if torch.equal(now, left):
            return 1.0
        if not now.isfinite().all():  # a clip by a norm that another weight's gradient made infinite
            return math.nan
        # ranks may have been summed in another order, which rounds an entry by eps of the largest part
        factor = _factor(now, left, loose=self.processes.count > 1)
        if factor is None and self._reduced is not None:
            factor = _factor(now, self._reduced, loose=False)
        if factor is None:
            raise ModeError(
                f"the gradient of {self.name} was changed between backward and step in another way than by one factor. "
                "This step reads the gradient itself, for a refresh or a residual, and the change cannot be carried over. "
                "Change the gradient by one factor, or use opt.clip_grad_norm_, which refreshes first."
            )
        return factor


def _factor(now: Tensor, before: Tensor, *, loose: bool) -> float | None:
    """By what factor a gradient was multiplied; None where it was changed in another way."""
    if not before.any():
        return None
    factor = float((now.double() * before).sum() / before.double().square().sum())
    # one multiplication of each entry rounds it by at most eps; a clip after an unscale makes two
    rounding = 8 * torch.finfo(now.dtype).eps
    floor = float((factor * before).abs().max()) * rounding if loose else torch.finfo(now.dtype).tiny
    return factor if torch.allclose(now, factor * before, rtol=rounding, atol=floor) else None


def _plus(total: Seen | None, part: Seen) -> Seen:
    """The sum, in the memory of the first; products are added one by one."""
    if isinstance(part, Gradient):
        return accumulate(total if isinstance(total, Gradient) else None, part)
    return part if not isinstance(total, tuple) else tuple(a.add_(b) for a, b in zip(total, part, strict=True))
