"""Steps as a CUDA graph: what an ordinary step launches is recorded once and launched again without Python.

A step in which a basis changes, or coordinates are merged every few steps, runs as it is; the next ordinary one is recorded
anew, since it uses other bases. So the cost of a capture, about that of one step, is paid once a period.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, final

import torch
from torch import Tensor

from lingrad import parallel
from lingrad.engine.arithmetic import unfit_rate
from lingrad.engine.refresh import schedule
from lingrad.engine.run import Run
from lingrad.errors import ModeError, SpecError
from lingrad.subspaces.watched import is_touched, settle


class Recorder(Protocol):
    """Records what a function launches."""

    def __call__(self, body: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Run a function, recording instead of launching.

        Args:
            body: The function.

        Returns:
            What it returned, and a function that launches what was recorded.
        """


def on_cuda(body: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """`Recorder` by ``torch.cuda.CUDAGraph``."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = body()
    return result, graph.replay


@final
class CapturedStep:
    """A step that is launched from a graph where no basis changes in it; call it for each step.

    Args:
        run: The run.
        body: One whole step; see `lingrad.engine.optimizer.SubspaceOptimizer.capture`.
        warmup: Ordinary steps that run as they are before one is recorded.
        record: How to record.

    Attributes:
        replays: Steps that were launched from a graph.
        captures: Graphs that were recorded.
    """

    def __init__(self, run: Run, body: Callable[[], Any], *, warmup: int, record: Recorder = on_cuda) -> None:
        _check(run)
        if record is on_cuda and any(not param.is_cuda for group in run.groups for param in group["params"]):
            raise ModeError("opt.capture records a CUDA graph, and this model is not on a CUDA device; step it as it is")
        self._run, self._body, self._warmup, self._record = run, body, warmup, record
        self._result: Any = None
        self._replay: Callable[[], None] | None = None
        self._seen: tuple[Any, ...] = ()  # what the graph has frozen
        self.replays = 0
        self.captures = 0

    def __call__(self) -> Any:
        """One step.

        Returns:
            What the body returned; tensors of a graph are the same ones at each of its steps.

        Raises:
            ModeError: The body made no step, or several; the run was detached.
            SpecError: The base optimizer counts its steps in Python.
        """
        run = self._run
        run.require_attached()
        if not self._ordinary():
            self._replay = self._result = None
            return self._checked(self._body)
        if self._warmup > 0:
            self._warmup -= 1
            return self._checked(self._body)
        changed = self._replay is not None and self._seen != _frozen(run)
        # looking ahead to a change of a basis is no part of a graph, and a graph for one step is not worth it
        last = self._replay is None and run.step + 1 >= run.quiet_until
        if changed or last:
            self._replay = self._result = None
            return self._checked(self._body)
        if self._replay is None:
            _check_state(run)
            self._seen = _frozen(run)
            self._result, self._replay = self._checked(lambda: self._record(self._body))
            self.captures += 1
            self._launch(self._replay)  # what was recorded was not launched
            return self._result
        self._launch(self._replay)
        self.replays += 1
        run.step += 1
        if not run.is_quiet:
            with torch.no_grad():
                schedule(run)
        return self._result

    def _launch(self, replay: Callable[[], None]) -> None:
        replay()
        for attachment in self._run.attachments:  # which decays the weights
            settle(attachment.sub.weight.param)

    def _ordinary(self) -> bool:
        every = self._run.settings.merge_every
        return self._run.is_quiet and (every is None or (self._run.step + 1) % every != 0)

    def _checked(self, body: Callable[[], Any]) -> Any:
        before = self._run.step
        result = body()
        if self._run.step != before + 1:
            raise ModeError(
                f"the function given to opt.capture made {self._run.step - before} steps; it must call opt.step() once: "
                "zero_grad, forward, backward, step"
            )
        return result


def _check(run: Run) -> None:
    """Refuse what a graph would leave out or freeze."""
    settings = run.settings
    followed = {"layerwise": settings.layerwise, "ledger": settings.ledger, "compat": settings.compat is not None}
    followed |= {"residual": settings.residual is not None, "rounding": settings.rounding != "nearest"}
    followed |= {"offload": settings.offload is not None}
    for option in (option for option, given in followed.items() if given):
        raise SpecError(f"'{option}' is followed in Python at each step, which a graph leaves out; leave it out", option=option)
    if not all(basis.transform.stores_map for basis in run.bases):
        raise SpecError("a basis with store=false is drawn at each use, which a graph cannot do; leave it out", option="store")
    if parallel.initialized():
        raise ModeError("capture is for one process: the averages of torch.distributed were not tried in a graph")
    if run.settings.rounds is not None:
        raise ModeError("a graph cannot wait for other workers; leave capture out of a run with rounds")
    group, option = unfit_rate(run.groups, lambda group: getattr(group["lr"], "device", None) == group["params"][0].device)
    if group is not None:
        device = group["params"][0].device
        kind = "tensor on another device" if isinstance(group["lr"], Tensor) else "number"
        raise SpecError(
            f"the learning rate of group '{group['name']}' is a {kind}, "
            f"which a graph would freeze; make the optimizer with a tensor: {option}=torch.tensor(1e-3, device='{device}')",
            option=option,
        )


def _frozen(run: Run) -> tuple[Any, ...]:
    """What a graph would not follow: options of the param groups, and the memory of weights, coordinates, bases and moments."""
    options = [
        (key, id(value) if isinstance(value, Tensor | list) else value) for group in run.groups for key, value in group.items()
    ]
    trained = [(param.data_ptr(), param.requires_grad) for group in run.groups for param in group["params"]]
    found = [(one.sub, one.sub.weight.param) for one in run.attachments]
    weights = [(param.data_ptr(), sub.released, is_touched(param)) for sub, param in found]
    held = [id(tensor) for basis in run.bases for tensor in basis.tensors()]
    moments = [id(value) for entries in run.stepper.state.values() for value in entries.values()]
    return run.mode, options, trained, weights, held, moments


def _check_state(run: Run) -> None:
    """Make sure that the base optimizers keep nothing in Python that changes at each step."""
    for entries in run.stepper.state.values():
        counters = [key for key, value in entries.items() if isinstance(value, int | float) and not isinstance(value, bool)]
        if counters:
            raise SpecError(
                f"base '{run.stepper.base.name}' counts '{counters[0]}' in Python, which a graph would freeze; use one that "
                "keeps it in a tensor, such as adamw with capturable=True"
            )
