"""What an experiment compares: its entries (ways to train), and its sizes. Data only."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from lingrad.config import spec
from lingrad.config.methods import long_rules
from lingrad.config.rules import format_rule, parse_rules
from lingrad.models import LlamaShape
from lingrad.transforms import Transform


@dataclass(frozen=True)
class Entry:
    """One way to train, as an entry of a comparison.

    Args:
        label: Its name in tables and plots.
        rules: A config string or rules; None trains every weight in full, without lingrad.
        mode: ``optimizer`` or ``adapter``.
        switches: Fractions of the run at which the mode changes.
        base: The base optimizer, by name.
        options: Options of the base and of `lingrad.wrap`. Full-rank training accepts ``scale`` too: a factor on the learning
            rate of the weights that the other entries transform.
        reference: The label of the entry whose weights this one should reproduce; the difference is recorded.
        reverse: Reverse the order of the rows in each batch: the same mathematics, other rounding errors.
    """

    label: str
    rules: str | None = None
    mode: Literal["optimizer", "adapter"] = "optimizer"
    switches: tuple[float, ...] = ()
    base: str = "adamw"
    options: dict[str, Any] = field(default_factory=dict)
    reference: str | None = None
    reverse: bool = False


@dataclass(frozen=True)
class Setup:
    """The sizes of an experiment.

    Args:
        model: The model.
        steps: Training steps.
        rows: Windows in a batch.
        warmup: Fraction of the steps in which the learning rate rises; after it the rate falls to a tenth along a cosine.
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


def both_modes(rules: str, label: str, **options: Any) -> list[Entry]:
    """One method in optimizer mode, in adapter mode, with two mode switches, and a control that shows the effect of rounding.

    Args:
        rules: A config string or rules.
        label: The method's name.
        **options: As for `lingrad.wrap`, and ``base``.

    Returns:
        Four entries; the first one is the reference of the others.
    """
    base = options.pop("base", "adamw")
    first = f"{label}, optimizer mode"
    return [
        Entry(first, rules, base=base, options=options),
        Entry(f"{label}, adapter mode", rules, "adapter", base=base, options=options, reference=first),
        Entry(f"{label}, mode switched twice", rules, switches=(0.4, 0.7), base=base, options=options, reference=first),
        Entry(f"{label}, batch rows reversed (control)", rules, base=base, options=options, reference=first, reverse=True),
    ]


def demo_entries() -> list[Entry]:
    """The entries of ``lingrad demo``: full rank, GaLore in both modes and switched, a random map, online PCA."""
    low_rank = {"lr": 5e-3, "scale": 0.25}
    return [
        # a tenth of the learning rate for linear layers, because Adam's steps on all their elements are larger
        full_rank(lr=5e-3, scale=0.1),
        *both_modes("svd(rank=64, every=50)", "GaLore", **low_rank),
        Entry("Random map", "random(rank=64, every=50)", options=low_rank),
        Entry("Online PCA", "pca(rank=64)", options=low_rank),
    ]


def full_rank(lr: float, scale: float, base: str = "adamw") -> Entry:
    """The baseline: every weight in full, with an ordinary optimizer.

    Args:
        lr: Learning rate.
        scale: Factor on the learning rate of linear layers.
        base: The optimizer, by name.

    Returns:
        The entry.
    """
    return Entry(f"{base}, full rank", base=base, options={"lr": lr, "scale": scale})


def in_float64(entries: list[Entry], setup: Setup) -> tuple[list[Entry], Setup]:
    """A short version, for float64, of the entries that should have equal weights.

    Args:
        entries: All entries. Those with a reference, and the references, are used.
        setup: The sizes.

    Returns:
        The entries, with a refresh at every sixth step, and the sizes.
    """
    references = {entry.reference for entry in entries}
    compared = [entry for entry in entries if entry.label in references or entry.reference is not None]
    short = replace(setup, steps=min(30, setup.steps), eval_batches=1)
    return [replace(entry, rules=refreshing(entry.rules, 6)) for entry in compared if entry.rules is not None], short


def refreshing(rules: str, every: int) -> str:
    """The same rules with another refresh interval.

    Args:
        rules: A config string or rules.
        every: Steps between refreshes.

    Returns:
        The rules with each ``every`` replaced, those inside a ``kron`` too.
    """
    parsed = parse_rules(long_rules(rules))
    if isinstance(parsed, Transform):
        return spec.format(_refreshing(parsed, every))
    changed = {glob: _refreshing(rule, every) if isinstance(rule, Transform) else rule for glob, rule in parsed.items()}
    return "; ".join(f"{glob}: {format_rule(rule)}" for glob, rule in changed.items())


def _refreshing(transform: Transform, every: int) -> Transform:
    changed: dict[str, Any] = {}
    for option in fields(transform):
        value = getattr(transform, option.name)
        if option.name == "every":
            changed["every"] = every
        elif isinstance(value, Transform):
            changed[option.name] = _refreshing(value, every)
    return replace(transform, **changed)
