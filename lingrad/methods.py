"""Ways to train a model whose memory can be compared: lingrad's two modes, and what people use instead."""

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
from lingrad.config.rules import Rules
from lingrad.config.settings import Mode
from lingrad.config.targets import resolve_model
from lingrad.errors import SpecError, optional, require_one_of
from lingrad.transforms.base import Transform


@dataclass
class Training:
    """A model that is ready to be trained.

    Args:
        model: The model.
        optimizers: What steps it; after every backward, or inside it where ``hooks`` are set.
        layerwise: Whether each parameter is stepped, and its gradient freed, inside the backward.
        hooks: Handles of the hooks that do so.
    """

    model: nn.Module
    optimizers: list[Optimizer]
    layerwise: bool = False
    hooks: list[Any] = field(default_factory=list)

    def step(self) -> None:
        """Step after a backward, where nothing was stepped inside it."""
        if not self.hooks:
            for optimizer in self.optimizers:
                optimizer.step()

    def close(self) -> None:
        """Take the hooks off, so that model and optimizers can be freed: cycles through a tensor's hooks never are."""
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
        """What tables call it."""

    @abstractmethod
    def prepare(self, model: nn.Module, *, layerwise: bool = False) -> Training:
        """Make a model ready to be trained.

        Args:
            model: The model, changed in place.
            layerwise: Step each parameter inside the backward, as soon as its gradient is there, and free that.

        Returns:
            The model, which may be another one, with its optimizers.
        """


@final
@dataclass(frozen=True)
class Lingrad(Method):
    """`lingrad.wrap` or `lingrad.adapt`.

    Args:
        rules: The spec or rules.
        base: The base optimizer.
        mode: ``optimizer`` or ``adapter``.
        options: Options of the base and of `lingrad.wrap`.
    """

    rules: Rules
    base: optimizers.BaseLike = "adamw"
    mode: Mode = "optimizer"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the mode."""
        require_one_of(self.mode, get_args(Mode), "mode")

    @property
    @override
    def label(self) -> str:
        text = spec.format(self.rules) if isinstance(self.rules, Transform) else self.rules
        return f"{self.mode} mode, {text}, {name_of(self.base)}"

    @override
    def prepare(self, model: nn.Module, *, layerwise: bool = False) -> Training:
        make = wrap if self.mode == "optimizer" else adapt
        optimizer = make(model, self.rules, self.base, layerwise=layerwise, **self.options)
        return Training(model, [optimizer], layerwise)


@final
@dataclass(frozen=True)
class Full(Method):
    """Every parameter in full, by a stock optimizer.

    Args:
        base: The optimizer.
        options: Its options.
    """

    base: optimizers.BaseLike = "adamw"
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    @override
    def label(self) -> str:
        return f"full {name_of(self.base)}"

    @override
    def prepare(self, model: nn.Module, *, layerwise: bool = False) -> Training:
        found = optimizers.find(self.base, {"lr": 1e-4, **self.options})
        return _with(model, lambda params: found.build(params), [[p] for p in _trainable(model)], layerwise)


@final
@dataclass(frozen=True)
class Lora(Method):
    """PEFT's LoRA on every Linear but the output head, the rest of the model frozen.

    Args:
        rank: Its rank.
        base: The optimizer of the factors.
        options: Its options.
        one_sided: Freeze the A factors, which makes it the adapter of a random right map.
    """

    rank: int
    base: optimizers.BaseLike = "adamw"
    options: Mapping[str, Any] = field(default_factory=dict)
    one_sided: bool = False

    @property
    @override
    def label(self) -> str:
        return f"LoRA (rank {self.rank}{', A frozen' if self.one_sided else ''}), {name_of(self.base)}"

    @override
    def prepare(self, model: nn.Module, *, layerwise: bool = False) -> Training:
        peft = optional("peft", "LoRA", "hf")
        dtype = next(model.parameters()).dtype
        config = peft.LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules="all-linear", lora_dropout=0.0)
        adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=False).to(dtype)
        if self.one_sided:
            for name, param in adapted.named_parameters():
                if "lora_A" in name:
                    param.requires_grad_(False)
        found = optimizers.find(self.base, {"lr": 1e-4, **self.options})
        return _with(adapted, lambda params: found.build(params), [[p] for p in _trainable(adapted)], layerwise)


@final
@dataclass(frozen=True)
class GaloreTorch(Method):
    """galore_torch's own optimizers, as its README sets them up.

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
    def prepare(self, model: nn.Module, *, layerwise: bool = False) -> Training:
        names = {"adamw": "GaLoreAdamW", "adamw8bit": "GaLoreAdamW8bit"}
        if self.base not in names:
            raise SpecError(f"galore_torch has no base '{self.base}' that serves here; expected one of {', '.join(names)}")
        factory = getattr(optional("galore_torch", "comparing with galore_torch", "peers"), names[self.base])
        projected = [target.param for target in resolve_model(model, f"svd(rank={self.rank}, clip=true)").targets]
        chosen = {id(param) for param in projected}
        rest = [param for param in _trainable(model) if id(param) not in chosen]
        galore = {"rank": self.rank, "update_proj_gap": self.every, "scale": 0.25, "proj_type": "std"}

        def build(params: list[Tensor]) -> Optimizer:
            ours = [param for param in params if id(param) in chosen]
            others = [param for param in params if id(param) not in chosen]
            groups = [{"params": others}] * bool(others) + [{"params": ours, **galore}] * bool(ours)
            optimizer: Optimizer = factory(groups, lr=1e-4, **self.options)
            return optimizer

        return _with(model, build, [[param] for param in (*rest, *projected)], layerwise)


def name_of(base: optimizers.BaseLike) -> str:
    """What messages call a base."""
    return base if isinstance(base, str) else getattr(base, "__name__", type(base).__name__)


def _trainable(model: nn.Module) -> list[Tensor]:
    return [param for param in model.parameters() if param.requires_grad]


def _with(
    model: nn.Module, build: Callable[[list[Tensor]], Optimizer], groups: list[list[Tensor]], layerwise: bool
) -> Training:
    """One optimizer for all parameters, or one for each that steps in a hook (the layerwise recipe of GaLore's README)."""
    if not layerwise:
        return Training(model, [build([param for group in groups for param in group])])
    training = Training(model, [build(group) for group in groups], layerwise=True)
    for optimizer, (param,) in zip(training.optimizers, groups, strict=True):

        def step(_: Tensor, optimizer: Optimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        training.hooks.append(param.register_post_accumulate_grad_hook(step))
    return training
