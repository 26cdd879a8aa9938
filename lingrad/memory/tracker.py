"""Track every storage of a run, on a real or the meta device, with one dispatch mode.

A storage is recorded when an operator first returns or reads it, and freed when its last tensor is. Nothing is timed, no
module is wrapped and no tensor is kept alive. The mode and its hooks are removed when the context is left.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

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
from lingrad.tensors import is_sharded, on_host, own

Execute = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


class Tracker(TorchDispatchMode):
    """A dispatch mode that fills a `Log` while it is active.

    Args:
        device: The type of the device whose storages count: ``cpu``, ``cuda`` or ``meta``.
        execute: Runs an operator, given (operator, args, kwargs); by default the operator is called.

    Attributes:
        log: The log so far.
        operators: How many operators ran.
    """

    def __init__(self, device: str, execute: Execute | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.log = Log(host=Log())
        self.operators = 0
        self._execute = execute
        self._live: dict[int, tuple[Storage, weakref.ref[Any]]] = {}
        self._models: list[nn.Module] = []
        self._optimizers: list[Optimizer] = []
        self._hooks: list[Any] = []
        self._hooked: set[int] = set()
        self._coords: set[int] = set()
        self._steps = 0  # optimizer steps that are running, nested
        self._active = self._entered = False
        resize = torch.UntypedStorage.resize_

        def follow(storage: Any, size: int) -> Any:
            found = resize(storage, size)
            self._resized(storage)
            return found

        self._resizing = mock.patch.object(torch.UntypedStorage, "resize_", follow)

    def watch(self, *watched: nn.Module | Optimizer | Tensor) -> Tracker:
        """Record what exists already, and label the tensors of models and optimizers from now on.

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
        """Label what models and optimizers store now. For optimizers this happens before and after each step anyway.

        Args:
            new: Record storages that are not known yet as older than the log.
        """
        for tensor, category in labels.persistent(self._models, self._optimizers):
            self._label(tensor, category, new=new)

    def report(self) -> MemoryReport:
        """The report of the run so far. Raises `MemoryModelError` on the meta device."""
        if self.device == "meta":
            raise MemoryModelError("a run on the meta device takes no memory; use lingrad.memory.simulate")
        return summarize(self.log, source="tracked", device=self.device)

    @property
    def phase(self) -> str:
        """The phase of the run: ``forward``, ``backward``, ``recompute`` or ``step``."""
        if self._steps:
            return STEP
        if torch._C._current_graph_task_id() != -1:
            return RECOMPUTE if torch.is_grad_enabled() or _checkpoint_recomputes() else BACKWARD
        return FORWARD

    @override
    def __enter__(self) -> Tracker:
        if self._entered:
            raise ModeError("a tracker can be entered once; make a new one with lingrad.memory.track")
        self._active = self._entered = True
        self._hooks += [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]
        self._hook_gradients()
        self._resizing.start()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    @override
    def __exit__(self, *exception: Any) -> Any:
        self._active, self._steps = False, 0
        self._resizing.stop()
        while self._hooks:
            self._hooks.pop().remove()
        self._hooked.clear()
        return super().__exit__(*exception)  # type: ignore[no-untyped-call]

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(is_sharded(tensor) for tensor in _tensors((args, kwargs))):
            return NotImplemented  # the operators of its part come here in turn
        kwargs = kwargs or {}
        name = ""
        for tensor in _tensors((args, kwargs)):
            self._record(tensor, name)
        out = func(*args, **kwargs) if self._execute is None else self._execute(func, args, kwargs)
        self.operators += 1
        name = str(func)
        for tensor in _tensors(out):
            self._record(tensor, name)
        return out

    def _record(self, tensor: Tensor, op: str) -> None:
        for part in _strided(tensor):
            storage = part.untyped_storage()
            known = self._live.get(storage._cdata)
            if known is None:
                self._follow(storage, part, self.phase, op)
            elif known[0].nbytes != storage.nbytes():
                self.log.resize(known[0], storage.nbytes(), self.phase)

    def _resized(self, storage: Any) -> None:
        """A storage was resized behind its tensors, as ``fully_shard`` does with the weights that it gathers."""
        known = self._live.get(storage._cdata)
        if known is not None and known[0].nbytes != storage.nbytes():
            known[0].label = known[0].label or "gathered"
            self.log.resize(known[0], storage.nbytes(), self.phase)

    def _label(self, tensor: Tensor, category: str, *, new: bool) -> None:
        for part in _strided(tensor):
            storage = part.untyped_storage()
            known = self._live.get(storage._cdata)
            if known is not None:
                known[0].label = category
            elif new or part.device.type == self.device or on_host(part):
                self._follow(storage, part, BEFORE if new else self.phase, "", category)

    def _follow(self, storage: Any, tensor: Tensor, phase: str, op: str, label: str | None = None) -> None:
        nbytes, host = storage.nbytes(), on_host(tensor)
        if nbytes == 0 or (tensor.device.type != self.device and not host):
            return
        log = self.log if not host or self.log.host is None else self.log.host
        recorded = log.add(nbytes, phase, op, label)
        key, live, this = storage._cdata, self._live, weakref.ref(self)

        def on_free(_: Any) -> None:
            live.pop(key, None)
            tracker = this()
            if tracker is not None and tracker._active:
                log.free(recorded, tracker.phase)

        self._live[key] = (recorded, weakref.ref(storage, on_free))

    def _hook_gradients(self) -> None:
        for param, category in labels.gradients_of(self._models, self._optimizers):
            if category == "coords gradient":
                self._coords.add(id(param))
            if id(param) in self._hooked or not param.requires_grad:
                continue
            self._hooked.add(id(param))

            def on_gradient(grad: Tensor, category: str = category) -> None:
                self._label(grad, category, new=False)

            def on_accumulated(param: Tensor, category: str = category) -> None:
                if param.grad is not None:
                    self._label(param.grad, category, new=False)

            self._hooks += [param.register_hook(on_gradient), param.register_post_accumulate_grad_hook(on_accumulated)]

    def _before_step(self, optimizer: Any, *_: Any) -> None:
        self._label_of(optimizer)
        self._steps += 1

    def _after_step(self, optimizer: Any, *_: Any) -> None:
        self._steps = max(self._steps - 1, 0)
        self._label_of(optimizer)
        if self._steps == 0 and torch._C._current_graph_task_id() == -1:  # not a layerwise step inside the backward
            self.log.mark(END_OF_STEP)

    def _label_of(self, optimizer: Optimizer) -> None:
        for tensor, category in labels.stored_by(optimizer, self._coords):
            self._label(tensor, category, new=False)


def track(*watched: nn.Module | Optimizer | Tensor, device: str | None = None) -> Tracker:
    """Track the memory of any training loop.

    Write ``with memory.track(model, optimizer) as tracked: ...`` around the loop, and ``tracked.report()`` after it.

    Args:
        *watched: The model, its optimizers, and input tensors; the report names the category of what they store.
        device: The device whose memory counts; None is that of the first parameter or tensor of ``watched``.

    Returns:
        A context manager.

    Raises:
        MemoryModelError: CUDA is requested and there is no device.
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
        elif isinstance(item, nn.Module):
            yield from labels.persistent([item], [])
        else:
            yield from labels.persistent([], [item])


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
        return
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf


def _strided(tensor: Any) -> Iterable[Tensor]:
    """The ordinary tensors that store a tensor's elements in this process."""
    tensor = own(tensor)
    if is_traceable_wrapper_subclass(tensor):
        parts, _ = tensor.__tensor_flatten__()
        return (inner for part in parts for inner in _strided(getattr(tensor, part)))
    if tensor.is_sparse:
        return (tensor._indices(), tensor._values())
    return (tensor,) if tensor.layout is torch.strided else ()


def _checkpoint_recomputes() -> bool:
    """Whether a checkpointed forward is being recomputed. Inside an autograd function, grad mode does not show it."""
    find = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    hooks = None if find is None else find(False)
    return hooks is not None and hooks[0].__qualname__.startswith("_recomputation_hook")
