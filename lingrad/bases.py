"""Base optimizers: stock classes, found by name, that step the coordinates and whatever trains in full.

A base is used as it is; nothing here subclasses one. What the duality asks of it is that its update reads only gradients
(Torroba-Hennigen et al., ICML 2025, arXiv 2502.13811, section 3), which `check_reads_only_gradients` finds out by running it.
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

# Large enough to be quantised, where a base does that from 4096 numbers on.
TRIAL_SHAPE = (64, 64)
TRIAL_STEPS = 3

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

        Raises:
            SpecError: The factory refuses its options, or makes no optimizer.
        """
        params = list(params)
        options = dict(self.options)
        if _has_fused(self.factory) and not {"fused", "foreach", "capturable", "differentiable"} & options.keys():
            options["fused"] = all(_fusible(p) for p in _flatten(params))
        try:
            optimizer = self.factory(params, **options)
        except (TypeError, ValueError, IndexError, AssertionError, RuntimeError) as error:
            given = ", ".join(f"{key}={value!r}" for key, value in self.options.items())
            raise SpecError(f"base '{self.name}' refused its options ({given}): {error or type(error).__name__}") from error
        if not isinstance(optimizer, Optimizer):
            raise SpecError(f"base '{self.name}' made a {type(optimizer).__name__}; expected a torch.optim.Optimizer")
        return optimizer

    def memory(self, param: Tensor) -> dict[str, Any]:
        """What the optimizer keeps of a parameter after its first step, of no meaning but in names, dtypes and shapes.

        Args:
            param: The parameter; not touched.

        Returns:
            Its state entries.
        """
        trial = nn.Parameter(torch.zeros_like(param))
        trial.grad = torch.zeros_like(trial)
        optimizer = self.build([trial])
        optimizer.step()
        return dict(optimizer.state[trial])


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
        DualityError: A factory brings a decay of its own.
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
    accepted = _options_of(factory)
    others = _options_of(_load(stock.rest, _STOCK[stock.rest])) if stock.rest is not None else ()
    _check_options(name, [*accepted, *others], options)
    merged = {**stock.options, **{k: v for k, v in options.items() if _takes(accepted, k)}}
    if not decay and "weight_decay" in accepted:
        _refuse_own_decay(name, factory)
        merged["weight_decay"] = 0.0
    if stock.rest is None:
        return Base(name, factory, merged)
    # one learning rate serves both; any other option belongs to the base itself, or else to the one beside it
    kept = {k: v for k, v in options.items() if k == "lr" or k not in accepted}
    return Base(name, factory, merged, find(stock.rest, kept, decay=decay))


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
    places = torch.randn(TRIAL_STEPS, *TRIAL_SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved, _ = _trial(base, [torch.zeros(TRIAL_SHAPE)])
    other, _ = _trial(base, list(places))
    # bitsandbytes rounds to float32, which leaves 4e-7 of updates of about 1; a decay of 1e-5 would leave 3e-5
    if not torch.allclose(moved, other, rtol=0, atol=2e-6 * float(moved.abs().max())):
        raise DualityError(
            f"the update of base '{base.name}' reads the parameter, not only its gradient (a trust ratio, parameter "
            "scaling, a decay of its own, or a memory of where the parameter was), so optimizer mode and adapter mode would "
            "differ. Switch that off in the base (weight decay is the engine's: weight_decay=...), or choose another base."
        )


def moment_degrees(base: Base) -> dict[str, int]:
    """Find how each moment of a base grows with the gradient: 1 for means, 2 for squares.

    Args:
        base: The base to try, as `check_reads_only_gradients` does.

    Returns:
        State key -> degree, for every state tensor that has the parameter's shape.

    Raises:
        DualityError: A state tensor is neither, so that it cannot be rotated into another basis.
    """
    start = [torch.zeros(TRIAL_SHAPE)]
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


def _load(name: str, stock: _Stock) -> Callable[..., Optimizer]:
    module, _, attribute = stock.path.rpartition(".")
    factory: Callable[..., Optimizer] = getattr(optional(module, f"base '{name}'", stock.extra), attribute)
    return factory


@cache
def _options_of(factory: Callable[..., Optimizer]) -> tuple[str, ...]:
    """The names of a factory's options, without its first parameter, params; ``**`` where it takes any."""
    parameters = list(inspect.signature(factory).parameters.values())[1:]
    return tuple("**" if p.kind is inspect.Parameter.VAR_KEYWORD else p.name for p in parameters)


def _takes(accepted: Iterable[str], option: str) -> bool:
    return option in accepted or "**" in accepted


def _check_options(name: str, accepted: list[str], options: Mapping[str, Any]) -> None:
    known = list(dict.fromkeys(key for key in accepted if key != "weight_decay"))
    for option in options:
        if not _takes(accepted, option):
            raise SpecError(
                f"base '{name}' takes no option '{option}'{did_you_mean(option, known)} It takes: {', '.join(known)}.",
                option=option,
            )


def _refuse_own_decay(name: str, factory: Callable[..., Optimizer]) -> None:
    """A class has a default decay that nobody chose, and gets 0; somebody chose that of a factory."""
    chosen = inspect.signature(factory).parameters["weight_decay"].default
    if not isinstance(factory, type) and chosen not in (0, inspect.Parameter.empty):
        raise DualityError(
            f"base '{name}' has weight_decay={chosen}; a decay inside the base would part the two modes. "
            "Leave it out there and give it to the engine: lingrad.wrap(..., weight_decay=...)"
        )


def _has_fused(factory: Callable[..., Optimizer]) -> bool:
    # not SGD: its fused kernel fails where a parameter gets its first gradient late, or a sparse one
    return isinstance(factory, type) and issubclass(factory, (torch.optim.Adam, torch.optim.Adagrad))


def _flatten(params: Iterable[Any]) -> Iterable[Tensor]:
    for item in params:
        if isinstance(item, dict):
            yield from _flatten(item["params"])
        else:
            yield item[1] if isinstance(item, tuple) else item


def _fusible(param: Tensor) -> bool:
    return type(param) in (Tensor, nn.Parameter) and param.is_floating_point() and param.device.type in ("cpu", "cuda")


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


def _updates(optimizer: Optimizer, param: nn.Parameter, places: list[Tensor], factor: float) -> Tensor:
    gradients = torch.randn(TRIAL_STEPS, *TRIAL_SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
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
