"""What the duality requires of a base optimizer, tested by a dry run of a few steps.

Its update must read only gradients (Torroba-Hennigen et al., ICML 2025, arXiv 2502.13811, section 3).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lingrad.errors import DualityError, SpecError
from lingrad.optimizers.base import Base
from lingrad.optimizers.later import reads_later
from lingrad.optimizers.reads import ParameterReads

Shape = tuple[int, ...]

# A base may quantise tensors of 4096 elements or more, and leave smaller ones as they are.
SHAPE: Shape = (64, 64)
SMALL: Shape = (8, 8)
MATRICES: tuple[Shape, ...] = (SHAPE, SMALL)
VECTORS: tuple[Shape, ...] = ((16,),)
STEPS = 2  # the second is one that finds a state
MANY_STEPS = 12  # a base that looks back does so every 5 or 6 steps, or more seldom and with a copy that it keeps

# Classes that have read only gradients, with the options with which they did; a factory may be another the next time
_PASSED: WeakKeyDictionary[type, set[Any]] = WeakKeyDictionary()
_FIXED = {"params", "lr", "weight_decay", "fused", "foreach", "capturable"}  # in a dry run
_PLAIN = (bool, int, float, str, type(None))


class DryRun(NamedTuple):
    """A few steps of a base.

    Args:
        updates: Of every parameter, [steps, *its shape].
        state: The optimizer state of the first one.
        found: What reads a parameter; empty if nothing does, or if nothing was followed.
    """

    updates: list[Tensor]
    state: dict[str, Any]
    found: str = ""


def check_reads_only_gradients(base: Base) -> None:
    """Run a base on parameters that only its own steps change, and on others that are set to other values before each step.

    In the second run everything that reads the parameters is followed: they may be added to, and nothing else. For what cannot
    be seen, such as kernels of the base's own, the updates are compared: with equal gradients they must be equal, since adapter
    mode has the first kind of parameters, and optimizer mode, which merges after each step, the second. The learning rate is 1.

    Args:
        base: The base to test, on matrices of 4096 elements and of fewer, and on a vector if it steps vectors; in float64 if it
            supports that.

    Raises:
        DualityError: An update reads the parameter, so the two modes would differ.
        SpecError: The base cannot step on gradients alone.
    """
    if base.options.get("differentiable"):
        raise SpecError(
            "differentiable=True is not supported: steps are outside of autograd; leave it out", option="differentiable"
        )
    passed, key = _passed(base)
    if key in passed:
        return
    shapes, dtype, moved = first_run(base)
    try:
        placed = dry_run(base, shapes, dtype, placed=True, followed=True)
    except Exception:  # what no dispatch mode can follow may raise anything
        placed = dry_run(base, shapes, dtype, placed=True)
    why = placed.found
    why = why or _read_later(base, dtype)
    if not why:
        longer = [dry_run(base, [SMALL], dtype, steps=MANY_STEPS, placed=placed) for placed in (False, True)]
        same = map(_agree, moved.updates + longer[0].updates, placed.updates + longer[1].updates)
        why = (
            ""
            if all(same)
            else "with equal gradients it differs where the parameter does (a trust ratio, or a decay of its own)"
        )
    if why:
        raise DualityError(
            f"the update of base '{base.name}' reads the parameter, not only its gradient: {why}; so optimizer mode "
            "and adapter mode would differ. Switch that off in the base (weight decay is the engine's: weight_decay=...), or "
            "choose another base."
        )
    if key is not None:
        passed.add(key)


def _read_later(base: Base, dtype: torch.dtype) -> str:
    """What reads a parameter after many steps."""
    params = [nn.Parameter(_windows(torch.zeros(SMALL, dtype=dtype, device="cpu"), 1, seed=0)[0])]
    try:
        with (reads := ParameterReads(params)):
            # moments in 8 bits are put in the place of others around each step; the step is the same
            optimizer = base.unquantised.build_dry(params)
    except Exception:  # as above
        return ""
    return reads_later(optimizer, params, [_windows(param, 1, seed=1)[0] for param in params], reads)


def _passed(base: Base) -> tuple[set[Any], Any]:
    """The options with which the base's class has passed, and those of the base as one of these; None if they may change."""
    plain = all(
        isinstance(value, _PLAIN) for given in base.options.values() for value in (given if type(given) is tuple else [given])
    )
    if not plain or not isinstance(base.factory, type):
        return set(), None
    return _PASSED.setdefault(base.factory, set()), (base.quantizer, base.fallback is None, *sorted(base.options.items()))


def check_steps(base: Base, named: Iterable[tuple[str, Tensor]], *, capturable: bool) -> None:
    """Make sure that a base can step the parameters it is to step; one of each number of dimensions and each device is tried.

    Args:
        base: The base.
        named: The parameters with their names; those on the meta device are passed over.
        capturable: Whether its steps are to be recorded as CUDA graphs.

    Raises:
        SpecError: It cannot, and why.
    """
    tried: set[tuple[int, torch.device]] = set()
    for name, param in named:
        key = param.dim(), param.device
        if param.is_meta or key in tried:
            continue
        tried.add(key)
        if capturable and param.device.type == "cpu":
            raise SpecError(
                f"capturable=True is for parameters on a GPU, and {name} is on the CPU; move the model there before it is "
                "wrapped, or leave capturable out",
                option="capturable",
            )
        try:
            small = nn.Parameter(torch.zeros((4,) * param.dim(), dtype=param.dtype, device=param.device))
            small.grad = torch.ones_like(small) if small.dim() == 0 else _windows(small, 1, seed=1)[0]
            base.build([small]).step()
        except Exception as error:
            dims = "1 dimension" if param.dim() == 1 else f"{param.dim()} dimensions"
            raise SpecError(
                f"base '{base.name}' cannot step {name}, a parameter of {dims}: {error or type(error).__name__}. Freeze it "
                "(requires_grad=False), transform it by a rule, or choose another base"
            ) from error


def check_no_shared_state(base: Base, option: str = "layerwise=True") -> None:
    """Make sure that a base may step its parameters separately.

    Args:
        base: The base to test.
        option: The option that requires it, for the message.

    Raises:
        SpecError: A step changes its param group: a counter or a step size that all parameters share.
    """
    param = nn.Parameter(torch.zeros(SHAPE, device="cpu"))
    optimizer = base.build_dry([param])
    param.grad = _windows(param, 1, seed=1)[0].clone()
    before, name = _group_options(optimizer), option.partition("=")[0]
    optimizer.step()
    for key, value in _group_options(optimizer).items():
        if not _equal(value, before.get(key)):
            raise SpecError(
                f"{option} steps parameters separately, but base '{base.name}' has one '{key}' for all of them; "
                f"leave {name} out, or choose another base",
                option=name,
            )


def shared_entries(base: Base) -> set[str]:
    """The entries of a base's state that are one tensor for all parameters, such as a code book of bitsandbytes."""
    params = [nn.Parameter(torch.zeros(SHAPE, device="cpu")) for _ in range(2)]
    optimizer = base.build_dry(params)
    for param in params:
        param.grad = _windows(param, 1, seed=1)[0].clone()
    optimizer.step()
    one, other = (optimizer.state[param] for param in params)
    return {key for key, value in one.items() if isinstance(value, Tensor) and value is other.get(key)}


def _group_options(optimizer: Optimizer) -> dict[str, Any]:
    """The options of a param group, tensors copied."""
    group = optimizer.param_groups[0].items()
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in group if key != "params"}


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return bool(one == other)


def first_run(base: Base) -> tuple[Sequence[Shape], torch.dtype, DryRun]:
    """A dry run on what the base can step, where only its own steps change the parameters; they start at zero.

    Returns:
        The shapes and the dtype that it can step, and the run.

    Raises:
        SpecError: The base cannot step on gradients alone.
    """
    failure: Exception | None = None
    for shapes in [MATRICES] if base.fallback else [MATRICES + VECTORS, MATRICES]:
        for dtype in (torch.float64, torch.float32):
            try:
                return shapes, dtype, dry_run(base, shapes, dtype)
            except Exception as error:  # other code; bitsandbytes, for one, has no float64
                failure = error
    if isinstance(failure, SpecError):
        raise failure
    why = str(failure) or type(failure).__name__
    raise SpecError(f"base '{base.name}' cannot be used: its step(), without a closure, failed with: {why}") from failure


def dry_run(
    base: Base,
    shapes: Sequence[Shape],
    dtype: torch.dtype,
    *,
    steps: int = STEPS,
    factor: float = 1.0,
    placed: bool = False,
    followed: bool = False,
    constant: bool = False,
    group: Mapping[str, Any] | None = None,
) -> DryRun:
    """A few steps on fixed gradients, times a factor.

    Args:
        base: The base.
        shapes: Of the parameters.
        dtype: Their dtype.
        steps: How many.
        factor: The factor.
        placed: Whether the parameters are set to other values before each step.
        followed: Whether they are followed; then the run ends with the first thing that reads them.
        constant: Whether every gradient is 1 throughout.
        group: Hyper-parameters that replace the base's own.

    Returns:
        The run.
    """
    params = [nn.Parameter(torch.zeros(shape, dtype=dtype, device="cpu")) for shape in shapes]
    reads = ParameterReads(params) if followed else nullcontext()
    with reads:
        optimizer = base.build_dry(params)
    for options in optimizer.param_groups:
        options.update({key: value for key, value in (group or {}).items() if key in options.keys() - _FIXED})
        options["lr"] = torch.ones_like(options["lr"]) if isinstance(options.get("lr"), Tensor) else 1.0
    gradients = [[torch.ones_like(p)] * steps if constant else _windows(p, steps, seed=1) for p in params]
    positions = [_windows(param, steps, seed=0) for param in params] if placed else []
    updates: list[list[Tensor]] = [[] for _ in params]
    for i in range(steps):
        for param, position in zip(params, positions, strict=False):
            param.data.copy_(position[i])
        before = [param.detach().clone() for param in params]
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = factor * gradient[i]
        with reads.step() if isinstance(reads, ParameterReads) else reads:
            optimizer.step()
        if isinstance(reads, ParameterReads) and reads.found:
            return DryRun([], {}, reads.found)
        for param, was, own in zip(params, before, updates, strict=True):
            own.append(param.detach() - was)
    return DryRun([torch.stack(own) for own in updates], dict(optimizer.state.get(params[0], {})))


def _windows(param: Tensor, steps: int, *, seed: int) -> list[Tensor]:
    """A standard normal tensor for every step, the same on every device; each is the one before it, moved by a row."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(param)
    noise = torch.randn(rows + steps, *param.shape[1:], generator=generator, dtype=torch.float64, device="cpu").to(param)
    return [noise[i : i + rows] for i in range(steps)]


def _agree(moved: Tensor, other: Tensor) -> bool:
    # bitsandbytes rounds to float32: updates of about 1 differ by 4e-7; with a decay of 1e-5 they would differ by 3e-5
    return torch.allclose(moved, other, rtol=0, atol=2e-6 * float(moved.abs().max()))


def hyper_parameters(base: Base) -> dict[str, Any]:
    """What a base optimizer has in its groups, with the user's options; read from one built on a dummy parameter."""
    group = base.build([nn.Parameter(torch.zeros(2, 2))]).param_groups[0]
    return {key: value for key, value in group.items() if key != "params"}
