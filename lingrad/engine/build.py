"""How a run is made: what the user passed, sorted into coordinates, matrices and vectors, with a basis for each weight."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn

from lingrad import optimizers, parallel
from lingrad.adapters import Attachment, Gathering, Projection, SharedInput, make_attachment, make_weight, refuse_attached
from lingrad.config.coverage import remark
from lingrad.config.names import held_parameters
from lingrad.config.residual import parse_residual
from lingrad.config.rules import Rules
from lingrad.config.settings import Mode, Settings, TrainOnly, check_not_negative
from lingrad.config.sharing import GroupedTarget, group_targets, require_shared
from lingrad.config.targets import Plan, resolve_model, resolve_parameters
from lingrad.deprecated import renamed_option
from lingrad.engine import rounds
from lingrad.engine.arithmetic import arithmetic, as_published
from lingrad.engine.checkpoint import identity
from lingrad.engine.grouping import make_groups
from lingrad.engine.layerwise import Layerwise
from lingrad.engine.moments import known_kinds
from lingrad.engine.offload import Offload
from lingrad.engine.refresh import schedule
from lingrad.engine.refusals import check_base, check_effective, check_equal, check_sharded
from lingrad.engine.run import Run
from lingrad.engine.step import choose_one, step_one
from lingrad.engine.stepper import Group, Stepper
from lingrad.errors import SpecError, warn_caller
from lingrad.optimizers import BaseLike, checks
from lingrad.optimizers.hooks import without_global_hooks
from lingrad.parallel import Processes
from lingrad.subspaces.basis import Basis
from lingrad.subspaces.ledger import Ledger
from lingrad.subspaces.subspace import Subspace
from lingrad.tensors import wide
from lingrad.transforms.linalg import derive_seed
from lingrad.weights.base import Weight
from lingrad.weights.dense import DenseWeight
from lingrad.weights.packed import PackedWeight
from lingrad.weights.rounding import Rounding
from lingrad.weights.sharding import LayerSharding, reshard

Named = tuple[str, nn.Parameter]
Trainable = nn.Module | Iterable[Named] | Iterable[dict[str, Any]]


def resolve_groups(model: Trainable, rules: Rules, train_only: TrainOnly | None = None) -> list[tuple[Plan, dict[str, Any]]]:
    """Resolve what the user passed, group by group.

    Args:
        model: A model, named parameters, or dicts with named ``params``, optional ``rules``, and hyper-parameters.
        rules: The config string or rules of groups that bring none of their own.
        train_only: Whether what no rule names is frozen; see `lingrad.wrap`.

    Returns:
        A plan and the hyper-parameters of each group; one group for a model.

    Raises:
        SpecError: The parameters have no names, or one is given twice, or none trains.
    """
    if isinstance(model, nn.Module):
        for name, param, module, _ in held_parameters(model):
            refuse_attached(name, param, module)
        return [(resolve_model(model, rules, train_only), {})]
    given: Any = model
    items: list[Any] = [given] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)
    groups = items if items and all(isinstance(item, dict) and "params" in item for item in items) else [{"params": items}]
    resolved: list[tuple[Plan, dict[str, Any]]] = []
    seen: set[object] = set()
    for group in groups:
        options = {key: value for key, value in group.items() if key != "params"}
        renamed_option(options, "spec", "rules", "a param group")
        own_rules = options.pop("rules", rules)
        named = list(group["params"])
        for item in named:
            if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], Tensor)):
                raise SpecError(
                    "expected a model, model.named_parameters(), or groups {'params': ..., 'rules': ...} whose params are "
                    f"(name, parameter) pairs, since seeds, rules and checkpoints refer to names; not {_short(item)}"
                )
            refuse_attached(*item)
            for what, key in (("parameter", id(item[1])), ("name", item[0])):
                if key in seen:
                    raise SpecError(f"the {what} '{item[0]}' is given twice")
                seen.add(key)
        resolved.append((resolve_parameters(named, cast("Rules", own_rules), train_only), options))
    if not any(plan.targets or plan.full for plan, _ in resolved):
        unruled = " and that no rule freezes" if any(plan.frozen for plan, _ in resolved) else ""
        raise SpecError(f"nothing to train: no parameter was given that requires a gradient{unruled}")
    return resolved


@without_global_hooks()
def build(model: Trainable, rules: Rules, base: BaseLike, mode: Mode, options: Mapping[str, Any]) -> tuple[Run, list[Group]]:
    """Make a run, not attached yet.

    Args:
        model: A model, named parameters, or dicts with named ``params``.
        rules: The config string or rules.
        base: The base optimizer.
        mode: The mode it is to start in.
        options: Options of the run and of the base.

    Returns:
        The run and its param groups, for ``torch.optim.Optimizer`` to take.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile: names, and so seeds, are the model's own
    settings, base_options = Settings.split(options)
    settings.check_mode(mode)
    if base_options.get("lr") is not None:  # some bases choose their own
        check_not_negative("lr", base_options["lr"])
    found = optimizers.find(base, base_options, decay=False, others=Settings.names())
    check_base(found)
    checks.check_reads_only_gradients(found)
    kinds = known_kinds(found, settings)
    steps_as = arithmetic(settings.compat, found.name)
    if settings.layerwise is True:
        checks.check_no_shared_state(found)
    if found.quantizer is not None:
        checks.check_no_shared_state(found, f"moments='{found.quantizer.kind}'")
    parallel.refuse_wrapped(model)
    if isinstance(model, nn.Module):
        reshard(model)
    # a worker of a decentralised run shares its rounds with others, not its steps
    processes = Processes(settings.process_group, alone=settings.rounds is not None and settings.process_group is None)
    plans = resolve_groups(model, rules, settings.train_only)
    placed = [group_targets(plan.targets, settings.share) for plan, _ in plans]
    if settings.share is not None:
        require_shared([place for every in placed for place in every])
    attachments: list[Attachment] = []
    groups: list[Group] = []
    gathering = Gathering(layerwise=bool(settings.layerwise))
    for i, ((plan, given), every) in enumerate(zip(plans, placed, strict=True)):
        made = _attachments(every, model, settings, gathering, processes)
        attachments += made
        groups += make_groups(
            plan,
            [attachment.sub for attachment in made],
            given,
            base=found,
            arithmetic=steps_as,
            defaults={option: getattr(settings, option) for option in ("weight_decay", "scale", "rest_lr")},
            prefix=f"{i}." if len(plans) > 1 else "",
        )
    check_effective(settings, mode, attachments, plans)
    check_sharded(settings, found, attachments)
    for group in groups:
        stepped = found if group["kind"] == "coords" else found.fallback or found
        checks.check_steps(stepped, group["params"], capturable=bool(group.get("capturable")))
    mostly_full = remark([plan for plan, _ in plans])
    if mostly_full:
        warn_caller(mostly_full, UserWarning)
    bases = list(dict.fromkeys(attachment.sub.basis for attachment in attachments))
    for i, basis in enumerate(bases if settings.stagger else ()):
        basis.offset = i * basis.transform.period // len(bases)
    offload = Offload(found) if "moments" in settings.offloaded else None
    run = Run(settings, Stepper(found, steps_as, kinds, offload), attachments, bases, gathering, processes)
    rounds.begin(run)
    if isinstance(model, nn.Module):
        run.model = model
        run.frozen = [(name, weakref.ref(param)) for name, param in model.named_parameters() if not param.requires_grad]
    run.ruled_out = [(name, weakref.ref(param)) for plan, _ in plans for name, param in plan.frozen]
    if settings.layerwise:
        steps = settings.layerwise is True
        run.layerwise = Layerwise(step_one if steps else choose_one, steps=steps)
        run.layerwise.belong_to(run)
    return run, [group | identity(run) for group in groups]


def start(run: Run, mode: Mode) -> None:
    """Attach a run whose groups are made, and prepare its first step.

    Args:
        run: The run.
        mode: The mode.
    """
    check_equal(run, mode)
    run.processes.broadcast(sub.weight.param.data for sub in run.subspaces if isinstance(sub.weight, DenseWeight))
    run.attach(mode)
    schedule(run)
    run.freeze()  # last, since nothing can fail after it


def _attachments(
    placed: Sequence[GroupedTarget], model: object, settings: Settings, gathering: Gathering, processes: Processes
) -> list[Attachment]:
    """The subspace of every target, on a basis of its own or a shared one, and its connection to the model."""
    bases: dict[str, tuple[Basis, SharedInput | None, int]] = {}  # by the first of the weights: with the rows used so far
    found = []
    for place in placed:
        target, first = place.target, place.group[0]
        weight, rows = make_weight(target, model, processes.ranks, settings.merge), target.layout.shape[0]
        if first.name not in bases:
            transform, like = as_published(settings.compat, first.transform), first.template
            seed = derive_seed(settings.seed, first.name)
            on_host = "bases" in settings.offloaded
            basis = Basis(first.name, transform, place.shape, seed=seed, run_seed=settings.seed, like=like, on_host=on_host)
            if settings.residual is not None and basis.coords_shape != basis.shape:  # full() drops nothing
                basis.chance = parse_residual(settings.residual).chance
            names = {member.name for member in place.group}
            bases[first.name] = basis, SharedInput(names) if len(names) > 1 else None, 0
        weight.rounding = _rounding(settings, weight, target.name)
        basis, shared, start = bases[first.name]
        bases[first.name] = basis, shared, start + rows
        ledger = Ledger(basis.transform, records=settings.ledger, on_host="ledger" in settings.offloaded)
        adds = isinstance(weight.sharding, LayerSharding)
        sub = Subspace(target.name, weight, basis, slice(start, start + rows), ledger, replace(processes, adds=adds))
        found.append(make_attachment(target, Projection(sub, shared, gathering), plain=settings.self_contained))
    return found


def _rounding(settings: Settings, weight: Weight, name: str) -> Rounding | None:
    """How merges round a weight; None where it is to the nearest, as a weight of 32 bits or more always is."""
    if settings.rounding == "nearest":
        return None
    if isinstance(weight, PackedWeight):
        weight.require_rounding()
    elif weight.dtype == wide(weight.dtype):
        return None
    found = Rounding(settings.rounding, derive_seed(settings.seed, name, "rounding"))
    if weight.sharding is not None:
        start = weight.sharding.rows(weight.layout.shape[weight.sharding.dim]).start
        found.first = (0, start) if weight.sharding.dim else (start, 0)
    return found


def _short(item: Any) -> str:
    text = repr(item)
    return text if len(text) < 80 else f"a {type(item).__name__}"
