"""What the duality asks of a base optimizer, found out by running it a few steps.

Its update must read only gradients (Torroba-Hennigen et al., ICML 2025, arXiv 2502.13811, section 3), and moments that are
rotated into another basis must be means or squares of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lingrad.errors import DualityError, SpecError
from lingrad.optimizers.base import Base

# Large enough to be quantised, where a base does that from 4096 numbers on.
TRIAL_SHAPE = (64, 64)
TRIAL_STEPS = 3


def check_reads_only_gradients(base: Base) -> None:
    """Run a base on a parameter that its own steps alone move and on one that is moved elsewhere before each step.

    Given equal gradients its updates must be equal: adapter mode is the first parameter, optimizer mode, which merges after
    each step, the second. Whatever the run's learning rate is, the trial's is 1.

    Args:
        base: The base to try; a few steps on a 64 x 64 parameter, in float64 where the base takes that.

    Raises:
        DualityError: The updates differ, so the two modes would part.
        SpecError: The base cannot step on gradients alone.
    """
    places = _draw(seed=0)
    moved, _ = _trial(base, [torch.zeros(TRIAL_SHAPE, device="cpu")])
    other, _ = _trial(base, list(places))
    # bitsandbytes rounds to float32, which leaves 4e-7 of updates of about 1; a decay of 1e-5 would leave 3e-5
    if not torch.allclose(moved, other, rtol=0, atol=2e-6 * float(moved.abs().max())):
        raise DualityError(
            f"the update of base '{base.name}' reads the parameter, not only its gradient (a trust ratio, parameter "
            "scaling, a decay of its own, or a memory of where the parameter was), so optimizer mode and adapter mode would "
            "differ. Switch that off in the base (weight decay is the engine's: weight_decay=...), or choose another base."
        )


def check_keeps_nothing_for_all(base: Base, option: str = "layerwise=True") -> None:
    """Make sure that a base may step its parameters in parts.

    Args:
        base: The base to try.
        option: What asks for it, for the message.

    Raises:
        SpecError: A step changes its param group: a counter or a step size for all parameters at once.
    """
    param = nn.Parameter(torch.zeros(TRIAL_SHAPE, device="cpu"))
    optimizer = base.build([param])
    param.grad = _draw(seed=1)[0].to(param.dtype)
    before, name = _group(optimizer), option.partition("=")[0]
    optimizer.step()
    for key, value in _group(optimizer).items():
        if not _equal(value, before.get(key)):
            raise SpecError(
                f"{option} steps parameters by themselves, and base '{base.name}' keeps '{key}' for all of them "
                f"together; leave {name} out, or choose another base",
                option=name,
            )


def _group(optimizer: Optimizer) -> dict[str, Any]:
    """What a param group holds beside its parameters, tensors copied."""
    group = optimizer.param_groups[0].items()
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in group if key != "params"}


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return bool(one == other)


def moment_degrees(base: Base) -> dict[str, int]:
    """Find how each moment of a base grows with the gradient: 1 for means, 2 for squares.

    Args:
        base: The base to try, as `check_reads_only_gradients` does.

    Returns:
        State key -> degree, for every state tensor that has the parameter's shape.

    Raises:
        DualityError: A state tensor is neither, so that it cannot be rotated into another basis.
    """
    base = base.unquantised
    start = [torch.zeros(TRIAL_SHAPE, device="cpu")]
    once, twice = (_trial(base, start, factor)[1] for factor in (1.0, 2.0))
    degrees = {}
    for key, value in once.items():
        if not isinstance(value, Tensor) or value.numel() == 1:
            continue
        degree = next((d for d in (1, 2) if _grew(value, twice[key], 2.0**d)), None)
        if value.shape != TRIAL_SHAPE or degree is None:
            raise DualityError(
                f"carry='rotate' cannot rotate the state '{key}' of base '{base.name}' (it is quantised, factored or "
                "not a moment of the gradient); use carry='keep' or carry='reset'"
            )
        degrees[key] = degree
    return degrees


def _trial(base: Base, places: list[Tensor], factor: float = 1.0) -> tuple[Tensor, dict[str, Any]]:
    """A few steps on the same gradients, from the places given in turn, or on from wherever the last step led.

    Returns:
        The updates [steps, rows, columns], and the state that is left.

    Raises:
        SpecError: The base cannot step on gradients alone.
    """
    for dtype in (torch.float64, torch.float32):
        param = nn.Parameter(places[0].to(dtype))
        optimizer = base.build([param])
        for group in optimizer.param_groups:
            group["lr"] = torch.ones_like(group["lr"]) if isinstance(group.get("lr"), Tensor) else 1.0
        try:
            return _updates(optimizer, param, places, factor), dict(optimizer.state[param])
        except (TypeError, ValueError, RuntimeError) as error:
            failure = error  # bitsandbytes has no float64
    raise SpecError(f"base '{base.name}' cannot be used: its step(), without a closure, failed with: {failure}") from failure


def _draw(*, seed: int) -> Tensor:
    """What every step of a trial meets, [steps, rows, columns]; on the CPU, whatever the default device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(TRIAL_STEPS, *TRIAL_SHAPE, generator=generator, dtype=torch.float64, device="cpu")


def _updates(optimizer: Optimizer, param: nn.Parameter, places: list[Tensor], factor: float) -> Tensor:
    gradients = _draw(seed=1)
    updates = []
    for i, gradient in enumerate(gradients.to(param.dtype)):
        if i < len(places):
            param.data.copy_(places[i])
        before = param.detach().clone()
        param.grad = factor * gradient
        optimizer.step()
        updates.append(param.detach() - before)
    return torch.stack(updates)


def _grew(once: Tensor, twice: Tensor, factor: float) -> bool:
    return once.is_floating_point() and torch.allclose(twice, factor * once, rtol=1e-3, atol=0.0)
