"""`slice`: each of several workers trains in columns of its own (Torroba-Hennigen et al., ICML 2025, arXiv 2502.13811)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, final

import torch
from torch import Tensor
from typing_extensions import override

from lingrad.errors import ShapeError, SpecError, require
from lingrad.gradients.base import Gradient
from lingrad.maps import KroneckerMap, LinearMap
from lingrad.tensors import wide
from lingrad.transforms.base import Probe, Reads, Sketch, When
from lingrad.transforms.linalg import align_signs, derive_seed, gaussian, leading_vectors, orthonormalize
from lingrad.transforms.registry import register
from lingrad.transforms.side import BasisTransform, Sides
from lingrad.transforms.sketch import by_side, range_probes

Choice = Literal["identical", "independent", "orthogonal", "by_gradient"]


class Cut(NamedTuple):
    """State of `Slice`: what is needed to draw every worker's bases.

    Args:
        seed: The seed of this basis.
        m: Rows of the weight.
        n: Columns of the weight.
        p: Columns of a worker's left basis; None if that side has none.
        q: Columns of a worker's right basis; None if that side has none.
        number: Which worker this is, from 0.
        like: Empty, with the device and dtype of the bases.
        shared: The bases that all workers share out, [workers, m, p] and [workers, n, q], where they are not drawn; else Nones.
    """

    seed: int
    m: int
    n: int
    p: int | None
    q: int | None
    number: int
    like: Tensor
    shared: Sides

    @property
    def fixed(self) -> tuple[str, ...]:
        """The fields that a checkpoint must agree on: sizes of memory, and the worker whose moments it has."""
        return ("m", "n", "p", "q", "number")


@register("slice")
@final
class Slice(BasisTransform):
    """One worker's slice: orthonormal columns for that worker, known to all. For `lingrad.decentralized`.

    Args:
        rank: Columns of each worker's basis.
        every: Steps between changes of the bases; 0 chooses once.
        side: Which side has the basis: short, long, left, right, both.
        clip: Lower the rank to min(m, n) where it does not fit; then to what all workers' slices leave room for.
        choice: ``identical`` gives all workers one random basis; ``independent`` each a random basis of its own; ``orthogonal``
            each its columns of one random orthonormal matrix; ``by_gradient`` each its share of the leading singular vectors of
            a sketch of the gradient, the mean of all workers' (worker k has the k-th of every ``workers`` of them).
        workers: How many slices the shared basis is cut into; of use to ``orthogonal`` and ``by_gradient`` only. Drawn bases
            take no memory beyond the worker's own; ``by_gradient`` stores those of all.

    Raises:
        SpecError: An option is out of range.
    """

    uncoded = "workers compare theirs with each other's"

    choice: Choice = "orthogonal"
    workers: int = 1

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        require(self.workers >= 1, "workers", f"workers must be at least 1, not {self.workers}")
        require(
            self.workers == 1 or self.cuts,
            "workers",
            f"workers cuts a shared basis, and choice={self.choice} has none; leave it out, or choose orthogonal or "
            "by_gradient",
        )

    @override
    def check_schedule(self) -> None:
        raise SpecError(
            "the bases of all workers change between their rounds, every so many steps; leave schedule out", option="schedule"
        )

    @property
    def cuts(self) -> bool:
        """Whether workers share out one basis, which is as large as all their slices."""
        return self.choice in ("orthogonal", "by_gradient")

    @property
    @override
    def reads(self) -> Reads:
        return "sketch" if self.choice == "by_gradient" else "nothing"

    @override
    def due(self, step: int) -> bool:
        # a basis that is learned from a sketch is in use from the next step on, when the others' rounds begin
        learns = self.choice == "by_gradient" and self.every > 0
        return step == 0 or (learns and (step + 1) % self.every == 0) or (not learns and super().due(step))

    @override
    def ranks(self, shape: tuple[int, int]) -> tuple[int | None, int | None]:
        ranks = super().ranks(shape)
        if not self.cuts:
            return ranks
        room = min(size for size, rank in zip(shape, ranks, strict=True) if rank is not None)
        if self.choice == "by_gradient":
            room = min(shape)  # a gradient has no more singular vectors
        most = room // self.workers
        if max(rank or 0 for rank in ranks) <= most:
            return ranks
        if most == 0 or not self.clip:
            raise ShapeError(
                f"{self.workers} slices of rank {self.rank} need {self.workers * self.rank} columns, and a basis of a "
                f"{shape[0]} x {shape[1]} weight has at most {room}; lower rank or workers, or let the rank be lowered where "
                "needed: clip=true"
            )
        return None if ranks[0] is None else most, None if ranks[1] is None else most

    @override
    def basis_shapes(self, shape: tuple[int, int]) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
        count = self.workers if self.choice == "by_gradient" else 1
        left, right = (
            None if rank is None else (size, rank * count) for size, rank in zip(shape, self.ranks(shape), strict=True)
        )
        return left, right

    @override
    def init(self, shape: tuple[int, int], *, seed: int, device: torch.device, dtype: torch.dtype) -> Cut:
        state = Cut(seed, *shape, *self.ranks(shape), 0, torch.empty(0, device=device, dtype=dtype), Sides(None, None))
        if self.choice != "by_gradient":
            return state
        drawn = (self._drawn(state, side, None) for side in ("left", "right"))
        blocks = (None if one is None else one.unflatten(1, (self.workers, -1)).movedim(1, 0).contiguous() for one in drawn)
        return state._replace(shared=Sides(*blocks))

    @override
    def refresh(self, state: Cut, grad: Gradient | None, when: When) -> Cut:
        if grad is not None:
            products = tuple(grad.product(*probe).to(wide(grad.dtype)) for probe in self.probes(state, when))
            return self.learn(state, products, when)
        return state._replace(seed=derive_seed(when.seed, when.step))

    @override
    def probes(self, state: Cut, when: When) -> tuple[Probe, ...]:
        if self.choice != "by_gradient":
            return ()
        return range_probes(state.shared, self.workers * (state.p or state.q or 0), when)

    @override
    def learn(self, state: Cut, sketch: Sketch, when: When) -> Cut:
        if self.choice != "by_gradient":
            return self.refresh(state, None, when)
        found: list[Tensor | None] = []
        for seen, old, side in zip(by_side(state.shared, sketch), state.shared, ("left", "right"), strict=True):
            if seen is None or old is None:
                found.append(None)
                continue
            seed = derive_seed(when.seed, when.step, side)
            solver: Literal["exact", "gram"] = "exact" if seen.dtype == torch.float64 else "gram"
            vectors, _ = leading_vectors(seen, self.workers * old.shape[2], None, solver=solver, seed=seed)
            assert vectors is not None  # noqa: S101 - a left basis was asked for
            dealt = vectors.unflatten(1, (-1, self.workers)).movedim(2, 0)  # the k-th of each round of cards is k's
            aligned = [align_signs(new, was) for new, was in zip(dealt, old, strict=True)]  # moments depend on signs
            found.append(torch.stack(aligned).to(old.dtype))
        return state._replace(shared=Sides(*found))

    @override
    def map(self, state: Cut) -> LinearMap:
        return self._map(state, (state.number,))

    def of_worker(self, state: Cut, number: int) -> Cut:
        """The state of another worker.

        Args:
            state: Any worker's state.
            number: The other one's number.

        Returns:
            Its state.
        """
        if self.cuts:
            require(
                number < self.workers,
                "workers",
                f"worker {number} has no slice: slice(..., workers={self.workers}) cuts the basis for numbers below "
                f"{self.workers}; give workers the number of workers",
            )
        return state._replace(number=number)

    def joint(self, state: Cut, coords: Mapping[int, Tensor]) -> tuple[KroneckerMap, Tensor]:
        """The sum of several workers' S_k z_k as one map of one coordinate matrix.

        Args:
            state: Any worker's state.
            coords: Number -> z_k [p, q]; of a shared right basis with the rows of one weight.

        Returns:
            S, with P_1 ... P_N side by side as its left basis and Q_1 ... Q_N as its right one, and z with S z the sum of all
            S_k z_k. Workers with identical bases share one, and their coordinates are added up.
        """
        every = list(coords.values())
        if self.choice == "identical":
            return self._map(state, (state.number,)), torch.stack(every).sum(0)
        if state.p is not None and state.q is not None:
            return self._map(state, tuple(coords)), torch.block_diag(*every)
        return self._map(state, tuple(coords)), torch.cat(every, 0 if state.q is None else 1)

    def _map(self, state: Cut, numbers: tuple[int, ...]) -> KroneckerMap:
        return KroneckerMap(self._columns(state, "left", numbers), self._columns(state, "right", numbers))

    def _columns(self, state: Cut, side: Literal["left", "right"], numbers: tuple[int, ...]) -> Tensor | None:
        rank = state.p if side == "left" else state.q
        if rank is None:
            return None
        if not self.cuts:
            parts = [self._drawn(state, side, None if self.choice == "identical" else number) for number in numbers]
            return parts[0] if len(parts) == 1 else torch.cat([part for part in parts if part is not None], 1)
        shared = state.shared.left if side == "left" else state.shared.right
        if shared is not None:
            return shared[numbers[0]] if len(numbers) == 1 else torch.cat([shared[number] for number in numbers], 1)
        basis = self._drawn(state, side, None)
        assert basis is not None  # noqa: S101 - the side has a rank
        return torch.cat([basis[:, number * rank : (number + 1) * rank] for number in numbers], 1).contiguous()

    def _drawn(self, state: Cut, side: Literal["left", "right"], number: int | None) -> Tensor | None:
        """Orthonormal columns of all workers, or of one alone."""
        size, rank = (state.m, state.p) if side == "left" else (state.n, state.q)
        if rank is None:
            return None
        seed = derive_seed(state.seed, side) if number is None else derive_seed(state.seed, side, number)
        columns = rank * (self.workers if self.cuts else 1)
        drawn = gaussian(size, columns, seed=seed, device=state.like.device, dtype=wide(state.like.dtype))
        return orthonormalize(drawn, seed=seed).to(state.like.dtype)
