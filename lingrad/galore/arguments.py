"""The arguments of the Trainer's own GaLore, translated: ``optim``, ``optim_target_modules`` and ``optim_args``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from lingrad.config import spec
from lingrad.errors import SpecError, did_you_mean, optional, require
from lingrad.galore.names import BASES, DEFAULTS, LAYERWISE, SIDES
from lingrad.transforms import SVD


@dataclass(frozen=True)
class GaloreTargets:
    """Rules to be resolved with a model: the layers that ``optim_target_modules`` selects, by the Trainer's own matching.

    Args:
        spec: The transform, as a config string.
        modules: A regular expression for full names, ``all-linear``, or a tuple of names, parts of names and expressions.
    """

    spec: str
    modules: str | tuple[str, ...]

    def __call__(self, model: nn.Module) -> dict[str, str]:
        """The rules for a model: each selected weight by its name.

        Args:
            model: The model.

        Returns:
            Parameter name -> spec; all others train in full.

        Raises:
            SpecError: No trainable linear layer is selected.
        """
        matches = optional("transformers.trainer_utils", "lingrad.hf", "hf").check_target_module_exists
        modules = self.modules if isinstance(self.modules, str) else list(self.modules)
        everything = isinstance(modules, str) and modules.replace("_", "-") == "all-linear"
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        chosen = {f"{name}.weight" for name in linear if everything or matches(modules, name)}
        # a weight that is tied to another one has the other's name, and is not selected
        rules = {name: self.spec for name, param in model.named_parameters() if name in chosen and param.requires_grad}
        if not rules:
            raise SpecError(
                f"optim_target_modules={modules!r} selects no trainable linear layer of {type(model).__name__}, which has "
                f"{', '.join(linear[:3]) or 'none'}{', ...' if len(linear) > 3 else ''}",
                option="optim_target_modules",
            )
        return rules


def from_galore_args(args: Any, *, as_published: bool = False) -> tuple[GaloreTargets, dict[str, Any]]:
    """Translate a configuration of the Trainer's own GaLore.

    ::

        rules, options = lingrad.hf.from_galore_args(args)
        Trainer(model, args, ..., **lingrad.hf.trainer_kwargs(rules, args, **options))

    The Trainer's own GaLore ignores ``weight_decay``, betas and epsilon of the arguments, cannot resume, and ignores the
    schedule if layerwise; lingrad honors them and resumes.

    Args:
        args: TrainingArguments with ``optim="galore_..."``, ``optim_target_modules`` and ``optim_args``.
        as_published: Follow the Trainer's own GaLore to rounding: galore_torch's arithmetic, no decay, betas (0.9, 0.999) and
            eps 1e-6, regardless of the arguments. For ``galore_adamw`` only.

    Returns:
        The rules for `trainer_kwargs`, and its other arguments: ``base``, ``scale`` and, if ``optim`` has it, ``layerwise``.

    Raises:
        SpecError: ``args`` are no TrainingArguments, or have another optimizer or unknown options.
    """
    needed = ("optim", "optim_args", "optim_target_modules")
    require(
        all(hasattr(args, name) for name in needed),
        "args",
        f"args must be the TrainingArguments of the Trainer, not {args!r}",
    )
    optim = str(getattr(args.optim, "value", args.optim))
    name = optim.removesuffix(LAYERWISE)
    if name not in BASES:
        why = (
            "; APOLLO's update is not a linear map of the gradient, and has no counterpart here"
            if name.startswith("apollo")
            else ""
        )
        raise SpecError(
            f"optim={optim!r} is none of {', '.join(BASES)}, or one of these with '{LAYERWISE}'{why}", option="optim"
        )
    found = {**DEFAULTS, **_parse(args.optim_args)}
    side = found["proj_type"]
    if side not in SIDES:
        raise SpecError(
            f"proj_type must be one of {', '.join(SIDES)}, not {side!r}{did_you_mean(side, SIDES)}", option="proj_type"
        )
    modules = args.optim_target_modules
    if not modules or not (
        isinstance(modules, str) or (isinstance(modules, list) and all(isinstance(m, str) for m in modules))
    ):
        raise SpecError(
            f"optim_target_modules must be a regular expression, 'all-linear', or a list of strings, not {modules!r}",
            option="optim_target_modules",
        )
    _check_expressions(modules)
    transform = SVD(
        rank=_number("rank", found["rank"], int),
        every=_number("update_proj_gap", found["update_proj_gap"], int),
        side=SIDES[side],  # type: ignore[arg-type]
        clip=True,  # galore_torch takes a slice of all singular vectors
    )
    options: dict[str, Any] = {"base": BASES[name], "scale": _number("scale", found["scale"], float)}
    if optim.endswith(LAYERWISE):
        options["layerwise"] = True
    if as_published:
        if options["base"] != "adamw":
            raise SpecError(
                f"as_published=True is for galore_adamw, whose arithmetic is reproduced, not for {optim!r}",
                option="as_published",
            )
        options |= {"compat": "galore", "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0}
    return GaloreTargets(spec.format(transform), modules if isinstance(modules, str) else tuple(modules)), options


def _parse(text: str | None) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in (text or "").replace(" ", "").split(",") if text else ():
        key, equals, value = part.partition("=")
        if not equals or "=" in value:
            raise SpecError(f"optim_args is written 'rank=64, scale=0.1', not {text!r}", option="optim_args")
        if key not in DEFAULTS:
            raise SpecError(
                f"optim_args has '{key}', which is not an option of GaLore{did_you_mean(key, DEFAULTS)} "
                f"Its options are {', '.join(DEFAULTS)}.",
                option="optim_args",
            )
        if key in found:
            raise SpecError(f"optim_args has '{key}' twice", option="optim_args")
        found[key] = value
    return found


def _number(name: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise SpecError(
            f"optim_args has {name}={text}; expected {'a whole' if kind is int else 'a'} number", option=name
        ) from None


def _check_expressions(modules: str | list[str]) -> None:
    for text in [modules] if isinstance(modules, str) else modules:
        try:
            re.compile(text)
        except re.error as error:
            raise SpecError(f"optim_target_modules has {text!r}, which is not a regular expression: {error}") from None
