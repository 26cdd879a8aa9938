"""Which parameters are transformed, and how: a bare spec or rules by module name, resolved against a model.

Nothing here makes a tensor: a model on the meta device resolves as any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn

from lingrad import spec
from lingrad.errors import ShapeError, SpecError, did_you_mean
from lingrad.layout import Layout, is_conv1d, layout_of
from lingrad.transforms.base import Transform

SpecLike = str | Transform
Rules = SpecLike | Mapping[str, SpecLike | None]
Road = Literal["projected", "weight"]

# Names under which models hold their output layer, beside what get_output_embeddings() tells.
_HEADS = {"lm_head", "head", "classifier", "score", "qa_outputs", "fc_out", "output", "output_projection"}


@dataclass(frozen=True)
class Target:
    """One parameter that is transformed.

    Args:
        name: The parameter's name.
        param: The parameter.
        transform: Its transform.
        layout: How it is read as a matrix.
        road: ``projected`` where the gradient is born small (linear layers), ``weight`` where it is projected afterwards.
        owners: Every (module, attribute) that holds it.
    """

    name: str
    param: nn.Parameter
    transform: Transform
    layout: Layout
    road: Road
    owners: tuple[tuple[nn.Module, str], ...] = ()


@dataclass
class Plan:
    """What happens to each trainable parameter: transformed, or trained in full.

    Args:
        targets: The transformed ones.
        full: (name, parameter) of the others.
    """

    targets: list[Target] = field(default_factory=list)
    full: list[tuple[str, nn.Parameter]] = field(default_factory=list)


@dataclass
class _Candidate:
    """A trainable parameter, all its names, and who owns it."""

    names: list[str]
    param: nn.Parameter
    owners: list[tuple[nn.Module, str]] = field(default_factory=list)

    def known_as(self) -> set[str]:
        """Names a rule may match: of the parameter and of the modules that own it."""
        return {*self.names, *(name.rpartition(".")[0] for name in self.names)}


def resolve_model(model: nn.Module, rules: Rules) -> Plan:
    """Decide for every trainable parameter of a model.

    Args:
        model: The model; not changed.
        rules: A spec for every Linear (and Conv1D) weight but the output head's, or a mapping of globs over module or
            parameter names to specs, where ``none`` means to train in full; the first match wins.

    Returns:
        The plan.

    Raises:
        SpecError: A spec is malformed; a rule matches nothing, or nothing that can be transformed.
        ShapeError: A rank does not fit; the message names the parameter.
    """
    candidates = _candidates(model)
    parsed = parse_rules(rules)
    if isinstance(parsed, Transform):
        head = _output_head(model)
        chosen = [parsed if _is_linear_weight(c) and not _owned_by(c, head) else None for c in candidates]
        if not any(chosen):
            raise SpecError(
                f"no trainable Linear layer was found in {type(model).__name__} besides its output head; "
                f"name the weights to transform by rules, such as {{'*.proj': '{spec.format(parsed)}'}}"
            )
    else:
        chosen = _match(candidates, parsed)
    return _plan(candidates, chosen)


def resolve_parameters(named: Iterable[tuple[str, nn.Parameter]], rules: Rules) -> Plan:
    """Decide for parameters whose modules are not known; a bare spec means every one with two or more dimensions.

    Args:
        named: (name, parameter) pairs.
        rules: As for `resolve_model`, matched against parameter names.

    Returns:
        The plan; every target takes the ``weight`` road.

    Raises:
        SpecError: A spec is malformed, or a rule matches nothing.
        ShapeError: A rank does not fit.
    """
    candidates = [_Candidate([name], param) for name, param in named if param.requires_grad]
    parsed = parse_rules(rules)
    if isinstance(parsed, Transform):
        chosen = [parsed if c.param.dim() >= 2 else None for c in candidates]
    else:
        chosen = _match(candidates, parsed)
    return _plan(candidates, chosen)


def parse_rules(rules: Rules) -> Transform | dict[str, Transform | None]:
    """Read a spec, or rules.

    Args:
        rules: A transform, a config string, a mapping of globs to either, or the same as one string:
            ``"*.attn.*: svd(rank=64); *: none"``.

    Returns:
        The transform, or globs with their transforms, None meaning to train in full.

    Raises:
        SpecError: A spec is malformed or there are no rules.
    """
    if isinstance(rules, Transform):
        return rules
    if isinstance(rules, str):
        if ":" not in rules:
            return spec.parse(rules)
        parts = [line.partition(":") for line in rules.replace("\n", ";").split(";") if line.strip()]
        globs = [glob.strip() for glob, _, _ in parts]
        for glob in globs:
            if globs.count(glob) > 1:
                raise SpecError(f"rule '{glob}' is given twice; the first match wins, so keep one of them")
        rules = {glob: text.strip() for glob, (_, _, text) in zip(globs, parts, strict=True)}
    if not isinstance(rules, Mapping) or not rules:
        raise SpecError(
            f"expected a spec such as 'svd(rank=128)' or rules such as {{'*.attn.*': 'svd(rank=64)'}}, not {rules!r}"
        )
    for glob in rules:
        if not isinstance(glob, str):
            raise SpecError(f"rules are globs over module names, such as '*.attn.*', not {glob!r}")
    return {glob: _rule_value(glob, value) for glob, value in rules.items()}


def _rule_value(glob: str, value: SpecLike | None) -> Transform | None:
    if value is None or isinstance(value, Transform):
        return value
    if isinstance(value, str) and value.strip() == "none":
        return None
    try:
        return spec.parse(value)
    except SpecError as error:
        raise SpecError(f"rule '{glob}': {error}") from None


def _candidates(model: nn.Module) -> list[_Candidate]:
    found: dict[int, _Candidate] = {}
    for module_name, module in model.named_modules():
        for attribute, param in module.named_parameters(recurse=False):
            name = f"{module_name}.{attribute}" if module_name else attribute
            if param.requires_grad:
                candidate = found.setdefault(id(param), _Candidate([], param))
                candidate.names.append(name)
                candidate.owners.append((module, attribute))
    return list(found.values())


def _is_linear_weight(candidate: _Candidate) -> bool:
    return any(
        attribute == "weight" and (isinstance(module, nn.Linear) or is_conv1d(module)) for module, attribute in candidate.owners
    )


def _output_head(model: nn.Module) -> set[nn.Module]:
    heads = {m for name, m in model.named_modules() if name.rpartition(".")[2] in _HEADS}
    embeddings = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(embeddings, nn.Module):
        heads.add(embeddings)
    return heads


def _owned_by(candidate: _Candidate, heads: set[nn.Module]) -> bool:
    tied_to_embedding = any(isinstance(module, nn.Embedding) for module, _ in candidate.owners)
    return tied_to_embedding or any(module in heads for module, _ in candidate.owners)


def _match(candidates: list[_Candidate], rules: Mapping[str, Transform | None]) -> list[Transform | None]:
    chosen: list[Transform | None] = [None] * len(candidates)
    taken: set[int] = set()
    for glob, transform in rules.items():
        matched = [i for i, c in enumerate(candidates) if any(fnmatchcase(name, glob) for name in c.known_as())]
        usable = [i for i in matched if transform is None or candidates[i].param.dim() >= 2]
        if not matched:
            modules = sorted({name for c in candidates for name in c.known_as()})
            raise SpecError(
                f"rule '{glob}' matches no trainable parameter{did_you_mean(glob, modules)} "
                f"Rules are globs over module names, such as '{max(modules, key=len, default='')}'."
            )
        if not usable:
            raise SpecError(
                f"rule '{glob}' matches nothing that can be transformed: '{candidates[matched[0]].names[0]}' has shape "
                f"{tuple(candidates[matched[0]].param.shape)}, and a transform needs two dimensions or more"
            )
        fresh = [i for i in usable if i not in taken]
        if not fresh:
            raise SpecError(f"rule '{glob}' is never reached: the rules before it take every parameter it matches")
        for i in fresh:
            chosen[i] = transform
        taken.update(matched)
    return chosen


def _plan(candidates: list[_Candidate], chosen: list[Transform | None]) -> Plan:
    plan = Plan()
    for candidate, transform in zip(candidates, chosen, strict=True):
        name = candidate.names[0]
        if transform is None:
            plan.full.append((name, candidate.param))
            continue
        owners = tuple(candidate.owners)
        layout = layout_of(candidate.param, owners[0][0] if owners else None, name)
        try:
            transform.coords_shape(layout.shape)
        except ShapeError as error:
            raise ShapeError(f"{name}: {error}") from None
        plan.targets.append(Target(name, candidate.param, transform, layout, _road(owners), owners))
    return plan


def _road(owners: tuple[tuple[nn.Module, str], ...]) -> Road:
    # Projected backward is for layers known to use their weight in their own forward only, and owned once. A subclass of
    # Linear may do otherwise: nn.MultiheadAttention reads the weight of its out_proj without calling it.
    if len(owners) != 1 or owners[0][1] != "weight":
        return "weight"
    return "projected" if type(owners[0][0]) is nn.Linear or is_conv1d(owners[0][0]) else "weight"
