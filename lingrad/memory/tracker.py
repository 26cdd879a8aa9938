"""Following every storage of a run, real or on the meta device, by one dispatch mode.

A storage is noted when an operator returns or reads it for the first time, and freed when its last tensor goes. Nothing is
timed, no module is wrapped and no tensor is kept alive; hooks and the mode are gone when the context is left.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from lingrad.errors import MemoryModelError, ModeError
from lingrad.memory import labels
from lingrad.memory.log import BACKWARD, BEFORE, END_OF_STEP, FORWARD, RECOMPUTE, STEP, Log, Storage
from lingrad.memory.report import MemoryReport, summarize

Execute = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


class Tracker(TorchDispatchMode):
    """A dispatch mode that fills a `Log` while it is active.

    Args:
        device: The device whose storages count, by type: ``cpu``, ``cuda`` or ``meta``.
        execute: Runs an operator; by default it is called as it is.

    Attributes:
        log: What happened so far.
        operators: How many operators ran.
    """

    def __init__(self, device: str, execute: Execute | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.log = Log()
        self.operators = 0
        self._execute = execute
        self._live: dict[int, tuple[Storage, weakref.ref[Any]]] = {}
        self._models: list[nn.Module] = []
        self._optimizers: list[Optimizer] = []
        self._hooks: list[Any] = []
        self._hooked: set[int] = set()
        self._coords: set[int] = set()
        self._steps = 0  # optimizers whose step is running, one inside the other
        self._active = self._entered = False

    def watch(self, *watched: nn.Module | Optimizer | Tensor) -> Tracker:
        """Say what is there already, and whose tensors are to be labelled.

        Args:
            *watched: Models, optimizers, and tensors that are inputs.

        Returns:
            The tracker.
        """
        for item in watched:
            if isinstance(item, nn.Module):
                self._models.append(item)
            elif isinstance(item, Optimizer):
                self._optimizers.append(item)
            else:
                self._label(item, "input", new=not self._active)
        self.label(new=not self._active)
        if self._active:
            self._hook_gradients()
        return self

    def label(self, *, new: bool = False) -> None:
        """Label what models and optimizers hold now; of an optimizer, this is done by itself before and after each step.

        Args:
            new: Note storages not seen yet as having been there before the log began.
        """
        for tensor, category in labels.kept(self._models, self._optimizers):
            self._label(tensor, category, new=new)

    def report(self) -> MemoryReport:
        """Where the memory went so far."""
        if self.device == "meta":
            raise MemoryModelError("what ran on the meta device took no memory; use lingrad.memory.simulate")
        return summarize(self.log, source="tracked", device=self.device)

    @property
    def phase(self) -> str:
        """What the run is doing."""
        if self._steps:
            return STEP
        if torch._C._current_graph_task_id() != -1:
            return RECOMPUTE if torch.is_grad_enabled() or _checkpoint_recomputes() else BACKWARD
        return FORWARD

    @override
    def __enter__(self) -> Tracker:
        if self._entered:
            raise ModeError("a tracker follows one stretch of a program; make another one for the next")
        self._active = self._entered = True
        self._hooks += [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]
        self._hook_gradients()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    @override
    def __exit__(self, *exception: Any) -> Any:
        self._active, self._steps = False, 0
        while self._hooks:
            self._hooks.pop().remove()
        self._hooked.clear()
        return super().__exit__(*exception)  # type: ignore[no-untyped-call]

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = ""
        for tensor in _tensors((args, kwargs)):
            self._note(tensor, name)
        out = func(*args, **kwargs) if self._execute is None else self._execute(func, args, kwargs)
        self.operators += 1
        name = str(func)
        for tensor in _tensors(out):
            self._note(tensor, name)
        return out

    def _note(self, tensor: Tensor, op: str) -> None:
        for part in _strided(tensor):
            storage = part.untyped_storage()
            known = self._live.get(storage._cdata)
            if known is None:
                self._follow(storage, part, self.phase, op)
            elif known[0].nbytes != storage.nbytes():
                self.log.resize(known[0], storage.nbytes(), self.phase)

    def _label(self, tensor: Tensor, category: str, *, new: bool) -> None:
        for part in _strided(tensor):
            storage = part.untyped_storage()
            known = self._live.get(storage._cdata)
            if known is not None:
                known[0].label = category
            elif new or part.device.type == self.device:
                self._follow(storage, part, BEFORE if new else self.phase, "", category)

    def _follow(self, storage: Any, tensor: Tensor, phase: str, op: str, label: str | None = None) -> None:
        nbytes = storage.nbytes()
        if nbytes == 0 or tensor.device.type != self.device:
            return
        noted = self.log.add(nbytes, phase, op, label)
        key, live, this = storage._cdata, self._live, weakref.ref(self)

        def gone(_: Any) -> None:
            live.pop(key, None)
            tracker = this()
            if tracker is not None and tracker._active:
                tracker.log.free(noted, tracker.phase)

        self._live[key] = (noted, weakref.ref(storage, gone))

    def _hook_gradients(self) -> None:
        for param, category in labels.gradients_of(self._models, self._optimizers):
            if category == "coords gradient":
                self._coords.add(id(param))
            if id(param) in self._hooked or not param.requires_grad:
                continue
            self._hooked.add(id(param))

            def arriving(grad: Tensor, category: str = category) -> None:
                self._label(grad, category, new=False)

            def arrived(param: Tensor, category: str = category) -> None:
                if param.grad is not None:
                    self._label(param.grad, category, new=False)

            self._hooks += [param.register_hook(arriving), param.register_post_accumulate_grad_hook(arrived)]

    def _before_step(self, optimizer: Any, *_: Any) -> None:
        self._label_of(optimizer)
        self._steps += 1

    def _after_step(self, optimizer: Any, *_: Any) -> None:
        self._steps = max(self._steps - 1, 0)
        self._label_of(optimizer)
        if self._steps == 0 and torch._C._current_graph_task_id() == -1:  # not a weight that is stepped inside the backward
            self.log.mark(END_OF_STEP)

    def _label_of(self, optimizer: Optimizer) -> None:
        for tensor, category in labels.kept_by(optimizer, self._coords):
            self._label(tensor, category, new=False)


def track(*watched: nn.Module | Optimizer | Tensor, device: str | None = None) -> Tracker:
    """Follow the memory of any training loop.

    Use it as ``with memory.track(model, optimizer) as tracked: ...`` round the loop, and ``tracked.report()`` after it.

    Args:
        *watched: The model, its optimizers, and tensors that are there before; what they hold is told apart in the report.
        device: The device whose memory counts; None is that of the first parameter or tensor watched.

    Returns:
        A context manager.

    Raises:
        MemoryModelError: CUDA is asked for and there is none.
    """
    if device is None:
        first = next((tensor for tensor, _ in _all(watched)), None)
        device = "cpu" if first is None else first.device.type
    if device == "cuda" and not torch.cuda.is_available():
        raise MemoryModelError("there is no CUDA device to track (torch.cuda.is_available() is false)")
    return Tracker(torch.device(device).type).watch(*watched)


def _all(watched: Iterable[nn.Module | Optimizer | Tensor]) -> Iterator[tuple[Tensor, str]]:
    for item in watched:
        if isinstance(item, Tensor):
            yield item, "input"
        else:
            yield from labels.kept([item] if isinstance(item, nn.Module) else [], [] if isinstance(item, nn.Module) else [item])


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
        return
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf


def _strided(tensor: Any) -> Iterable[Tensor]:
    """The plain tensors that hold a tensor's numbers."""
    if is_traceable_wrapper_subclass(tensor):
        parts, _ = tensor.__tensor_flatten__()
        return (inner for part in parts for inner in _strided(getattr(tensor, part)))
    if tensor.is_sparse:
        return (tensor._indices(), tensor._values())
    return (tensor,) if tensor.layout is torch.strided else ()


def _checkpoint_recomputes() -> bool:
    """Whether a checkpoint's forward runs again: inside an autograd function of it gradients are off, as in a backward."""
    find = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    hooks = None if find is None else find(False)
    return hooks is not None and hooks[0].__qualname__.startswith("_recomputation_hook")
