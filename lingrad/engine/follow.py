"""A model that other programs change while it is trained.

What torch's own optimizer would follow is followed. Where a parameter would stand still without a word, or be stepped with
moments of another size, the next step is an error that names the parameter and says what to do.
"""

from __future__ import annotations

import warnings

import torch

from lingrad.adapters import is_attached
from lingrad.config.names import parameter_at
from lingrad.engine.run import Run
from lingrad.errors import ModeError
from lingrad.subspaces.watched import SummedWeight
from lingrad.tensors import is_sharded
from lingrad.weights.sharding import refuse_factors, refuse_late


def refuse_lost(run: Run) -> None:
    """Make sure that whatever trains in the model is what this run trains.

    It costs next to nothing where every parameter of the run has a gradient and none was frozen when the run was made.

    Args:
        run: The run, with the gradients of a step.

    Raises:
        ModeError: The model, or a param group, has another parameter in place of one that is trained, or the model several in
            place of a tied one.
    """
    params = [param for group in run.groups for param in group["params"]]
    if run.lacks(params):
        raise ModeError(
            "another program has put parameters of its own into the optimizer's param groups, as DeepSpeed's ZeRO does with "
            "flat vectors: coordinates would not be merged, nor bases refreshed. Leave it out, and shard the model by "
            "torch.distributed.fsdp.fully_shard (FSDP2), then call lingrad"
        )
    if run.model is None:
        return
    if run.frozen:
        _warn_of_unfrozen(run)
    if not run.is_quiet and any(sub.weight.sharding is not None for sub in run.subspaces):
        refuse_factors(run.model)
    for name, weight in run.tied:
        if weight.untied:
            raise ModeError(
                f"the layers that shared {name} hold different parameters now (one was replaced, or "
                "load_state_dict was called with assign=True), and only one of them would be trained. Tie them again"
            )
    if all(param.grad is not None or not param.requires_grad for param in params):
        return
    idle = [named for named in run.named() if named.param.grad is None and named.param.requires_grad]
    if run.layerwise is not None and run.settings.layerwise is True:
        idle = [named for named in idle if not run.layerwise.was_stepped(named.param)]
    own = {id(named.param) for named in run.named()}
    for named in idle:
        current = parameter_at(run.model, named.name)
        if current is None or not current.requires_grad or id(current) in own or is_attached(current):
            continue
        if named.attachment is None or not named.attachment.holds(current):
            raise ModeError(
                f"{named.name} is another parameter now than the one that this optimizer trains (a layer was replaced, or "
                "load_state_dict was called with assign=True), so it would not be trained. Load without assign=True; or call "
                "detach(), change the model, and call lingrad again"
            )


def refuse_apart(run: Run) -> None:
    """Make sure that something averages gradients over the processes of a run; asked in its first step with gradients.

    Args:
        run: The run, with the gradients of a step.

    Raises:
        ModeError: Processes have other gradients than each other; all of them raise.
    """
    subs = [sub for sub in run.subspaces if sub.weight.sharding is None]
    if run.compared or run.processes.count == 1 or not subs:
        return
    grads = [sub.coords.new_zeros(()) if sub.coords.grad is None else sub.coords.grad for sub in subs]
    norms = torch.stack([torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in grads])
    mean, squares = run.processes.average(torch.stack((norms, norms.square())))
    run.compared = bool(mean.any())
    apart = squares - mean.square() > 1e-8 * mean.square()  # of batches they are; what is averaged is equal but for rounding
    if apart.any():
        raise ModeError(
            f"the gradient of {subs[int(apart.int().argmax())].name} is not the same in the {run.processes.count} processes of "
            "this run: nothing has averaged it, and their weights would part. Build DistributedDataParallel(model) after "
            "lingrad was called; processes with models of their own (pipeline stages, local SGD) need a process_group each"
        )


def take_assigned(run: Run) -> None:
    """Take gradients that another program has assigned to transformed weights (``weight.grad = ...``), as torch's own steps do.

    Args:
        run: The run; each such gradient is added to that of the coordinates, and freed.

    Raises:
        ModeError: A weight was sharded after the run was made, has a hook for a gradient that is never formed, or is that of
            another layer.
    """
    for attachment in run.attachments:
        weight = attachment.sub.weight.param
        attachment.require_heard(weight)
        if id(weight) != attachment.marked and is_attached(weight):
            raise ModeError(
                f"{attachment.sub.name} holds the parameter of another layer that this optimizer trains (weights were tied or "
                "exchanged), which would be stepped with the moments of both. Call detach(), tie the layers, and call lingrad "
                "again"
            )
        if is_sharded(weight) and attachment.sub.weight.sharding is None:
            refuse_late(attachment.sub.name)
        if weight.grad is not None or isinstance(weight, SummedWeight) or attachment.sub.weight.sharding is not None:
            attachment.sub.take(weight)


def _warn_of_unfrozen(run: Run) -> None:
    """Say once of each parameter that was frozen and has a gradient now that this run does not train it; others may."""
    found = [(name, ref()) for name, ref in run.frozen]
    unfrozen = [
        name
        for name, param in found
        if param is not None and param.grad is not None and param.requires_grad and not is_attached(param)
    ]
    if not unfrozen:
        return
    run.frozen = [(name, ref) for name, ref in run.frozen if name not in set(unfrozen)]
    more = f" and {len(unfrozen) - 1} more" if unfrozen[1:] else ""
    warnings.warn(
        f"{unfrozen[0]}{more} was frozen when lingrad was called, has a gradient now, and is not in this optimizer: it is not "
        "trained, unless by another one. Call lingrad while it is trainable, without a rule that freezes it, and freeze it "
        "then until it is to train",
        stacklevel=2,
    )
