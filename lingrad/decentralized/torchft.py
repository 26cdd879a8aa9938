"""Workers that may die, be late or join, by torchft: its lighthouse, quorum and process groups."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed
from typing_extensions import override

from lingrad.config.rounds import Workers
from lingrad.decentralized.messages import Head, by_number, check_heads, packed
from lingrad.errors import ExchangeError, ModeError, SpecError, in_short, optional, require


class TorchftWorkers(Workers):
    """The workers that a lighthouse of torchft knows: one process each, started and stopped at any time.

    At the end of a round the lighthouse names those who are there (its quorum), who exchange coordinates. One that has died is
    missing from then on. One that is later than the lighthouse waits (``--join_timeout_ms``), or starts later, is given the
    weights of another at the next exchange that it reaches; what it has trained since is lost.

    All workers start with the same weights. Close it, or use it in a ``with`` block, at the end.

    Args:
        number: Which worker this is, from 0; no two have the same.
        lighthouse: The lighthouse's address, ``http://host:port``; None for that in the environment, TORCHFT_LIGHTHOUSE.
        at_least: How many workers an exchange needs; with fewer they wait. 1 lets a worker that has lost sight of all others
            go on alone.
        timeout: Seconds that a message, or the weights for a worker that joins, may take.
        patience: Seconds to wait for an exchange in all, at least as long as the slowest worker's round.
        on_join: Called with the number of steps that the run has finished when weights were taken over, to set schedules and
            data.
        process_group: A process group of torchft's; None for its gloo.

    Raises:
        DependencyError: torchft is not installed.
        SpecError: An option is wrong, or there is no lighthouse.
        ExchangeError: The lighthouse cannot be reached.
    """

    def __init__(
        self,
        number: int,
        *,
        lighthouse: str | None = None,
        at_least: int = 2,
        timeout: float = 60.0,
        patience: float = 3600.0,
        on_join: Callable[[int], None] | None = None,
        process_group: Any = None,
    ) -> None:
        super().__init__(number)
        for option, value in (("timeout", timeout), ("patience", patience)):
            require(isinstance(value, (int, float)) and value > 0, option, f"{option} must be seconds above 0, not {value!r}")
        require(type(at_least) is int and at_least >= 1, "at_least", f"at_least must be 1 or more, not {at_least!r}")
        what = "lingrad.decentralized.TorchftWorkers"
        groups, self._on_join = optional("torchft.process_group", what, "torchft"), on_join
        if lighthouse is None and not os.environ.get("TORCHFT_LIGHTHOUSE"):
            raise SpecError(
                "no lighthouse: start one with torchft_lighthouse, and give its address, http://host:port, as lighthouse or in "
                "the environment, TORCHFT_LIGHTHOUSE",
                option="lighthouse",
            )
        limit = timedelta(seconds=timeout)
        self._follows = self._has_joined = False
        self._patience, self._options = patience, groups.AllgatherOptions()
        self._group = groups.ProcessGroupGloo(timeout=limit) if process_group is None else process_group
        self._store = distributed.TCPStore(  # type: ignore[attr-defined]
            "localhost", 0, is_master=True, wait_for_workers=False
        )
        manager = optional("torchft.manager", what, "torchft").Manager
        try:
            self._manager = manager(**self._of_manager(limit, at_least, lighthouse))
        except RuntimeError as error:
            address = lighthouse or os.environ["TORCHFT_LIGHTHOUSE"]
            raise ExchangeError(f"the lighthouse {address} cannot be reached: {in_short(error)}; start it first") from error

    def _of_manager(self, limit: timedelta, at_least: int, lighthouse: str | None) -> dict[str, Any]:
        return {
            "pg": self._group,
            "load_state_dict": None,
            "state_dict": None,
            "min_replica_size": at_least,
            "use_async_quorum": True,  # a worker that joins is counted from the next exchange on
            "init_sync": False,
            "timeout": limit,
            "quorum_timeout": timedelta(seconds=self._patience),
            "connect_timeout": limit,
            "rank": 0,
            "world_size": 1,
            "store_addr": "localhost",
            "store_port": self._store.port,
            "lighthouse_addr": lighthouse,
            "replica_id": f"worker{self.number}",
            "checkpoint_transport": _plain_transport(limit),
        }

    @override
    def follow(self, save: Callable[[], dict[str, Any]], load: Callable[[dict[str, Any]], None]) -> None:
        if self._follows:
            raise ModeError("these TorchftWorkers are of another run already; give each run a TorchftWorkers of its own")
        self._follows = True

        def take(state: dict[str, Any]) -> None:
            load(state)
            self._has_joined = True
            if self._on_join is not None:
                self._on_join(state["run.ended"])

        self._manager.register_state_dict_fn("lingrad", take, save)

    @override
    def gather(self, give: Callable[[], Sequence[Tensor]]) -> Mapping[int, Sequence[Tensor]]:
        own, until = give(), time.monotonic() + self._patience
        while True:
            self._join_quorum(until - time.monotonic())
            found = None if self._manager.errored() else self._try(packed(own, self._group.getBackendName()))
            merges = self._manager.should_commit()
            if self._has_joined:  # what is due there may not have been due here
                own, self._has_joined = give(), False
            if merges and found is not None:
                return by_number(*found, own)

    def _join_quorum(self, left: float) -> None:
        """Wait until the lighthouse names those who are there.

        Args:
            left: Seconds to wait.

        Raises:
            ExchangeError: It has not.
        """
        failed = self._manager.errored()
        try:
            self._manager.start_quorum(timeout=timedelta(seconds=max(left, 0.001)))
            self._manager.wait_quorum()
        except TimeoutError as error:
            raise ExchangeError(
                f"no exchange has come about in {self._patience:g} seconds"
                f"{'' if failed is None else f' ({in_short(failed.original_exception)})'}; look whether the lighthouse and as "
                "many workers as it waits for run, or give patience more than the slowest worker's round takes"
            ) from error

    def _try(self, buffer: Tensor) -> tuple[list[Head], list[Tensor]] | None:
        """One exchange of those in the quorum; None where it failed, as when one of them has just died."""
        head = Head(self.number, len(buffer), int(self._manager.is_participating()))
        try:
            heads = [Head(*found.tolist()) for found in self._gather(head.to(buffer.device))]
            check_heads(heads)
            if not head.taken:  # it sends nothing that is read, of the size that the others send
                buffer = buffer.new_zeros(max(other.size for other in heads if other.taken))
            found = heads, self._gather(buffer)
        except ExchangeError:
            raise
        except RuntimeError as error:  # of the process group
            self._manager.report_error(error)
            return None
        return found

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        count = self._group.size()
        found = [torch.empty_like(tensor) for _ in range(count)]
        self._group.allgather([found], [tensor], self._options).wait()
        self.sent += tensor.nbytes * (count - 1)
        return found

    def close(self) -> None:
        """Leave; the others go on."""
        with suppress(Exception):
            self._manager.shutdown(wait=False)

    def __enter__(self) -> TorchftWorkers:
        """Nothing; `close` at the end."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leave."""
        self.close()


def _plain_transport(timeout: timedelta) -> Any:
    """Torchft's transport of weights by HTTP, here only tensors and plain values; its own unpickles what it is sent."""
    transports = optional("torchft.checkpointing.http_transport", "lingrad.decentralized.TorchftWorkers", "torchft")

    class PlainTransport(transports.HTTPTransport):  # type: ignore[misc, name-defined]
        @classmethod
        def _load_from_address(cls, address: str, timeout: timedelta) -> object:
            with transports.urllib.request.urlopen(address, timeout=timeout.total_seconds()) as file:
                return transports._streaming_load(file, weights_only=True)

    return PlainTransport(timeout=timeout, num_chunks=0)
