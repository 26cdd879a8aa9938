"""Categories of the tensors that live longer than a step: those of models, of torch's optimizers and of lingrad's."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lingrad.adapters.base import Coords
from lingrad.engine.optimizer import SubspaceOptimizer

_DEPTH = 6  # levels of nesting searched for tensors in an optimizer's state: projector objects hold dicts of lists


def persistent(models: Iterable[nn.Module], optimizers: Iterable[Optimizer]) -> Iterator[tuple[Tensor, str]]:
    """The tensors that models and optimizers store between steps.

    Args:
        models: The models.
        optimizers: Their optimizers. A `lingrad.SubspaceOptimizer` distinguishes coords, bases and moments. In the state of
            others, entries named after a projector (galore_torch's) are bases and all other entries moments.

    Yields:
        (tensor, category). Where a tensor comes twice, the last category counts.
    """
    optimizers = list(optimizers)
    for model in models:
        for weight in model.parameters():
            yield weight, "weight" if weight.requires_grad else "frozen"
        for buffer in model.buffers():
            yield buffer, "buffer"
    for optimizer in optimizers:
        yield from stored_by(optimizer, set())
    for owner, category in gradients_of(models, optimizers):
        if owner.grad is not None:
            yield owner.grad, category


def stored_by(optimizer: Optimizer, coords: Container[int]) -> Iterator[tuple[Tensor, str]]:
    """The tensors that one optimizer stores.

    Args:
        optimizer: A `lingrad.SubspaceOptimizer`, or any other optimizer, on its own or as the base of a run of lingrad.
        coords: Ids of the parameters that are known to be coordinates.

    Yields:
        (tensor, category).
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    own = {id(param) for param in params}
    for param in params:
        is_coords = id(param) in coords
        yield param, "coords" if is_coords else "weight" if param.requires_grad else "frozen"
        if param.grad is not None:
            yield param.grad, "coords gradient" if is_coords else "gradient"
    if isinstance(optimizer, SubspaceOptimizer):
        yield from optimizer.held()
        return
    for param in params:
        for key, value in optimizer.state.get(param, {}).items():
            category = "basis" if "projector" in str(key) else "moments"
            yield from ((t, category) for t in _reachable(value) if id(t) not in own)


def gradients_of(models: Iterable[nn.Module], optimizers: Iterable[Optimizer]) -> Iterator[tuple[Tensor, str]]:
    """The parameters that may get gradients, with the category of these gradients.

    Args:
        models: The models.
        optimizers: The optimizers.

    Yields:
        (parameter, ``gradient`` or ``coords gradient``), each parameter once.
    """
    seen: set[int] = set()
    for optimizer in optimizers:
        if isinstance(optimizer, SubspaceOptimizer):
            for sub in optimizer.subspaces:
                seen.add(id(sub.coords))
                yield sub.coords, "coords gradient"
    for model in models:
        for module in model.modules():
            if isinstance(module, Coords) and id(module.coords) not in seen:
                seen.add(id(module.coords))
                yield module.coords, "coords gradient"
    params: list[Tensor] = [parameter for model in models for parameter in model.parameters()]
    params += [parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]]
    for param in params:
        if id(param) not in seen:
            seen.add(id(param))
            yield param, "gradient"


def _reachable(value: Any, depth: int = _DEPTH) -> Iterator[Tensor]:
    """Every tensor in a state entry: in containers, and in attributes of objects such as galore_torch's projectors."""
    if isinstance(value, Tensor):
        yield value
    elif depth == 0 or isinstance(value, (type, nn.Module, str, int, float, bool)) or value is None:
        return
    elif isinstance(value, dict):
        for item in value.values():
            yield from _reachable(item, depth - 1)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _reachable(item, depth - 1)
    elif hasattr(value, "__dict__"):
        yield from _reachable(vars(value), depth - 1)
