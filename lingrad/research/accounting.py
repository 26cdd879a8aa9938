"""The bytes that a training run holds: gradients, and what its optimizer keeps between steps."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lingrad.engine.optimizer import SubspaceOptimizer
from lingrad.tensors import distinct, nbytes


def gradient_bytes(model: nn.Module, optimizer: Optimizer) -> int:
    """Bytes of all gradients: of parameters, of coordinates, and what a refresh keeps until the step."""
    params = {id(p): p for p in model.parameters()}
    params |= {id(p): p for group in optimizer.param_groups for p in group["params"]}
    total = nbytes(*(p.grad for p in params.values() if p.grad is not None))
    if isinstance(optimizer, SubspaceOptimizer):
        total += sum(sub.pending.nbytes for sub in optimizer.subspaces)
    return total


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes that the optimizer stores between steps: moments, step counters and bases."""
    if isinstance(optimizer, SubspaceOptimizer):  # whose ``state`` may have the weights too
        return nbytes(*distinct(tensor for tensor, kind in optimizer.held() if kind in ("moments", "basis")))
    stored: list[Any] = [value for state in optimizer.state.values() for value in state.values()]
    return nbytes(*distinct(t for t in stored if isinstance(t, Tensor)))
