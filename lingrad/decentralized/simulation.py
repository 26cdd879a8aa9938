"""All workers in one process: for studies and tests, without a cluster."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from threading import Condition, Thread
from typing import Any, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from lingrad.config.rounds import Workers
from lingrad.decentralized.messages import Head, by_number, check_heads, packed
from lingrad.errors import require

T = TypeVar("T")


def simulate(work: Callable[[Workers], T], workers: int) -> list[T]:
    """Run the same program for each of several workers, in turn: one runs until it waits for the others.

    The numbers are those of as many processes. Each worker has a state of torch's random number generators of its own, which
    begins as the caller's does.

    Args:
        work: What a worker does: it builds its model, passes ``rounds=Rounds(workers=...)`` with what it is given, trains, and
            returns anything. One that returns early has left; the others go on without it.
        workers: How many there are. Each holds a model in memory.

    Returns:
        What ``work`` returned, by number. An error of one worker stops all, and is raised here.
    """
    require(type(workers) is int and workers >= 1, "workers", f"workers must be 1 or more, not {workers!r}")
    hall = _Hall(workers)
    found: list[Any] = [None] * workers

    def run(number: int) -> None:
        try:
            hall.enter(number)
            found[number] = work(_SimulatedWorkers(number, hall))
            hall.leave(number)
        except _StoppedError:
            pass
        except BaseException as error:
            hall.stop(error)

    random = _random_state()
    threads = [Thread(target=run, args=(number,), name=f"worker {number}", daemon=True) for number in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    _set_random_state(random)
    if hall.error is not None:
        raise hall.error
    return found


class _StoppedError(Exception):
    """Another worker has failed."""


class _SimulatedWorkers(Workers):
    def __init__(self, number: int, hall: _Hall) -> None:
        super().__init__(number)
        self._place, self._hall = number, hall

    @override
    def gather(self, give: Callable[[], Sequence[Tensor]]) -> Mapping[int, Sequence[Tensor]]:
        own = give()
        buffer = packed(own)
        head = Head(self.number, len(buffer))
        given = self._hall.exchange(self._place, (head, buffer))
        check_heads([head for head, _ in given])
        self.sent += (len(buffer) + head.to(buffer.device).nbytes) * (len(given) - 1)
        return by_number([head for head, _ in given], [buffer for _, buffer in given], own)


_Given = tuple[Head, Tensor]


class _Hall:
    """Where simulated workers meet: one of them runs at a time.

    Attributes:
        error: What a worker has failed with.
    """

    def __init__(self, count: int) -> None:
        self.error: BaseException | None = None
        self._changed = Condition()
        self._there = list(range(count))
        self._now = 0
        self._given: dict[int, _Given] = {}
        self._found: list[_Given] = []
        self._random = dict.fromkeys(range(count), _random_state())

    def enter(self, number: int) -> None:
        """Wait for one's turn."""
        with self._changed:
            self._changed.wait_for(lambda: self._now == number or self.error is not None)
            if self.error is not None:
                raise _StoppedError
        _set_random_state(self._random[number])

    def exchange(self, number: int, given: _Given) -> list[_Given]:
        """Give something, and wait until all who are there have."""
        self._given[number] = given
        self._random[number] = _random_state()
        self._pass_on()
        self.enter(number)
        return self._found

    def leave(self, number: int) -> None:
        """Be there no longer."""
        self._there.remove(number)
        self._pass_on()

    def stop(self, error: BaseException) -> None:
        """Stop all others."""
        with self._changed:
            self.error = self.error or error
            self._changed.notify_all()

    def _pass_on(self) -> None:
        waiting = [number for number in self._there if number not in self._given]
        if not waiting:
            self._found, self._given = list(self._given.values()), {}
            waiting = self._there
        with self._changed:
            self._now = waiting[0] if waiting else -1
            self._changed.notify_all()


def _random_state() -> list[Tensor]:
    on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *on_devices]


def _set_random_state(state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if state[1:]:
        torch.cuda.set_rng_state_all(state[1:])
