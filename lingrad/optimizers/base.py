"""Base optimizers: existing classes, found by name, that step the coordinates and the parameters that train in full.

A base is used unmodified; nothing here subclasses one. `lingrad.optimizers.checks` tests what the duality requires of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from lingrad.errors import DualityError, SpecError, did_you_mean, optional
from lingrad.optimizers.eight_bit import QuantizedOptimizer, Quantizer, find_quantizer
from lingrad.optimizers.table import BUILT_IN, BuiltIn, StateRow
from lingrad.tensors import TensorSpec, is_sharded

_OF_ANY_BASE = ("moments", "min_8bit_size")  # options of every base, read by lingrad

BaseLike = str | type[Optimizer] | Callable[..., Optimizer]


@dataclass(frozen=True)
class Base:
    """A base optimizer that is chosen but not built yet.

    Args:
        name: Its name in messages.
        factory: The optimizer class, or any callable ``factory(params, **options)``.
        options: Keyword arguments for the factory.
        fallback: The base that steps the parameters that train in full; None means this one.
        row: Its state for a parameter, as the memory estimate counts it; None means that of a dry run.
        quantizer: How its moments are stored between steps; None means unquantised.
        hint: What messages about refused options end with.
    """

    name: str
    factory: Callable[..., Optimizer]
    options: Mapping[str, Any] = field(default_factory=dict)
    fallback: Base | None = None
    row: StateRow | None = None
    quantizer: Quantizer | None = None
    hint: str = ""

    @property
    def unquantised(self) -> Base:
        """The same base with unquantised moments."""
        return self if self.quantizer is None else replace(self, quantizer=None)

    def moments(self, shape: tuple[int, ...], dtype: torch.dtype) -> list[TensorSpec]:
        """The optimizer state of one parameter on its device, as the memory estimate counts it.

        Args:
            shape: The parameter's shape.
            dtype: Its dtype.

        Returns:
            Its tensors, as on CUDA; for a base without ``row``, those of a step on the meta device. Tensors that all
            parameters share, such as the code book of 8-bit moments, are not included.
        """
        if self.quantizer is not None:
            return self.quantizer.encoded_specs(self.unquantised.moments(shape, dtype))
        if self.row is not None:
            return self.row(shape, dtype, self.options)
        found = self.state_of(torch.empty(shape, dtype=dtype, device="meta")).values()
        return [TensorSpec(tuple(t.shape), t.dtype) for t in found if isinstance(t, Tensor) and t.is_meta]

    def build(self, params: Iterable[Any]) -> Optimizer:
        """Build the optimizer.

        Args:
            params: Parameters or param groups, as any ``torch.optim.Optimizer`` takes them.

        Returns:
            The optimizer, fused if torch can and no option says otherwise; a `QuantizedOptimizer` for quantised moments.

        Raises:
            SpecError: The factory refuses its options, or returns no optimizer.
        """
        params, options = list(params), dict(self.options)
        devices = _fused_on(self.factory)
        if devices and not {"fused", "foreach", "differentiable"} & options.keys():  # fused and capturable go together
            flat = list(_flatten(params))  # a fused kernel takes plain tensors or DTensors, not both
            options["fused"] = all(_fusible(p, devices) for p in flat) and len({is_sharded(p) for p in flat}) == 1
        try:
            optimizer = self.factory(params, **options)
        except Exception as error:  # other code
            given = ", ".join(f"{key}={value!r}" for key, value in self.options.items())
            why = f"{error or type(error).__name__}{self.hint}"
            raise SpecError(f"base '{self.name}' refused its options ({given}): {why}") from error
        if not isinstance(optimizer, Optimizer):
            raise SpecError(f"base '{self.name}' returned a {type(optimizer).__name__}; expected a torch.optim.Optimizer")
        return optimizer if self.quantizer is None else QuantizedOptimizer(optimizer, self.quantizer)

    def build_dry(self, params: Iterable[Any]) -> Optimizer:
        """Build the optimizer for steps on no GPU, whose numbers are the same; ``capturable`` is only for one.

        Args:
            params: Parameters or param groups.

        Returns:
            The optimizer.
        """
        optimizer = self.build(params)
        for group in optimizer.param_groups:
            if group.get("capturable"):
                group["capturable"], group["lr"] = False, float(group["lr"])
        return optimizer

    def compiled(self, options: Mapping[str, Any]) -> Base:
        """The same base for ``torch.compile``: without a fused kernel, unless one was asked for, or with compiled codes."""
        fallback = None if self.fallback is None else self.fallback.compiled(options)
        if self.quantizer is not None:
            return replace(self, quantizer=self.quantizer.compiled(options), fallback=fallback)
        chosen = {"fused", "foreach", "capturable", "differentiable"} & self.options.keys()
        own = self.options if chosen or not _fused_on(self.factory) else {**self.options, "fused": False}
        return replace(self, options=own, fallback=fallback)

    def state_of(self, param: Tensor) -> dict[str, Any]:
        """The optimizer state of a parameter after a first step; only its names, dtypes and shapes have a meaning.

        Args:
            param: The parameter; not modified.

        Returns:
            Its state entries.
        """
        dummy = nn.Parameter(torch.zeros_like(param))
        dummy.grad = torch.zeros_like(dummy)
        optimizer = self.build_dry([dummy]) if param.device.type in ("cpu", "meta") else self.build([dummy])
        optimizer.step()
        return dict(optimizer.state[dummy])


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
            **defaults: Options that are used unless the choice sets them.

        Returns:
            The base, its options checked.
        """
        return find(self.name, {**defaults, **dict(self.options)})


def names() -> list[str]:
    """The names that `find` accepts."""
    return sorted(BUILT_IN)


def find(base: BaseLike, options: Mapping[str, Any], *, decay: bool = True, others: Collection[str] = ()) -> Base:
    """Find a base by name, or accept a class or factory.

    Args:
        base: A name from `names`, a ``torch.optim.Optimizer`` class, or a callable ``factory(params, **options)``.
        options: Keyword arguments for it. Any base also takes ``moments``, ``8bit`` or ``8bit_linear``, to store its moments as
            `lingrad.optimizers.eight_bit` describes, and ``min_8bit_size``, the fewest elements of a tensor that is quantised
            (4096).
        decay: False switches off the decay inside the base, because the engine decays.
        others: Names of options that the caller takes; a misspelt option is compared with these too.

    Returns:
        The base, its options checked against its signature.

    Raises:
        SpecError: The name or one of the options is unknown.
        DualityError: A factory has a weight decay of its own.
        DependencyError: The package of the base is not installed.
    """
    built_in = BuiltIn("")
    if isinstance(base, str):
        if base not in BUILT_IN:
            raise SpecError(
                f"unknown base optimizer '{base}'{did_you_mean(base, names())} "
                f"Known: {', '.join(names())}; or pass an optimizer class or a factory."
            )
        name, built_in = base, BUILT_IN[base]
        factory: Callable[..., Optimizer] = _load(name, built_in)
    elif callable(base):
        name, factory, built_in = name_of(base), base, _fallback_of(base)
    else:
        raise SpecError(f"base must be a name, an optimizer class or a factory, not {base!r}")
    accepted, fallback = _option_names(factory), built_in.fallback
    known = [*accepted, *(() if fallback is None else _option_names(_load(fallback, BUILT_IN[fallback])))]
    general = {key: value for key, value in options.items() if key in _OF_ANY_BASE and key not in known}
    options = {key: value for key, value in options.items() if key not in general}
    _check_options(name, known, options, others)
    merged = {**built_in.options, **{k: v for k, v in options.items() if _takes(accepted, k)}}
    if not decay and "weight_decay" in accepted:
        _refuse_own_decay(name, factory)
        merged["weight_decay"] = 0.0
    found = Base(name, factory, merged, None, built_in.moments, hint=_hint(accepted, options, others))
    found = replace(found, quantizer=find_quantizer(general, name, found.build_dry))
    if fallback is None:
        return found
    # both have one learning rate; any other option belongs to the base if it takes it, otherwise to the fallback
    left = {k: v for k, v in options.items() if k == "lr" or k not in accepted}
    return replace(found, fallback=find(fallback, {**left, **general}, decay=decay))


def _fallback_of(factory: Callable[..., Optimizer]) -> BuiltIn:
    """What a class has of the table: the fallback, if it is one of those, or derived from one, that cannot step everything."""
    for name, row in BUILT_IN.items():
        if row.fallback is not None and isinstance(factory, type) and issubclass(factory, _load(name, row)):  # type: ignore[arg-type]
            return replace(row, options={})
    return BuiltIn("")


def name_of(base: BaseLike) -> str:
    """The name of a base in messages: the one given, or that of the class or factory."""
    return base if isinstance(base, str) else getattr(base, "__name__", type(base).__name__)


def _load(name: str, built_in: BuiltIn) -> Callable[..., Optimizer]:
    module, _, attribute = built_in.path.rpartition(".")
    factory: Callable[..., Optimizer] = getattr(optional(module, f"base '{name}'", built_in.extra), attribute)
    return factory


def _option_names(factory: Callable[..., Optimizer]) -> tuple[str, ...]:
    """The names of a factory's options, without its first parameter, params; ``**`` if it takes any."""
    try:
        parameters = list(inspect.signature(factory).parameters.values())[1:]
    except (TypeError, ValueError) as error:
        raise SpecError(f"base '{name_of(factory)}' cannot be used, since its options cannot be read: {error}") from error
    return tuple("**" if p.kind is inspect.Parameter.VAR_KEYWORD else p.name for p in parameters)


def _takes(accepted: Iterable[str], option: str) -> bool:
    return option in accepted or "**" in accepted


def _check_options(name: str, accepted: list[str], options: Mapping[str, Any], others: Collection[str]) -> None:
    known = list(dict.fromkeys(key for key in accepted if key != "weight_decay"))
    for option in options:
        if not _takes(accepted, option):
            raise SpecError(
                f"base '{name}' takes no option '{option}'{did_you_mean(option, [*known, *_OF_ANY_BASE, *others])} "
                f"It takes: {', '.join(known)}." + (f" A run takes: {', '.join([*others, *_OF_ANY_BASE])}." if others else ""),
                option=option,
            )


def _hint(accepted: Collection[str], options: Mapping[str, Any], others: Collection[str]) -> str:
    """What is appended to the error of a factory that takes any option: which of these may be misspelt ones of the caller."""
    near = {option: did_you_mean(option, others) for option in options if option not in accepted}
    return "".join(f"; '{option}' may be an option of a run{text}" for option, text in near.items() if text.startswith(";"))


def _refuse_own_decay(name: str, factory: Callable[..., Optimizer]) -> None:
    """Refuse the weight decay of a factory, which was chosen; that of a class is only a default, and is set to 0."""
    chosen = inspect.signature(factory).parameters["weight_decay"].default
    if not isinstance(factory, type) and chosen not in (0, inspect.Parameter.empty):
        raise DualityError(
            f"base '{name}' has weight_decay={chosen}; a decay inside the base would make the two modes differ. "
            "Leave it out there and give it to the engine: lingrad.wrap(..., weight_decay=...)"
        )


def _fused_on(factory: Callable[..., Optimizer]) -> set[str]:
    """The devices on which a class has a fused kernel that is faster."""
    # not SGD: its fused kernel fails if a parameter's first gradient comes late or is sparse
    if not (isinstance(factory, type) and issubclass(factory, (torch.optim.Adam, torch.optim.Adagrad))):
        return set()
    if not _takes(_option_names(factory), "fused"):
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
    # coordinates that are released have a class of their own until they are stepped; torch has no fused Adagrad of DTensors
    plain = (type(param) is Tensor or isinstance(param, nn.Parameter)) and (not is_sharded(param) or "meta" in devices)
    return plain and param.is_floating_point() and param.device.type in devices
