"""`pca`: online PCA of the gradient (Online Subspace Descent, Liang et al., NeurIPS 2024, arXiv 2408.12857, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from typing_extensions import override

from lingrad.errors import SpecError, require
from lingrad.gradients.base import Gradient
from lingrad.maps import KroneckerMap, LinearMap
from lingrad.optimizers.base import Choice
from lingrad.tensors import TensorSpec, wide
from lingrad.transforms import options
from lingrad.transforms.base import Probe, Sketch, When
from lingrad.transforms.linalg import align_signs, derive_seed, leading_vectors, orthonormalize
from lingrad.transforms.registry import register
from lingrad.transforms.side import SketchBasis
from lingrad.transforms.sketch import by_side, range_probes


class Learned(NamedTuple):
    """State of `PCA`: the bases, and what the optimizer remembers of each; of no meaning before the second refresh."""

    left: Tensor | None
    right: Tensor | None
    left_memory: dict[str, Any]
    right_memory: dict[str, Any]


@register("pca")
@final
@dataclass(frozen=True, kw_only=True)
class PCA(SketchBasis):
    """A basis trained beside the weights: one optimizer step on its reconstruction error at each refresh.

    The objective of a left basis P is |P P^T N - N|_F^2 + lam |P^T P - I|_F^2 with N = G / |G|_F (section 3.2); a right basis
    is the same of N^T. It depends on G through G G^T alone, for which a sketch G Omega stands, drawn anew at each refresh:
    E[G Omega Omega^T G^T] is G G^T but for a factor that N does not see. As published, P is used for a step and then stepped
    itself. The first refresh takes the singular vectors of the sketch instead.

    Args:
        rank: Columns of each basis.
        every: Steps between refreshes, 1 as published; 0 refreshes once.
        side: Which side has the basis: short, long, left, right, both.
        clip: Lower the rank to min(m, n) where it does not fit.
        lam: Weight of the orthonormality term.
        lr: Learning rate of the basis.
        optimizer: A stock optimizer by name, with options if need be: ``adam``, ``sgd(momentum=0.9)``.
        orthonormalize: Replace the basis by its QR factor after each step.
        sketch: Columns of the sketch; None is a quarter of ``rank``. The first refresh has as many as the basis.

    Raises:
        SpecError: An option is out of range, or the optimizer is unknown.
    """

    every: int = 1
    lam: float = 0.1
    lr: float = 1e-3
    optimizer: Choice = field(default_factory=lambda: Choice("adam"))
    orthonormalize: bool = False
    sketch: int | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        if isinstance(self.optimizer, str):
            object.__setattr__(self, "optimizer", Choice(self.optimizer))
        super().__post_init__()
        require(self.lam >= 0, "lam", f"lam must be 0 or more, not {self.lam}")
        require(self.sketch is None or self.sketch >= 1, "sketch", f"sketch must be 1 or more, not {self.sketch}")
        require(self.lr > 0, "lr", f"lr must be positive, not {self.lr}")
        require(
            "lr" not in dict(self.optimizer.options),
            "optimizer",
            "the learning rate of the basis is the option lr of pca itself; leave it out of the optimizer's",
        )
        try:  # an unknown name, option or value is found here, not in the first step
            self.optimizer.base(lr=self.lr).build([nn.Parameter(torch.zeros(1))])
        except SpecError as error:
            raise SpecError(str(error), option="optimizer") from error
        if self.every == 0:
            for option in fields(self):
                unused = option.name in ("lam", "lr", "optimizer", "orthonormalize", "sketch")
                require(
                    not unused or getattr(self, option.name) == options.default(option),
                    option.name,
                    f"{option.name} is used from the second refresh on, and every=0 has one only; leave it out",
                )

    @override
    def init(self, shape: tuple[int, int], *, seed: int, device: torch.device, dtype: torch.dtype) -> Learned:
        # at least float32: a learning rate's worth of change would be lost in a bfloat16 basis
        left, right = self.start(shape, seed=seed, device=device, dtype=wide(dtype))
        base = self.optimizer.base(lr=self.lr)
        return Learned(left, right, *({} if b is None or self.every == 0 else base.state_of(b) for b in (left, right)))

    @override
    def storage(self, shape: tuple[int, int], dtype: torch.dtype) -> list[TensorSpec]:
        learned = super().storage(shape, wide(dtype))
        if self.every == 0:
            return learned
        base = self.optimizer.base(lr=self.lr)
        return [*learned, *(moment for basis in learned for moment in base.moments(*basis))]

    @override
    def probes(self, state: Learned, when: When) -> tuple[Probe, ...]:
        bases = state.left, state.right
        rank = next(basis.shape[1] for basis in bases if basis is not None)
        columns = max(1, rank // 4) if self.sketch is None else self.sketch
        return range_probes(bases, max(rank, columns) if when.refreshes == 0 else columns, when)

    @override
    def learn(self, state: Learned, sketch: Sketch, when: When) -> Learned:
        bases = state.left, state.right
        memories = ({}, {}) if when.refreshes <= 1 else (state.left_memory, state.right_memory)
        found = [
            (basis, memory) if basis is None or grad is None else self._learn(basis, grad, memory, side, when)
            for basis, grad, memory, side in zip(bases, by_side(bases, sketch), memories, ("left", "right"), strict=True)
        ]
        (left, left_memory), (right, right_memory) = found
        if when.refreshes == 0:
            return state._replace(left=left, right=right)
        return Learned(left, right, left_memory, right_memory)

    @override
    def map(self, state: Learned) -> LinearMap:
        return KroneckerMap(state.left, state.right)

    def _learn(
        self, basis: Tensor, grad: Gradient, memory: dict[str, Any], side: str, when: When
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """The next basis of one side, whose gradient has this side in its rows."""
        seed = derive_seed(when.seed, when.step, side)
        if when.refreshes == 0:
            found, _ = leading_vectors(grad, basis.shape[1], None, solver="exact", seed=seed)
            return align_signs(found, basis), memory  # moments of the first step refer to the basis it had
        param = nn.Parameter(basis.clone())
        param.grad = objective_grad(basis, grad, self.lam).to(basis.dtype)
        optimizer = self.optimizer.base(lr=self.lr).build([param])
        optimizer.state[param] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in memory.items()}
        optimizer.step()
        learned = param.detach()
        if self.orthonormalize:
            learned = orthonormalize(learned, seed=seed)
        return learned, dict(optimizer.state[param])


def objective_grad(basis: Tensor, grad: Gradient, lam: float) -> Tensor:
    """Gradient of the online PCA objective with respect to a left basis, in closed form from two products.

    With N = G / |G|_F, C = N^T P, M = P^T P it is 2 (P C^T C + N C M - 2 N C) + 4 lam P (M - I), that is
    P (2 C^T C + 4 lam (M - I)) + N (2 C (M - 2 I)).

    Args:
        basis: P [m, r].
        grad: G [m, n], not zero; ``grad.T`` for a right basis.
        lam: Weight of the orthonormality term.

    Returns:
        [m, r], in the gradient's dtype.
    """
    basis = basis.to(grad.dtype)
    identity = torch.eye(basis.shape[1], device=basis.device, dtype=basis.dtype)
    square = grad.norm().to(grad.dtype).square()
    product = grad.rmatmul(basis).t()  # |G| C
    gram = basis.t() @ basis
    inner = 2 / square * (product.t() @ product) + 4 * lam * (gram - identity)
    return grad.matmul(2 / square * (product @ (gram - 2 * identity))).addmm_(basis, inner)
