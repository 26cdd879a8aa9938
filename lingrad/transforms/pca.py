"""`pca`: online PCA of the gradient (Online Subspace Descent, Liang et al., NeurIPS 2024, arXiv 2408.12857, section 3.2)."""

from __future__ import annotations

from dataclasses import field, fields
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from typing_extensions import override

from lingrad.errors import SpecError, require
from lingrad.gradients.base import Gradient
from lingrad.optimizers.base import Choice
from lingrad.tensors import TensorSpec, wide
from lingrad.transforms import options
from lingrad.transforms.base import Probe, Sketch, When
from lingrad.transforms.linalg import align_signs, derive_seed, leading_vectors, orthonormalize
from lingrad.transforms.registry import register
from lingrad.transforms.side import Sides, SideTransform
from lingrad.transforms.sketch import by_side, range_probes


class Learned(NamedTuple):
    """State of `PCA`: the bases, and the state of each one's optimizer, which is first used by the second refresh.

    The names are keys in checkpoints.
    """

    left: Tensor | None
    right: Tensor | None
    left_memory: dict[str, Any]
    right_memory: dict[str, Any]


@register("pca")
@final
class PCA(SideTransform):
    """A basis trained alongside the weights: one optimizer step on its reconstruction error at each refresh.

    The objective of a left basis P is |P P^T N - N|_F^2 + lam |P^T P - I|_F^2 with N = G / |G|_F (section 3.2); that of a right
    basis has N^T. It depends on G only through G G^T, so a sketch G Omega takes the place of G, with a new Omega at each
    refresh: E[G Omega Omega^T G^T] is G G^T up to a factor, which N removes. As published, P is used for a step and then
    updated. The first refresh takes the singular vectors of the sketch instead.

    Args:
        rank: Columns of each basis.
        every: Steps between refreshes, 1 as published; 0 refreshes once.
        side: Which side has the basis: short, long, left, right, both.
        clip: Lower the rank to min(m, n) where it does not fit.
        lam: Weight of the orthonormality term.
        lr: Learning rate of the basis.
        optimizer: A built-in optimizer by name, with options if needed: ``adam``, ``sgd(momentum=0.9)``.
        orthonormalize: Replace the basis by its QR factor after each step.
        sketch: Columns of the sketch; None means a quarter of ``rank``. The first refresh has at least ``rank``.

    Raises:
        SpecError: An option is out of range, or the optimizer is unknown.
    """

    reads = "sketch"
    uncoded = "it is learned in steps that codes would round away"

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
        try:  # so that an unknown name, option or value is found here, not in the first step
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
    def check_schedule(self) -> None:
        raise SpecError(
            "pca trains its basis by one step of an optimizer at each refresh, and has no use for a schedule that leaves some "
            "out; leave schedule out, or choose power, which begins anew at each refresh",
            option="schedule",
        )

    @override
    def init(self, shape: tuple[int, int], *, seed: int, device: torch.device, dtype: torch.dtype) -> Learned:
        # at least float32: an update of the size of a learning rate would be lost in a bfloat16 basis
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
    def columns(self, rank: int) -> int:
        return max(1, rank // 4) if self.sketch is None else self.sketch

    @override
    def probes(self, state: Learned, when: When) -> tuple[Probe, ...]:
        bases = state.left, state.right
        rank = next(basis.shape[1] for basis in bases if basis is not None)
        columns = self.columns(rank)
        return range_probes(bases, max(rank, columns) if when.refreshes == 0 else columns, when)

    @override
    def basis(self, seen: Gradient, old: Tensor, when: When) -> Tensor:
        """The basis of the first refresh: the leading singular vectors of the sketch."""
        found, _ = leading_vectors(seen, old.shape[1], None, seed=derive_seed(when.seed, when.step, when.side))
        assert found is not None  # noqa: S101 - the left vectors were asked for
        return align_signs(found, old)  # moments of the first step depend on the signs of the basis it had

    @override
    def learn(self, state: Learned, sketch: Sketch, when: When) -> Learned:
        old = Sides(state.left, state.right)
        seen = by_side(old, sketch)
        if when.refreshes == 0:
            left, right = self.each_side(seen, old, when)
            return state._replace(left=left, right=right)
        before = ({}, {}) if when.refreshes == 1 else (state.left_memory, state.right_memory)
        (left, left_after), (right, right_after) = (
            (basis, own) if basis is None or grad is None else self._updated(basis, grad, own, side, when)
            for basis, grad, own, side in zip(old, seen, before, ("left", "right"), strict=True)
        )
        return Learned(left, right, left_after, right_after)

    def _updated(
        self, basis: Tensor, seen: Gradient, before: dict[str, Any], side: str, when: When
    ) -> tuple[Tensor, dict[str, Any]]:
        """The basis of one side and its optimizer's state, one step later; the sketch has this side in its rows."""
        param = nn.Parameter(basis.clone())
        param.grad = objective_grad(basis, seen, self.lam).to(basis.dtype)
        optimizer = self.optimizer.base(lr=self.lr).build([param])
        optimizer.state[param] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in before.items()}
        optimizer.step()
        updated = param.detach()
        if self.orthonormalize:
            updated = orthonormalize(updated, seed=derive_seed(when.seed, when.step, side))
        return updated, dict(optimizer.state[param])


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
