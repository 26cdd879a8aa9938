"""The interface of a linear map, and its laws."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lingrad.errors import DualityError, ModeError
from lingrad.gradients.base import Gradient
from lingrad.gradients.local import DenseGradient, FactoredGradient
from lingrad.maps.factors import Factors
from lingrad.tensors import cast

ITERATIONS = 100  # of conjugate gradients, at most; a well-conditioned basis needs 1 to 20


class LinearMap(ABC):
    """An immutable linear map S from coordinates z [p, q] to a weight [m, n].

    Laws, for any coordinates z, gradient G and layer input x:

    - adjoint: ``<lift(z), G> == <z, project(G)>``, so that autograd of ``lift`` is ``project``;
    - action: ``apply(x, z) == x @ lift(z).T``;
    - transpose: ``T.lift(z.T) == lift(z).T``;
    - factors: ``left @ right == lift(z)`` for ``left, right = factors(z)``;
    - reduction: ``inner.apply(reduce(x), z) == apply(x, z)`` and, for G = dY^T X,
      ``inner.project(dY^T reduce(X)) == project(G) == core.project(T.reduce(dY)^T reduce(X))``;
    - expansion, where the map has one: ``expand(reduce(x) @ z.T) == apply(x, z)``, so that ``expand`` is the adjoint of
      ``T.reduce``.
    """

    @abstractmethod
    def lift(self, coords: Tensor) -> Tensor:
        """S z: [p, q] -> [m, n], in the dtype of ``coords``."""

    @abstractmethod
    def project(self, grad: Gradient | Tensor) -> Tensor:
        """S^T G, the adjoint of ``lift``: [m, n] -> [p, q], in the dtype of ``grad``."""

    @property
    @abstractmethod
    def T(self) -> LinearMap:  # noqa: N802 - the name torch and numpy give a transpose
        """The map whose lift of z^T is the transpose of this one's lift of z."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that the map stores."""

    @property
    def aligned(self) -> bool:
        """Whether each row of the weight is a map of the same row of the coordinates, and of no other."""
        return False

    def part(self, rows: slice, coords: Tensor) -> tuple[LinearMap, Tensor]:
        """A map S' to some rows of the weight, and the coordinates z' it takes: ``S'.lift(z') == lift(z)[rows]``.

        Args:
            rows: The rows, with a start and a stop.
            coords: z [p, q]; where the map is `aligned`, those rows of it.

        Raises:
            ModeError: There is none.
        """
        raise ModeError(f"a {type(self).__name__} cannot be cut by rows; leave sharded weights to another transform")

    @property
    def inner(self) -> LinearMap:
        """The map that acts on ``reduce(x)`` instead of x; this map itself if nothing can be reduced."""
        return self

    def reduce(self, x: Tensor) -> Tensor:
        """What the map's products need of a layer input: [..., n] -> [..., q] if a right factor allows it."""
        return x

    @property
    def core(self) -> LinearMap:
        """The map that acts on ``reduce(x)`` and ``T.reduce(dY)`` instead of x and dY."""
        return self.inner.T.inner.T

    def reduce_grad(self, out_grad: Tensor) -> Tensor:
        """``T.reduce(dY)``, all that the map needs of a layer's gradient: [..., m] -> [..., p]."""
        return self.T.reduce(out_grad)

    def project_reduced(self, out_grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``core.project(dY^T X)``, of what the two reductions gave.

        Args:
            out_grad: ``reduce_grad(dY)``, [T, p].
            x: ``reduce(X)``, [T, q].
            dtype: Of the result, at least as wide as theirs.

        Returns:
            [p, q].
        """
        return cast(self.core.project(FactoredGradient(out_grad, x)), dtype)

    def expand(self, y: Tensor) -> Tensor:
        """What a product of ``reduce(x)`` and coordinates says of the layer's output: [..., p] -> [..., m].

        Args:
            y: Rows of ``reduce(x) @ z.T``, each by coordinates z of its own if need be.

        Raises:
            ModeError: Coordinates of this map are no matrix between the two.
        """
        raise ModeError(f"a {type(self).__name__} takes its coordinates block by block; its rows cannot have some of their own")

    def apply(self, x: Tensor, coords: Tensor) -> Tensor:
        """Act as the layer with weight ``lift(coords)``: [..., n] -> [..., m], in the dtype of ``x``."""
        return x @ self.lift(coords).to(x.dtype).t()

    def add_apply_(self, out: Tensor, x: Tensor, coords: Tensor) -> None:
        """``out += apply(x, coords)`` in place, [..., m], contiguous."""
        out.add_(self.apply(x, coords))

    def add_lift(self, weight: Tensor, coords: Tensor) -> Tensor:
        """``weight + lift(coords)``, [m, n], in the weight's dtype."""
        return weight + self.lift(coords).to(weight.dtype)

    def add_lift_(self, weight: Tensor, coords: Tensor) -> None:
        """``weight += lift(coords)`` in place, [m, n]; without a temporary where the dtypes allow it."""
        weight.add_(self.lift(coords))

    def add_rounded_lift_(self, weight: Tensor, coords: Tensor) -> None:
        """``weight += lift(coords)`` in place, [m, n], by products in the weight's dtype, with z rounded to it first.

        A map without such products, as this default, does what `add_lift_` does.
        """
        self.add_lift_(weight, coords)

    def lifts_cheaper(self, tokens: int, shape: tuple[int, int]) -> bool:
        """Whether a layer with the weight W + S z computes less if it forms that matrix.

        It then forms it in the forward and again in the backward; otherwise it applies the map to the tokens and to their
        gradients. The reductions of x and dY are not counted, since the gradient of the coordinates needs them in any case.

        Args:
            tokens: Number of tokens.
            shape: (m, n).

        Returns:
            True where `apply` itself forms the lift.
        """
        return True

    def factors(self, coords: Tensor) -> Factors:
        """``lift(coords)`` as a product of a matrix [m, r] and one [r, n], in the dtype of ``coords``.

        Args:
            coords: z [p, q].

        Returns:
            The two. Here one of them is the identity; a map with thinner factors overrides this.
        """
        lifted = self.lift(coords)
        m, n = lifted.shape
        eye = torch.eye(min(m, n), dtype=lifted.dtype, device=lifted.device)
        return Factors(lifted, eye) if m >= n else Factors(eye, lifted)

    def residual(self, matrix: Tensor) -> Tensor:
        """What no coordinates can express of a matrix: ``matrix - S z`` for the S z that is nearest to it.

        Args:
            matrix: [m, n], at least float32.

        Returns:
            [m, n], a new tensor. By conjugate gradients, as `fit`, where the map knows no faster way.
        """
        return matrix - self.lift(self.fit(matrix))

    def norm(self, coords: Tensor) -> Tensor:
        """|S z|_F, 0-d; without forming the lift if the map allows it."""
        norm: Tensor = torch.linalg.vector_norm(self.lift(coords))
        return norm

    def fit(self, matrix: Tensor) -> Tensor:
        """The coordinates whose lift is nearest to a matrix, argmin |matrix - S z|_F, by conjugate gradients.

        Args:
            matrix: [m, n], at least float32.

        Returns:
            z [p, q]; for an orthonormal map ``project(matrix)``, after one iteration. If a map is so ill-conditioned that 100
            iterations are not enough, z is only nearer than zero.
        """
        residual = matrix.clone()
        step = slope = self.project(residual).to(matrix.dtype)
        found, size = torch.zeros_like(slope), float(slope.square().sum())
        floor = size * (4 * torch.finfo(matrix.dtype).eps) ** 2
        for _ in range(min(slope.numel(), ITERATIONS)):
            lift = self.lift(step)
            steepness = float(lift.square().sum())
            if size <= floor or steepness == 0.0:
                break
            length = size / steepness
            found, residual = found + length * step, residual.sub_(lift, alpha=length)
            slope = self.project(residual).to(matrix.dtype)
            size, before = float(slope.square().sum()), size
            step = slope + size / before * step
        return found

    def transport(self, old: LinearMap, coords: Tensor) -> Tensor:
        """S^T S_old z: another map's lift, projected by this one (``carry="rotate"``), [p, q]."""
        return self.project(old.lift(coords))

    def transport_squares(self, old: LinearMap, squares: Tensor) -> Tensor:
        """The corresponding transport of elementwise second moments: (C o C) v for C = S^T S_old, which keeps v >= 0.

        This is the variance of C g for a g with uncorrelated entries of variance v.

        Args:
            old: The map the second moments belong to.
            squares: v [p, q].

        Raises:
            DualityError: The map has no cheap elementwise square. One that has returns [p, q].
        """
        raise DualityError(
            f"carry='rotate' and 'transport' need the square of S_new^T S_old, which {type(self).__name__} does not offer; "
            "use carry='keep' or carry='reset'"
        )


def as_gradient(grad: Gradient | Tensor) -> Gradient:
    """A matrix [m, n] as a gradient; a gradient is returned as it is."""
    return DenseGradient(grad) if isinstance(grad, Tensor) else grad
