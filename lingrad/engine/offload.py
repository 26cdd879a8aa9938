"""Moments that are in host memory between steps, and stream through the device while they are stepped.

The idea is that of ZeRO-Offload (Ren et al., USENIX ATC 2021, arXiv 2101.06840), but the step itself stays on the device, so
that its numbers are those of any other run: what is offloaded is memory, not arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lingrad.optimizers import Base
from lingrad.optimizers.checks import check_no_shared_state, shared_entries
from lingrad.tensors import on_host, to_device, to_host

BLOCK = 2**22  # elements of the parameters whose moments are on the device together

State = MutableMapping[Tensor, dict[str, Any]]
Entry = tuple[int, str]  # the id of a parameter, and the name of an entry of its state


class _Block(NamedTuple):
    """Some parameters of one param group, on one device, which are stepped together."""

    group: dict[str, Any]
    params: list[Tensor]


class Offload:
    """Keeps the tensors of a base's state in host memory; scalars, such as counts of steps, stay where they are.

    While one block is stepped, the next one is copied to the device and the one before it back, on CUDA on streams of their
    own: three are on the device at most.

    Args:
        base: The base of the coordinates. Raises `SpecError` where its parameters share a counter or a step size.
    """

    def __init__(self, base: Base) -> None:
        self._stay: set[str] = set()  # entries that all parameters share, such as code books
        for one in (base, base.fallback):
            if one is not None:
                check_no_shared_state(one, "offload='moments'")
                self._stay |= shared_entries(one)
        self._streams: dict[torch.device, tuple[Any, Any]] = {}  # to the device and back
        self._leaving: list[tuple[Any, list[Tensor]]] = []  # copies that are under way, with what they read
        self.stepped = False  # whether the step under way has changed any parameter

    def step(self, optimizer: Optimizer) -> None:
        """One step of an optimizer, block by block; whatever fails, its state is complete, and in host memory.

        Args:
            optimizer: The optimizer.
        """
        groups, blocks = optimizer.param_groups, list(_blocks(optimizer.param_groups))
        self.stepped = False
        try:
            ahead = self._fetch(optimizer.state, blocks[0].params) if blocks else {}
            for i, (group, params) in enumerate(blocks):
                now, ahead = ahead, {}
                if i + 1 < len(blocks):
                    ahead = self._fetch(optimizer.state, blocks[i + 1].params)
                self._wait()
                memory = self._enter(optimizer.state, params, now)
                part = {**group, "params": params}
                optimizer.param_groups = [part]
                try:
                    optimizer.step()
                finally:
                    self._leave(optimizer.state, params, memory, now)
                self.stepped = True
                group.update({key: value for key, value in part.items() if key != "params"})
        finally:
            optimizer.param_groups = groups
            self._wait()

    @contextmanager
    def fetched(self, state: State, param: Tensor) -> Iterator[None]:
        """Have the state of one parameter on the device.

        Args:
            state: What the optimizers keep, by parameter.
            param: The parameter.

        Yields:
            None. What the state is afterwards is in host memory again.
        """
        copies = self._fetch(state, [param])
        memory = self._enter(state, [param], copies)
        try:
            yield
        finally:
            self._leave(state, [param], memory, copies)
            self._wait()

    def stow(self, entries: dict[str, Any]) -> dict[str, Any]:
        """Move the state of one parameter to host memory.

        Args:
            entries: The state, changed in place.

        Returns:
            The state.
        """
        for key, value in self._moving(entries):
            if not on_host(value):
                entries[key] = to_host(value)
        return entries

    def _moving(self, entries: dict[str, Any]) -> list[tuple[str, Tensor]]:
        return [
            (key, value)
            for key, value in entries.items()
            if isinstance(value, Tensor) and value.numel() > 1 and key not in self._stay
        ]

    def _fetch(self, state: State, params: Iterable[Tensor]) -> dict[Entry, Tensor]:
        """Start to copy the state of some parameters to their device."""
        found: dict[Entry, Tensor] = {}
        for param in params:
            with self._beside(param.device, 0):
                for key, value in self._moving(state.get(param, {})):
                    if on_host(value):
                        found[id(param), key] = to_device(value, param.device)
        return found

    def _enter(self, state: State, params: list[Tensor], copies: dict[Entry, Tensor]) -> dict[Entry, Tensor]:
        """Put copies on the device in the place of what is in host memory, which is returned."""
        if params[0].is_cuda:
            torch.cuda.current_stream(params[0].device).wait_stream(self._both(params[0].device)[0])
        entries = {id(param): state[param] for param in params if param in state}
        memory = {(param, key): entries[param][key] for param, key in copies}
        for (param, key), value in copies.items():
            entries[param][key] = value
        return memory

    def _leave(self, state: State, params: list[Tensor], memory: dict[Entry, Tensor], copies: dict[Entry, Tensor]) -> None:
        """Start to copy the state of some parameters back; an entry is replaced once its copy has memory."""
        device = params[0].device
        back = self._both(device)[1] if device.type == "cuda" else None
        read = list(copies.values())  # a base may have put others in their place, and the device may read them still
        if back is not None:
            back.wait_stream(torch.cuda.current_stream(device))
        try:
            with self._beside(device, 1):
                for param in params:
                    entries = state.get(param, {})
                    for key, value in self._moving(entries):
                        read.append(value)
                        entries[key] = to_host(value, memory.get((id(param), key)), wait=False)
        finally:  # of what found no memory the state has the tensors on the device
            self._leaving.append((None if back is None else back.record_event(), read))

    def _wait(self) -> None:
        """Wait for the copies to host memory, and give the memory that they read back to the device."""
        leaving, self._leaving = self._leaving, []
        for event, _ in leaving:
            if event is not None:
                event.synchronize()

    def _both(self, device: torch.device) -> tuple[Any, Any]:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device), torch.cuda.Stream(device)
        return self._streams[device]

    def _beside(self, device: torch.device, way: int) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._both(device)[way]) if device.type == "cuda" else nullcontext()


def _blocks(groups: Iterable[dict[str, Any]]) -> Iterator[_Block]:
    """Parameters with a gradient: as many of one group and device as have `BLOCK` elements or fewer, but at least one."""
    for group in groups:
        block: list[Tensor] = []
        elements = 0
        for param in group["params"]:
            if param.grad is None:
                continue
            if block and (elements + param.numel() > BLOCK or param.device != block[0].device):
                yield _Block(group, block)
                block, elements = [], 0
            block.append(param)
            elements += param.numel()
        if block:
            yield _Block(group, block)
