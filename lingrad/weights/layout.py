"""Weights of any number of dimensions, read as a matrix [m, n]; decided once, when a weight is attached."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from einops import rearrange
from torch import Tensor, nn

from lingrad.errors import ShapeError

_OF_TORCH = (nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention)


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
        if self._is_matrix:
            return weight
        return weight.t() if self.forward == "a0 a1 -> a1 a0" else rearrange(weight, self.forward)

    def restore(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`: [m, n] -> the weight's shape."""
        if self._is_matrix:
            return matrix
        axes = self.forward.partition(" -> ")[0].split()
        return rearrange(matrix, self.backward, **dict(zip(axes, self.weight_shape, strict=True)))


def layout_of(weight: Tensor, module: nn.Module | None, name: str, *, stacked: bool = False) -> Layout:
    """Choose how a weight is read as a matrix.

    Linear and embedding weights are matrices already; a Conv1D of GPT-2, stored [in, out], is transposed; the output
    channels of a convolution are its rows. The matrices of fused experts [experts, in, out], by `fused_experts`, are one
    under the other, [experts * in, out]. Anything else is cut where the shorter side of the matrix comes out longest; a
    convolution whose module is not known, too.

    Args:
        weight: A parameter with at least two dimensions.
        module: The module that owns it, if known.
        name: The parameter's name.
        stacked: Whether a weight with three dimensions, not of a convolution, is known to be a stack of matrices.

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
    if (stacked and weight.dim() == 3 and len(cuts) > 1) or fused_experts(weight, module, name):
        cuts = [weight.dim() - 1]
    shapes = {cut: (prod(weight.shape[:cut]), prod(weight.shape[cut:])) for cut in cuts}
    cut = max(shapes, key=lambda cut: min(shapes[cut]))
    grouped = f"({' '.join(axes[:cut])}) ({' '.join(axes[cut:])})"
    return Layout(f"{whole} -> {grouped}", f"{grouped} -> {whole}", tuple(weight.shape), shapes[cut])


def fused_experts(weight: Tensor, module: nn.Module | None, name: str) -> int:
    """How many matrices of experts one parameter fuses, as the layers of mixtures of experts in transformers do.

    It is one of floating-point numbers, [experts, m, n] or [experts * m, n] with m and n above 1, and belongs to a module that
    is no layer of torch's own. Of three dimensions either that module counts as many experts (an int attribute such as
    ``num_experts``), or the name of its class or its path has the word; of two dimensions both.

    Args:
        weight: The parameter.
        module: The module that owns it, if known.
        name: The parameter's name.

    Returns:
        How many; 0 if it is none of these.
    """
    if not weight.is_floating_point() or weight.dim() not in (2, 3) or isinstance(module, _OF_TORCH) or is_conv1d(module):
        return 0
    if module is None or all(cls.__module__.partition(".")[0] == "torch" for cls in type(module).__mro__[:-1]):
        return 0
    of_experts = "expert" in type(module).__name__.lower()
    counts = {value for key, value in vars(module).items() if "expert" in key.lower() and type(value) is int and value > 1}
    rows = weight.shape[0]
    if weight.dim() == 2:
        found = next((count for count in sorted(counts) if rows % count == 0 and rows > count), 0) if of_experts else 0
    else:
        named = of_experts or "expert" in name.rpartition(".")[0].lower()
        found = rows if min(weight.shape[1:]) > 1 and (named or rows in counts) else 0
    return found if weight.shape[-1] > 1 else 0


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
