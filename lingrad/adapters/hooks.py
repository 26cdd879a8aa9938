"""Hooks of other programs on the gradient of a weight that is never formed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lingrad.errors import ModeError


def is_hooked(param: Tensor) -> bool:
    """Whether another program waits for the gradient of a parameter; hooks of lingrad itself do not count.

    Args:
        param: The parameter.

    Returns:
        Whether it has a hook, of either kind.
    """
    kinds: tuple[Any, Any] = param._backward_hooks, param._post_accumulate_grad_hooks
    modules = (getattr(getattr(hook, "func", hook), "__module__", "") for hooks in kinds if hooks for hook in hooks.values())
    return any(not str(module).startswith("lingrad.") for module in modules)


def refuse_hooks(name: str, param: Tensor, reason: str) -> None:
    """Make sure that nothing waits for a gradient that will not be.

    Args:
        name: The parameter's name.
        param: The parameter.
        reason: Why its hooks would not be called.

    Raises:
        ModeError: It has hooks.
    """
    if is_hooked(param):
        raise ModeError(
            f"{name} has a hook on its gradient, which would never be called: {reason}. Remove the hook, or leave the weight "
            "out by a rule: 'none'"
        )
