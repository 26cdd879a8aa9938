"""What becomes of the part of a gradient that its basis drops: R = G - S z, for the S z nearest to G. Optimizer mode only.

Every step reads the gradient G [m, n] itself: of all transformed weights between the backward and the step, or, where the run
is layerwise, of one at a time; ``sampled`` of those that are drawn. The rules are those of `lingrad.config.residual.Residual`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lingrad.engine.residual_state import ResidualState
from lingrad.engine.run import Run
from lingrad.errors import ModeError
from lingrad.gradients import DenseGradient, Gradient
from lingrad.gradients.averaged import averaged
from lingrad.subspaces.merging import merge_all
from lingrad.subspaces.products import sketch
from lingrad.subspaces.subspace import Subspace
from lingrad.subspaces.watched import release
from lingrad.tensors import wide
from lingrad.weights.dense import DenseWeight

FLOOR = 1e-8  # is added to the norms that steps are divided by, as in Fira's own program


def take_up(run: Run, subs: Iterable[Subspace]) -> None:
    """Add what was fed back to the gradients of this step, once, before a basis is chosen from them.

    Args:
        run: The run.
        subs: The subspaces that are about to be stepped.
    """
    if run.residuals is None or run.residuals.rule.kind != "feedback":
        return
    live = [sub for sub in subs if not sub.pending.fed and _has_gradient(sub)]
    for sub, factor in zip(live, _factors(live), strict=True):
        dtype = _seen(sub).dtype
        matrix = _dense(sub, factor).add_(run.residuals.error(sub))
        assert sub.coords.grad is not None  # noqa: S101 - `_has_gradient`
        sub.coords.grad.copy_(sub.map().project(matrix))
        sub.pending.replace(DenseGradient(matrix.to(dtype)), sub.coords)  # those of all weights are in memory together
        sub.pending.fed = True


def prepare(run: Run, subs: Iterable[Subspace]) -> None:
    """Find by how much gradients were scaled since their backward, before anything is stepped: a step is refused as a whole.

    Args:
        run: The run.
        subs: The subspaces that are about to be stepped, in their bases of this step.

    Raises:
        ModeError: A gradient came from elsewhere, or was changed by more than one factor.
    """
    if run.residuals is not None:
        live = [sub for sub in subs if _has_gradient(sub)]
        run.residuals.factors = {sub.name: factor for sub, factor in zip(live, _factors(live), strict=True)}


def merge(run: Run, subs: Sequence[Subspace]) -> None:
    """``W += S z`` and the step along the residual, in one sum, then ``z = 0``; where the rule feeds it back, keep it.

    Args:
        run: The run.
        subs: The subspaces whose coordinates were stepped; of those that are not drawn ``z`` alone is merged.
    """
    residuals = run.residuals
    assert residuals is not None  # noqa: S101 - the caller has looked
    factors, residuals.factors = residuals.factors, {}
    groups = {id(param): group for group in run.groups if group["kind"] == "coords" for param in group["params"]}
    for sub in (sub for sub in subs if sub.name in factors):
        grad = _dense(sub, factors[sub.name])
        current = sub.map()
        rest = current.residual(grad)
        sketched = sub.basis.due and sub.basis.transform.reads == "sketch"
        sub.pending.total = (
            sketch(sub.probes(), current, sub.weight, DenseGradient(grad), current.project(grad)) if sketched else None
        )
        kind = residuals.rule.kind
        rounding = _rounding(grad) if kind == "sign" else None
        del grad
        if kind == "feedback":
            residuals.error(sub).copy_(rest)
            residuals.settle(sub)
            continue
        group = groups[id(sub.coords)]
        rate = group["lr"] * group["scale"]
        if rounding is not None:
            step = _signs(rest, rounding).mul_(rate * residuals.rule.factor)
        elif kind == "sampled":
            step = _sampled(sub, rest, residuals.rule.q)
        else:
            step = _scaled(residuals, sub, rest, rate)
        if not group.get("maximize", False):
            step.neg_()
        current.add_lift_(step, sub.coords.detach())
        assert isinstance(sub.weight, DenseWeight)  # noqa: S101 - refused otherwise
        sub.weight.add_matrix_(step)
        sub.ledger.merged = True
        release([sub.coords])
    merge_all([sub for sub in subs if not sub.released], ())


def _scaled(residuals: ResidualState, sub: Subspace, rest: Tensor, rate: Any) -> Tensor:
    """R |base's step| / |gradient of the coordinates|, of each row or column, limited in its growth; in R's memory."""
    p, q = sub.basis.transform.ranks(sub.basis.shape)
    # a row of z is one of W where there is no left basis; experts are blocks of rows, each with a basis of its own
    across = 2 if p is None else 1 if q is None else (1, 2)
    blocks = (sub.basis.transform.blocks, -1)
    assert sub.coords.grad is not None  # noqa: S101 - `_has_gradient`
    stepped, grad = (
        torch.linalg.vector_norm(part.unflatten(0, blocks), dim=across, keepdim=True)
        for part in (sub.coords.detach(), sub.coords.grad)
    )
    step = rest
    step.unflatten(0, blocks).mul_(stepped / (grad + FLOOR))
    last = residuals.entries(sub)["norm"]
    # without a learning rate, as in the first step of a warm-up, there is no step, and nothing to compare the next with
    rate = torch.as_tensor(rate, dtype=last.dtype, device=last.device).reshape(())
    norm = torch.linalg.vector_norm(step).to(last.dtype) / rate.clamp_min(torch.finfo(last.dtype).tiny)
    allowed = torch.where(last > 0, residuals.rule.limit * last, torch.inf)
    norm = torch.where(rate > 0, norm, 0)
    step.mul_((allowed / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp(max=1.0))
    last.copy_(torch.where(norm > 0, torch.minimum(norm, allowed), last))
    return step


def _sampled(sub: Subspace, rest: Tensor, q: float) -> Tensor:
    """R / q times |base's step| / |gradient of the coordinates|, one number a weight, or an expert; in R's memory."""
    # that number is lr with SGD: the mean of this step, with probability q, and of none is lr R
    blocks = (sub.basis.transform.blocks, -1)
    assert sub.coords.grad is not None  # noqa: S101 - `_has_gradient`
    stepped, grad = (
        torch.linalg.vector_norm(part.unflatten(0, blocks), dim=(1, 2), keepdim=True)
        for part in (sub.coords.detach(), sub.coords.grad)
    )
    # R / |gradient| first: their quotient may overflow where one of them is tiny; no gradient is no measure, and no step
    rest.unflatten(0, blocks).div_(torch.where(grad > 0, grad, torch.inf)).mul_(stepped / q)
    return rest


def _signs(rest: Tensor, rounding: Tensor) -> Tensor:
    """The signs of R, in its memory; 0 where it is zero but for rounding, as in rows without a gradient."""
    return rest.mul_(rest.abs() > rounding).sign_()


def _rounding(grad: Tensor) -> Tensor:
    """How large entries of R are where all there is of them is rounding: eps times the row's and the column's norm, [m, n]."""
    norms = torch.linalg.vector_norm(grad, dim=1, keepdim=True) + torch.linalg.vector_norm(grad, dim=0, keepdim=True)
    rounding: Tensor = norms.mul_(8 * torch.finfo(grad.dtype).eps)
    return rounding


def _has_gradient(sub: Subspace) -> bool:
    """Whether a backward has left the gradient itself, of which the basis drops a part.

    Returns:
        Whether it has; False where there is none, or zero.

    Raises:
        ModeError: The gradient of the coordinates came from elsewhere.
    """
    grad = sub.coords.grad
    if grad is None or not sub.basis.whole:
        return False
    if isinstance(sub.pending.total, Gradient):
        return True
    if sub.processes.count > 1:  # another one's did
        return True
    if bool(grad.any()):
        raise ModeError(
            f"the gradient of {sub.name} did not come from a backward since the last step, and its residual needs the gradient "
            "of the weight itself; run forward and backward, then step"
        )
    return False


def _dense(sub: Subspace, factor: float) -> Tensor:
    """The gradient of a weight, as other programs scaled it: [m, n], at least float32; what was recorded may be its memory."""
    dense = averaged(_seen(sub), sub.processes).dense().to(wide(sub.weight.dtype))
    return dense if factor == 1.0 else dense.mul_(factor)


def _seen(sub: Subspace) -> Gradient:
    total = sub.pending.total
    if isinstance(total, Gradient):  # in float16 products of factors may overflow where their projections do not
        return total.to(torch.float32) if total.dtype == torch.float16 else total
    return DenseGradient(torch.zeros(sub.weight.layout.shape, dtype=sub.coords.dtype, device=sub.coords.device))


def _factors(subs: Sequence[Subspace]) -> list[float]:
    """By how much other programs have scaled each gradient since its backward: clipping, the loss scale.

    Args:
        subs: The subspaces, with gradients.

    Returns:
        The factors; of gradients that are zero that of the others.

    Raises:
        ModeError: A gradient was changed in another way.
    """
    found = [sub.pending.scaled_by(sub.coords) for sub in subs]
    common = next((factor for factor in found if factor is not None), 1.0)
    return [common if factor is None else factor for factor in found]
