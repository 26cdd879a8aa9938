"""Base optimizers: stock classes, found by name, that step the coordinates and whatever trains in full.

A base is used as it is; nothing here subclasses one. What the duality asks of it is that its update reads only gradients
(Torroba-Hennigen et al., ICML 2025, arXiv 2502.13811, section 3), which `reads_only_gradients` finds out by running it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lingrad.errors import DualityError, SpecError, did_you_mean, optional

BaseLike = str | type[Optimizer] | Callable[..., Optimizer]


@dataclass(frozen=True)
class _Stock:
    """Where a named base lives, and the options that make it fit."""

    path: str
    options: Mapping[str, Any] = field(default_factory=dict)
    extra: str = "all"
    rest: str | None = None  # the base for parameters this one cannot step


_STOCK: dict[str, _Stock] = {
    "adamw": _Stock("torch.optim.AdamW"),
    "adam": _Stock("torch.optim.Adam"),
    "sgd": _Stock("torch.optim.SGD"),
    "rmsprop": _Stock("torch.optim.RMSprop"),
    "adagrad": _Stock("torch.optim.Adagrad"),
    # Muon steps matrices only; its update is rescaled to AdamW's so that one learning rate serves both.
    "muon": _Stock("torch.optim.Muon", {"adjust_lr_fn": "match_rms_adamw"}, rest="adamw"),
    "lion": _Stock("lion_pytorch.Lion", extra="lion"),
    "adafactor": _Stock(
        "transformers.optimization.Adafactor",
        {"lr": 1e-3, "scale_parameter": False, "relative_step": False, "warmup_init": False},
        extra="hf",
    ),
    "adamw8bit": _Stock("bitsandbytes.optim.AdamW8bit", extra="bnb"),
}


@dataclass(frozen=True)
class Base:
    """A base optimizer that is chosen but not yet built.

    Args:
        name: What messages call it.
        factory: The optimizer class, or any callable ``factory(params, **options)``.
        options: Keyword arguments for the factory.
        rest: The base that steps untransformed parameters, where this one cannot; None means this one.
    """

    name: str
    factory: Callable[..., Optimizer]
    options: Mapping[str, Any] = field(default_factory=dict)
    rest: Base | None = None

    def build(self, params: Iterable[Any]) -> Optimizer:
        """Build the optimizer.

        Args:
            params: Parameters or param groups, as any ``torch.optim.Optimizer`` takes them.

        Returns:
            The stock optimizer; fused where torch offers it and nobody asked otherwise.
        """
        params = list(params)
        options = dict(self.options)
        accepted = _signature(self.factory)
        if "fused" in accepted and not {"fused", "foreach", "capturable", "differentiable"} & options.keys():
            options["fused"] = all(_fusible(p) for p in _flatten(params))
        return self.factory(params, **options)


@dataclass(frozen=True)
class Choice:
    """A base optimizer as a config string names it: hashable and comparable.

    Args:
        name: A name from `names`.
        options: Its options, as (name, value) pairs.
    """

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def base(self, **defaults: Any) -> Base:
        """Find the base.

        Args:
            **defaults: Options that hold unless the choice names them itself.

        Returns:
            The base, its options checked.
        """
        return find(self.name, {**defaults, **dict(self.options)})


def names() -> list[str]:
    """The names `find` knows."""
    return sorted(_STOCK)


def find(base: BaseLike, options: Mapping[str, Any], *, decay: bool = True) -> Base:
    """Find a base by name, or accept a class or factory.

    Args:
        base: A name from `names`, a ``torch.optim.Optimizer`` class, or a callable ``factory(params, **options)``.
        options: Keyword arguments for it.
        decay: False switches off the decay inside the base, because the engine decays.

    Returns:
        The base, its options checked against its signature.

    Raises:
        SpecError: The name or one of the options is unknown.
        DependencyError: The package that holds the base is not installed.
    """
    stock = _Stock("")
    if isinstance(base, str):
        if base not in _STOCK:
            raise SpecError(
                f"unknown base optimizer '{base}'{did_you_mean(base, names())} "
                f"Known: {', '.join(names())}; or pass an optimizer class or a factory."
            )
        name, stock = base, _STOCK[base]
        factory: Callable[..., Optimizer] = _load(name, stock)
    elif callable(base):
        name, factory = getattr(base, "__name__", type(base).__name__), base
    else:
        raise SpecError(f"base must be a name, an optimizer class or a factory, not {base!r}")
    accepted = _signature(factory)
    _check_options(name, accepted, options)
    merged = {**stock.options, **options}
    if not decay and "weight_decay" in accepted:
        merged["weight_decay"] = 0.0
    rest = None
    if stock.rest is not None:
        shared = _signature(_load(stock.rest, _STOCK[stock.rest]))
        kept = {k: v for k, v in options.items() if k in shared and k in ("lr", "fused", "foreach")}
        rest = find(stock.rest, kept, decay=decay)
    return Base(name, factory, merged, rest)


def check_reads_only_gradients(base: Base) -> None:
    """Run a base on two parameters that differ, with equal gradients, and compare its updates.

    Args:
        base: The base to try; a few steps on an 8 x 8 parameter.

    Raises:
        DualityError: The updates differ, so the two modes would part.
    """
    start = _draw(8)
    moved = _trial(base, torch.zeros_like(start), 1.0)[0]
    other = _trial(base, start, 1.0)[0]
    # float32 arithmetic of a stock optimizer agrees to about 1e-5; a norm of the parameter would show as 1e-1 or more
    if not torch.allclose(moved, other, rtol=1e-3, atol=1e-3 * float(moved.abs().max())):
        raise DualityError(
            f"the update of base '{base.name}' reads the parameter, not only its gradient (a trust ratio, parameter "
            "scaling or a decay of its own), so optimizer mode and adapter mode would differ. "
            "Switch that off in the base (weight decay is the engine's: weight_decay=...), or choose another base."
        )


def moment_degrees(base: Base) -> dict[str, int]:
    """Find how each moment of a base grows with the gradient: 1 for means, 2 for squares.

    Args:
        base: The base to try; a few steps on a 64 x 64 parameter, large enough to be quantised where a base does that.

    Returns:
        State key -> degree, for every state tensor that has the parameter's shape.

    Raises:
        DualityError: A state tensor is neither, so that it cannot be rotated into another basis.
    """
    start = torch.zeros(64, 64)
    once, twice = (_trial(base, start, factor)[1] for factor in (1.0, 2.0))
    degrees = {}
    for key, value in once.items():
        if not isinstance(value, Tensor) or value.numel() == 1:
            continue
        degree = next((d for d in (1, 2) if _grew(value, twice[key], 2.0**d)), None)
        if value.shape != start.shape or degree is None:
            raise DualityError(
                f"carry='rotate' cannot rotate the state '{key}' of base '{base.name}' (it is quantised, factored or "
                "not a moment of the gradient); use carry='keep' or carry='reset'"
            )
        degrees[key] = degree
    return degrees


def _load(name: str, stock: _Stock) -> Callable[..., Optimizer]:
    module, _, attribute = stock.path.rpartition(".")
    factory: Callable[..., Optimizer] = getattr(optional(module, f"base '{name}'", stock.extra), attribute)
    return factory


@cache
def _signature(factory: Callable[..., Optimizer]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(factory).parameters


def _check_options(name: str, accepted: Mapping[str, inspect.Parameter], options: Mapping[str, Any]) -> None:
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values()):
        return
    known = [key for key in list(accepted)[1:] if key != "weight_decay"]  # the first one is params
    for option in options:
        if option not in accepted:
            raise SpecError(
                f"base '{name}' takes no option '{option}'{did_you_mean(option, known)} It takes: {', '.join(known)}.",
                option=option,
            )


def _flatten(params: Iterable[Any]) -> Iterable[Tensor]:
    for item in params:
        if isinstance(item, dict):
            yield from _flatten(item["params"])
        else:
            yield item[1] if isinstance(item, tuple) else item


def _fusible(param: Tensor) -> bool:
    return type(param) in (Tensor, nn.Parameter) and param.is_floating_point() and param.device.type in ("cpu", "cuda")


def _draw(size: int) -> Tensor:
    return torch.randn(size, size, generator=torch.Generator().manual_seed(0))


def _trial(base: Base, start: Tensor, factor: float) -> tuple[Tensor, dict[str, Any]]:
    """Three steps from ``start``; returns how far the parameter went and the state it left."""
    param = nn.Parameter(start.clone())
    optimizer = base.build([param])
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        param.grad = factor * torch.randn(start.shape, generator=generator)
        optimizer.step()
    return param.detach() - start, dict(optimizer.state[param])


def _grew(once: Tensor, twice: Tensor, factor: float) -> bool:
    return once.is_floating_point() and torch.allclose(twice, factor * once, rtol=1e-3, atol=0.0)
