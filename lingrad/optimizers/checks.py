"""What the duality requires of a base optimizer, tested by a dry run of a few steps.

Its update must read only gradients (Torroba-Hennigen et al., ICML 2025, arXiv 2502.13811, section 3), and moments that are
rotated into another basis must be means of gradients or of their squares.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lingrad.errors import DualityError, SpecError
from lingrad.optimizers.base import Base

# Large enough for a base that quantises tensors of 4096 elements or more.
SHAPE = (64, 64)
STEPS = 3


def check_reads_only_gradients(base: Base) -> None:
    """Run a base on a parameter that only its own steps change, and on one that is set to other values before each step.

    With equal gradients the updates must be equal: adapter mode has the first parameter; optimizer mode, which merges after
    each step, the second. The learning rate of the dry run is 1.

    Args:
        base: The base to test; a few steps on a 64 x 64 parameter, in float64 if the base supports it.

    Raises:
        DualityError: The updates differ, so the two modes would too.
        SpecError: The base cannot step on gradients alone.
    """
    positions = _random(seed=0)
    moved, _ = _dry_run(base, [torch.zeros(SHAPE, device="cpu")])
    other, _ = _dry_run(base, list(positions))
    # bitsandbytes rounds to float32: updates of about 1 differ by 4e-7; with a decay of 1e-5 they would differ by 3e-5
    if not torch.allclose(moved, other, rtol=0, atol=2e-6 * float(moved.abs().max())):
        raise DualityError(
            f"the update of base '{base.name}' reads the parameter, not only its gradient (a trust ratio, parameter "
            "scaling, a decay of its own, or stored values of the parameter), so optimizer mode and adapter mode would "
            "differ. Switch that off in the base (weight decay is the engine's: weight_decay=...), or choose another base."
        )


def check_no_shared_state(base: Base, option: str = "layerwise=True") -> None:
    """Make sure that a base may step its parameters separately.

    Args:
        base: The base to test.
        option: The option that requires it, for the message.

    Raises:
        SpecError: A step changes its param group: a counter or a step size that all parameters share.
    """
    param = nn.Parameter(torch.zeros(SHAPE, device="cpu"))
    optimizer = base.build([param])
    param.grad = _random(seed=1)[0].to(param.dtype)
    before, name = _group_options(optimizer), option.partition("=")[0]
    optimizer.step()
    for key, value in _group_options(optimizer).items():
        if not _equal(value, before.get(key)):
            raise SpecError(
                f"{option} steps parameters separately, but base '{base.name}' has one '{key}' for all of them; "
                f"leave {name} out, or choose another base",
                option=name,
            )


def _group_options(optimizer: Optimizer) -> dict[str, Any]:
    """The options of a param group, tensors copied."""
    group = optimizer.param_groups[0].items()
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in group if key != "params"}


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return bool(one == other)


def moment_degrees(base: Base) -> dict[str, int]:
    """Find the degree of each moment of a base in the gradient: 1 for means, 2 for squares.

    Args:
        base: The base to test.

    Returns:
        State key -> degree, for every state tensor that has the parameter's shape.

    Raises:
        DualityError: A state tensor is neither, so that it cannot be rotated into another basis.
    """
    base = base.unquantised
    start = [torch.zeros(SHAPE, device="cpu")]
    once, twice = (_dry_run(base, start, factor)[1] for factor in (1.0, 2.0))
    degrees = {}
    for key, value in once.items():
        if not isinstance(value, Tensor) or value.numel() == 1:
            continue
        degree = next((d for d in (1, 2) if _grew(value, twice[key], 2.0**d)), None)
        if value.shape != SHAPE or degree is None:
            raise DualityError(
                f"carry='rotate' cannot rotate the state '{key}' of base '{base.name}' (it is quantised, factored or "
                "not a moment of the gradient); use carry='keep' or carry='reset'"
            )
        degrees[key] = degree
    return degrees


def _dry_run(base: Base, positions: list[Tensor], factor: float = 1.0) -> tuple[Tensor, dict[str, Any]]:
    """A few steps on fixed gradients; the parameter has the given value before a step, or that of the step before.

    Returns:
        The updates [steps, rows, columns], and the optimizer state.

    Raises:
        SpecError: The base cannot step on gradients alone.
    """
    for dtype in (torch.float64, torch.float32):
        param = nn.Parameter(positions[0].to(dtype))
        optimizer = base.build([param])
        for group in optimizer.param_groups:
            group["lr"] = torch.ones_like(group["lr"]) if isinstance(group.get("lr"), Tensor) else 1.0
        try:
            return _updates(optimizer, param, positions, factor), dict(optimizer.state[param])
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            failure: Exception = error  # bitsandbytes has no float64
    raise SpecError(f"base '{base.name}' cannot be used: its step(), without a closure, failed with: {failure}") from failure


def _random(*, seed: int) -> Tensor:
    """A standard normal matrix for every step of a dry run, [steps, rows, columns]; on the CPU, whatever the default device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(STEPS, *SHAPE, generator=generator, dtype=torch.float64, device="cpu")


def _updates(optimizer: Optimizer, param: nn.Parameter, positions: list[Tensor], factor: float) -> Tensor:
    gradients = _random(seed=1)
    updates = []
    for i, gradient in enumerate(gradients.to(param.dtype)):
        if i < len(positions):
            param.data.copy_(positions[i])
        before = param.detach().clone()
        param.grad = factor * gradient
        optimizer.step()
        updates.append(param.detach() - before)
    return torch.stack(updates)


def _grew(once: Tensor, twice: Tensor, factor: float) -> bool:
    return once.is_floating_point() and torch.allclose(twice, factor * once, rtol=1e-3, atol=0.0)
