"""One weight's subspace: its coordinates z [p, q] in the basis it uses, and what becomes of them.

Everything here is about one weight W [m, n]. The weight of the forward is the effective weight W + S z; in optimizer mode z is
zero between steps. What happens when, and to which weights, is the engine's: `lingrad.engine.step`, `lingrad.engine.refresh`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lingrad.errors import ShapeError
from lingrad.gradients import DenseGradient, Gradient
from lingrad.maps import LinearMap
from lingrad.parallel import Processes
from lingrad.subspaces.basis import Basis
from lingrad.subspaces.ledger import Change, Ledger, total
from lingrad.subspaces.pending import PendingGradient
from lingrad.subspaces.products import sketch
from lingrad.subspaces.watched import is_released, refuse_written, settle, was_written
from lingrad.tensors import dense, own, whole, wide
from lingrad.transforms import Probe
from lingrad.weights.base import Remainder, Weight
from lingrad.weights.sharding import refuse_reader


@dataclass(eq=False, repr=False)
class Subspace:
    """The coordinates of one weight.

    Args:
        name: The parameter's name.
        weight: The weight, as it is stored.
        basis: The basis, which other subspaces may use too.
        rows: The rows of the basis's shape that are this weight's.
        ledger: What was merged.
        processes: The processes that train it together.

    Attributes:
        coords: z [p, q], zero at the start, float32 unless the weight is float64; see `release`.
        pending: The gradient of the coordinates on its way to the step, and what a refresh reads.
        on_gradient: Called when ``coords.grad`` holds the gradient of one more backward.
        on_change: Called with the old map and the new one at a refresh, before moments and coordinates are carried over.
    """

    name: str
    weight: Weight
    basis: Basis
    rows: slice
    ledger: Ledger
    processes: Processes = field(default_factory=Processes)
    coords: nn.Parameter = field(init=False)
    pending: PendingGradient = field(init=False)
    on_gradient: Callable[[], None] | None = None
    on_change: Callable[[LinearMap, LinearMap], None] | None = None

    def __post_init__(self) -> None:
        """Make the coordinates."""
        p, q = self.basis.coords_shape
        if self.weight.layout.shape != self.basis.shape:  # a shared basis is on the right side
            p = self.weight.layout.shape[0]
        zeros = torch.zeros((p, q), device=self.weight.param.device, dtype=wide(self.weight.dtype))
        self.coords = nn.Parameter(self.placed(zeros))
        self.pending = PendingGradient(self.name, self.processes)

    def __repr__(self) -> str:
        return f"Subspace({self.name!r}, {self.basis.transform}, coords={tuple(self.coords.shape)})"

    def listen(self) -> None:
        """Follow what autograd adds to the gradient of the coordinates, in steps where it matters: hooks take their time."""
        matters = self.basis.gathers or self.pending.stale or self.on_gradient is not None
        self.pending.listen(self.coords, (self._before_accumulate, self._after_accumulate) if matters else None)

    def placed(self, coords: Tensor) -> Tensor:
        """Coordinates, or their gradient, which every process has, as this weight's are held."""
        return coords if self.weight.sharding is None else self.weight.sharding.spread(coords)

    def map(self) -> LinearMap:
        """The map S of the basis in use."""
        return self.basis.map()

    @torch.no_grad()
    def effective(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight of the forward, W + S z.

        Args:
            dtype: To compute it in; None for the weight's own, as a merge would round it.

        Returns:
            In the weight's shape; W itself, not a copy, where the coordinates are zero and the dtype is its own.
        """
        self._require_sum(self.weight.param)
        weight = self.weight.dense()
        if not self.released and bool(whole(self.coords).any()):
            wanted = weight if dtype is None else weight.to(dtype)
            weight = self.add_to(wanted, self.coords.detach() if dtype is None else self.coords.detach().to(dtype))
        return weight.to(self.weight.dtype if dtype is None else dtype)

    def require_intact(self) -> None:
        """Make sure that weight and coordinates belong together still.

        Raises:
            ShapeError: The weight has another shape than it was given with.
            ModeError: Another program has written into the weight, and z is not zero.
        """
        now, given = self.weight.shape, self.weight.layout.weight_shape
        if now != given:
            raise ShapeError(
                f"{self.name} has shape {tuple(now)} now, and had {given} when lingrad was called; its basis, its coordinates "
                "and their moments are for that shape. Call detach() before such a change (resize_token_embeddings and the "
                "like), and lingrad.wrap or lingrad.adapt after it; to go on now, give the weight its shape back first"
            )
        self._require_sum(self.weight.param)

    def _require_sum(self, weight: Tensor) -> None:
        if was_written(weight):
            if bool(whole(self.coords).any()):
                refuse_written(self.name, weight)
            self._lose_record()

    @torch.no_grad()
    def open(self) -> None:
        """Have W be the sum, W + S z, for another program to write into."""
        self.require_intact()
        self._lose_record()
        self.merge()

    def restart(self) -> None:
        """Take W, which another program has put there, for the whole weight; z is zero."""
        self._lose_record()
        if self.weight.sharding is None:
            self.coords.data = torch.zeros_like(self.coords)
        else:
            self.coords.detach().zero_()

    def _lose_record(self) -> None:
        """The weight is about to be another program's: where it had changed, the recorded change is not its."""
        self.ledger.replaced |= self.ledger.merged or bool(whole(self.coords).any())

    def add_to(self, weight: Tensor, coords: Tensor) -> Tensor:
        """``weight + S z``, in the weight's shape and dtype; S z is rounded to that before the sum."""
        return self.weight.sum(self.map(), coords, weight)

    def capture(self, grad: Gradient) -> None:
        """``coords.grad += project(grad)``: linear, so that micro-batches, and ranks, add up in the small space.

        Args:
            grad: G [m, n] of one micro-batch; stored until the step where a refresh reads it.
        """
        self._before_accumulate()
        projected = self.processes.average(self.project(grad))
        if self.coords.grad is None:
            self.coords.grad = projected
        else:
            self.coords.grad.add_(projected)
        self._after_accumulate()

    def project(self, grad: Gradient, owned: Callable[[], Gradient] | None = None) -> Tensor:
        """The gradient of the coordinates; in a step that gathers it, what a refresh reads is recorded.

        Args:
            grad: G [m, n] of one backward.
            owned: See `record`.

        Returns:
            The projection [p, q] in the coordinates' dtype, of this rank.
        """
        projected = self.map().project(grad)
        if self.basis.gathers:
            self.record(grad, projected, owned)
        return projected.to(self.coords.dtype)

    def take(self, param: Tensor) -> None:
        """`capture` the gradient that a parameter holds for this weight, and free it, before a step changes the coordinates."""
        self._require_sum(param)
        grad = param.grad
        if grad is not None:
            param.grad = None
            if self.weight.sharding is not None:
                refuse_reader(self.name)
            self.require_intact()
            self.capture(DenseGradient(self.weight.layout.matrix(dense(grad))))

    def record(self, grad: Gradient, projected: Tensor, owned: Callable[[], Gradient] | None = None) -> None:
        """Keep what a refresh needs of one backward, in a step that gathers it.

        A transform that reads the gradient gets it as it is. One that reads a sketch gets products with matrices that were
        fixed before the step; they are computed here, where the gradient's factors are at hand.

        Args:
            grad: G [m, n].
            projected: Its projection by the map in use, [p, q], which may be one of the products.
            owned: Gives the gradient in memory that no other program will write into, where it is in such memory now.
        """
        if self.basis.whole or self.basis.transform.reads == "gradient":
            self.pending.record(grad if owned is None else owned())
            return
        self.pending.record(sketch(self.probes(), self.map(), self.weight, grad, projected))

    def probes(self) -> list[Probe]:
        """What the refresh of the step that is being prepared multiplies this weight's gradient with."""
        learned, held_out = self.basis.asks(self.coords)
        rows = self.weight.layout.shape[0]  # of a shared basis the probes are as tall as the stacked weights
        return [
            probe if probe.left is None or len(probe.left) == rows else probe._replace(left=probe.left[self.rows])
            for probe in (*learned, *held_out)
        ]

    def merge(self, *, keep: bool = False) -> Remainder | None:
        """``W += S z``, then ``z = 0``: the effective weight stays what it was.

        Args:
            keep: Return what a quantised weight cannot take, for `keep`, instead of counting it as lost.

        Returns:
            The remainder where it is to be kept; else None.
        """
        # to quantise again would change a weight for nothing; of others only the first merge asks the device
        asks = self.weight.loss is not None or not self.ledger.merged
        if self.released or (asks and not bool(whole(self.coords).any())):
            return None
        remainder = self.add(self.coords)
        self.coords.zero_()
        if remainder is None or keep:
            return remainder
        self.weight.lose(remainder)
        return None

    def add(self, coords: Tensor) -> Remainder | None:
        """``W += S z`` and its record, and z stays; where that fails, for want of memory, nothing has changed.

        Args:
            coords: z, or z in the dtype that the weight rounds it to for a merge.

        Returns:
            What a quantised weight could not take.
        """
        self.ledger.reserve(self.coords)
        remainder = self.weight.add_(self.basis.map(), coords)
        settle(self.weight.param)
        self.ledger.merged = True
        self.ledger.add(self.coords)
        return remainder

    def keep(self, remainder: Remainder) -> None:
        """Keep the part of a remainder that the basis in use can hold in the coordinates, which are zero.

        Args:
            remainder: What `merge` gave.
        """
        current = self.map()
        self.coords.copy_(current.fit(remainder.matrix))
        self.ledger.add(-self.coords.detach())  # they stand for what was merged before, and are in the ledger already
        self.weight.lose(remainder._replace(matrix=remainder.matrix.sub_(current.lift(self.coords.detach().float()))))

    def decaying(self) -> list[Tensor]:
        """What a decoupled decay of W + S z multiplies: the weight, and coordinates that may not be zero."""
        return self.weight.scales() if self.released else [*self.weight.scales(), own(self.coords)]

    def change(self, *, decays: bool) -> Change:
        """What the run has made of the weight, as thin factors.

        Args:
            decays: Whether the weight decays.

        Returns:
            The change, on the CPU.

        Raises:
            ModeError: It is not known.
        """
        self.ledger.require_known(self.name, decays=decays)
        open_ = whole(self.ledger.open(self.coords))
        last = self.map().factors(open_.detach()) if open_.any() else None
        return Change(self.name, self.weight.layout, total(self.ledger.closed(), last), self.ledger.decay)

    @property
    def released(self) -> bool:
        """Whether the coordinates are all zero, and nothing has been written to them since."""
        return is_released(self.coords)

    def forget(self) -> None:
        """Drop what backwards have left for a refresh, and a refresh that was chosen from it."""
        self.pending.forget()
        self.basis.proposal = None

    def _before_accumulate(self) -> None:
        dropped = self.pending.proposed and self.coords.grad is None
        self.pending.before_accumulate(self.coords)
        if dropped:
            self.basis.proposal = None

    def _after_accumulate(self) -> None:
        if self.basis.gathers:
            self.pending.after_accumulate(self.coords, compare=self.basis.whole or self.basis.transform.reads == "gradient")
        if self.on_gradient is not None:
            self.on_gradient()
