"""Stepping each parameter inside the backward, as soon as its gradient is complete, so that no two are in memory together.

The idea is that of fused or per-layer weight updates (Lv et al., "Full Parameter Fine-tuning for Large Language Models with
Limited Resources", 2023, arXiv 2306.09782, section 3.1). Schedules, decay, refreshes and the step counter are those of any
other run; what needs all gradients at once (accumulation over micro-batches, clipping by a norm, loss scaling) is refused.

With ``layerwise="coordinates"`` only the refreshes that read a gradient are inside the backward, and the step is where it
always is: what waits for it are gradients of coordinates.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lingrad.errors import ModeError
from lingrad.parallel import initialized
from lingrad.subspaces.subspace import Subspace


class Layerwise:
    """Waits for gradients and has each stepped once a step.

    Args:
        update: ``update(run, param)`` steps one parameter and frees its gradient, or refreshes its basis.
        steps: Whether it steps.
    """

    def __init__(self, update: Callable[[Any, Tensor], None] | None, *, steps: bool = True) -> None:
        self._update = update
        self._steps = steps
        self._run: weakref.ref[Any] | None = None  # hooks keep this object alive, and must not keep the run alive
        self._handles: list[Any] = []
        self._waiting: list[Tensor] = []
        self._stepped: set[int] = set()
        self._backward = -1

    def __reduce__(self) -> Any:
        """A copy of a model, which is for evaluation, steps nothing."""
        return Layerwise, (None,)

    def belong_to(self, run: object) -> None:
        """Step the parameters of a run.

        Args:
            run: The run, not kept alive.
        """
        self._run = weakref.ref(run)

    def listen(self, params: Iterable[tuple[Tensor, str, Subspace | None]]) -> None:
        """Have gradients reported as they are completed.

        Args:
            params: Each parameter with its name and, of coordinates, their subspace.
        """
        for param, name, sub in params:
            if not self._steps and (sub is None or sub.basis.transform.reads != "gradient"):
                continue
            if sub is not None:
                sub.on_gradient = partial(self.arrived, param, name, wait=True)
                sub.listen()
                continue
            report, trains = partial(self.arrived, name=name, wait=False), param.requires_grad
            self._handles.append(param.requires_grad_(True).register_post_accumulate_grad_hook(report))
            param.requires_grad_(trains)

    def stop(self) -> None:
        """Take the hooks off."""
        while self._handles:
            self._handles.pop().remove()

    def begin(self) -> None:
        """A new step begins: every parameter may be stepped again."""
        self._waiting.clear()
        self._stepped.clear()

    def arrived(self, param: Tensor, name: str, *, wait: bool) -> None:
        """The gradient of a parameter is complete.

        Args:
            param: The parameter.
            name: Its name, for messages.
            wait: Take it when the next gradient is complete, or at the end of the backward: the layer itself may need its
                weight once more, for the gradient of its input.

        Raises:
            ModeError: It was stepped already in this step.
        """
        if self._run is None:
            return
        if initialized():
            does = "layerwise=True steps a weight" if self._steps else "layerwise='coordinates' refreshes a basis"
            raise ModeError(
                f"{does} before torch.distributed could average its gradient; leave layerwise out where there is a process "
                "group"
            )
        if not self._steps and id(param) in self._stepped:
            return
        if id(param) in self._stepped:
            raise ModeError(
                f"a second backward reached {name} before step(); with layerwise=True each backward is a step of its own. "
                "Call step() after every backward, or leave layerwise out to accumulate gradients; a layer that is used in "
                "several checkpoints needs use_reentrant=False"
            )
        self._stepped.add(id(param))
        self.flush()
        self._waiting.append(param)
        if not wait:
            self.flush()
            return
        running = torch._C._current_graph_task_id()
        if running != self._backward and running != -1:
            self._backward = running
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self.flush)

    def was_stepped(self, param: Tensor) -> bool:
        """Whether a parameter was stepped since the last step of the run."""
        return id(param) in self._stepped

    def flush(self) -> None:
        """Step what waits."""
        waiting, self._waiting = self._waiting, []
        run = None if self._run is None else self._run()
        if run is None or self._update is None:
            return
        with torch.no_grad():
            for param in waiting:
                self._update(run, param)
