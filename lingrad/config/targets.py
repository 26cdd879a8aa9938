"""Which parameters are transformed, and how: a config string or rules by module name, resolved against a model.

No tensor is created, so that the model may be on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from lingrad.config import spec
from lingrad.config.matching import Candidate, match
from lingrad.config.names import held_parameters, require_elements
from lingrad.config.rules import FROZEN, Rule, Rules, parse_rules
from lingrad.config.settings import TrainOnly
from lingrad.errors import ShapeError, SpecError
from lingrad.transforms.base import Transform
from lingrad.transforms.experts import Experts
from lingrad.weights.bitsandbytes import packed_of
from lingrad.weights.layout import Layout, is_conv1d, is_packed, layout_of

Route = Literal["projected", "packed", "weight"]

# Names of output layers, in models without get_output_embeddings().
_HEADS = {"lm_head", "head", "classifier", "score", "qa_outputs", "fc_out", "output", "output_projection"}


@dataclass(frozen=True)
class Target:
    """One parameter that is transformed.

    Args:
        name: The parameter's name.
        param: The parameter.
        transform: Its transform.
        layout: How it is read as a matrix.
        route: ``projected`` for a linear layer, whose backward computes the projected gradient; ``packed`` for one whose weight
            is stored in 4 or 8 bits; ``weight`` if the gradient of the weight is projected by a hook.
        owners: Every (module, attribute) that is this parameter.
    """

    name: str
    param: nn.Parameter
    transform: Transform
    layout: Layout
    route: Route
    owners: tuple[tuple[nn.Module, str], ...] = ()

    @property
    def template(self) -> Tensor:
        """A tensor with the device and the dtype of the weight: the weight itself, or an empty one if it is packed."""
        if self.route != "packed":
            return self.param
        dtype = torch.float32 if self.param.is_meta else packed_of(self.owners[0][0], self.name).dtype
        return torch.empty(0, dtype=dtype, device=self.param.device)

    @property
    def stored(self) -> list[Tensor]:
        """The tensors that hold the weight."""
        return packed_of(self.owners[0][0], self.name).tensors() if self.route == "packed" else [self.param]


@dataclass
class Plan:
    """What happens to each trainable parameter: transformed, trained in full, or frozen.

    Args:
        targets: The transformed ones.
        full: (name, parameter) of those that train in full.
        none: Name of a matrix among these, no embedding or output head, that a rule says ``none`` of -> experts it fuses.
        unasked: The same of those that nobody asked to train in full.
        frozen: (name, parameter) of those that a rule says ``frozen`` of; they still require a gradient.
    """

    targets: list[Target] = field(default_factory=list)
    full: list[tuple[str, nn.Parameter]] = field(default_factory=list)
    none: dict[str, int] = field(default_factory=dict)
    unasked: dict[str, int] = field(default_factory=dict)
    frozen: list[tuple[str, nn.Parameter]] = field(default_factory=list)


def resolve_model(model: nn.Module, rules: Rules, train_only: TrainOnly | None = None) -> Plan:
    """Decide for every trainable parameter of a model, and for linear layers' weights in 4 or 8 bits.

    Args:
        model: The model; not changed.
        rules: A config string for every Linear (and Conv1D) weight but the output head's, and for every expert's matrix of
            fused experts; or a mapping of globs over module or parameter names to specs, where ``none`` means to train in full
            and ``frozen`` not to train; the first match wins.
        train_only: ``transformed`` freezes what would train in full without a rule that says ``none`` of it.

    Returns:
        The plan.

    Raises:
        SpecError: A config string is malformed; a rule matches nothing, or nothing that can be transformed; nothing trains.
        ShapeError: A rank does not fit; the message names the parameter.
    """
    candidates = _candidates(model)
    parsed, head = parse_rules(rules), _output_head(model)
    ends = [_owned_by(c, head) for c in candidates]
    chosen: list[Rule]
    if isinstance(parsed, Transform):
        chosen = [None if end else _bare(parsed, c) for c, end in zip(candidates, ends, strict=True)]
        if candidates and not any(chosen):
            raise SpecError(
                f"no trainable Linear layer was found in {type(model).__name__} apart from its output head; "
                f"name the weights to transform by rules, such as {{'*.proj': '{spec.format(parsed)}'}}"
            )
    else:
        chosen = match(candidates, parsed, [name for name, param in model.named_parameters() if not param.requires_grad])
    plan = _plan(candidates, _frozen_unless_named(candidates, chosen, train_only), ends)
    if not plan.targets and not plan.full:
        raise SpecError(
            f"nothing to train: every parameter of {type(model).__name__} is frozen, by requires_grad=False, a rule or "
            "train_only; unfreeze what is to train, or give it another rule"
        )
    return plan


def resolve_parameters(named: Iterable[tuple[str, nn.Parameter]], rules: Rules, train_only: TrainOnly | None = None) -> Plan:
    """Decide for parameters without their modules; a config string alone means every one with two or more dimensions.

    Args:
        named: (name, parameter) pairs.
        rules: As for `resolve_model`, matched against parameter names.
        train_only: As for `resolve_model`.

    Returns:
        The plan; every target takes the ``weight`` route.

    Raises:
        SpecError: A config string is malformed, or a rule matches nothing.
        ShapeError: A rank does not fit.
    """
    named = list(named)
    for name, param in named:
        require_elements(name, param)
    candidates = [Candidate([name], param) for name, param in named if param.requires_grad]
    parsed = parse_rules(rules)
    chosen: list[Rule]
    if isinstance(parsed, Transform):
        chosen = [parsed if c.param.dim() >= 2 else None for c in candidates]
    else:
        chosen = match(candidates, parsed, [name for name, param in named if not param.requires_grad])
    return _plan(
        candidates, _frozen_unless_named(candidates, chosen, train_only), [_named_as_end(c.names[0]) for c in candidates]
    )


def _frozen_unless_named(candidates: list[Candidate], chosen: list[Rule], train_only: TrainOnly | None) -> list[Rule]:
    """The rules with what no rule says ``none`` of frozen, where only what is transformed is to train."""
    if train_only is None:
        return chosen
    return [FROZEN if rule is None and not c.ruled else rule for c, rule in zip(candidates, chosen, strict=True)]


def _candidates(model: nn.Module) -> list[Candidate]:
    found: dict[int, Candidate] = {}
    for name, param, module, attribute in held_parameters(model):
        require_elements(name, param)
        if param.requires_grad or (attribute == "weight" and is_packed(module)):
            candidate = found.setdefault(id(param), Candidate([], param))
            candidate.names.append(name)
            candidate.owners.append((module, attribute))
    return list(found.values())


def _bare(transform: Transform, candidate: Candidate) -> Transform | None:
    """What a config string alone means for a parameter."""
    if any(name == "weight" and (isinstance(module, nn.Linear) or is_conv1d(module)) for module, name in candidate.owners):
        return transform
    if not candidate.experts:
        return None
    return transform if isinstance(transform, Experts) else Experts(each=transform)


def _output_head(model: nn.Module) -> set[nn.Module]:
    declared = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(declared, nn.Module):
        return {declared}
    found = set()
    for name, module in model.named_modules():
        *path, last = name.split(".")
        in_a_block = any(part.isdigit() for part in path)  # a layer of that name inside a block, such as GPT-J's fc_out
        if last in _HEADS and not in_a_block:
            found.add(module)
    return found


def _owned_by(candidate: Candidate, heads: set[nn.Module]) -> bool:
    tied_to_embedding = any(isinstance(module, nn.Embedding | nn.EmbeddingBag) for module, _ in candidate.owners)
    return tied_to_embedding or any(module in heads for module, _ in candidate.owners)


def _named_as_end(name: str) -> bool:
    """Whether a parameter whose module is not known has the name of an embedding or of an output head."""
    owner = name.rpartition(".")[0].rpartition(".")[2] or name
    return owner in _HEADS or "emb" in owner.lower() or owner in ("wte", "wpe")


def _plan(candidates: list[Candidate], chosen: list[Rule], ends: list[bool]) -> Plan:
    """The plan; ``ends`` says which candidates are embeddings or the output head."""
    plan = Plan()
    for candidate, transform, end in zip(candidates, chosen, ends, strict=True):
        name = candidate.names[0]
        if transform is FROZEN and candidate.param.requires_grad:
            plan.frozen.append((name, candidate.param))
        if transform is FROZEN or (transform is None and candidate.is_packed):
            continue  # codes train through coordinates only: where not transformed they are frozen as they are
        if transform is None:
            plan.full.append((name, candidate.param))
            if candidate.param.dim() >= 2 and not end:
                (plan.none if candidate.ruled else plan.unasked)[name] = candidate.experts
            continue
        if candidate.param.is_complex():
            raise SpecError(f"{name} is complex, and transforms are real; leave it out by a rule: 'none'")
        owners = tuple(candidate.owners)
        if candidate.is_packed and len(owners) != 1:
            raise SpecError(f"{name} is stored in 4 or 8 bits and shared by several layers; leave it out by a rule: 'none'")
        layout = layout_of(candidate.param, owners[0][0] if owners else None, name, stacked=isinstance(transform, Experts))
        if isinstance(transform, Experts):
            transform = transform.of(candidate.experts or (len(candidate.param) if candidate.param.dim() == 3 else 0))
        try:
            transform.ranks(layout.shape)
        except ShapeError as error:
            raise ShapeError(f"{name}: {error}") from None
        plan.targets.append(Target(name, candidate.param, transform, layout, _route(owners), owners))
    return plan


def _route(owners: tuple[tuple[nn.Module, str], ...]) -> Route:
    if len(owners) == 1 and is_packed(owners[0][0]):
        return "packed"
    # A projected backward is for weights with one owner that uses them in its own forward only. A subclass of Linear may do
    # otherwise: nn.MultiheadAttention reads the weight of its out_proj without calling it.
    if len(owners) != 1 or owners[0][1] != "weight":
        return "weight"
    kind = type(owners[0][0])  # of a layer that fully_shard was called on alone, a class that it has made
    linear = kind is nn.Linear or (kind.__name__ == "FSDPLinear" and kind.__bases__[-1] is nn.Linear)
    return "projected" if linear or is_conv1d(owners[0][0]) else "weight"
