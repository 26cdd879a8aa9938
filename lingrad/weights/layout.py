"""Weights of any number of dimensions, read as a matrix [m, n]; decided once, when a weight is attached."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from einops import rearrange
from torch import Tensor, nn

from lingrad.errors import ShapeError


@dataclass(frozen=True)
class Layout:
    """How one weight is read as a matrix.

    Args:
        forward: einops pattern from the weight to [m, n].
        backward: einops pattern from [m, n] to the weight.
        weight_shape: The weight's own shape.
        shape: (m, n).
    """

    forward: str
    backward: str
    weight_shape: tuple[int, ...]
    shape: tuple[int, int]

    @property
    def _is_matrix(self) -> bool:
        return self.forward == "a0 a1 -> (a0) (a1)"

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight, or a gradient of its shape, as [m, n]; a view where its strides allow one."""
        return weight if self._is_matrix else rearrange(weight, self.forward)

    def restore(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`: [m, n] -> the weight's shape."""
        if self._is_matrix:
            return matrix
        axes = self.forward.partition(" -> ")[0].split()
        return rearrange(matrix, self.backward, **dict(zip(axes, self.weight_shape, strict=True)))


def layout_of(weight: Tensor, module: nn.Module | None, name: str) -> Layout:
    """Choose how a weight is read as a matrix.

    Linear and embedding weights are matrices already; a Conv1D of GPT-2, stored [in, out], is transposed; the output
    channels of a convolution are its rows. Anything else is cut where the shorter side of the matrix comes out longest:
    fused experts [experts, in, out] become [experts * in, out] and share a right basis, and a convolution whose module is
    not known is cut as if it were.

    Args:
        weight: A parameter with at least two dimensions.
        module: The module that owns it, if known.
        name: The parameter's name, for messages.

    Returns:
        The layout.

    Raises:
        ShapeError: The weight has fewer than two dimensions, or none of some dimension.
    """
    if weight.dim() < 2 or weight.numel() == 0:
        raise ShapeError(
            f"'{name}' has shape {tuple(weight.shape)}; a transform needs a weight with two or more dimensions, none empty"
        )
    if module is not None and is_packed(module):  # the parameter is codes in a layout of their own
        shape = int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
        return Layout("a0 a1 -> (a0) (a1)", "(a0) (a1) -> a0 a1", shape, shape)
    axes = [f"a{i}" for i in range(weight.dim())]
    whole = " ".join(axes)
    if is_conv1d(module):
        return Layout(f"{whole} -> a1 a0", f"a1 a0 -> {whole}", tuple(weight.shape), (weight.shape[1], weight.shape[0]))
    cuts = [1] if isinstance(module, nn.modules.conv._ConvNd) else range(1, weight.dim())
    shapes = {cut: (prod(weight.shape[:cut]), prod(weight.shape[cut:])) for cut in cuts}
    cut = max(shapes, key=lambda cut: min(shapes[cut]))
    grouped = f"({' '.join(axes[:cut])}) ({' '.join(axes[cut:])})"
    return Layout(f"{whole} -> {grouped}", f"{grouped} -> {whole}", tuple(weight.shape), shapes[cut])


def is_conv1d(module: nn.Module | None) -> bool:
    """Whether a module is the Conv1D of transformers' GPT-2: y = x W + b with W [in, out]."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def packed_kind(module: nn.Module | None) -> str:
    """The name of bitsandbytes' class of a layer with a weight in 4 or 8 bits; empty for any other layer."""
    names = (c.__name__ for c in type(module).__mro__ if c.__module__.partition(".")[0] == "bitsandbytes")
    return next((name for name in names if name in ("Linear4bit", "Linear8bitLt")), "")


def is_packed(module: nn.Module | None) -> bool:
    """Whether a layer holds a quantised weight, as bitsandbytes' layers for 4 and 8 bits do."""
    return bool(packed_kind(module)) and not getattr(getattr(module, "weight", None), "has_fp16_weights", False)
