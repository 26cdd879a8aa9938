"""What a config string or rules would do to a model, as a table; nothing is trained and no tensor is created."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import nn

from lingrad.config import coverage, spec
from lingrad.config.methods import method_of
from lingrad.config.published import DEFAULT
from lingrad.config.residual import parse_residual
from lingrad.config.rules import Rules
from lingrad.config.settings import Share, TrainOnly
from lingrad.config.sharing import GroupedTarget, group_targets
from lingrad.config.targets import resolve_model
from lingrad.console import columns, layers
from lingrad.errors import require

HEADERS = ("parameter", "weight", "transform", "coords", "basis", "gradient", "trained")


@dataclass(frozen=True)
class Line:
    """One parameter, or several that differ in layer numbers only.

    Args:
        name: The parameter's name; ``*`` stands for the layer numbers of several.
        count: How many parameters the line stands for.
        weight: Its shape as a matrix, such as ``1024 x 4096``; of fused experts as so many matrices, ``8 x 1024 x 4096``, and
            so their coordinates and bases.
        transform: Its config string, ``in full``, or ``frozen`` by a rule.
        coords: The shape of its coordinates.
        basis: The shapes of its bases in memory.
        gradient: Where its gradient is computed: ``projected`` in the layer's backward, by a ``hook``, or in ``full``;
            ``sampled`` in full at steps that draw it, else projected; ``-`` of a frozen one.
        trained: Elements that the base optimizer steps, over all ``count``.
    """

    name: str
    count: int
    weight: str
    transform: str
    coords: str
    basis: str
    gradient: str
    trained: int


@dataclass(frozen=True)
class Explanation:
    """The resolution of rules against a model.

    Args:
        lines: One for each parameter, or for all that differ in layer numbers only.
        parameters: Elements of the parameters that train.
        trained: Elements that the base optimizer steps.
        remark: What `lingrad.wrap` warns of: that most of the matrices are stepped in full unasked; else empty.
    """

    lines: tuple[Line, ...]
    parameters: int
    trained: int
    remark: str = ""

    def __str__(self) -> str:
        cells = [HEADERS]
        for line in self.lines:
            name = f"{line.name} (x {line.count})" if line.count > 1 else line.name
            cells.append((name, line.weight, line.transform, line.coords, line.basis, line.gradient, f"{line.trained:,}"))
        text = columns(cells, right=[name == "trained" for name in HEADERS], rule=True)
        share = self.trained / self.parameters if self.parameters else 0.0
        text.append(f"{self.trained:,} of {self.parameters:,} elements are stepped by the base optimizer ({share:.1%})")
        text += [self.remark] if self.remark else []
        return "\n".join(text)


def explain(
    model: nn.Module,
    rules: Rules = DEFAULT,
    *,
    share: Share | None = None,
    every_parameter: bool = False,
    train_only: TrainOnly | None = None,
) -> Explanation:
    """Show what `lingrad.wrap` would do.

    Args:
        model: The model; it may be on the meta device.
        rules: As for `lingrad.wrap`.
        share: As for `lingrad.wrap`.
        train_only: As for `lingrad.wrap`.
        every_parameter: Give each parameter its own line, instead of one for all that differ in layer numbers only.

    Returns:
        A table; its ``str`` is for reading. Errors are those of `lingrad.wrap`.
    """
    instead = "lingrad.models.open_model makes one from a name or a config"
    known = isinstance(model, nn.Module)  # the text of a model is long, and some can be written only where they have values
    require(known, "model", f"model must be a torch.nn.Module, not {'one' if known else repr(model)}; {instead}")
    chosen = method_of(rules)
    if chosen is not None and train_only is None:
        train_only = chosen.settings.get("train_only")
    plan = resolve_model(model, rules if chosen is None else chosen.rules, train_only)
    rule = None if chosen is None or chosen.settings.get("residual") is None else parse_residual(chosen.settings["residual"])
    linear = "projected" if rule is None else "full" if rule.chance == 1 else "sampled"
    targets = {grouped.target.name: _line(grouped, linear) for grouped in group_targets(plan.targets, share)}
    untouched = {name: _untouched(name, param, "in full", "full", param.numel()) for name, param in plan.full}
    untouched |= {name: _untouched(name, param, "frozen", "-", 0) for name, param in plan.frozen}
    order = [name for name, _ in model.named_parameters() if name in targets or name in untouched]
    lines = [targets.get(name) or untouched[name] for name in order]
    sizes = {t.name: prod(t.layout.shape) for t in plan.targets} | {name: p.numel() for name, p in plan.full}
    parameters, trained = sum(sizes.values()), sum(line.trained for line in lines)
    return Explanation(tuple(lines if every_parameter else _alike(lines)), parameters, trained, coverage.remark([plan]))


def _line(grouped: GroupedTarget, linear: str) -> Line:
    target, coords, blocks = grouped.target, grouped.coords, grouped.target.transform.blocks
    bases = [_by(s, blocks) for s in target.transform.basis_shapes(grouped.shape) if s is not None]
    if not grouped.is_first:
        bases = [f"that of {grouped.group[0].name.removesuffix('.weight').rpartition('.')[2]}"]
    gradient = "hook" if target.route == "weight" else linear
    shapes = _by(target.layout.shape, blocks), spec.format(target.transform), _by(coords, blocks), ", ".join(bases) or "-"
    return Line(target.name, 1, *shapes, gradient, coords[0] * coords[1])


def _untouched(name: str, param: nn.Parameter, how: str, gradient: str, trained: int) -> Line:
    return Line(name, 1, _by(param.shape), how, "-", "-", gradient, trained)


def _by(shape: tuple[int, ...], blocks: int = 1) -> str:
    whole = shape if blocks == 1 else (blocks, shape[0] // blocks, *shape[1:])
    return " x ".join(map(str, whole)) or "scalar"


def _alike(lines: list[Line]) -> list[Line]:
    groups: dict[tuple[str, ...], list[Line]] = {}
    for line in lines:
        pattern = layers(line.name)
        groups.setdefault((pattern, line.weight, line.transform, line.gradient), []).append(line)
    merged = []
    for (pattern, *_), group in groups.items():
        first, count = group[0], len(group)
        name = pattern if count > 1 else first.name
        total = sum(line.trained for line in group)
        merged.append(Line(name, count, first.weight, first.transform, first.coords, first.basis, first.gradient, total))
    return merged
