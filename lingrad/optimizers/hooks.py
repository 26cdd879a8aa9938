"""Hooks that other programs register for the steps of every optimizer, which must not see those inside of a run."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim import optimizer as torch_optimizer

_NONE: OrderedDict[int, Callable[..., Any]] = OrderedDict()  # one object, which a compiled step may be guarded by


@contextmanager
def without_global_hooks() -> Iterator[None]:
    """Step optimizers without the hooks of ``register_optimizer_step_pre_hook`` and ``register_optimizer_step_post_hook``.

    A step of a run is one step, whatever optimizers are stepped for it; the run's own ``step`` has called the hooks.

    Yields:
        Nothing.
    """
    hooks: Any = torch_optimizer
    before = hooks._global_optimizer_pre_hooks, hooks._global_optimizer_post_hooks
    if not any(before):
        yield
        return
    hooks._global_optimizer_pre_hooks = hooks._global_optimizer_post_hooks = _NONE
    try:
        yield
    finally:
        hooks._global_optimizer_pre_hooks, hooks._global_optimizer_post_hooks = before
