"""The hooks that other programs register for an optimizer's state, as torch runs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer


def with_hooks(optimizer: Optimizer, give: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A state, between the hooks that other programs have registered for it, as in torch."""
    for before in optimizer._optimizer_state_dict_pre_hooks.values():
        before(optimizer)
    saved = give()
    for after in optimizer._optimizer_state_dict_post_hooks.values():
        saved = _or_given(after(optimizer, saved), saved)
    return saved


def load_with_hooks(optimizer: Optimizer, take: Callable[[Any], None], given: Any) -> None:
    """Load a state, between the hooks that other programs have registered for it, as in torch."""
    given = dict(given) if isinstance(given, dict) else given  # hooks may change it
    for before in optimizer._optimizer_load_state_dict_pre_hooks.values():
        given = _or_given(before(optimizer, given), given)
    take(given)
    for after in optimizer._optimizer_load_state_dict_post_hooks.values():
        after(optimizer)


def _or_given(returned: dict[str, Any] | None, given: dict[str, Any]) -> dict[str, Any]:
    """What a hook returned in place of what it was given, if anything."""
    return given if returned is None else returned
