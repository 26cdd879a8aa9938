"""From TrainingArguments to the optimizer: what they ask for applies, and what would have no effect is refused.

The Trainer creates its optimizer late, when ``train()`` begins, so the arguments are read then; they are checked at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields
from functools import wraps
from inspect import signature
from typing import Any, get_args

from torch import nn
from torch.optim import Optimizer

from lingrad import optimizers
from lingrad.api import adapt, wrap
from lingrad.config.methods import method_of, takes_methods
from lingrad.config.names import plain
from lingrad.config.rules import Rules, parse_rules
from lingrad.config.settings import Carry, InBackward, Mode, Scale, Settings
from lingrad.deprecated import renamed_keywords
from lingrad.engine.optimizer import SubspaceOptimizer
from lingrad.errors import ModeError, SpecError, optional, require, require_one_of
from lingrad.galore.arguments import GaloreTargets
from lingrad.galore.names import is_galore
from lingrad.hf.sharded import check_order, check_parallel

AnyRules = Rules | Callable[[nn.Module], Rules]

# The names of each base optimizer in ``optim``, so that naming the same one twice is not a contradiction.
_SAME = {
    "adamw": {"adamw_torch", "adamw_torch_fused"},
    "adafactor": {"adafactor"},
    "sgd": {"sgd"},
    "adagrad": {"adagrad"},
    "rmsprop": {"rmsprop"},
    "lion": {"lion_32bit"},
    "adamw8bit": {"adamw_8bit", "adamw_bnb_8bit"},
}


def _betas_of_arguments(function: Callable[..., Any]) -> Callable[..., Any]:
    """Have betas that were changed in the arguments replace those of a method that the rules name."""

    @wraps(function)
    def taking(*given: Any, **options: Any) -> Any:
        known = signature(function).bind_partial(*given, **options).arguments
        chosen, args = method_of(known.get("rules")), known.get("args")
        own = chosen is not None and "betas" in chosen.base_options.keys() - options.keys()
        if own and args is not None and (_changed(args, "adam_beta1") or _changed(args, "adam_beta2")):
            options["betas"] = (args.adam_beta1, args.adam_beta2)
        return function(*given, **options)

    return taking


@renamed_keywords("lingrad.hf.trainer_kwargs", spec_or_rules="rules")
@_betas_of_arguments
@takes_methods
def trainer_kwargs(
    rules: AnyRules,
    args: Any,
    *,
    mode: Mode = "optimizer",
    base: optimizers.BaseLike = "adamw",
    scale: Scale = 1.0,
    carry: Carry = "keep",
    seed: int | None = None,
    ledger: bool | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Keywords that make a Trainer train with lingrad: ``Trainer(model, args, ..., **lingrad.hf.trainer_kwargs(rules, args))``.

    Learning rate, schedule, warm-up, weight decay (by the Trainer's rule, not on norms and biases), betas, epsilon, clipping,
    accumulation, checkpointing and precision are those of ``args``. Checkpoints are complete and resume bit for bit in both
    modes.

    Args:
        rules: As for `lingrad.wrap`; or a function of the model that returns them, such as `from_galore_args` gives. Required.
        args: The TrainingArguments (or SFTConfig, ...) that are also passed to the trainer. Required.
        mode: ``optimizer`` or ``adapter``.
        base: As for `lingrad.wrap`; ``args.optim`` may name the same one, or have its default.
        scale: As for `lingrad.wrap`.
        carry: As for `lingrad.wrap`.
        seed: Seed of everything random; ``args.seed`` unless given.
        ledger: As for `lingrad.wrap`; by default on in adapter mode, so that an adapter can be written at the end.
        **options: Other options of `lingrad.wrap` or `lingrad.adapt`, and of the base. They override ``args``.

    Returns:
        ``{"optimizer_cls_and_kwargs": ...}``.

    Raises:
        SpecError: A config string, rule or option is wrong; or ``args`` have something that would have no effect.
        ModeError: ``args`` have something that is not supported: DeepSpeed, FSDP other than FSDP2, DataParallel, layerwise
            steps with accumulation.
        DependencyError: transformers, or the package of the base, is not installed.
    """
    optional("transformers", "lingrad.hf", "hf")
    require_one_of(mode, get_args(Mode), "mode")
    require_one_of(carry, get_args(Carry), "carry")
    require(ledger in (None, True, False), "ledger", f"ledger must be True, False or None, not {ledger!r}")
    given = {"scale": scale, "carry": carry, **options}
    if not callable(rules):
        parse_rules(rules)
    for name in ("self_contained", "model"):
        require(name not in options, name, f"'{name}' is set by lingrad.hf; leave it out")
    _check_args(args, base, translated=isinstance(rules, GaloreTargets))
    _check_layerwise(args, given.get("layerwise", False))
    check_parallel(args)
    records = mode == "adapter" if ledger is None else ledger
    _, of_base = Settings.split({**given, "ledger": records})
    optimizers.find(base, {**_of_the_base(args, base), **of_base}, decay=False, others=Settings.names())
    settings = {"args": args, "rules": rules, "mode": mode, "base": base, "ledger": ledger, "options": given | {"seed": seed}}
    return {"optimizer_cls_and_kwargs": (Factory, settings)}


class Factory:
    """Called by the Trainer as ``Factory()(model, **settings)``: it passes the model to what is not an Optimizer class."""

    def __call__(
        self,
        model: nn.Module,
        training_args: Any = None,
        *,
        args: Any,
        rules: AnyRules,
        mode: Mode,
        base: optimizers.BaseLike,
        ledger: bool | None,
        options: Mapping[str, Any],
        decaying: Iterable[str] | None = None,
    ) -> SubspaceOptimizer:
        """Make the optimizer.

        Args:
            model: The Trainer's model.
            training_args: Not used. axolotl's trainers pass the arguments after the model, as well as here.
            args: See `trainer_kwargs`.
            rules: See `trainer_kwargs`.
            mode: See `trainer_kwargs`.
            base: See `trainer_kwargs`.
            ledger: See `trainer_kwargs`.
            options: The other arguments of `lingrad.wrap`.
            decaying: Names of the parameters that decay; by default those that the Trainer chooses.

        Returns:
            The optimizer, in ``mode``.

        Raises:
            ModeError: The model was not sharded by the Trainer before this, or uses a transformed weight without calling its
                layer.
        """
        check_order(model, args)
        if decaying is None:
            trainer = optional("transformers", "lingrad.hf", "hf").Trainer
            decaying = trainer.get_decay_parameter_names(None, model)
        resolved: Rules = rules(model) if callable(rules) else rules
        settings = {"lr": args.learning_rate, "weight_decay": args.weight_decay, **_of_the_base(args, base), **options}
        settings["seed"] = args.seed if settings["seed"] is None else settings["seed"]
        if mode == "adapter":
            optimizer = adapt(model, resolved, base, ledger=ledger is not False, self_contained=True, **settings)
        else:
            optimizer = wrap(model, resolved, base, ledger=bool(ledger), **settings)
        try:
            _check_head(model, optimizer, args)
            _check_reached(model, optimizer)
        except BaseException:
            optimizer.detach()
            raise
        optimizer.exclude_from_decay({plain(name) for name in decaying}.__contains__)
        return optimizer


def _default(args: Any, name: str) -> Any:
    return next((f.default for f in fields(args) if f.name == name and f.default is not MISSING), None)


def _changed(args: Any, name: str) -> bool:
    return bool(getattr(args, name, None) != _default(args, name))


def _check_args(args: Any, base: optimizers.BaseLike, *, translated: bool) -> None:
    training_arguments = optional("transformers", "lingrad.hf", "hf").TrainingArguments
    if not isinstance(args, training_arguments):
        raise SpecError(
            f"args must be the TrainingArguments of the Trainer, not a {type(args).__name__}: "
            "lingrad.hf.trainer_kwargs(rules, args)",
            option="args",
        )
    if translated:
        return
    optim = str(getattr(args.optim, "value", args.optim))
    if is_galore(optim):
        raise SpecError(
            f"optim={optim!r} is the Trainer's own GaLore; translate it: rules, options = lingrad.hf.from_galore_args(args), "
            "then lingrad.hf.trainer_kwargs(rules, args, **options)",
            option="optim",
        )
    same = _SAME.get(base, set()) if isinstance(base, str) else set()
    if _changed(args, "optim") and optim not in same:
        known = next((name for name, words in _SAME.items() if optim in words), None)
        remedy = f"pass base='{known}' to lingrad.hf.trainer_kwargs" if known else "leave it out of TrainingArguments"
        raise SpecError(f"optim={optim!r} would have no effect: the base is {_named(base)}; {remedy}", option="optim")
    for name, instead in (
        ("optim_args", "pass options of the base to lingrad.hf.trainer_kwargs"),
        ("optim_target_modules", "rules select the modules to transform: {'*.self_attn.*': 'svd(rank=64)'}"),
    ):
        if getattr(args, name, None) is not None:
            raise SpecError(f"{name}={getattr(args, name)!r} would have no effect; {instead}", option=name)


def _check_layerwise(args: Any, layerwise: InBackward) -> None:
    if layerwise is not True:
        return
    for wrong, why in (
        (
            args.gradient_accumulation_steps != 1,
            "makes every backward a step; it cannot go with gradient_accumulation_steps other than 1",
        ),
        (getattr(args, "fp16", False), "steps before a gradient scaler can check for overflow; use bf16 instead of fp16"),
        (args.world_size > 1, "steps a weight before the processes have averaged its gradient; use one process"),
    ):
        if wrong:
            raise ModeError(f"layerwise=True {why}, or leave layerwise out")
    if args.max_grad_norm:
        warnings.warn(
            f"max_grad_norm={args.max_grad_norm} has no effect with layerwise=True, where no two gradients exist at once; "
            "TrainingArguments(max_grad_norm=0) avoids this warning",
            UserWarning,
            stacklevel=3,
        )


def _of_the_base(args: Any, base: optimizers.BaseLike) -> dict[str, Any]:
    """Betas and epsilon of the arguments: for every Adam, and for other bases where they were changed from the defaults."""
    found = optimizers.find(base, {}, decay=False)
    own, fallback = (set() if part is None else _options_of(part.factory) for part in (found, found.fallback))
    betas = _changed(args, "adam_beta1") or _changed(args, "adam_beta2")
    epsilon = _changed(args, "adam_epsilon")
    adam = {"betas", "eps"} <= own
    for chosen, taken, words in (
        (betas, "betas" in own | fallback, f"adam_beta1={args.adam_beta1}, adam_beta2={args.adam_beta2}"),
        (epsilon, adam, f"adam_epsilon={args.adam_epsilon}"),
    ):
        if chosen and not taken:
            raise SpecError(
                f"{words} would have no effect: the base {_named(base)} has no such option; leave it out of "
                "TrainingArguments, and pass options of the base to lingrad.hf.trainer_kwargs"
            )
    options: dict[str, Any] = {}
    if adam or (betas and "betas" in own | fallback):
        options["betas"] = (args.adam_beta1, args.adam_beta2)
    if adam:
        options["eps"] = args.adam_epsilon
    return options


def _options_of(factory: Callable[..., Optimizer]) -> set[str]:
    return set(signature(factory).parameters)


def _named(base: optimizers.BaseLike) -> str:
    return repr(base) if isinstance(base, str) else optimizers.name_of(base)


def _check_head(model: nn.Module, optimizer: SubspaceOptimizer, args: Any) -> None:
    """Refuse a transformed head that TRL's SFTTrainer or liger's kernels multiply by without calling its layer."""
    forward = vars(model).get("forward")
    fused = forward is not None and "fused_lm_head" in signature(forward, follow_wrapped=False).parameters
    if not (fused or getattr(args, "use_liger_kernel", False)):
        return
    head = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    for attachment in optimizer.attachments:
        if attachment.sub.weight.param is weight:
            raise ModeError(
                f"{attachment.sub.name} is transformed, but {'SFTTrainer' if fused else 'use_liger_kernel'} multiplies by it "
                f"without calling its layer, and it would not be trained; train it in full by a rule that comes first: "
                f"{{'{attachment.sub.name}': 'none', ...}}"
            )


def _check_reached(model: nn.Module, optimizer: SubspaceOptimizer) -> None:
    """The Trainer zeroes and clips the gradients of ``model.parameters()``; coordinates must be among them."""
    known = {id(param) for param in model.parameters()}
    for sub in optimizer.subspaces:
        if id(sub.coords) not in known:
            raise ModeError(
                f"the coordinates of {sub.name} are not among the model's parameters, where the Trainer would zero and clip "
                f"their gradient; train it in full by a rule that comes first: {{'{sub.name}': 'none', ...}}"
            )
