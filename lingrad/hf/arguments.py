"""TrainingArguments -> the optimizer: what they say is done, and what could not be done is refused.

The Trainer makes its optimizer late, when ``train()`` begins; so what is read of the arguments is read then, and what is wrong
with them is said at once.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields
from inspect import signature
from typing import Any, get_args

from torch import nn
from torch.optim import Optimizer

from lingrad import optimizers
from lingrad.api import adapt, wrap
from lingrad.config.rules import Rules, parse_rules
from lingrad.config.settings import Carry, Mode, Settings
from lingrad.engine.optimizer import SubspaceOptimizer
from lingrad.errors import ModeError, SpecError, optional, require, require_one_of
from lingrad.galore.arguments import GaloreTargets, is_galore

AnyRules = Rules | Callable[[nn.Module], Rules]

# What ``optim`` calls each base, so that saying the same thing twice is no contradiction.
_SAME = {
    "adamw": {"adamw_torch", "adamw_torch_fused"},
    "adafactor": {"adafactor"},
    "sgd": {"sgd"},
    "adagrad": {"adagrad"},
    "rmsprop": {"rmsprop"},
    "lion": {"lion_32bit"},
    "adamw8bit": {"adamw_8bit", "adamw_bnb_8bit"},
}


def trainer_kwargs(
    spec_or_rules: AnyRules,
    args: Any,
    *,
    mode: Mode = "optimizer",
    base: optimizers.BaseLike = "adamw",
    scale: float = 1.0,
    carry: Carry = "keep",
    seed: int | None = None,
    ledger: bool | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Keywords that make a Trainer train with lingrad: ``Trainer(model, args, ..., **lingrad.hf.trainer_kwargs(spec, args))``.

    Learning rate, schedule, warm-up, weight decay (of no norm and no bias, as the Trainer has it), betas, epsilon, clipping,
    accumulation, checkpointing and precision are those of ``args``. Checkpoints are complete and resume bit for bit in both
    modes.

    Args:
        spec_or_rules: As for `lingrad.wrap`; or a function from the model to that, such as `from_galore_args` gives.
        args: The TrainingArguments (or SFTConfig, ...) that the trainer gets too.
        mode: ``optimizer`` or ``adapter``.
        base: As for `lingrad.wrap`; ``args.optim`` may say the same, or stay at its default.
        scale: As for `lingrad.wrap`.
        carry: As for `lingrad.wrap`.
        seed: Seed of everything random; ``args.seed`` unless given.
        ledger: As for `lingrad.wrap`; on in adapter mode unless given, so that an adapter can be written at the end.
        **options: Whatever else `lingrad.wrap` or `lingrad.adapt` takes, and options of the base. What is given here goes
            before what ``args`` say.

    Returns:
        ``{"optimizer_cls_and_kwargs": ...}``.

    Raises:
        SpecError: A spec, rule or option is wrong; or ``args`` ask for something that would have no effect.
        ModeError: ``args`` ask for something that cannot be had: sharding, DataParallel, layerwise steps with accumulation.
        DependencyError: transformers, or the package of the base, is not installed.
    """
    optional("transformers", "lingrad.hf", "hf")
    require_one_of(mode, get_args(Mode), "mode")
    require_one_of(carry, get_args(Carry), "carry")
    translated = isinstance(spec_or_rules, GaloreTargets)
    if not callable(spec_or_rules):
        parse_rules(spec_or_rules)
    for name in ("self_contained", "model"):
        require(name not in options, name, f"'{name}' is what lingrad.hf sets; leave it out")
    _check_args(args, base, translated=translated)
    _check_layerwise(args, layerwise=bool(options.get("layerwise")))
    _check_parallel(args)
    given = {"scale": scale, "carry": carry, "seed": seed, **options}
    _, of_base = Settings.split(options)
    optimizers.find(base, {**_of_the_base(args, base), **of_base}, decay=False, others=Settings.names())
    settings = {"args": args, "rules": spec_or_rules, "mode": mode, "base": base, "ledger": ledger, "options": given}
    return {"optimizer_cls_and_kwargs": (Factory, settings)}


class Factory:
    """What the Trainer calls, ``Factory()(model, **settings)``, because it is no Optimizer: it then hands out the model."""

    def __call__(
        self,
        model: nn.Module,
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
            args: See `trainer_kwargs`.
            rules: See `trainer_kwargs`.
            mode: See `trainer_kwargs`.
            base: See `trainer_kwargs`.
            ledger: See `trainer_kwargs`.
            options: The other arguments of `lingrad.wrap`.
            decaying: Names of the parameters that decay; those that the Trainer would choose unless given.

        Returns:
            The optimizer, in ``mode``.

        Raises:
            ModeError: The model is sharded, or uses a transformed weight behind the back of its layer.
        """
        if any(type(param).__name__ == "DTensor" for param in model.parameters()):
            raise ModeError("this model is sharded, which lingrad cannot train yet; use DistributedDataParallel")
        if decaying is None:
            trainer = optional("transformers", "lingrad.hf", "hf").Trainer
            decaying = trainer.get_decay_parameter_names(None, model)
        plain: Rules = rules(model) if callable(rules) else rules
        settings = {"lr": args.learning_rate, "weight_decay": args.weight_decay, **_of_the_base(args, base), **options}
        settings["seed"] = args.seed if settings["seed"] is None else settings["seed"]
        if mode == "adapter":
            optimizer = adapt(model, plain, base, ledger=ledger is not False, self_contained=True, **settings)
        else:
            optimizer = wrap(model, plain, base, ledger=bool(ledger), **settings)
        try:
            _check_head(model, optimizer, args)
            _check_reached(model, optimizer)
        except BaseException:
            optimizer.detach()
            raise
        optimizer.exclude_from_decay(set(decaying).__contains__)
        return optimizer


def _default(args: Any, name: str) -> Any:
    return next((f.default for f in fields(args) if f.name == name and f.default is not MISSING), None)


def _changed(args: Any, name: str) -> bool:
    return bool(getattr(args, name, None) != _default(args, name))


def _check_args(args: Any, base: optimizers.BaseLike, *, translated: bool) -> None:
    training_arguments = optional("transformers", "lingrad.hf", "hf").TrainingArguments
    if not isinstance(args, training_arguments):
        raise SpecError(
            f"args must be the TrainingArguments that the Trainer gets, not a {type(args).__name__}: "
            "lingrad.hf.trainer_kwargs(spec, args)",
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
        ("optim_target_modules", "rules say which modules are transformed: {'*.self_attn.*': 'svd(rank=64)'}"),
    ):
        if getattr(args, name, None) is not None:
            raise SpecError(f"{name}={getattr(args, name)!r} would have no effect; {instead}", option=name)


def _check_layerwise(args: Any, *, layerwise: bool) -> None:
    if not layerwise:
        return
    for wrong, why in (
        (
            args.gradient_accumulation_steps != 1,
            "makes every backward a step; it cannot go with gradient_accumulation_steps other than 1",
        ),
        (getattr(args, "fp16", False), "steps before a gradient scaler could object; use bf16 instead of fp16"),
        (args.world_size > 1, "steps a weight before the processes could average its gradient; use one process"),
    ):
        if wrong:
            raise ModeError(f"layerwise=True {why}, or leave layerwise out")
    if args.max_grad_norm:
        warnings.warn(
            f"max_grad_norm={args.max_grad_norm} has no effect with layerwise=True, where no two gradients exist at once; "
            "TrainingArguments(max_grad_norm=0) says so",
            UserWarning,
            stacklevel=3,
        )


def _check_parallel(args: Any) -> None:
    on = {"1", "true", "yes", "y", "t", "on"}
    for name, used in (
        ("FSDP", bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in on),
        ("DeepSpeed", bool(args.deepspeed) or os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in on),
    ):
        if used:
            raise ModeError(f"lingrad cannot train with {name} yet; leave it out, and several processes share each step by DDP")
    if args.n_gpu > 1:
        raise ModeError(
            f"the Trainer would put {args.n_gpu} GPUs into one DataParallel, whose copies of the model train nothing; "
            "start one process for each with 'accelerate launch' or 'torchrun', or show one only: CUDA_VISIBLE_DEVICES=0"
        )


def _of_the_base(args: Any, base: optimizers.BaseLike) -> dict[str, Any]:
    """Betas and epsilon of the arguments: for every Adam, and wherever somebody has chosen them."""
    found = optimizers.find(base, {}, decay=False)
    own, beside = (set() if part is None else _options_of(part.factory) for part in (found, found.fallback))
    betas = _changed(args, "adam_beta1") or _changed(args, "adam_beta2")
    epsilon = _changed(args, "adam_epsilon")
    adam = {"betas", "eps"} <= own
    for chosen, taken, words in (
        (betas, "betas" in own | beside, f"adam_beta1={args.adam_beta1}, adam_beta2={args.adam_beta2}"),
        (epsilon, adam, f"adam_epsilon={args.adam_epsilon}"),
    ):
        if chosen and not taken:
            raise SpecError(
                f"{words} would have no effect: the base {_named(base)} has no such option; leave it out of "
                "TrainingArguments, and pass options of the base to lingrad.hf.trainer_kwargs"
            )
    options: dict[str, Any] = {}
    if adam or (betas and "betas" in own | beside):
        options["betas"] = (args.adam_beta1, args.adam_beta2)
    if adam:
        options["eps"] = args.adam_epsilon
    return options


def _options_of(factory: Callable[..., Optimizer]) -> set[str]:
    return set(signature(factory).parameters)


def _named(base: optimizers.BaseLike) -> str:
    return repr(base) if isinstance(base, str) else optimizers.name_of(base)


def _check_head(model: nn.Module, optimizer: SubspaceOptimizer, args: Any) -> None:
    """TRL's SFTTrainer and liger's kernels multiply by the head's weight themselves, which a projected backward never sees."""
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
                f"the coordinates of {sub.name} have no place in the model, where the Trainer would zero and clip their "
                f"gradient; train it in full by a rule that comes first: {{'{sub.name}': 'none', ...}}"
            )
