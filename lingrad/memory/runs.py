"""Run a few training steps and report their memory: on meta tensors (`simulate`) or on a device (`measure`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lingrad.config.rules import Rules
from lingrad.config.settings import InBackward, Mode
from lingrad.deprecated import renamed_keywords
from lingrad.errors import MemoryModelError, ModeError, require, require_one_of
from lingrad.memory import kernels
from lingrad.memory.devices import allocator_of
from lingrad.memory.inputs import OwnLoss
from lingrad.memory.log import END_OF_STEP
from lingrad.memory.report import MemoryReport, summarize
from lingrad.memory.shards import first_of
from lingrad.memory.tracker import Tracker
from lingrad.methods import FullRank, Lingrad, Method, Training
from lingrad.optimizers.base import BaseLike

Build = Callable[[], nn.Module]
Loss = Callable[[nn.Module], Tensor]
Device = Literal["cuda", "cpu"]

# workspaces of cuBLAS on Hopper, one for the forward's thread and one for the backward's; smaller on other devices
CUBLAS = (2**25, 2**25)


@renamed_keywords("lingrad.memory.simulate", method="rules")
def simulate(
    build: Build,
    rules: Rules | Method,
    base: BaseLike | None = None,
    mode: Mode = "optimizer",
    *,
    batch: int = 1,
    length: int = 256,
    loss: Loss | None = None,
    dtype: torch.dtype | None = None,
    checkpointing: bool = False,
    layerwise: InBackward = False,
    steps: int = 2,
    device: Device = "cuda",
    attention: kernels.Attention = "flash",
    capacity: int | None = None,
    context: int = 0,
    expandable: bool = False,
    ranks: int = 1,
    **options: Any,
) -> MemoryReport:
    """Run real training steps on meta tensors, which take no memory, and report the memory they would take.

    The model's own class, autograd, every hook and the real optimizer run, with the operators that the device would use. The
    log of allocations and frees is replayed through a model of CUDA's caching allocator.

    Args:
        build: Builds the model; called with the meta device as default device.
        rules: A config string or rules for lingrad, or another `Method`.
        base: The base optimizer; None is that of a method, or AdamW; not with a `Method`.
        mode: ``optimizer`` or ``adapter``; not with a `Method`.
        batch: Rows of a batch.
        length: Tokens of a row.
        loss: Computes the loss of the model; by default the loss that a model of transformers computes itself, on random inputs
            of what it reads (token ids [batch, length], images, sound), or, if it computes none, the mean of its first output.
        dtype: The dtype to cast the model to; None leaves it as it is.
        checkpointing: Recompute each layer in the backward (transformers' ``gradient_checkpointing_enable``).
        layerwise: Step each parameter inside the backward and free its gradient; or see `lingrad.wrap`.
        steps: Steps to run; the first refreshes every basis, the second is an ordinary step.
        device: The device to simulate, ``cuda`` or ``cpu``.
        attention: The attention kernel on CUDA: ``flash``, ``efficient`` or ``math``.
        capacity: Memory of the device in bytes; the report then says whether the run fits.
        context: Bytes of ``capacity`` that the CUDA context takes, some hundred million; the command line assumes 512 MiB.
        expandable: Model ``expandable_segments:True`` of CUDA's allocator.
        ranks: Processes over which ``fully_shard`` cuts every weight, each with such a batch; the report is that of the first.
        **options: Options of the base and of `lingrad.wrap`; not with a `Method`.

    Returns:
        The report.

    Raises:
        MemoryModelError: Something depends on the values of tensors: autocast, an integer that is read back, an operator or
            a module without a meta implementation.
        ModeError: Several processes are asked for, and this is one of several already, or the method is not lingrad's.
    """
    _check(build, batch, length, steps, dtype)
    require(type(ranks) is int and ranks >= 1, "ranks", f"ranks must be a whole number, 1 or more, not {ranks!r}")
    require_one_of(device, ("cuda", "cpu"), "device")
    require_one_of(attention, get_args(kernels.Attention), "attention")
    for option, value in (("capacity", 0 if capacity is None else capacity), ("context", context)):
        require(type(value) is int and value >= 0, option, f"{option} must be a number of bytes, not {value!r}")
    assumed: set[str] = set()
    method = _method(rules, base, mode, options)
    if ranks > 1 and not isinstance(method, (Lingrad, FullRank)):
        raise ModeError(f"{method.label} is simulated for one process only; leave ranks={ranks} out")
    with torch.device("meta"):
        model = _cast(build(), dtype)
    strays = [name for name, tensor in model.named_parameters() if not tensor.is_meta]
    if strays:
        device_of = model.get_parameter(strays[0]).device
        raise MemoryModelError(
            f"'{strays[0]}' was built on {device_of}, not on the meta device: the model's code names a device; build it on the "
            "default device"
        )
    compute_loss = OwnLoss(batch, length) if loss is None else loss
    choices = kernels.as_on_cuda(attention, assumed) if device == "cuda" else kernels.as_on_cpu(assumed)
    with choices, kernels.without_autocast(), first_of(ranks, assumed) as shard:
        execute = kernels.answered(assumed)
        with Tracker("meta", execute):  # only to answer what the preparation reads back
            if isinstance(compute_loss, OwnLoss):
                compute_loss.prepare(model)
            training = method.prepare(shard(_checkpointed(model, checkpointing)), layerwise=layerwise)
        tracker = Tracker("meta", execute)
        with kernels.explained(type(model).__name__), kernels.norms_answered(assumed):
            _run(training, tracker, steps, compute_loss)
    assumptions = [
        f"{steps} steps of {type(model).__name__.removeprefix('FSDP')} on meta tensors, operators as on {device}",
        *sorted(assumed),
        "workspaces inside kernels (SVD, sorting) are not counted",
    ]
    if device == "cuda":
        assumptions.append("the allocator's figures include cuBLAS's workspaces on Hopper, 32 MiB for each of two threads")
    return summarize(
        tracker.log,
        source="simulated",
        device=device,
        capacity=capacity,
        context=context,
        expandable=expandable,
        allocator=device == "cuda",
        preload=CUBLAS if device == "cuda" else (),
        assumptions=assumptions,
    )


@renamed_keywords("lingrad.memory.measure", method="rules")
def measure(
    build: Build,
    rules: Rules | Method,
    base: BaseLike | None = None,
    mode: Mode = "optimizer",
    *,
    batch: int = 1,
    length: int = 256,
    loss: Loss | None = None,
    dtype: torch.dtype | None = None,
    checkpointing: bool = False,
    layerwise: InBackward = False,
    steps: int = 2,
    device: Device | None = None,
    **options: Any,
) -> MemoryReport:
    """Run the same training steps on a device, and report the memory they take.

    The peak is measured by the device's allocator: by CUDA's counters (``torch.cuda.memory_stats``), or on the CPU by the
    allocation events of torch's profiler. What it holds beyond the tracked tensors is in the category ``untracked``.

    Args:
        build: Builds the model; called with the device as default device. The model is trained and discarded.
        rules: As for `simulate`.
        base: As for `simulate`.
        mode: As for `simulate`.
        batch: As for `simulate`.
        length: As for `simulate`.
        loss: As for `simulate`.
        dtype: As for `simulate`.
        checkpointing: As for `simulate`.
        layerwise: As for `simulate`.
        steps: As for `simulate`.
        device: ``cuda`` or ``cpu``; None is CUDA if there is a device, else the CPU.
        **options: As for `simulate`.

    Returns:
        The report. Raises `MemoryModelError` if CUDA is requested and there is no device.
    """
    _check(build, batch, length, steps, dtype)
    allocator = allocator_of(device)
    target = torch.device(allocator.device)
    method = _method(rules, base, mode, options)
    tracker = Tracker(allocator.device)
    compute_loss = OwnLoss(batch, length) if loss is None else loss

    def prepare() -> Training:
        with target:
            model = _cast(build(), dtype)
            if isinstance(compute_loss, OwnLoss):
                compute_loss.prepare(model)
        return method.prepare(_checkpointed(model, checkpointing), layerwise=layerwise)

    measured = allocator.peak_of(prepare, lambda training: _run(training, tracker, steps, compute_loss))
    return allocator.report(tracker.log, measured)


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
    callable_ = callable(build) and not isinstance(build, nn.Module)
    expected = "build must be a function that builds the model, such as lambda: MyModel(config); the model is discarded after"
    require(callable_, "build", f"{expected} the run. Got a {type(build).__name__}")
    for option, value in (("batch", batch), ("length", length), ("steps", steps)):
        require(type(value) is int and value >= 1, option, f"{option} must be a whole number, 1 or more, not {value!r}")
    require(dtype is None or isinstance(dtype, torch.dtype), "dtype", f"dtype must be a torch.dtype, not {dtype!r}")


def _method(rules: Rules | Method, base: BaseLike | None, mode: Mode, options: dict[str, Any]) -> Method:
    if not isinstance(rules, Method):
        return Lingrad(rules, base, mode, {"lr": 1e-4, **options})
    given = [name for name, value, default in (("base", base, None), ("mode", mode, "optimizer")) if value != default]
    if given or options:
        name = type(rules).__name__
        raise TypeError(f"{', '.join([*given, *options])} must be given to the method itself: {name}(...)")
    return rules


def _cast(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    return model if dtype is None else model.to(dtype)


def _checkpointed(model: nn.Module, checkpointing: bool) -> nn.Module:
    model.train()
    config: Any = getattr(model, "config", None)
    if config is not None:
        config.use_cache = False
    if checkpointing:
        newer = getattr(model, "activation_checkpointing_enable", None)  # its name in newer releases
        enable: Any = newer or getattr(model, "gradient_checkpointing_enable", None)
        if enable is None:
            raise MemoryModelError(
                f"{type(model).__name__} has no gradient_checkpointing_enable(); checkpoint its layers in build instead"
            )
        enable({"use_reentrant": False})
    return model
