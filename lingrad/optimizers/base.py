"""Base optimizers: stock classes, found by name, that step the coordinates and whatever trains in full.

A base is used as it is; nothing here subclasses one. What the duality asks of it `lingrad.optimizers.checks` finds out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from lingrad.errors import DualityError, SpecError, did_you_mean, optional
from lingrad.optimizers.eight_bit import QuantizedOptimizer, Quantizer, find_quantizer
from lingrad.optimizers.table import STOCK, Row, Stock
from lingrad.tensors import TensorSpec

_OURS = ("moments", "min_8bit_size")  # options of any base that are not its own

BaseLike = str | type[Optimizer] | Callable[..., Optimizer]


@dataclass(frozen=True)
class Base:
    """A base optimizer that is chosen but not yet built.

    Args:
        name: What messages call it.
        factory: The optimizer class, or any callable ``factory(params, **options)``.
        options: Keyword arguments for the factory.
        fallback: The base that steps untransformed parameters, where this one cannot; None means this one.
        row: Its row in the memory ledger, if it has one.
        quantizer: How its moments are held between steps, where not as they are.
    """

    name: str
    factory: Callable[..., Optimizer]
    options: Mapping[str, Any] = field(default_factory=dict)
    fallback: Base | None = None
    row: Row | None = None
    quantizer: Quantizer | None = None

    @property
    def unquantised(self) -> Base:
        """The same base with its moments as they are."""
        return self if self.quantizer is None else replace(self, quantizer=None)

    def moments(self, shape: tuple[int, ...], dtype: torch.dtype) -> list[TensorSpec]:
        """What the base keeps of one parameter on its device, tensor by tensor: its row in the memory ledger.

        Args:
            shape: The parameter's shape.
            dtype: Its dtype.

        Returns:
            The tensors, as on CUDA; of a base without a row of its own, those of a step on the meta device. What all
            parameters share, such as the code book of 8-bit moments, is not among them.
        """
        if self.quantizer is not None:
            return self.quantizer.stored(self.unquantised.moments(shape, dtype))
        if self.row is not None:
            return self.row(shape, dtype, self.options)
        found = self.state_of(torch.empty(shape, dtype=dtype, device="meta"))
        return [TensorSpec(tuple(t.shape), t.dtype) for t in found.values() if isinstance(t, Tensor) and t.is_meta]

    def build(self, params: Iterable[Any]) -> Optimizer:
        """Build the optimizer.

        Args:
            params: Parameters or param groups, as any ``torch.optim.Optimizer`` takes them.

        Returns:
            The stock optimizer; fused where torch offers it and nobody asked otherwise; in a wrapper where its moments are
            quantised.

        Raises:
            SpecError: The factory refuses its options, or makes no optimizer.
        """
        params = list(params)
        options = dict(self.options)
        devices = _fused_on(self.factory)
        if devices and not {"fused", "foreach", "capturable", "differentiable"} & options.keys():
            options["fused"] = all(_fusible(p, devices) for p in _flatten(params))
        try:
            optimizer = self.factory(params, **options)
        except (TypeError, ValueError, IndexError, AssertionError, RuntimeError) as error:
            given = ", ".join(f"{key}={value!r}" for key, value in self.options.items())
            raise SpecError(f"base '{self.name}' refused its options ({given}): {error or type(error).__name__}") from error
        if not isinstance(optimizer, Optimizer):
            raise SpecError(f"base '{self.name}' made a {type(optimizer).__name__}; expected a torch.optim.Optimizer")
        return optimizer if self.quantizer is None else QuantizedOptimizer(optimizer, self.quantizer)

    def unfused(self) -> Base:
        """The same base without a fused kernel, which compilers do not see into; a choice of the user's stays."""
        chosen = {"fused", "foreach", "capturable", "differentiable"} & self.options.keys()
        fallback = None if self.fallback is None else self.fallback.unfused()
        options = self.options if chosen or not _fused_on(self.factory) else {**self.options, "fused": False}
        return replace(self, options=options, fallback=fallback)

    def state_of(self, param: Tensor) -> dict[str, Any]:
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
    return sorted(STOCK)


def find(base: BaseLike, options: Mapping[str, Any], *, decay: bool = True, others: Collection[str] = ()) -> Base:
    """Find a base by name, or accept a class or factory.

    Args:
        base: A name from `names`, a ``torch.optim.Optimizer`` class, or a callable ``factory(params, **options)``.
        options: Keyword arguments for it; of any base also ``moments``, ``8bit`` or ``8bit_linear``, which holds its moments as
            `lingrad.optimizers.eight_bit` says, and ``min_8bit_size``, from how many numbers of a tensor on (4096).
        decay: False switches off the decay inside the base, because the engine decays.
        others: Names of options that the caller takes itself, to tell the nearest of all where one is misspelt.

    Returns:
        The base, its options checked against its signature.

    Raises:
        SpecError: The name or one of the options is unknown.
        DualityError: A factory brings a decay of its own.
        DependencyError: The package that holds the base is not installed.
    """
    stock = Stock("")
    if isinstance(base, str):
        if base not in STOCK:
            raise SpecError(
                f"unknown base optimizer '{base}'{did_you_mean(base, names())} "
                f"Known: {', '.join(names())}; or pass an optimizer class or a factory."
            )
        name, stock = base, STOCK[base]
        factory: Callable[..., Optimizer] = _load(name, stock)
    elif callable(base):
        name, factory = getattr(base, "__name__", type(base).__name__), base
    else:
        raise SpecError(f"base must be a name, an optimizer class or a factory, not {base!r}")
    accepted = _options_of(factory)
    beside = _options_of(_load(stock.fallback, STOCK[stock.fallback])) if stock.fallback is not None else ()
    ours = {key: value for key, value in options.items() if key in _OURS and not any(key in of for of in (accepted, beside))}
    options = {key: value for key, value in options.items() if key not in ours}
    _check_options(name, [*accepted, *beside], options, others)
    merged = {**stock.options, **{k: v for k, v in options.items() if _takes(accepted, k)}}
    if not decay and "weight_decay" in accepted:
        _refuse_own_decay(name, factory)
        merged["weight_decay"] = 0.0
    found = Base(name, factory, merged, row=stock.moments)
    found = replace(found, quantizer=find_quantizer(ours, name, found.build))
    if stock.fallback is None:
        return found
    # one learning rate serves both; any other option belongs to the base itself, or else to the one beside it
    kept = {k: v for k, v in options.items() if k == "lr" or k not in accepted}
    return replace(found, fallback=find(stock.fallback, {**kept, **ours}, decay=decay))


def _load(name: str, stock: Stock) -> Callable[..., Optimizer]:
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


def _check_options(name: str, accepted: list[str], options: Mapping[str, Any], others: Collection[str]) -> None:
    known = list(dict.fromkeys(key for key in accepted if key != "weight_decay"))
    for option in options:
        if not _takes(accepted, option):
            raise SpecError(
                f"base '{name}' takes no option '{option}'{did_you_mean(option, [*known, *_OURS, *others])} "
                f"It takes: {', '.join(known)}." + (f" A run takes: {', '.join(others)}." if others else ""),
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


def _fused_on(factory: Callable[..., Optimizer]) -> set[str]:
    """The devices on which torch has a fused kernel of a class that is worth its while."""
    # not SGD: its fused kernel fails where a parameter gets its first gradient late, or a sparse one
    if not (isinstance(factory, type) and issubclass(factory, (torch.optim.Adam, torch.optim.Adagrad))):
        return set()
    devices = set(torch_optimizer._get_fused_kernels_supported_devices()) & {"cpu", "cuda", "meta"}  # type: ignore[attr-defined]
    return devices - {"cuda", "meta"} if issubclass(factory, torch.optim.Adagrad) else devices


def _flatten(params: Iterable[Any]) -> Iterable[Tensor]:
    for item in params:
        if isinstance(item, dict):
            yield from _flatten(item["params"])
        else:
            yield item[1] if isinstance(item, tuple) else item


def _fusible(param: Tensor, devices: set[str]) -> bool:
    return type(param) in (Tensor, nn.Parameter) and param.is_floating_point() and param.device.type in devices
