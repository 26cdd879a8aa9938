"""What the workers of a decentralised run send each other at the end of a round."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lingrad.config.rounds import Rounds
from lingrad.engine.run import Run
from lingrad.errors import ExchangeError
from lingrad.optimizers.codes import code_book, dequantize, quantize
from lingrad.subspaces.subspace import Subspace
from lingrad.transforms.linalg import derive_seed

SAMPLES = 16  # elements of each weight by which workers see that they hold the same ones
ALIKE = 1e-4  # by how much these may differ, of the largest: other machines round other ways; or four units of 16 bits


def alike(run: Run) -> float:
    """By how much elements of workers' weights may differ, of the largest."""
    return max([ALIKE, *(4 * torch.finfo(sub.weight.dtype).eps for sub in run.subspaces)])


class Message(NamedTuple):
    """What a worker sends.

    Args:
        terms: What workers must agree on: [steps, hash of the options, sum of the bits of all weights before the first round],
            int64; and some elements of each weight, float64.
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


def packed(run: Run, rounds: Rounds) -> list[Tensor]:
    """This worker's message, as it is sent.

    Args:
        run: The run.
        rounds: Its rounds.

    Returns:
        Tensors, as many and as large as every worker's.
    """
    sent: list[Tensor] = _terms(run, rounds)
    for sub in run.subspaces:
        sent += _encoded(sub.coords.detach(), rounds)
    for sub in learning(run):
        m, n = sub.weight.layout.shape
        shapes = [(m if a is None else a.shape[1], n if b is None else b.shape[1]) for a, b in sub.probes()]
        total = sub.pending.total
        sent += total if isinstance(total, tuple) else [sub.coords.new_zeros(shape) for shape in shapes]
    return [*sent, *trained_in_full(run).values()]


def unpacked(run: Run, rounds: Rounds, sent: Sequence[Tensor]) -> Message:
    """The message of a worker.

    Args:
        run: The run.
        rounds: Its rounds.
        sent: What that worker's `packed` gave.

    Returns:
        The message, coordinates decoded.
    """
    parts = iter(sent)
    terms = [next(parts), next(parts)]
    coords = [_decoded(parts, sub.coords, rounds) for sub in run.subspaces]
    sketches = [[next(parts) for _ in sub.probes()] for sub in learning(run)]
    return Message(terms, coords, sketches, list(parts))


def _encoded(coords: Tensor, rounds: Rounds) -> list[Tensor]:
    if rounds.send == "8bit":
        return list(quantize(coords, code_book("8bit", signed=True, device=coords.device)))
    return [coords if rounds.send == "full" else coords.to(torch.bfloat16)]


def _decoded(parts: Iterator[Tensor], like: Tensor, rounds: Rounds) -> Tensor:
    if rounds.send == "8bit":
        return dequantize(next(parts), next(parts), code_book("8bit", signed=True, device=like.device))
    return next(parts).to(like.dtype)


def learning(run: Run) -> list[Subspace]:
    """The weights whose bases are about to be learned from a sketch."""
    return [sub for sub in run.subspaces if sub.basis.due]


def trained_in_full(run: Run) -> dict[str, Tensor]:
    """The parameters that train in full, by name."""
    return {named.name: named.param.detach() for named in run.named() if named.attachment is None}


def _terms(run: Run, rounds: Rounds) -> list[Tensor]:
    """What workers must agree on: see `Message`."""
    specs = [(sub.name, str(sub.basis.transform), sub.weight.layout.shape, sub.basis.refreshes) for sub in run.subspaces]
    # weights are multiplied by 1 - lr weight_decay in each worker
    decays = [(float(group["lr"]), float(group["weight_decay"])) for group in run.groups if group["weight_decay"]]
    options = run.settings.seed, run.settings.carry, run.stepper.base.name, decays, rounds.terms()
    known = derive_seed(0, options, specs, list(trained_in_full(run)))
    samples = [_sample(sub.weight.dense()) for sub in run.subspaces]
    started = 0 if any(sub.ledger.merged for sub in run.subspaces) else _bits(run)
    return [torch.tensor([run.ended, known, started], dtype=torch.int64, device=samples[0].device), torch.cat(samples)]


def _bits(run: Run) -> int:
    """The sum of the bits of all parameters that no worker changes before its first exchange, which wraps around."""
    trained = {id(named.param) for named in run.named()}
    params = () if run.model is None else (param for param in run.model.parameters() if id(param) not in trained)
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = (param.detach().contiguous().view(-1).view(words[param.element_size()]).sum(dtype=torch.int64) for param in params)
    total = sum(int(one) for one in sums)
    return (total + 2**63) % 2**64 - 2**63


def _sample(weight: Tensor) -> Tensor:
    flat = weight.reshape(-1)
    return flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES].to(torch.float64)


def check_terms(terms: Mapping[int, Sequence[Tensor]], tolerance: float) -> None:
    """Make sure that workers mean the same by what they send.

    Args:
        terms: Number -> the terms of its message.
        tolerance: What `alike` gives.

    Raises:
        ExchangeError: They do not.
    """
    (one, (agreed, weights)), *others = terms.items()
    for number, (own, sample) in others:
        steps = int(agreed[0]), int(own[0])
        if steps[0] != steps[1]:
            raise ExchangeError(
                f"worker {one} has made {steps[0]} steps and worker {number} {steps[1]}: workers must start together, and make "
                "equally many steps in a round; TorchftWorkers give weights to one that joins"
            )
        if int(agreed[1]) != int(own[1]):
            raise ExchangeError(
                f"workers {one} and {number} differ in their rules, base, seed, carry, options of Rounds, trained parameters, "
                "or in lr where weights decay, and would make other changes than were trained; start all of them with the same"
            )
        same = int(agreed[2]) == int(own[2])
        if not same or float((sample - weights).abs().max()) > tolerance * float(weights.abs().max()):
            raise ExchangeError(
                f"workers {one} and {number} hold different weights: load the same checkpoint in all of them before the run, "
                "and write to no weight in it"
            )
