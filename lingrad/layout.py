"""Weights of any number of dimensions, read as a matrix [m, n]; decided once, when a weight is attached."""

from __future__ import annotations

from dataclasses import dataclass

from einops import rearrange
from torch import Tensor, nn

from lingrad.errors import ShapeError

ATTACHED = "_lingrad_attached"  # the mark on a parameter whose gradient already belongs to a subspace


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

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight, or a gradient of its shape, as [m, n]; a view where its strides allow one."""
        return rearrange(weight, self.forward)

    def restore(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`: [m, n] -> the weight's shape."""
        axes = self.forward.partition(" -> ")[0].split()
        return rearrange(matrix, self.backward, **dict(zip(axes, self.weight_shape, strict=True)))


def layout_of(weight: Tensor, module: nn.Module | None, name: str) -> Layout:
    """Choose how a weight is read as a matrix.

    Linear and embedding weights are matrices already; a Conv1D of GPT-2, stored [in, out], is transposed; the output
    channels of a convolution are its rows; of anything else the last dimension is the columns, so that fused experts
    [experts, in, out] share a right basis.

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
    axes = [f"a{i}" for i in range(weight.dim())]
    whole = " ".join(axes)
    if is_conv1d(module):
        grouped, shape = "a1 a0", (weight.shape[1], weight.shape[0])
    elif isinstance(module, nn.modules.conv._ConvNd):
        grouped, shape = f"a0 ({' '.join(axes[1:])})", (weight.shape[0], weight[0].numel())
    else:
        grouped, shape = f"({' '.join(axes[:-1])}) {axes[-1]}", (weight.numel() // weight.shape[-1], weight.shape[-1])
    return Layout(f"{whole} -> {grouped}", f"{grouped} -> {whole}", tuple(weight.shape), shape)


def is_conv1d(module: nn.Module | None) -> bool:
    """Whether a module is the Conv1D of transformers' GPT-2: y = x W + b with W [in, out]."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")
