"""The closure that a step of an optimizer may be given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def evaluate(closure: Callable[[], Any] | None) -> Any:
    """Call the closure of a step with gradients enabled, which a step disables.

    Args:
        closure: Evaluates the model and returns the loss, as in torch; None for none.

    Returns:
        What it returned, or None.
    """
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
