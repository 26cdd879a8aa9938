"""The end of a round of a decentralised run: workers exchange coordinates, and all merge the same change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lingrad.config.rounds import Rounds
from lingrad.engine.messages import alike, check_terms, learning, packed, trained_in_full, unpacked
from lingrad.engine.refresh import look_ahead
from lingrad.engine.run import Run
from lingrad.errors import ExchangeError, ModeError, SpecError, in_short, require, warn_caller
from lingrad.maps import KroneckerMap
from lingrad.subspaces import trees
from lingrad.subspaces.basis import Basis
from lingrad.subspaces.subspace import Subspace
from lingrad.subspaces.watched import settle
from lingrad.transforms import Full, Slice


def begin(run: Run) -> None:
    """Give every basis the worker's slice, before the run starts.

    Args:
        run: The run; nothing is done where it has no rounds.

    Raises:
        SpecError: A transform or an option does not go with rounds.
        ModeError: Weights are sharded.
    """
    rounds = run.settings.rounds
    if rounds is None:
        trained = [sub.basis for sub in run.subspaces if not sub.weight.param.is_meta]  # and not only simulated
        sliced = next((basis for basis in trained if isinstance(basis.transform, Slice) and basis.transform.workers > 1), None)
        require(
            sliced is None,
            "rounds",
            f"{sliced and sliced.name} trains in one worker's slice of several, and the run has no rounds, in which the "
            "others' would be merged: pass rounds=lingrad.decentralized.Rounds(workers=...) to lingrad.adapt",
        )
        return
    require(bool(run.bases), "rounds", "'rounds' has no effect where nothing is transformed; leave it out")
    for sub in run.subspaces:
        if sub.weight.sharding is not None:
            raise ModeError(f"{sub.name} is sharded, and each worker of a round needs whole weights; leave rounds out")
    for option in ("stagger", "layerwise", "keep_remainder", "merge_every"):
        require(
            not getattr(run.settings, option),
            option,
            f"{option} merges or changes bases at other steps than the end of a round, where all workers do; leave it out",
        )
    for basis in run.bases:
        transform = basis.transform
        if isinstance(transform, Full):
            continue
        if not isinstance(transform, Slice):
            raise SpecError(
                f"{basis.name} has the transform {transform.name}, whose basis other workers do not know; a run with rounds "
                "needs slice(rank=..., choice=...), or full() for whole weights",
                option="rules",
            )
        require(
            transform.every % rounds.every == 0,
            "every",
            f"the slices of {basis.name} change every {transform.every} steps, and a round has {rounds.every}: slices change "
            f"at the end of a round; make the number a multiple of {rounds.every}, or 0",
        )
        basis.replace(_numbered(basis, rounds.workers.number), basis.refreshes)
    rounds.workers.follow(lambda: snapshot(run), lambda state: restore(run, state))


def ends(run: Run) -> bool:
    """Whether the step that has just been made ends a round: it was the last one, or bases are about to change."""
    rounds = run.settings.rounds
    return rounds is not None and ((run.step + 1) % rounds.every == 0 or any(basis.due for basis in run.bases))


def require_whole(run: Run) -> None:
    """Make sure that no exchange of an earlier step has failed.

    Args:
        run: The run.

    Raises:
        ExchangeError: One has; what was due after it was not done.
    """
    if run.failed is not None:
        raise ExchangeError(
            f"the exchange after step {run.step + 1} has failed, and this worker's weights are not those of the others: start "
            f"again from a checkpoint. It failed with: {run.failed}"
        )


def exchange_in_step(run: Run) -> None:
    """`exchange` at the end of a step; where it fails the run does not go on.

    Args:
        run: The run. Raises what `exchange` does.
    """
    try:
        exchange(run, run.step + 1)
    except Exception as error:
        run.failed = in_short(error)
        raise


@torch.no_grad()
def exchange(run: Run, finished: int) -> None:
    """Send coordinates, and add to every weight what all workers have found.

    Nothing is done where no step was made since the last. Parameters that train in full become their mean, and so do the
    sketches that the next bases are learned from. What is not finite of a worker is left out, and its moments start anew.

    Args:
        run: The run.
        finished: Steps finished, that which has just been made among them.

    Raises:
        ModeError: The run has no rounds, or is detached.
        ExchangeError: Workers differ in their options, in their step or in the weights they hold.
    """
    run.require_attached()
    require_whole(run)
    rounds = run.settings.rounds
    if rounds is None:
        raise ModeError("this run has no rounds; pass rounds=lingrad.decentralized.Rounds(workers=...) to lingrad.adapt")
    if finished == run.ended:  # nothing was trained since, and an outer momentum would move the weights again
        return
    own, subs = rounds.workers.number, run.subspaces
    before, run.ended = run.ended, finished
    try:
        given = rounds.workers.gather(lambda: packed(run, rounds))
        found = {number: unpacked(run, rounds, given[number]) for number in sorted(given)}
        check_terms({number: message.terms for number, message in found.items()}, alike(run))
        taken = {number: message for number, message in found.items() if message.is_finite}
        if not taken:
            raise ExchangeError(f"no worker has sent finite values by step {run.ended}; lower the learning rate")
    except BaseException:
        run.ended = before
        raise
    for number in found.keys() - taken.keys():
        warn_caller(f"worker {number} sent values that are not finite; its round is left out", RuntimeWarning)
    for i, sub in enumerate(subs):
        _merge(run, rounds, sub, {number: message.coords[i] for number, message in taken.items()})
        if rounds.moments == "reset":
            run.stepper.restart("coords", sub.coords)
    for i, sub in enumerate(learning(run)):
        sub.pending.total = tuple(map(_mean, zip(*(message.sketches[i] for message in taken.values()), strict=True)))
    for i, param in enumerate(trained_in_full(run).values()):
        param.copy_(_mean([message.full[i] for message in taken.values()]))
    if own in found.keys() - taken.keys():  # its moments are not finite either
        for named in run.named():
            run.stepper.restart(named.group["kind"], named.param)


def snapshot(run: Run) -> dict[str, Any]:
    """What a worker that joins at the end of this round needs: weights, bases, outer momentum; nothing of this worker alone.

    Args:
        run: The run.

    Returns:
        Name -> tensor or plain value; tensors are the run's own.
    """
    bases = {basis.name: {"refreshes": basis.refreshes, "state": _numbered(basis, 0)} for basis in run.bases}
    return trees.flatten({"ended": run.ended, **_common(run), "bases": bases, "outer": run.outer}, "run")


@torch.no_grad()
def restore(run: Run, state: Mapping[str, Any]) -> None:
    """Join a run: take over what another worker's `snapshot` gave; coordinates and moments start anew.

    Args:
        run: The run; not changed where the snapshot is of another model.
        state: The snapshot. Raises `CheckpointError` where it is of another model.
    """
    owner, number = "what another worker has sent", run.settings.rounds.workers.number if run.settings.rounds else 0
    pairs = [(leaf, trees.checked(leaf, state, key, owner)) for key, leaf in trees.flatten(_common(run), "run").items()]
    bases = []
    for basis in run.bases:
        shared = trees.restore(_numbered(basis, 0), state, f"run.bases.{basis.name}.state", owner)
        bases.append((basis, shared, trees.checked(0, state, f"run.bases.{basis.name}.refreshes", owner)))
    outer = {sub.name: state[key].clone() for sub in run.subspaces if (key := f"run.outer.{sub.name}") in state}
    ended = trees.checked(0, state, "run.ended", owner)
    run.step, run.ended, run.outer = run.step + ended - run.ended, ended, outer
    for leaf, value in pairs:
        leaf.copy_(value)
    for basis, shared, refreshes in bases:
        basis.replace(shared, refreshes)
        basis.state = _numbered(basis, number)
    for sub in run.subspaces:
        sub.coords.zero_()
        settle(sub.weight.param)
        sub.ledger.merged = True
    for named in run.named():
        run.stepper.restart(named.group["kind"], named.param)
    look_ahead(run)  # a redraw that was due is in the snapshot


def _numbered(basis: Basis, number: int) -> Any:
    """The state of a basis as another worker has it."""
    transform = basis.transform
    return transform.of_worker(basis.state, number) if isinstance(transform, Slice) else basis.state


def _common(run: Run) -> dict[str, Any]:
    """The tensors that are alike in all workers at the end of a round."""
    return {"weights": {sub.name: sub.weight.state() for sub in run.subspaces}, "full": trained_in_full(run)}


def _merge(run: Run, rounds: Rounds, sub: Subspace, coords: Mapping[int, Tensor]) -> None:
    """``W += outer(sum or mean of S_k z_k)``, then ``z = 0``."""
    transform = sub.basis.transform
    if isinstance(transform, Slice):
        joint, z = transform.joint(sub.basis.state, coords)
    else:  # whole weights
        joint, z = KroneckerMap(None, None), torch.stack(list(coords.values())).sum(0)
    if rounds.combine == "mean":
        z = z / len(coords)
    if rounds.momentum:
        change = joint.lift(z)
        buffer = run.outer.setdefault(sub.name, torch.zeros_like(change))
        joint, z = KroneckerMap(None, None), rounds.outer(change, buffer)
    else:
        z = rounds.outer(z, None)
    sub.coords.zero_()
    if not bool(z.any()):  # a quantised weight would be rounded again for nothing
        return
    remainder = sub.weight.add_(joint, z)
    settle(sub.weight.param)
    sub.ledger.take(joint.factors, z)
    if remainder is not None:
        sub.weight.lose(remainder)


def _mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean(0)
