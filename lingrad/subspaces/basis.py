"""A basis: the map S of one weight, or of several that are stacked to one tall weight, and how it came about.

It knows no weight and no gradient: a run asks it what a refresh needs, and gives it the state that a refresh chose.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import Tensor

from lingrad.errors import ModeError
from lingrad.maps import LinearMap
from lingrad.subspaces import trees
from lingrad.subspaces.schedule import Cadence, Probes, Proposal, Schedule
from lingrad.tensors import distinct
from lingrad.transforms import Probe, Transform, When
from lingrad.transforms.linalg import derive_seed
from lingrad.transforms.sketch import test_matrix

HELD_OUT = 16  # test vectors that no transform fits its basis to, from which its captured energy is estimated
NEVER = 2**62  # steps


class Basis:
    """One map S for one weight, or for several weights [m_i, n] that share a right basis, read as [sum of m_i, n].

    Args:
        name: The parameter it was made for, for messages; of several the first one.
        transform: How the map is chosen.
        shape: (m, n), or (sum of m_i, n).
        seed: The seed of this basis.
        run_seed: The seed of the run.
        like: A weight, for device and dtype.
        on_host: Keep it in host memory, and copy it to the device where it is used, for as long as it is used.

    Attributes:
        state: The transform's state, where it is kept; see `fetched`.
        device: The device that uses it, where it is kept in host memory; else None.
        when: The step that is being prepared, as its refresh would see it.
        refreshes: Refreshes committed.
        cadence: When it is refreshed, where its transform has a ``schedule``; else None.
        offset: Steps by which its refreshes are late, where weights take turns.
        due: Whether the step that is being prepared gathers what a refresh needs.
        chance: The probability with which a step gathers the gradient itself, for the part of it that the basis drops; 0 where
            that part is not used.
        whole: Whether the step that is being prepared does, as drawn from the basis's seed and the number of the step.
        energy: |S S^T G| / |G| of the last refresh; None where it was not measured.
        proposal: A refresh that is chosen and not yet committed.
        idle: Whether no weight that uses it had a gradient in the last step in which it was due.
        seal: A zero that each change is written into, for compiled backwards to notice it; None where there are none.
    """

    def __init__(
        self,
        name: str,
        transform: Transform,
        shape: tuple[int, int],
        *,
        seed: int,
        run_seed: int,
        like: Tensor,
        on_host: bool = False,
    ) -> None:
        self.name = name
        self.transform = transform
        self.device = like.device if on_host else None
        self.state = trees.stowed(transform.init(shape, seed=seed, device=like.device, dtype=like.dtype), self.device)
        self.when = When(0, 0, seed, shape, run_seed)
        self.refreshes = 0
        self.cadence = Cadence.of(transform)
        self.offset = 0
        self.due = False
        self.chance, self.whole = 0.0, False
        self.energy: float | None = None
        self.proposal: Proposal | None = None
        self.idle = False
        self.seal: Tensor | None = None
        self._map: LinearMap | None = None
        self._lent: weakref.ref[LinearMap] | None = None  # made of a copy on the device, while it is used
        self._said: set[str] = set()

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n), of the stacked weights where several share it."""
        return self.when.shape

    @property
    def gathers(self) -> bool:
        """Whether the backwards of the step that is being prepared leave more than the gradient of the coordinates."""
        return self.due or self.whole

    @property
    def coords_shape(self) -> tuple[int, int]:
        """(p, q), of the stacked weights where several share it."""
        return self.transform.coords_shape(self.shape)

    @property
    def rank(self) -> int | None:
        """Columns that are not zero: of two sides on the smaller, of experts of the one with most; None without a basis."""
        used = [int(t.any(-2).sum(-1).max()) if t.dim() > 1 else len(t) for t in self.map().tensors]
        return (max if self.transform.blocks > 1 else min)(used, default=None)

    def map(self) -> LinearMap:
        """The map S."""
        current = self._map if self._lent is None else self._lent()
        if current is None:
            current = self.transform.map(self.fetched())
            if self.stores_map:
                self._map = current
            elif self.device is not None:
                self._lent = weakref.ref(current)
        return current

    @property
    def stores_map(self) -> bool:
        """Whether the map stays on the device between its uses."""
        return self.transform.stores_map and self.device is None

    def fetched(self) -> Any:
        """The state on the device that uses it."""
        return trees.fetched(self.state, self.device)

    def map_after(self, refreshes: int, name: str) -> LinearMap:
        """The map that a forward had, for its backward.

        Args:
            refreshes: How often the basis had been refreshed at the forward.
            name: The weight's, for the message.

        Returns:
            The map S.

        Raises:
            ModeError: The basis was refreshed since.
        """
        if self.refreshes != refreshes:
            raise ModeError(
                f"the basis of {name} was refreshed between this forward and its backward; "
                "run step() after the backward of every forward of the step"
            )
        return self.map()

    def tensors(self) -> list[Tensor]:
        """The tensors that hold the basis between steps: of the transform's state, and of the map where it is stored."""
        followed = () if self.cadence is None else self.cadence.tensors()
        return distinct([*trees.tensors(self.state), *(self._map.tensors if self._map is not None else ()), *followed])

    def schedule(self, step: int) -> Schedule:
        """Look ahead to the step after ``step`` finished ones; a refresh that was proposed and not committed is dropped.

        A refresh that needs something of that step's gradient sets ``due``; a basis that has seen no usable gradient yet
        stays due until it does.

        Args:
            step: Steps finished.

        Returns:
            What that step means.
        """
        self.proposal = None
        clock, now = step - self.offset, self._changes_in(step)
        # a basis that is learned from a sketch has changed at the end of the last step, any other changes in this one
        changes = self.refreshes != self.when.refreshes if self.transform.reads == "sketch" else now
        self.when = When(clock, self.refreshes, self.when.seed, self.when.shape, self.when.run_seed)
        self.due = now and not self.transform.before_step
        self.whole = self.draws(step)
        return Schedule(now and not self.due, changes)

    def draws(self, step: int) -> bool:
        """Whether the step after ``step`` finished ones gathers the gradient itself: a function of the seed and the step."""
        if not 0.0 < self.chance < 1.0:
            return self.chance > 0.0
        return derive_seed(self.when.seed, "whole", step) < self.chance * 2.0**63  # a seed has 63 bits

    def quiet_until(self, step: int) -> int:
        """The first step after ``step`` finished ones in which the basis may change, or a thousand steps on if it does not."""
        return next((later for later in range(step + 1, step + 1000) if self.acts_in(later)), step + 1000)

    def acts_in(self, step: int) -> bool:
        """Whether the basis may change in a step to come, as far as is known now: it does, or its schedule decides on that."""
        if self.cadence is None or self.refreshes == 0:
            return self._changes_in(step)
        return step >= self.offset and self.cadence.acts(step - self.offset)

    def checks(self, step: int) -> bool:
        """Whether what its steps have added up decides, after ``step`` finished ones, on a refresh in the next."""
        steps = self.cadence is not None and self.cadence.rule.decides == "steps"
        return steps and self.refreshes > 0 and self.acts_in(step)

    def _changes_in(self, step: int) -> bool:
        clock = step - self.offset
        if self.cadence is not None:
            return clock >= 0 and self.cadence.due(clock, self.refreshes)
        return clock >= 0 and (self.transform.due(clock) or (self.refreshes == 0 and self.transform.due(0)))

    def asks(self, like: Tensor) -> Probes:
        """What the refresh of the step that is being prepared asks of the gradient.

        Args:
            like: Coordinates, for device and dtype of the test vectors.

        Returns:
            The probes, in the shape of the stacked weights.
        """
        return Probes(self.transform.probes(self.fetched(), self.when), self.held_out(like))

    def held_out(self, like: Tensor) -> tuple[Probe, ...]:
        """Test vectors for each side on which there is a basis with fewer columns than the weight has rows or columns.

        Args:
            like: Coordinates, for device and dtype.

        Returns:
            A probe for each such side.
        """
        if self.transform.blocks > 1:
            return ()  # a product of the whole gradient says nothing of the basis of one block
        found = []
        sides = zip(("left", "right"), self.coords_shape, self.shape, reversed(self.shape), strict=True)
        for side, few, size, across in sides:
            if few < size:
                seed = derive_seed(self.when.run_seed, "witness", self.when.step, side)
                columns = min(HELD_OUT, across)
                drawn = test_matrix(across, columns, seed=seed, device=like.device, dtype=like.dtype)
                found.append(Probe(None, drawn) if side == "left" else Probe(drawn, None))
        return tuple(found)

    def propose(self, state: Any, chosen: LinearMap) -> None:
        """Propose to change to a state, whose map is given; `commit` takes it over."""
        self.proposal = Proposal(trees.stowed(state, self.device), chosen if self.device is None else None)

    def proposed_map(self) -> LinearMap:
        """The map of the proposal."""
        assert self.proposal is not None  # noqa: S101 - the caller has looked
        return self.proposal.map or self.transform.map(trees.fetched(self.proposal.state, self.device))

    def commit(self) -> None:
        """Change to the proposal; coordinates and moments are those of the old map, and the caller's to carry over."""
        assert self.proposal is not None  # noqa: S101 - the caller has looked
        state, chosen = self.proposal
        self.replace(state, self.refreshes + 1, chosen)
        self.proposal, self.due = None, False

    def replace(self, state: Any, refreshes: int, chosen: LinearMap | None = None) -> None:
        """Take over a state.

        Args:
            state: The state, of a refresh or a checkpoint.
            refreshes: Refreshes that led to it.
            chosen: Its map, if that was made already.
        """
        self.state, self.refreshes = trees.stowed(state, self.device), refreshes
        self._map, self._lent = chosen if self.stores_map else None, None
        if self.seal is not None:
            self.seal.zero_()

    def make_seal(self, like: Tensor) -> None:
        """Make the seal, if there is none on the device of some coordinates.

        Args:
            like: The coordinates.
        """
        if self.seal is None or self.seal.device != like.device or self.seal.dtype != like.dtype:
            self.seal = like.detach().new_zeros(())

    def begin(self, state: Any) -> None:
        """Start a run from a state that was chosen elsewhere, and keep it for a whole period.

        Args:
            state: The state.
        """
        self.replace(state, 1)
        self.offset += self.transform.period or NEVER
        if self.cadence is not None:
            self.cadence.wait(self.transform.period)
        self.schedule(0)

    def move(self, device: torch.device) -> None:
        """Follow the weights to a device; the basis keeps its dtype."""
        used = {t.device for t in trees.tensors(self.state)} if self.device is None else {self.device}
        self.device = None if self.device is None else device
        if used - {device}:
            self.replace(trees.moved(self.state, device), self.refreshes)

    def warn_once(self, message: str, name: str = "") -> None:
        """Warn, once for each message.

        Args:
            message: The message.
            name: The weight it is about, where it is about one of several.
        """
        text = f"{name or self.name}: {message}"
        if text not in self._said:
            self._said.add(text)
            warnings.warn(text, RuntimeWarning, stacklevel=3)
