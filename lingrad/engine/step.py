"""The order of a step, for all weights or for one inside the backward.

a new basis, where one is due that reads the gradient -> (clip) -> decay -> base -> merge, in optimizer mode
-> a new basis, where one is due that reads a sketch -> a new basis for the next forward, where it reads nothing
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lingrad.adapters import Attachment
from lingrad.engine import adaptive, residual, rounds
from lingrad.engine.follow import refuse_apart, refuse_lost, take_assigned
from lingrad.engine.refresh import choose, commit, renew, schedule
from lingrad.engine.run import Run
from lingrad.engine.stepper import Built, Group
from lingrad.errors import ModeError
from lingrad.optimizers.closure import evaluate as evaluate
from lingrad.optimizers.hooks import without_global_hooks
from lingrad.subspaces.ledger import Ledger
from lingrad.subspaces.merging import merge_all
from lingrad.subspaces.watched import allocate, settle
from lingrad.tensors import is_sharded, own, whole


@torch.no_grad()
def step(run: Run, closure: Callable[[], Any] | None = None) -> Any:
    """One step of a run.

    Args:
        run: The run.
        closure: Evaluates the model once and returns the loss, as in torch.

    Returns:
        What the closure returned.
    """
    run.require_attached()
    loss = evaluate(closure)
    _step(run)
    return loss


def _step(run: Run) -> None:
    rounds.require_whole(run)
    dry = _stepped(run)
    if not dry:
        if rounds.ends(run):
            rounds.exchange_in_step(run)
        _end(run)
    if run.layerwise is not None:
        run.layerwise.begin()


@without_global_hooks()
def _end(run: Run) -> None:
    """Change the bases that are learned from this step's sketches, and those that are drawn before the next."""
    if not run.is_quiet:
        for basis in run.bases:
            unused = all(attachment.sub.coords.grad is None for attachment in run.of(basis))
            basis.idle = basis.due and unused and run.settings.layerwise is not True
        renew(run)
    run.step += 1
    if not run.is_quiet:
        schedule(run)
    if run.residuals is not None:
        for sub in run.subspaces:
            run.residuals.settle(sub)


@without_global_hooks()
def _stepped(run: Run) -> bool:
    """Step all that has a gradient; whether this is a dry run."""
    for group in run.groups:
        run.stepper.follow(group, group["params"])
    take_assigned(run)
    refuse_lost(run)
    dry = run.is_dry_run()
    if not dry:
        refuse_apart(run)
    if run.layerwise is not None:
        run.layerwise.flush()
    if not dry:
        _change(run, run.attachments)
    _advance(run, run.stepper.built(run.groups), run.attachments)
    return dry


@without_global_hooks()
def step_one(run: Run, param: Tensor) -> None:
    """Step one parameter inside the backward and free its gradient.

    Args:
        run: The run.
        param: The parameter, whose gradient is complete.
    """
    attachment = run.attachment_of(param)
    attachments = [] if attachment is None else [attachment]
    for one in attachments:
        one.sub.require_intact()
    _change(run, attachments)
    _advance(run, [run.stepper.single(run.groups, param)], attachments)
    param.grad = None


@without_global_hooks()
def choose_one(run: Run, param: Tensor) -> None:
    """Refresh the basis of one weight inside the backward, if it is due, from the gradient that has arrived, and free that.

    Args:
        run: The run.
        param: Its coordinates.
    """
    attachment = run.attachment_of(param)
    if attachment is None or not attachment.sub.basis.due:
        return
    sub = attachment.sub
    sub.require_intact()
    attachment.require_read()
    sub.pending.require_read(sub.coords)
    choose(run, [sub])
    grad = sub.coords.grad
    if sub.basis.proposal is None and grad is not None and bool(grad.any() & grad.isfinite().all()):
        sub.basis.due = False  # its schedule, which is asked once a step, lets the old one stay
        sub.pending.forget()
    commit(run, sub.basis)


def clip(run: Run, max_norm: float, norm_type: float) -> Tensor:
    """Clip the gradient of all that trains by its norm; where a refresh is due its basis is chosen first.

    Args:
        run: The run.
        max_norm: The largest norm allowed.
        norm_type: Which norm.

    Returns:
        The norm before clipping, 0-d.

    Raises:
        ModeError: The run steps inside the backward, so that gradients never exist together.
    """
    if run.settings.layerwise is True:
        raise ModeError(
            "with layerwise=True each gradient is stepped and freed inside the backward, and there is no norm to clip by; "
            "leave layerwise out to clip, or use layerwise='coordinates'"
        )
    with torch.no_grad():
        take_assigned(run)
        refuse_apart(run)
        residual.take_up(run, run.subspaces)
        choose(run, (sub for sub in run.subspaces if sub.basis.due and sub.basis.transform.reads == "gradient"))
    params = [named.param for named in run.named()]
    grads = [param.grad for param in params if param.grad is not None]
    kinds = [[grad for grad in grads if is_sharded(grad) is cut] for cut in (False, True)]
    if not all(kinds):
        return torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type)
    with torch.no_grad():  # of tensors that are cut and others, which torch does not take together
        norms = [whole(torch.nn.utils.get_total_norm(kind, norm_type)) for kind in kinds]
        total: Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
        torch._foreach_mul_([own(grad) for grad in grads], (max_norm / (total + 1e-6)).clamp(max=1.0))
    return total


def _change(run: Run, attachments: Sequence[Attachment]) -> None:
    """Change to the bases that read this step's gradient; make sure that the other gradients belong to the bases in use."""
    if run.is_quiet and all(attachment.sub.coords.grad is not None for attachment in attachments):
        return
    due = []
    for attachment in attachments:
        sub = attachment.sub
        attachment.require_read()
        if sub.basis.due:
            sub.pending.require_read(sub.coords)
        if sub.basis.due and sub.basis.transform.reads == "gradient":
            due.append(sub)
        else:
            sub.pending.refuse_stale(sub.coords)
        missing = sub.coords.grad is None and sub.coords.requires_grad
        waits = run.settings.layerwise is not True  # else gradients are stepped by now
        if missing and waits and attachment.overridden:
            sub.basis.warn_once(
                "it has no gradient. The forward of its layer was replaced after lingrad had wrapped it; if the new one "
                "does not call the one it found, the weight is not trained: replace forwards first, then call lingrad",
                sub.name,
            )
    residual.take_up(run, (attachment.sub for attachment in attachments))
    choose(run, due)
    residual.prepare(run, [attachment.sub for attachment in attachments])
    for basis in dict.fromkeys(sub.basis for sub in due):
        commit(run, basis)


def _advance(run: Run, optimizers: Sequence[Built], attachments: Sequence[Attachment]) -> None:
    """Decay, step and merge whatever of these has a gradient."""
    stepped = [pair for built in optimizers for pair in built.stepped()]
    live = [attachment.sub for attachment in attachments if attachment.sub.coords.grad is not None]
    optimizer_mode = run.mode == "optimizer"
    decay_last = run.stepper.arithmetic.decay_last
    if not decay_last:
        _decay(run, stepped)
    flats = allocate([sub.coords for sub in live], together=optimizer_mode)
    for i, built in enumerate(optimizers):
        try:
            run.stepper.step(built, run.step + 1)
        except BaseException:
            if i == 0 and not decay_last and not run.stepper.has_stepped:
                _decay(run, stepped, undo=True)  # nothing was stepped: the weights stay as the step found them
            raise
    adaptive.follow(live)
    if decay_last:
        _decay(run, stepped)
    if run.settings.rounding != "nearest":
        _decay_rounded(run, stepped)
    every = run.settings.merge_every
    if run.residuals is not None:
        residual.merge(run, live)
    elif optimizer_mode:
        merge_all(live, flats)
    elif every is not None and (run.step + 1) % every == 0:
        for sub in live:
            sub.merge()


def _decay(run: Run, stepped: Sequence[tuple[Group, Tensor]], *, undo: bool = False) -> None:
    """Multiply weights and coordinates that have a gradient by 1 - lr * weight_decay, each param group in one call."""
    by_group: dict[int, tuple[Group, list[Tensor], list[Ledger]]] = {}
    for group, param in stepped:
        # of workers' weights each decays in every step, whether or not it had a gradient in this worker: they stay alike
        if group["weight_decay"] == 0 or (param.grad is None and run.settings.rounds is None):
            continue
        attachment = run.attachment_of(param)
        _, tensors, ledgers = by_group.setdefault(id(group), (group, [], []))
        tensors.extend([own(param)] if attachment is None else attachment.sub.decaying())
        if attachment is not None and attachment.sub.ledger.records:
            ledger = attachment.sub.ledger
            tensors.extend(() if ledger.on_host else map(own, ledger.tensors()))
            ledgers.append(ledger)
    for group, tensors, ledgers in by_group.values():
        if not tensors and not ledgers:
            continue
        factor = 1.0 - group["lr"] * group["weight_decay"]
        if undo:
            factor = 1.0 / factor if factor else 1.0
        if tensors:  # else the weights decay elsewhere, and what was merged is in host memory, or is nothing yet
            torch._foreach_mul_(tensors, factor)
            for tensor in tensors if run.mode == "adapter" else ():
                settle(tensor)
        number = float(factor) if ledgers else 1.0  # of a learning rate that is a tensor, once
        for ledger in ledgers:
            ledger.decayed(number)


def _decay_rounded(run: Run, stepped: Sequence[tuple[Group, Tensor]]) -> None:
    """Decay the weights that round in their own way: after the base, which reads none, so that nothing has to be undone."""
    for group, param in stepped:
        attachment = run.attachment_of(param)
        weight = None if attachment is None else attachment.sub.weight
        if weight is None or weight.rounding is None or weight.scales():
            continue
        if group["weight_decay"] != 0 and (param.grad is not None or run.settings.rounds is not None):
            weight.decay_(1.0 - group["lr"] * group["weight_decay"])
            settle(weight.param)
