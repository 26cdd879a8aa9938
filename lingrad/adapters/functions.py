"""How the attachments call their autograd functions: traced by torch.compile, and refused where they would go wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from lingrad.errors import ModeError

_tracing_state = torch._C._get_tracing_state
_in_functorch = torch._C._are_functorch_transforms_active


def applied(function: Any, *args: Any) -> Any:
    """Call an autograd function.

    Args:
        function: Its class.
        *args: Its arguments.

    Returns:
        What it returns.

    Raises:
        ModeError: A transform of torch.func is active, or torch.jit.trace, which would lose what the backward hands to a
            refresh.
    """
    if _tracing_state() is not None:
        raise ModeError(
            "torch.jit.trace cannot go through a layer that lingrad trains. Call it after opt.detach(), or on a plain model "
            "that has loaded opt.weights(); in optimizer mode under torch.no_grad() it can, and torch.export can in both modes"
        )
    if _in_functorch():
        raise ModeError(
            "torch.func (vmap, grad, jvp and the like) cannot go through a layer that lingrad trains: the gradient of its "
            "weight is computed on the way. Call it after opt.detach(), or on a plain model that has loaded opt.weights(); in "
            "optimizer mode under torch.no_grad() it can"
        )
    # what Function.apply does after it has asked the same, and looked over all arguments for what torch.func has left
    return super(torch.autograd.Function, function).apply(*args)


def _called(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


# Unlike torch.compiler.disable, torch.optim's own helper waits with the import of the compiler, which takes longer than that
# of torch.
outside_of_graph: Callable[..., Any] = torch._disable_dynamo(_called)  # type: ignore[attr-defined]
# what torch.compiler.disable(reason=...) would note, for the message of fullgraph=True
vars(outside_of_graph)["_torchdynamo_disable"] = True
vars(outside_of_graph)["_torchdynamo_disable_msg"] = (
    "this layer, which lingrad trains, cannot be compiled in one graph with others: its basis is drawn at each use "
    "(store=false), its weight is sharded or stepped inside the backward (layerwise), another program has replaced its "
    "forward, or it is no linear layer in adapter mode. Leave out fullgraph=True, or call opt.detach() first"
)


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """``once_differentiable``, skipping its overhead where grad mode is off."""
    refusing: Callable[..., Any] = once_differentiable(backward)

    @wraps(backward)
    def chosen(*args: Any) -> Any:
        traced = torch.compiler.is_dynamo_compiling()  # torch refuses second derivatives of what it compiles
        return refusing(*args) if torch.is_grad_enabled() and not traced else backward(*args)

    return chosen


def run(function: Any, *args: Any) -> Any:
    """Call an autograd function that torch.compile can trace; anywhere else as `applied` does."""
    return function.apply(*args) if torch.compiler.is_dynamo_compiling() else applied(function, *args)
