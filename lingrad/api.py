"""The two entry points: `wrap` for optimizer mode, `adapt` for adapter mode, with the same arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lingrad.config.methods import takes_methods
from lingrad.config.published import DEFAULT
from lingrad.config.rounds import Rounds
from lingrad.config.rules import Rules
from lingrad.config.settings import Carry, Compat, InBackward, Merge, RoundingKind, Scale, Share, TrainOnly
from lingrad.deprecated import renamed_keywords
from lingrad.engine.build import Trainable
from lingrad.engine.optimizer import SubspaceOptimizer
from lingrad.errors import require
from lingrad.optimizers.base import BaseLike


@renamed_keywords("lingrad.wrap", spec_or_rules="rules")
@takes_methods
def wrap(
    model: Trainable,
    rules: Rules = DEFAULT,
    base: BaseLike = "adamw",
    *,
    rest_lr: float | Tensor | None = None,
    weight_decay: float = 0.0,
    scale: Scale = 1.0,
    carry: Carry = "keep",
    residual: str | None = None,
    seed: int = 0,
    compat: Compat | None = None,
    layerwise: InBackward = False,
    stagger: bool = False,
    share: Share | None = None,
    ledger: bool = False,
    self_contained: bool = True,
    merge: Merge = "auto",
    rounding: RoundingKind = "nearest",
    process_group: Any = None,
    offload: str | None = None,
    train_only: TrainOnly | None = None,
    **base_kwargs: Any,
) -> SubspaceOptimizer:
    """Train in subspaces as an optimizer: W <- W + S opt(S^T G) (GaLore's form).

    Args:
        model: The model; or named parameters, ``model.named_parameters()``; or a list of param groups, dicts with named
            ``params``, optional ``rules`` and any hyper-parameter. Linear layers of a model get a projected backward;
            where only parameters are given, hooks project their gradients.
        rules: A config string such as ``svd(rank=128, every=200)``, for every Linear weight but the output head's;
            or rules, ``{"*.attn.*": "svd(rank=64)", "*norm*": "frozen", "*": "none"}``: globs over module names, the first
            match wins. ``none``, as of what no rule matches, trains in full with the same base. ``frozen`` does not train:
            ``requires_grad`` is False until ``opt.detach()``. Or the name of a method, ``fira(rank=128)``, of those that
            ``lingrad methods`` lists; by default ``finetune``, which docs/which-method.md explains.
        base: The optimizer of the coordinates: a name (see ``lingrad.optimizers.names()``), a ``torch.optim.Optimizer`` class,
            or a factory ``f(params, **base_kwargs)``.
        rest_lr: The learning rate of what trains in full, such as norms, biases, embeddings and the head; None is ``lr``, whose
            best value for the coordinates is several times larger. Schedulers that multiply rates scale both alike.
        weight_decay: Decoupled decay of every parameter, W <- (1 - lr * weight_decay) W, whatever the base; each with its own
            learning rate.
        scale: Multiplies the learning rate of the coordinates, not their decay (GaLore's ``scale``). ``norm`` makes the step of
            each weight as long as a full one of the base: by (m n / p q)^(1/2) where steps do not grow with the gradient, as
            Adam's, so that the learning rate of full training is nearer to the best for every rank and side
            (docs/which-method.md); each factor is a param group.
        carry: What happens to the base's moments at a refresh: ``keep``, ``reset``, ``rotate`` into the new basis, or
            ``transport``, which estimates squares better (LDAdam). Only ``reset`` sets the base's count of steps back.
        residual: What becomes of the part R of a gradient that no coordinates can express; None drops it. ``scaled`` steps
            along R as far as the base steps along the rest (Fira), ``sign`` along its signs (FRUGAL), ``feedback`` adds it to
            the next gradient (LDAdam), ``sampled(q=0.1)`` steps along R / q with probability q (as GUM). Every step then reads
            the gradients themselves, ``sampled`` those of the weights it draws, and the run has no counterpart in adapter mode
            (docs/methods.md).
        seed: Seed of everything random; each weight derives its own from it and its name.
        compat: ``galore`` follows galore_torch's arithmetic exactly.
        layerwise: Step each weight inside the backward as soon as its gradient is computed, then free the gradient: no two need
            exist at once. Every backward is then a step, which ``step()`` completes; accumulation over micro-batches, clipping
            by a norm and loss scaling are not supported.
            ``coordinates`` instead keeps accumulation, clipping and loss scaling: ``step()`` steps, and inside the backward
            each basis that is due is chosen from the gradient of the step's first backward, which is then freed, so that only
            gradients of coordinates wait. What trains in full keeps its gradient.
        stagger: Refresh the weights in turn, spread over the steps of a period, so that no step pays for all of them. Until its
            first refresh a weight is trained in a random basis.
        share: ``input`` gives linear layers that read the same input (q, k, v; gate, up; `lingrad.config.sharing`) one right
            basis, chosen from all their gradients, and one saved x @ Q.
        ledger: Record in host memory the basis (or its seed) and the coordinates of every merge, so that the run is known as a
            low-rank change of its initial weights; see ``opt.changes()``.
        self_contained: In adapter mode, store coordinates and the weights they belong to in ``opt.state_dict()``, and make
            ``model.state_dict()`` that of the plain model, W + S z: checkpoints of programs without support for adapters are
            then complete models and resume bit for bit. Load the model first, then the optimizer. False stores W and the
            coordinates in ``model.state_dict()``, which a plain model cannot load.
        merge: How S z is added to weights in bfloat16 and float16. ``exact`` multiplies in float32 and rounds the sum once.
            ``fast`` rounds z to the weight's dtype and multiplies in that, many times faster on a GPU; the added error is far
            below the weight's own rounding (docs/performance.md). ``auto`` is ``fast`` for bfloat16 on CUDA and ``exact``
            elsewhere: in float16 a coordinate above 65,504 would become infinite. Other dtypes have one way only.
        rounding: How a merge rounds a weight in 16 or 8 bits. ``nearest`` loses every change below half a step of the weight's
            grid; ``stochastic`` rounds up or down by chance, exact in the mean; ``compensated`` keeps what was rounded away, in
            as many bits again. Both need S z in float32, [m, n], for one weight at a time. With either, optimizer mode trains
            weights of bitsandbytes in 8 bits too (docs/lowbit.md).
        process_group: The processes that train this model together, each on its part of a batch, where these are not all that
            torch.distributed has: a ``ProcessGroup`` with this process in it. Checkpoints are free of it (docs/sharded.md).
        offload: What is in host memory between steps, pinned where the weights are on CUDA: ``moments`` of the base, which the
            step brings to the device a few weights at a time; ``bases``, of which each is brought when a layer, a merge or a
            refresh uses it; ``ledger``, with ``ledger=True``, what was merged through the basis in use. Several as one string,
            ``moments, bases``. The numbers are the same to the bit, and checkpoints load with any value of it. Bases that are
            computed from a seed or from indices are computed again at each use, as with ``store=false`` (docs/memory.md).
        train_only: ``transformed`` trains what is transformed, and what a rule says ``none`` of; everything else is frozen
            until ``opt.detach()``, as PEFT has it. None also trains what no rule names, such as norms, embeddings and the
            head, in full, which few servers load of an adapter (docs/serving.md).
        **base_kwargs: Options of the base, such as ``lr``, ``betas``, ``momentum``. Any base also takes ``moments="8bit"``,
            which stores its moments in 8 bits between steps.

    Returns:
        The optimizer, in optimizer mode.

    Raises:
        SpecError: A config string, rule, base or option is wrong.
        ShapeError: A rank is too large for a weight.
        DualityError: The base's update reads the parameter, so the two modes would differ.
        DependencyError: The base needs a package that is not installed.
        ModeError: The model is wrapped already.
    """
    _refuse_mode(base_kwargs, "wrap trains in optimizer mode; call lingrad.adapt for adapter mode")
    return SubspaceOptimizer(
        model,
        rules,
        base,
        mode="optimizer",
        rest_lr=rest_lr,
        weight_decay=weight_decay,
        scale=scale,
        carry=carry,
        residual=residual,
        seed=seed,
        compat=compat,
        layerwise=layerwise,
        stagger=stagger,
        share=share,
        ledger=ledger,
        self_contained=self_contained,
        merge=merge,
        rounding=rounding,
        process_group=process_group,
        offload=offload,
        train_only=train_only,
        **base_kwargs,
    )


@renamed_keywords("lingrad.adapt", spec_or_rules="rules")
@takes_methods
def adapt(
    model: Trainable,
    rules: Rules = DEFAULT,
    base: BaseLike = "adamw",
    *,
    rest_lr: float | Tensor | None = None,
    weight_decay: float = 0.0,
    scale: Scale = 1.0,
    carry: Carry = "keep",
    seed: int = 0,
    compat: Compat | None = None,
    layerwise: InBackward = False,
    stagger: bool = False,
    share: Share | None = None,
    ledger: bool = False,
    self_contained: bool = True,
    merge: Merge = "auto",
    rounding: RoundingKind = "nearest",
    process_group: Any = None,
    offload: str | None = None,
    train_only: TrainOnly | None = None,
    merge_every: int | None = None,
    keep_remainder: bool = False,
    rounds: Rounds | None = None,
    **base_kwargs: Any,
) -> SubspaceOptimizer:
    """Train in subspaces as one-sided adapters: W = W0 + S z, z trained, merged at each refresh.

    The trajectory of W is that of `wrap` with the same arguments (Torroba-Hennigen et al., ICML 2025, arXiv 2502.13811).

    Args:
        model: The model; see `wrap`. Parameters alone cannot be adapted, because the forward changes.
        rules: See `wrap`.
        base: See `wrap`.
        rest_lr: See `wrap`.
        weight_decay: See `wrap`.
        scale: See `wrap`.
        carry: See `wrap`.
        seed: See `wrap`.
        compat: See `wrap`.
        layerwise: See `wrap`.
        stagger: See `wrap`.
        share: See `wrap`.
        ledger: See `wrap`.
        self_contained: See `wrap`.
        merge: See `wrap`.
        rounding: See `wrap`.
        process_group: See `wrap`.
        offload: See `wrap`.
        train_only: See `wrap`.
        merge_every: Merge coordinates into the weights every so many steps, in addition to each refresh; None merges at
            refreshes only. 1 is optimizer mode's schedule with adapter mode's forward. The trajectory is the same.
        keep_remainder: Where a weight is stored in 4 or 8 bits, add the rounding error of a merge to the new coordinates, as
            far as their basis can express it (LoQT's error compensation); see ``opt.merge_losses()``.
        rounds: Train as one of several workers that exchange coordinates every few steps; see `lingrad.decentralized`.
        **base_kwargs: See `wrap`.

    Returns:
        The optimizer, in adapter mode. Its errors are those of `wrap`.
    """
    _refuse_mode(base_kwargs, "adapt trains in adapter mode; call lingrad.wrap for optimizer mode")
    return SubspaceOptimizer(
        model,
        rules,
        base,
        mode="adapter",
        rest_lr=rest_lr,
        weight_decay=weight_decay,
        scale=scale,
        carry=carry,
        seed=seed,
        compat=compat,
        layerwise=layerwise,
        stagger=stagger,
        share=share,
        ledger=ledger,
        self_contained=self_contained,
        merge=merge,
        rounding=rounding,
        process_group=process_group,
        offload=offload,
        train_only=train_only,
        merge_every=merge_every,
        keep_remainder=keep_remainder,
        rounds=rounds,
        **base_kwargs,
    )


def _refuse_mode(options: Mapping[str, Any], instead: str) -> None:
    require("mode" not in options, "mode", f"'mode' is not an option here: {instead}")
