"""Running a few training steps to see where their memory goes: on meta tensors, or for real."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lingrad.config.rules import Rules
from lingrad.config.settings import Mode
from lingrad.errors import MemoryModelError, require, require_one_of
from lingrad.memory import kernels
from lingrad.memory.devices import allocator_of
from lingrad.memory.log import END_OF_STEP
from lingrad.memory.report import MemoryReport, summarize
from lingrad.memory.tracker import Tracker
from lingrad.methods import Lingrad, Method, Training
from lingrad.optimizers.base import BaseLike

Build = Callable[[], nn.Module]
Loss = Callable[[nn.Module], Tensor]
Device = Literal["cuda", "cpu"]

CUBLAS = (2**25, 2**25)  # its workspaces on Hopper, for the forward's and the backward's thread; smaller elsewhere


def simulate(
    build: Build,
    method: Method | Rules,
    base: BaseLike = "adamw",
    mode: Mode = "optimizer",
    *,
    batch: int = 1,
    length: int = 256,
    loss: Loss | None = None,
    dtype: torch.dtype | None = None,
    checkpointing: bool = False,
    layerwise: bool = False,
    steps: int = 2,
    device: Device = "cuda",
    attention: kernels.Attention = "flash",
    capacity: int | None = None,
    expandable: bool = False,
    **options: Any,
) -> MemoryReport:
    """Run the real training steps of a model on meta tensors, which take no memory, and report what they would take.

    The model's own class, autograd, every hook and the real optimizer run, on operators as a device would choose them; the
    log of what is made and freed is replayed through a model of CUDA's caching allocator.

    Args:
        build: Makes the model; called with the meta device as default.
        method: A spec or rules for lingrad, or another `Method`.
        base: The base optimizer, with a spec or rules.
        mode: The mode, with a spec or rules.
        batch: Rows of a batch.
        length: Tokens in a row.
        loss: Computes the loss of the model; by default its own, of token ids [batch, length].
        dtype: What the model is cast to; None leaves it.
        checkpointing: Recompute each layer in the backward (transformers' ``gradient_checkpointing_enable``).
        layerwise: Step each parameter inside the backward and free its gradient.
        steps: Steps to run; the first refreshes every basis, the second is an ordinary one.
        device: Whose choices to follow.
        attention: The attention kernel on CUDA.
        capacity: Memory of the device in bytes, for a verdict.
        expandable: Model ``expandable_segments:True`` of CUDA's allocator.
        **options: With a spec or rules, options of the base and of `lingrad.wrap`.

    Returns:
        The report.

    Raises:
        MemoryModelError: Something cannot be known without numbers: autocast, an integer that is read back, an operator or
            module without a meta implementation.
    """
    _check(build, batch, length, steps, dtype)
    require_one_of(device, ("cuda", "cpu"), "device")
    require_one_of(attention, get_args(kernels.Attention), "attention")
    require(capacity is None or type(capacity) is int, "capacity", f"capacity is a number of bytes, not {capacity!r}")
    noted: set[str] = set()
    chosen = _method(method, base, mode, options)
    with torch.device("meta"):
        model = _cast(build(), dtype)
    strays = [name for name, tensor in model.named_parameters() if not tensor.is_meta]
    if strays:
        raise MemoryModelError(
            f"'{strays[0]}' was made on {model.get_parameter(strays[0]).device}, not on the meta device: the model's own code "
            "names a device. Build it so that the default device holds"
        )
    choices = kernels.as_on_cuda(attention, noted) if device == "cuda" else kernels.as_on_cpu(noted)
    with choices, kernels.without_autocast():
        execute = kernels.answered(noted)
        with Tracker("meta", execute):  # for its answers
            training = chosen.prepare(_checkpointed(model, checkpointing), layerwise=layerwise)
        tracker = Tracker("meta", execute)
        with kernels.explained(type(model).__name__):
            _run(training, tracker, steps, _loss(loss, batch, length, torch.device("meta")))
    assumed = [
        f"{steps} steps of {training.model.__class__.__name__} on meta tensors, operators as on {device}",
        *sorted(noted),
        "workspaces inside kernels (SVD, sorting) are not counted",
    ]
    if device == "cuda":
        assumed.append("what the allocator takes has cuBLAS's workspaces on Hopper, 32 MiB for each of two threads")
    return summarize(
        tracker.log,
        source="simulated",
        device=device,
        capacity=capacity,
        expandable=expandable,
        allocator=device == "cuda",
        preload=CUBLAS if device == "cuda" else (),
        assumptions=assumed,
    )


def measure(
    build: Build,
    method: Method | Rules,
    base: BaseLike = "adamw",
    mode: Mode = "optimizer",
    *,
    batch: int = 1,
    length: int = 256,
    loss: Loss | None = None,
    dtype: torch.dtype | None = None,
    checkpointing: bool = False,
    layerwise: bool = False,
    steps: int = 2,
    device: Device | None = None,
    **options: Any,
) -> MemoryReport:
    """Run the same training steps for real, and report what they take.

    The peak is the device's own: of CUDA's allocator (``torch.cuda.memory_stats``), or of the CPU's allocator events as
    torch's profiler records them. What it has beyond the tensors that were tracked is in the category ``untracked``.

    Args:
        build: Makes the model; called with the device as default. It is trained, and thrown away.
        method: As for `simulate`.
        base: As for `simulate`.
        mode: As for `simulate`.
        batch: As for `simulate`.
        length: As for `simulate`.
        loss: As for `simulate`.
        dtype: As for `simulate`.
        checkpointing: As for `simulate`.
        layerwise: As for `simulate`.
        steps: As for `simulate`.
        device: Where; None is CUDA where there is one, else the CPU.
        **options: As for `simulate`.

    Returns:
        The report. Raises `MemoryModelError` where CUDA is asked for and there is none.
    """
    _check(build, batch, length, steps, dtype)
    allocator = allocator_of(device)
    place = torch.device(allocator.device)
    chosen = _method(method, base, mode, options)
    tracker = Tracker(allocator.device)
    ask = _loss(loss, batch, length, place)

    def prepare() -> Training:
        with place:
            model = _cast(build(), dtype)
        return chosen.prepare(_checkpointed(model, checkpointing), layerwise=layerwise)

    found = allocator.peak_of(prepare, lambda training: _run(training, tracker, steps, ask))
    return allocator.report(tracker.log, found)


def _run(training: Training, tracker: Tracker, steps: int, loss: Loss) -> None:
    try:
        with tracker.watch(training.model, *training.optimizers):
            for _ in range(steps):
                value = loss(training.model)
                value.backward()
                del value
                training.step()
                tracker.label()
                tracker.log.mark(END_OF_STEP)
                training.zero_grad()
    finally:
        training.close()


def _check(build: Build, batch: int, length: int, steps: int, dtype: torch.dtype | None) -> None:
    made = isinstance(build, nn.Module) or not callable(build)
    expected = "expected a function that makes the model, such as lambda: MyModel(config), since it is trained and thrown away"
    require(not made, "build", f"{expected}; not a {type(build).__name__}")
    for option, value in (("batch", batch), ("length", length), ("steps", steps)):
        require(type(value) is int and value >= 1, option, f"{option} must be a whole number, 1 or more, not {value!r}")
    require(dtype is None or isinstance(dtype, torch.dtype), "dtype", f"dtype must be a torch.dtype, not {dtype!r}")


def _method(method: Method | Rules, base: BaseLike, mode: Mode, options: dict[str, Any]) -> Method:
    if not isinstance(method, Method):
        return Lingrad(method, base, mode, {"lr": 1e-4, **options})
    given = [name for name, value, default in (("base", base, "adamw"), ("mode", mode, "optimizer")) if value != default]
    if given or options:
        raise TypeError(f"{', '.join([*given, *options])} belongs into the method itself: {type(method).__name__}(...)")
    return method


def _cast(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    return model if dtype is None else model.to(dtype)


def _checkpointed(model: nn.Module, checkpointing: bool) -> nn.Module:
    model.train()
    config: Any = getattr(model, "config", None)
    if config is not None:
        config.use_cache = False
    if checkpointing:
        renamed = getattr(model, "activation_checkpointing_enable", None)  # its newer name
        enable: Any = renamed or getattr(model, "gradient_checkpointing_enable", None)
        if enable is None:
            raise MemoryModelError(
                f"{type(model).__name__} has no gradient_checkpointing_enable(); checkpoint its layers where it is built"
            )
        enable({"use_reentrant": False})
    return model


def _loss(loss: Loss | None, batch: int, length: int, device: torch.device) -> Loss:
    if loss is not None:
        return loss

    def own(model: nn.Module) -> Tensor:
        vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
        if vocabulary is None:
            raise MemoryModelError(f"{type(model).__name__} has no config.vocab_size; say how its loss is computed: loss=...")
        ids = torch.randint(vocabulary, (batch, length), device=device)
        try:
            value: Tensor = model(input_ids=ids, labels=ids).loss
        except (AttributeError, ValueError) as error:
            raise MemoryModelError(
                f"{type(model).__name__} is no causal language model: its loss of token ids as their own labels failed with "
                f"'{error}'. Say how its loss is computed: loss=..."
            ) from error
        return value

    return own
