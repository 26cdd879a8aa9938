"""Ways to train a model, to be compared in memory and speed: lingrad's two modes, and the usual alternatives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, final, get_args

from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lingrad import optimizers
from lingrad.api import adapt, wrap
from lingrad.config import spec
from lingrad.config.methods import method_of
from lingrad.config.rules import Rules
from lingrad.config.settings import InBackward, Mode
from lingrad.config.targets import resolve_model
from lingrad.errors import ModeError, SpecError, optional, require_one_of
from lingrad.transforms.base import Transform


@dataclass
class Training:
    """A model that is ready to be trained.

    Args:
        model: The model.
        optimizers: Its optimizers. They step after every backward, or inside it if there are ``hooks``.
        layerwise: Whether each parameter is stepped, and its gradient freed, inside the backward.
        hooks: Handles of the hooks that do so.
    """

    model: nn.Module
    optimizers: list[Optimizer]
    layerwise: bool = False
    hooks: list[Any] = field(default_factory=list)

    def step(self) -> None:
        """Step after a backward; nothing to do if hooks stepped inside it."""
        if not self.hooks:
            for optimizer in self.optimizers:
                optimizer.step()

    def close(self) -> None:
        """Remove the hooks, so that model and optimizers can be freed: reference cycles through a tensor's hooks never are."""
        while self.hooks:
            self.hooks.pop().remove()

    def zero_grad(self) -> None:
        """Free all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()


class Method(ABC):
    """A way to train."""

    @property
    @abstractmethod
    def label(self) -> str:
        """Its name in tables."""

    @abstractmethod
    def prepare(self, model: nn.Module, *, layerwise: InBackward = False) -> Training:
        """Prepare a model for training.

        Args:
            model: The model, changed in place.
            layerwise: Step each parameter inside the backward as soon as its gradient is complete, and free the gradient.

        Returns:
            The model (or one that wraps it) and its optimizers.
        """


@final
@dataclass(frozen=True)
class Lingrad(Method):
    """`lingrad.wrap` or `lingrad.adapt`.

    Args:
        rules: A config string or rules.
        base: The base optimizer; None is that of the method that the rules name, or AdamW.
        mode: ``optimizer`` or ``adapter``.
        options: Options of the base and of `lingrad.wrap`.
    """

    rules: Rules
    base: optimizers.BaseLike | None = None
    mode: Mode = "optimizer"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the mode: raise `SpecError` if it is neither."""
        require_one_of(self.mode, get_args(Mode), "mode")

    @property
    @override
    def label(self) -> str:
        text = spec.format(self.rules) if isinstance(self.rules, Transform) else self.rules
        named = method_of(self.rules)
        base = self.base if self.base is not None else "adamw" if named is None else named.base
        return f"{self.mode} mode, {text}, {optimizers.name_of(base)}"

    @override
    def prepare(self, model: nn.Module, *, layerwise: InBackward = False) -> Training:
        make = wrap if self.mode == "optimizer" else adapt
        given: dict[str, Any] = {"layerwise": layerwise} if layerwise else {}
        if self.base is not None:
            given["base"] = self.base
        optimizer = make(model, self.rules, **given, **self.options)
        return Training(model, [optimizer], layerwise is True)


@final
@dataclass(frozen=True)
class FullRank(Method):
    """Every parameter in full, with an ordinary optimizer.

    Args:
        base: The optimizer.
        options: Its options.
    """

    base: optimizers.BaseLike = "adamw"
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    @override
    def label(self) -> str:
        return f"full {optimizers.name_of(self.base)}"

    @override
    def prepare(self, model: nn.Module, *, layerwise: InBackward = False) -> Training:
        refuse_packed(model, self)
        found = optimizers.find(self.base, {"lr": 1e-4, **self.options})
        if found.fallback is None:
            return _with(model, lambda params: found.build(params), [[p] for p in _trainable(model)], layerwise)
        if layerwise is True:
            raise SpecError(
                f"base '{found.name}' is not stepped inside the backward here; leave layerwise out", option="layerwise"
            )
        matrices = [target.param for target in resolve_model(model, "full()").targets]
        chosen = {id(param) for param in matrices}
        rest = [param for param in _trainable(model) if id(param) not in chosen]
        return Training(model, [found.build(matrices), found.fallback.build(rest)])


@final
@dataclass(frozen=True)
class Lora(Method):
    """PEFT's LoRA on every Linear except the output head; all other parameters are frozen.

    Args:
        rank: The rank.
        base: The optimizer of the factors.
        options: Its options.
        rslora: Scale by alpha over the root of the rank (Kalajdzievski, 2023, arXiv 2312.03732).
        ratio: The learning rate of the B factors over that of the A factors (LoRA+: Hayou et al., ICML 2024, arXiv 2402.12354).
        one_sided: Freeze the A factors, which makes it the adapter of a random right map.
    """

    rank: int
    base: optimizers.BaseLike = "adamw"
    options: Mapping[str, Any] = field(default_factory=dict)
    one_sided: bool = False
    rslora: bool = False
    ratio: float = 1.0

    @property
    @override
    def label(self) -> str:
        kind = "rsLoRA" if self.rslora else "LoRA+" if self.ratio != 1.0 else "LoRA"
        return f"{kind} (rank {self.rank}{', A frozen' if self.one_sided else ''}), {optimizers.name_of(self.base)}"

    @override
    def prepare(self, model: nn.Module, *, layerwise: InBackward = False) -> Training:
        adapted = lora_model(model, self.rank, rslora=self.rslora)
        if self.one_sided:
            for name, param in adapted.named_parameters():
                if "lora_A" in name:
                    param.requires_grad_(False)
        options = {"lr": 1e-4, **self.options}
        found = optimizers.find(self.base, options)
        faster = {id(p) for name, p in adapted.named_parameters() if "lora_B" in name} if self.ratio != 1.0 else set()

        def build(params: list[Tensor]) -> Optimizer:
            optimizer = found.build([param for param in params if id(param) not in faster])
            rest = [param for param in params if id(param) in faster]
            if rest:
                optimizer.add_param_group({"params": rest, "lr": options["lr"] * self.ratio})
            return optimizer

        return _with(adapted, build, [[p] for p in _trainable(adapted)], layerwise)


@final
@dataclass(frozen=True)
class GaloreTorch(Method):
    """galore_torch's optimizers, set up as in its README.

    Args:
        rank: Rank of the projection.
        every: Steps between refreshes.
        base: ``adamw`` or ``adamw8bit``.
        options: Options of the optimizer.
    """

    rank: int
    every: int = 200
    base: Literal["adamw", "adamw8bit"] = "adamw"
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    @override
    def label(self) -> str:
        return f"galore_torch (rank {self.rank}), {self.base}"

    @override
    def prepare(self, model: nn.Module, *, layerwise: InBackward = False) -> Training:
        refuse_packed(model, self)
        names = {"adamw": "GaLoreAdamW", "adamw8bit": "GaLoreAdamW8bit"}
        if self.base not in names:
            raise SpecError(f"galore_torch has no base '{self.base}' here; expected one of {', '.join(names)}")
        factory = getattr(optional("galore_torch", "comparing with galore_torch", "peers"), names[self.base])
        projected = [target.param for target in resolve_model(model, f"svd(rank={self.rank}, clip=true)").targets]
        chosen = {id(param) for param in projected}
        others = [param for param in _trainable(model) if id(param) not in chosen]
        galore = {"rank": self.rank, "update_proj_gap": self.every, "scale": 0.25, "proj_type": "std"}

        found = optimizers.find(factory, {"lr": 1e-4, **self.options})

        def build(params: list[Tensor]) -> Optimizer:
            low_rank = [param for param in params if id(param) in chosen]
            full = [param for param in params if id(param) not in chosen]
            groups = [{"params": full}] * bool(full) + [{"params": low_rank, **galore}] * bool(low_rank)
            return found.build(groups)

        return _with(model, build, [[param] for param in (*others, *projected)], layerwise)


def lora_model(model: nn.Module, rank: int, *, rslora: bool = False) -> nn.Module:
    """A model with PEFT's LoRA on every Linear except the output head, alpha equal to the rank; all else is frozen.

    Args:
        model: The model, changed in place.
        rank: The rank.
        rslora: Scale by alpha over the root of the rank.

    Returns:
        PEFT's model, in the dtype of the model's first parameter.
    """
    peft = optional("peft", "LoRA", "hf")
    dtype = next(model.parameters()).dtype
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", use_rslora=rslora)
    adapted: nn.Module = peft.get_peft_model(model, config, autocast_adapter_dtype=False).to(dtype)
    return adapted


def refuse_packed(model: nn.Module, method: Method) -> None:
    """Refuse a model with weights in integers, which a method that changes every weight would leave as they are.

    Args:
        model: The model.
        method: The method.

    Raises:
        ModeError: A matrix is stored in integers; the message names it.
    """
    for name, param in model.named_parameters():
        if param.dim() > 1 and not param.is_floating_point():
            dtype = str(param.dtype).removeprefix("torch.")
            raise ModeError(
                f"{method.label} changes every weight, and {name} is stored as {dtype}, which has no gradient; give a model in "
                "bfloat16 or float32"
            )


def _trainable(model: nn.Module) -> list[Tensor]:
    return [param for param in model.parameters() if param.requires_grad]


def _with(
    model: nn.Module, build: Callable[[list[Tensor]], Optimizer], groups: list[list[Tensor]], layerwise: InBackward
) -> Training:
    """One optimizer for all parameters; layerwise one per group that steps in a hook, as in GaLore's README."""
    if layerwise is not True:
        return Training(model, [build([param for group in groups for param in group])])
    training = Training(model, [build(group) for group in groups], layerwise=True)
    for optimizer, (param,) in zip(training.optimizers, groups, strict=True):

        def step(_: Tensor, optimizer: Optimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        training.hooks.append(param.register_post_accumulate_grad_hook(step))
    return training
