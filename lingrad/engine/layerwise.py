"""Stepping each parameter inside the backward, as soon as its gradient is complete, so that no two gradients need coexist.

The idea is that of fused or per-layer weight updates (Lv et al., "Full Parameter Fine-tuning for Large Language Models with
Limited Resources", 2023, arXiv 2306.09782, section 3.1). Schedules, decay, refreshes and the step counter are those of any
other run; what needs all gradients at once (accumulation over micro-batches, clipping by a norm, loss scaling) cannot be had.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lingrad.errors import ModeError
from lingrad.parallel import together
from lingrad.subspaces.subspace import call

Update = Callable[[Tensor], None]


class Layerwise:
    """Waits for gradients and has each stepped once a step.

    Args:
        update: A method that steps one parameter and frees its gradient. Its object is not kept alive: parameters hold what
            waits for their gradients, and a cycle through a tensor's hooks would never be freed.
    """

    def __init__(self, update: Update | None) -> None:
        self._method = None if update is None else weakref.WeakMethod(update)
        self._waiting: list[Tensor] = []
        self._stepped: set[int] = set()
        self._backward = -1

    def __reduce__(self) -> Any:
        """A copy of a model, which is for evaluation, steps nothing."""
        return Layerwise, (None,)

    def begin(self) -> None:
        """A new step begins: every parameter may be stepped again."""
        self._waiting.clear()
        self._stepped.clear()

    def arrived(self, param: Tensor, name: str, *, wait: bool) -> None:
        """The gradient of a parameter is complete.

        Args:
            param: The parameter.
            name: Its name, for messages.
            wait: Step it when the next gradient arrives, or at the end of the backward: the layer itself may need its weight
                once more, for the gradient of its input.

        Raises:
            ModeError: It was stepped already in this step.
        """
        if self._method is None:
            return
        if together():
            raise ModeError(
                "layerwise=True steps a weight before torch.distributed could average its gradient; leave layerwise out where "
                "there is a process group"
            )
        if id(param) in self._stepped:
            raise ModeError(
                f"a second backward reached {name} before step(); with layerwise=True each backward is a step of its own. "
                "Call step() after every backward, or leave layerwise out to accumulate gradients; a layer that is used in "
                "several checkpoints needs use_reentrant=False"
            )
        self._stepped.add(id(param))
        self.flush()
        if not wait:
            with torch.no_grad():
                call(self._method, param)
            return
        self._waiting.append(param)
        running = torch._C._current_graph_task_id()
        if running != self._backward and running != -1:
            self._backward = running
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self.flush)

    def flush(self) -> None:
        """Step what waits."""
        waiting, self._waiting = self._waiting, []
        with torch.no_grad():
            for param in waiting:
                call(self._method, param)
