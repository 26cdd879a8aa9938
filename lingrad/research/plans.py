"""What is compared: methods, and the sizes of an experiment. Data only."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from lingrad.config import spec
from lingrad.config.rules import parse_rules
from lingrad.models import LlamaShape
from lingrad.transforms import Transform


@dataclass(frozen=True)
class Method:
    """One way to train.

    Args:
        label: What tables and plots call it.
        spec: The config string; None is the stock optimizer without lingrad.
        mode: ``optimizer`` or ``adapter``.
        switches: Fractions of the run at which the mode changes.
        base: The base optimizer, by name.
        options: Its options, and those of `lingrad.wrap`. The stock optimizer takes ``scale`` too: a factor on the learning
            rate of the weights that the other methods transform.
        like: The label of the method whose weights this one should have; the gap is recorded.
        reverse: Train on each batch with its rows in reverse order: the same mathematics, other roundings.
    """

    label: str
    spec: str | None = None
    mode: Literal["optimizer", "adapter"] = "optimizer"
    switches: tuple[float, ...] = ()
    base: str = "adamw"
    options: dict[str, Any] = field(default_factory=dict)
    like: str | None = None
    reverse: bool = False


@dataclass(frozen=True)
class Setup:
    """The sizes of an experiment.

    Args:
        model: The model.
        steps: Training steps.
        rows: Windows in a batch.
        warmup: Fraction of the steps in which the learning rate rises; it then falls to a tenth along a cosine.
        eval_every: Steps between validations.
        eval_batches: Batches in a validation.
        seed: Seed of weights, data and maps.
    """

    model: LlamaShape = field(default_factory=LlamaShape)
    steps: int = 200
    rows: int = 4
    warmup: float = 0.1
    eval_every: int = 20
    eval_batches: int = 32
    seed: int = 0


def both_modes(spec: str, label: str, **options: Any) -> list[Method]:
    """One method in optimizer mode, in adapter mode, changing twice, and a control that shows what rounding alone does.

    Args:
        spec: The config string.
        label: The method's name.
        **options: As for `lingrad.wrap`, and ``base``.

    Returns:
        The four, the last three to be compared with the first.
    """
    base = options.pop("base", "adamw")
    first = f"{label}, optimizer mode"
    return [
        Method(first, spec, base=base, options=options),
        Method(f"{label}, adapter mode", spec, "adapter", base=base, options=options, like=first),
        Method(f"{label}, mode switched twice", spec, switches=(0.4, 0.7), base=base, options=options, like=first),
        Method(f"{label}, batch rows reversed (control)", spec, base=base, options=options, like=first, reverse=True),
    ]


def demo_methods() -> list[Method]:
    """The methods of ``lingrad demo``: full rank, GaLore in both modes and switched, a random map, online PCA."""
    low_rank = {"lr": 5e-3, "scale": 0.25}
    return [
        # linear layers at a tenth of the learning rate, as Adam's steps on all their entries are the larger
        full_rank(lr=5e-3, scale=0.1),
        *both_modes("svd(rank=64, every=50)", "GaLore", **low_rank),
        Method("Random map", "random(rank=64, every=50)", options=low_rank),
        Method("Online PCA", "pca(rank=64)", options=low_rank),
    ]


def full_rank(lr: float, scale: float, base: str = "adamw") -> Method:
    """The baseline: the stock optimizer on every weight.

    Args:
        lr: Learning rate.
        scale: Factor on that of linear layers.
        base: The optimizer, by name.

    Returns:
        The method.
    """
    return Method(f"{base}, full rank", base=base, options={"lr": lr, "scale": scale})


def in_float64(methods: list[Method], setup: Setup) -> tuple[list[Method], Setup]:
    """A short version of the runs that should have equal weights, for float64.

    Args:
        methods: The methods; those with a twin are kept, and their twins.
        setup: The sizes.

    Returns:
        The methods and the sizes; a refresh falls on every sixth step.
    """
    twins = {method.like for method in methods}
    kept = [m for m in methods if m.label in twins or m.like is not None]
    short = replace(setup, steps=min(30, setup.steps), eval_batches=1)
    return [replace(m, spec=refreshing(m.spec, 6)) for m in kept if m.spec is not None], short


def refreshing(text: str, every: int) -> str:
    """The same config string with its schedule changed, where it has one.

    Args:
        text: A config string.
        every: Steps between refreshes.

    Returns:
        The config string, or the rules, with each ``every`` replaced, those of the parts of a ``kron`` too.
    """
    parsed = parse_rules(text)
    if isinstance(parsed, Transform):
        return spec.format(_refreshing(parsed, every))
    rules = {glob: "none" if t is None else spec.format(_refreshing(t, every)) for glob, t in parsed.items()}
    return "; ".join(f"{glob}: {value}" for glob, value in rules.items())


def _refreshing(transform: Transform, every: int) -> Transform:
    changed: dict[str, Any] = {}
    for option in fields(transform):
        value = getattr(transform, option.name)
        if option.name == "every":
            changed["every"] = every
        elif isinstance(value, Transform):
            changed[option.name] = _refreshing(value, every)
    return replace(transform, **changed)
