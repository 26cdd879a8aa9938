"""How far two runs are apart."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def weight_gap(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> tuple[float, float]:
    """How far two sets of weights are apart.

    Args:
        a: Weights by name.
        b: Weights by the same names.

    Returns:
        The largest absolute difference of any entry, and the largest |A - B|_F / |B|_F of any weight.
    """
    with torch.no_grad():
        differences = {name: a[name] - b[name] for name in b}
        absolute = max(float(d.abs().max()) for d in differences.values())
        return absolute, max(float(d.norm() / b[name].norm()) for name, d in differences.items())
