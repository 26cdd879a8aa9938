"""Oracles for maps, transforms and base optimizers: one call each, for the tests of this package and of others.

They run on the CPU in float64 and raise AssertionError with what was expected and what was found. Test a transform of your own
with ``assert_dual("name(rank=4, every=5)")``, and a new map with `assert_adjoint`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lingrad import optimizers
from lingrad.config.rules import Rules
from lingrad.errors import DualityError
from lingrad.gradients.local import FactoredGradient
from lingrad.maps import LinearMap
from lingrad.optimizers import checks
from lingrad.testing.training import Batches, BatchLoss, every_kind, token_batches, token_loss, trajectories, weight_gap
from lingrad.transforms import Transform


def assert_adjoint(linear_map: LinearMap, shape: tuple[int, int], *, tolerance: float = 1e-12) -> None:
    """Check every law of `lingrad.LinearMap` against the map's own matrix, column by column.

    Args:
        linear_map: The map S, its tensors in float64.
        shape: (m, n), the weight's shape; small, since the whole matrix [m n, p q] is formed.
        tolerance: Largest absolute difference of any element.
    """
    m, n = shape
    out_grad, x = _draw(11, m, seed=1), _draw(11, n, seed=2)
    grad = FactoredGradient(out_grad, x)
    p, q = linear_map.project(grad).shape
    coords = _draw(p, q, seed=3).requires_grad_()
    units = torch.eye(p * q, dtype=torch.float64).view(p * q, p, q)
    matrix = torch.stack([linear_map.lift(unit).flatten() for unit in units], dim=1)
    lifted = linear_map.lift(coords)
    assert lifted.shape == shape, f"lift gives {tuple(lifted.shape)} of {p} x {q} coordinates; expected {shape}"

    def same(law: str, found: Tensor, expected: Tensor) -> None:
        far = float((found - expected).detach().abs().max()) if found.shape == expected.shape else float("inf")
        assert far <= tolerance, f"{type(linear_map).__name__}: {law} is off by {far:.1e}, more than {tolerance:.0e}"

    dense = grad.dense()
    same("lift(z) as a linear function of z", lifted.flatten(), matrix @ coords.flatten())
    for kind, given in (("a dense", dense), ("a factored", grad)):
        same(
            f"project, the adjoint of lift, of {kind} gradient",
            linear_map.project(given).flatten(),
            matrix.t() @ dense.flatten(),
        )
    (slope,) = torch.autograd.grad((lifted * dense).sum(), coords)
    same("autograd of lift, which is project,", slope, linear_map.project(dense))
    coords = coords.detach()
    same("apply(x, z) == x @ lift(z).T", linear_map.apply(x, coords), x @ lifted.detach().t())
    same("T.lift(z.T) == lift(z).T", linear_map.T.lift(coords.t()), lifted.detach().t())
    same("factors(z), left @ right == lift(z),", linear_map.factors(coords).dense(), lifted.detach())
    reduced = linear_map.reduce(x)
    same("inner.apply(reduce(x), z) == apply(x, z)", linear_map.inner.apply(reduced, coords), linear_map.apply(x, coords))
    inner = linear_map.inner.project(FactoredGradient(out_grad, reduced))
    same("inner.project(dY^T reduce(x)) == project(dY^T x)", inner, linear_map.project(grad))
    core = linear_map.core.project(FactoredGradient(linear_map.T.reduce(out_grad), reduced))
    same("core.project(T.reduce(dY)^T reduce(x)) == project(dY^T x)", core, linear_map.project(grad))
    acted = _draw(11, m, seed=6)
    expected = acted + x @ lifted.detach().t()
    linear_map.add_apply_(acted, x, coords)
    same("add_apply_(y, x, z), y + apply(x, z) in place,", acted, expected)
    same("norm(z) == |lift(z)|", linear_map.norm(coords), lifted.detach().norm())
    same("lift(fit(lift(z))) == lift(z)", linear_map.lift(linear_map.fit(lifted.detach())), lifted.detach())
    weight = _draw(m, n, seed=4)
    same("add_lift(W, z) == W + lift(z)", linear_map.add_lift(weight, coords), weight + lifted.detach())
    total = weight.clone()
    linear_map.add_lift_(total, coords)
    same("add_lift_(W, z), W + lift(z) in place,", total, weight + lifted.detach())
    total = weight.clone()
    linear_map.add_rounded_lift_(total, coords)
    same("add_rounded_lift_(W, z), W + lift(z) in place,", total, weight + lifted.detach())


def assert_reads_only_gradients(base: optimizers.BaseLike, **options: Any) -> None:
    """Check that a base optimizer's update does not depend on the parameter, as the duality requires.

    Args:
        base: A name, an optimizer class or a factory, as for `lingrad.wrap`.
        **options: Its options.

    Raises:
        AssertionError: It does.
    """
    try:
        checks.check_reads_only_gradients(optimizers.find(base, options, decay=False))
    except DualityError as error:
        raise AssertionError(str(error)) from None


def assert_dual(
    rules: Rules,
    base: optimizers.BaseLike = "adamw",
    *,
    build: Callable[[], nn.Module] | None = None,
    batches: Batches | None = None,
    loss: BatchLoss | None = None,
    tolerance: float = 1e-12,
    clip: float | None = None,
    **options: Any,
) -> float:
    """Check that optimizer mode, adapter mode and a run that switches twice end with the same weights, and that they trained.

    The run has micro-batches, a cosine schedule, decay 0.1 and scale 0.25 unless ``options`` say otherwise. The theorem is that
    of Torroba-Hennigen et al. (ICML 2025, arXiv 2502.13811, section 3).

    Args:
        rules: A config string, a transform, or rules; a single transform is used for every weight of two or more dimensions.
        base: As for `lingrad.wrap`.
        build: Makes the model, with the same weights at every call. Default: `EveryKind`.
        batches: For each step its micro-batches; default 12 steps of two for `EveryKind`.
        loss: (model, micro-batch) -> loss; default that of `EveryKind`.
        tolerance: Largest relative difference of any weight, |A - B|_F / |B|_F.
        clip: Clip by ``opt.clip_grad_norm_`` at this norm.
        **options: For `lingrad.wrap`: ``lr``, ``carry``, ``weight_decay`` and so on.

    Returns:
        The largest relative difference found.
    """
    build = build or every_kind
    what = f"{rules} with {base}"
    start = {name: param.detach().clone() for name, param in build().named_parameters()}
    wrapped, *others = trajectories(
        build,
        {"*": rules} if isinstance(rules, str | Transform) else rules,
        base,
        batches or token_batches(12),
        loss or token_loss,
        clip=clip,
        **{"lr": 1e-2, "weight_decay": 0.1, "scale": 0.25} | options,
    )
    assert all(w.isfinite().all() for w in wrapped.values()), f"{what}: a weight is not finite"
    assert weight_gap(wrapped, start)[1] > 1e-4, f"{what}: nothing was trained"
    worst = 0.0
    for mode, weights in zip(("adapter mode", "a run that switches twice"), others, strict=True):
        far = weight_gap(weights, wrapped)[1]
        assert far <= tolerance, f"{what}: {mode} differs from optimizer mode by {far:.1e}, more than {tolerance:.0e}"
        worst = max(worst, far)
    return worst


def _draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu")
