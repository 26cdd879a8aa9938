"""The end of a round of a decentralised run: workers exchange coordinates, and all merge the same change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lingrad.config.rounds import Rounds
from lingrad.engine.refresh import look_ahead
from lingrad.engine.run import Run
from lingrad.errors import ExchangeError, ModeError, SpecError, require, warn_caller
from lingrad.maps import KroneckerMap
from lingrad.optimizers.codes import code_book, dequantize, quantize
from lingrad.subspaces import trees
from lingrad.subspaces.subspace import Subspace
from lingrad.transforms import Slice, derive_seed

SAMPLES = 16  # elements of each weight by which workers see that they hold the same ones
ALIKE = 1e-2  # by how much these may differ, of a weight's largest: other machines round other ways


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
        sliced = next((basis for basis in run.bases if isinstance(basis.transform, Slice) and basis.transform.workers > 1), None)
        require(
            sliced is None,
            "rounds",
            f"{sliced and sliced.name} trains in one worker's slice of several, and the run has no rounds, in which the others' "
            "would be merged: pass rounds=lingrad.decentralized.Rounds(workers=...) to lingrad.adapt",
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
        if not isinstance(transform, Slice):
            raise SpecError(
                f"{basis.name} has the transform {transform.name}, whose basis other workers do not know; a run with rounds "
                "needs slice(rank=..., choice=...)",
                option="rules",
            )
        require(
            transform.every % rounds.every == 0,
            "every",
            f"the slices of {basis.name} change every {transform.every} steps, and a round has {rounds.every}: slices change "
            f"at the end of a round; make the number a multiple of {rounds.every}, or 0",
        )
        basis.state = transform.of_worker(basis.state, rounds.workers.number)
    rounds.workers.follow(lambda: snapshot(run), lambda state: restore(run, state))


def ends(run: Run) -> bool:
    """Whether the step that has just been made ends a round: it was the last one, or bases are about to change."""
    rounds = run.settings.rounds
    return rounds is not None and ((run.step + 1) % rounds.every == 0 or any(basis.due for basis in run.bases))


@torch.no_grad()
def exchange(run: Run) -> None:
    """Send coordinates, and add to every weight what all workers have found.

    Parameters that train in full become their mean, and so do the sketches that the next bases are learned from. What is not
    finite of a worker is left out, and its moments start anew.

    Args:
        run: The run.

    Raises:
        ModeError: The run has no rounds, or is detached.
        ExchangeError: Workers differ in their options, in their step or in the weights they hold.
    """
    run.require_attached()
    rounds = run.settings.rounds
    if rounds is None:
        raise ModeError("this run has no rounds; pass rounds=lingrad.decentralized.Rounds(workers=...) to lingrad.adapt")
    own, subs = rounds.workers.number, run.subspaces
    given = rounds.workers.gather(_packed(run, rounds))
    found = {number: _unpacked(run, rounds, given[number]) for number in sorted(given)}
    _check(run, {number: message.terms for number, message in found.items()})
    taken = {number: message for number, message in found.items() if message.is_finite}
    for number in found.keys() - taken.keys():
        warn_caller(f"worker {number} sent values that are not finite; its round is left out", RuntimeWarning)
    if not taken:
        raise ExchangeError(f"no worker has sent finite values in step {run.step + 1}; lower the learning rate")
    for i, sub in enumerate(subs):
        _merge(run, rounds, sub, {number: message.coords[i] for number, message in taken.items()})
        if rounds.moments == "reset" or own in found.keys() - taken.keys():
            run.stepper.moments(sub, "reset").replace({})
    for i, sub in enumerate(_learning(run)):
        sub.pending.total = tuple(map(_mean, zip(*(message.sketches[i] for message in taken.values()), strict=True)))
    for i, param in enumerate(_full(run).values()):
        param.copy_(_mean([message.full[i] for message in taken.values()]))


def snapshot(run: Run) -> dict[str, Any]:
    """What a worker that joins at the end of this round needs: weights, bases, outer momentum; nothing of this worker alone.

    Args:
        run: The run.

    Returns:
        Name -> tensor or plain value; tensors are the run's own.
    """
    bases = {
        basis.name: {"refreshes": basis.refreshes, "state": basis.transform.of_worker(basis.state, 0)} for basis in run.bases
    }
    return trees.flatten({"step": run.step, **_common(run), "bases": bases, "outer": run.outer}, "run")


@torch.no_grad()
def restore(run: Run, state: Mapping[str, Any]) -> None:
    """Join a run: take over what another worker's `snapshot` gave; coordinates and moments start anew.

    Args:
        run: The run; not changed where the snapshot is of another model.
        state: The snapshot. Raises `CheckpointError` where it is of another model.
    """
    owner = "what another worker has sent"
    pairs = [(leaf, trees.checked(leaf, state, key, owner)) for key, leaf in trees.flatten(_common(run), "run").items()]
    bases = []
    for basis in run.bases:
        like = basis.transform.of_worker(basis.state, 0)
        shared = trees.restore(like, state, f"run.bases.{basis.name}.state", owner)
        refreshes = trees.checked(0, state, f"run.bases.{basis.name}.refreshes", owner)
        bases.append((basis, basis.transform.of_worker(shared, basis.state.number), refreshes))
    outer = {sub.name: state[key].clone() for sub in run.subspaces if (key := f"run.outer.{sub.name}") in state}
    run.step, run.outer = trees.checked(0, state, "run.step", owner), outer
    for leaf, value in pairs:
        leaf.copy_(value)
    for basis, shared, refreshes in bases:
        basis.replace(shared, refreshes)
    for sub in run.subspaces:
        sub.coords.zero_()
        run.stepper.moments(sub, "reset").replace({})
    look_ahead(run)  # a redraw that was due is in the snapshot


class Message(NamedTuple):
    """What a worker sends.

    Args:
        terms: What workers must agree on: [step, hash of the options], int64, and some elements of each weight, float64.
        coords: z of every weight.
        sketches: Of every weight whose basis is about to be learned, the products of its probes.
        full: The parameters that train in full.
    """

    terms: list[Tensor]
    coords: list[Tensor]
    sketches: list[list[Tensor]]
    full: list[Tensor]

    @property
    def is_finite(self) -> bool:
        """Whether all of it is finite."""
        values = [*self.coords, *(part for parts in self.sketches for part in parts), *self.full]
        return all(bool(value.isfinite().all()) for value in values)


def _packed(run: Run, rounds: Rounds) -> list[Tensor]:
    """This worker's message, as it is sent."""
    sent: list[Tensor] = _terms(run, rounds)
    for sub in run.subspaces:
        sent += _encoded(sub.coords.detach(), rounds)
    for sub in _learning(run):
        m, n = sub.weight.layout.shape
        shapes = [(m if a is None else a.shape[1], n if b is None else b.shape[1]) for a, b in sub.probes()]
        total = sub.pending.total
        sent += total if isinstance(total, tuple) else [sub.coords.new_zeros(shape) for shape in shapes]
    return [*sent, *_full(run).values()]


def _unpacked(run: Run, rounds: Rounds, sent: Sequence[Tensor]) -> Message:
    """The message of a worker whose tensors are as many as this one's."""
    parts = iter(sent)
    terms = [next(parts), next(parts)]
    coords = [_decoded(parts, sub.coords, rounds) for sub in run.subspaces]
    sketches = [[next(parts) for _ in sub.probes()] for sub in _learning(run)]
    return Message(terms, coords, sketches, list(parts))


def _encoded(coords: Tensor, rounds: Rounds) -> list[Tensor]:
    if rounds.send == "8bit":
        return list(quantize(coords, code_book("8bit", signed=True, device=coords.device)))
    return [coords if rounds.send == "full" else coords.to(torch.bfloat16)]


def _decoded(parts: Iterator[Tensor], like: Tensor, rounds: Rounds) -> Tensor:
    if rounds.send == "8bit":
        return dequantize(next(parts), next(parts), code_book("8bit", signed=True, device=like.device))
    return next(parts).to(like.dtype)


def _learning(run: Run) -> list[Subspace]:
    """The weights whose bases are about to be learned from a sketch."""
    return [sub for sub in run.subspaces if sub.basis.due]


def _full(run: Run) -> dict[str, Tensor]:
    """The parameters that train in full, by name."""
    return {named.name: named.param.detach() for named in run.named() if named.attachment is None}


def _common(run: Run) -> dict[str, Any]:
    """The tensors that are alike in all workers at the end of a round."""
    return {"weights": {sub.name: sub.weight.state() for sub in run.subspaces}, "full": _full(run)}


def _terms(run: Run, rounds: Rounds) -> list[Tensor]:
    """What workers must agree on: see `Message`."""
    specs = [(sub.name, str(sub.basis.transform), sub.weight.layout.shape, sub.basis.refreshes) for sub in run.subspaces]
    known = derive_seed(run.settings.seed, rounds.terms(), specs, list(_full(run)))
    samples = [_sample(sub.weight.dense()) for sub in run.subspaces]
    device = run.subspaces[0].coords.device if run.subspaces else None
    return [torch.tensor([run.step, known], dtype=torch.int64, device=device), torch.cat(samples)]


def _sample(weight: Tensor) -> Tensor:
    flat = weight.reshape(-1)
    return flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES].to(torch.float64)


def _check(run: Run, terms: Mapping[int, Sequence[Tensor]]) -> None:
    """Make sure that workers mean the same by what they send.

    Raises:
        ExchangeError: They do not.
    """
    (one, (agreed, weights)), *others = terms.items()
    for number, (own, sample) in others:
        steps = int(agreed[0]), int(own[0])
        if steps[0] != steps[1]:
            raise ExchangeError(
                f"worker {one} is in step {steps[0] + 1} and worker {number} in step {steps[1] + 1}: workers must start "
                "together, or join by a snapshot, and make equally many steps in a round"
            )
        if int(agreed[1]) != int(own[1]):
            raise ExchangeError(
                f"workers {one} and {number} differ in their rules, seed, options of Rounds or trained parameters, and would "
                "merge into other slices than were trained; start all of them with the same"
            )
        if float((sample - weights).abs().max()) > ALIKE * float(weights.abs().max()):
            raise ExchangeError(
                f"workers {one} and {number} hold different weights: load the same checkpoint in all of them before the run, "
                "and write to no weight in it"
            )


def _merge(run: Run, rounds: Rounds, sub: Subspace, coords: Mapping[int, Tensor]) -> None:
    """``W += outer(sum or mean of S_k z_k)``, then ``z = 0``."""
    joint, z = sub.basis.transform.joint(sub.basis.state, coords)
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
    sub.ledger.take(joint.factors, z)
    if remainder is not None:
        sub.weight.lose(remainder)


def _mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean(0)
