"""What one weight's run has merged so far, as thin factors, from which a low-rank adapter of the whole run is made.

With decoupled decay a run of T steps, whose decays multiply to d(t) by step t, leaves
W_T = d(T) W_0 + sum over merges k of d(T) / d(t_k) S_k z_k. What is recorded is S_k, or the seed it is drawn from, and z_k;
merges through one basis add up in its coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lingrad.errors import CheckpointError, ModeError, shown
from lingrad.maps.factors import Factors, stack
from lingrad.subspaces import trees
from lingrad.tensors import host_like, to_host, whole
from lingrad.transforms.base import Transform
from lingrad.weights.layout import Layout

CPU = torch.device("cpu")


class Part(NamedTuple):
    """What was merged through one basis that is no longer in use.

    Args:
        decay: The decay factor at the time its coordinates are in.
        coords: z [p, q] of a basis that its transform draws from a seed; otherwise None.
        state: The transform's state, with such coordinates.
        factors: S z, where the basis is not drawn.
    """

    decay: float
    coords: Tensor | None = None
    state: Any = None
    factors: Factors | None = None


class Ledger:
    """The history of one weight: whether anything was merged, and, where it records, all that was.

    Args:
        transform: The transform of the weight; makes the maps of seeds again.
        records: Whether merges are recorded, on the CPU once their basis is replaced.
        on_host: Keep what was merged through the basis in use in host memory too, and add to it there.

    Attributes:
        merged: Whether coordinates that were not zero have been merged.
        replaced: Whether the weight was loaded after it had changed, so that the record is of another weight's change.
        decay: By what decoupled decay has multiplied the weight that the run started from, 1 without decay; followed only
            where merges are recorded.
    """

    def __init__(self, transform: Transform, *, records: bool = False, on_host: bool = False) -> None:
        self.transform = transform
        self.records = records
        self.on_host = on_host
        self.merged = False
        self.replaced = False
        self.decay = 1.0
        self._parts: list[Part] = []
        self._open: Tensor | None = None  # merged through the basis in use, decayed up to now

    def decayed(self, factor: float) -> None:
        """Follow a decoupled decay of the weight.

        Args:
            factor: By which the weight was multiplied, and `tensors` with it; what is in host memory is, by this.
        """
        self.decay *= factor
        if self.on_host and self._open is not None:
            self._open.mul_(factor)
        if self.decay == 0.0:  # nothing of the start or the earlier merges is left
            self._parts.clear()

    def reserve(self, coords: Tensor) -> None:
        """Allocate what `add` needs, so that it cannot fail once the weight has changed.

        Args:
            coords: z [p, q].
        """
        if self.records and self._open is None:
            self._open = host_like(coords).zero_() if self.on_host else torch.zeros_like(coords)

    def add(self, coords: Tensor) -> None:
        """Record coordinates of the basis in use that were merged.

        Args:
            coords: z [p, q].
        """
        self.reserve(coords)
        if self._open is not None:
            self._open += to_host(coords) if self.on_host else coords

    def take(self, factors: Callable[[Tensor], Factors], coords: Tensor) -> None:
        """Record a merge through another basis than the one in use.

        Args:
            factors: Gives S z of that basis.
            coords: z.
        """
        self.merged = True
        if self.records:
            found = factors(coords)
            self._parts.append(Part(self.decay, factors=Factors(found.left.to(CPU), found.right.to(CPU))))

    def tensors(self) -> list[Tensor]:
        """The sum of the coordinates that were merged through the basis in use."""
        return [] if self._open is None else [self._open]

    def stow(self) -> None:
        """Move that sum to host memory."""
        self.on_host, self._open = True, None if self._open is None else to_host(self._open)

    def close(self, state: Any, factors: Callable[[Tensor], Factors], device: torch.device) -> None:
        """The basis in use is about to be replaced.

        Args:
            state: The transform's state.
            factors: Gives S z for coordinates z.
            device: The weight's.
        """
        if self._open is None:
            return
        coords, self._open = whole(self._open).to(device), None
        if not coords.any():
            return
        if self.transform.reads == "nothing":
            self._parts.append(Part(self.decay, coords.to(CPU), trees.moved(state, CPU)))
        else:
            found = factors(coords)
            left, right = (trees.copied(side, CPU) for side in (found.left, found.right))
            self._parts.append(Part(self.decay, factors=Factors(left, right)))

    def open(self, coords: Tensor) -> Tensor:
        """All that the basis in use has brought: what was merged through it, and coordinates that are not merged yet."""
        if self._open is None:
            return coords
        return (self._open.to(coords.device) if self.on_host else self._open) + coords

    def require_known(self, name: str, *, decays: bool) -> None:
        """Make sure that the change of the weight is recorded.

        Args:
            name: The weight's name.
            decays: Whether it decays.

        Raises:
            ModeError: The change is not known.
        """
        if self.replaced:
            raise ModeError(
                f"{name} was loaded into the model after it had changed, or written to by another program, and the recorded "
                "change is another weight's: load the optimizer's state that was saved with it (optimizer.pt of a Trainer's "
                "checkpoint), or compare the weights with those the run started from (lingrad convert)"
            )
        if not self.records and (self.merged or decays):
            raise ModeError(
                f"{name} {'was merged into' if self.merged else 'decays'}, and what was merged was not recorded: make the run "
                "with ledger=True to know its change as factors, or compare its weights with those it started from "
                "(lingrad convert)"
            )

    def closed(self) -> list[Factors]:
        """What was merged through bases that are no longer in use, as it stands in the weight now.

        Returns:
            Factors on the CPU, one for each basis.
        """
        found = []
        for part in self._parts:
            factors = part.factors or self.transform.map(part.state).factors(part.coords)  # type: ignore[arg-type]
            found.append(Factors(factors.left * (self.decay / part.decay), factors.right))
        return found

    def pack(self) -> dict[str, Any] | None:
        """The flat entries of a checkpoint, tensors and numbers; None where nothing is recorded."""
        if not self.records:
            return None
        flat: dict[str, Any] = {"decay": self.decay, "parts": len(self._parts)}
        if self._open is not None:
            flat["open"] = self._open
        for i, part in enumerate(self._parts):
            fields = {"decay": part.decay, "coords": part.coords, "state": part.state}
            if part.factors is not None:
                fields |= {"left": part.factors.left, "right": part.factors.right}
            flat |= trees.flatten(fields, str(i))
        return flat

    @classmethod
    def unpack(cls, transform: Transform, flat: Mapping[str, Any] | None, template: Any, coords: Tensor, name: str) -> Ledger:
        """The ledger that `pack` wrote.

        Args:
            transform: The transform of the weight.
            flat: Its entries; None for a ledger that records nothing.
            template: A state of the transform.
            coords: Coordinates of the weight.
            name: The weight's name, for messages.

        Returns:
            A ledger that shares no memory with the entries.

        Raises:
            CheckpointError: An entry is missing, or of another kind.
        """
        found = cls(transform, records=flat is not None)
        if flat is None:
            return found
        found.decay = trees.checked(1.0, flat, "decay", f"the ledger of {name}")
        if not math.isfinite(found.decay):
            raise CheckpointError(f"the decay of {name} is {found.decay} in the checkpoint; give an earlier one")
        if "open" in flat:
            open_ = trees.copied(trees.checked(coords, flat, "open", f"the ledger of {name}"), coords.device)
            found._open = open_ if whole(open_).any() else None
        parts = trees.checked(0, flat, "parts", f"the ledger of {name}")
        if parts < 0:
            raise CheckpointError(f"the ledger of {name} has {shown(parts)} merges in the checkpoint; give an earlier one")
        for i in range(parts):
            found._parts.append(_part(transform, flat, i, template, coords, f"merge {i} of {name}"))
        return found


def _part(transform: Transform, flat: Mapping[str, Any], i: int, template: Any, coords: Tensor, owner: str) -> Part:
    decay = trees.checked(1.0, flat, f"{i}.decay", owner)
    if not math.isfinite(decay) or decay == 0.0:
        raise CheckpointError(f"the decay of {owner} is {decay} in the checkpoint; give an earlier one")
    if transform.reads == "nothing" and f"{i}.left" not in flat:
        state = trees.restore(trees.moved(template, CPU), flat, f"{i}.state", owner)
        return Part(decay, trees.copied(trees.checked(coords, flat, f"{i}.coords", owner), CPU), state)
    left, right = (flat.get(f"{i}.{side}") for side in ("left", "right"))
    if not (isinstance(left, Tensor) and isinstance(right, Tensor) and left.dim() == right.dim() == 2):
        raise CheckpointError(f"the checkpoint has no factors of {owner}")
    for side, value in (("left", left), ("right", right)):
        trees.require_values(value, f"'{i}.{side}' of {owner}")
    if left.shape[1] != right.shape[0] or not (left.is_floating_point() and left.dtype == right.dtype):
        raise CheckpointError(
            f"the factors of {owner} are {tuple(left.shape)} {left.dtype} and {tuple(right.shape)} {right.dtype}"
        )
    return Part(decay, factors=Factors(trees.copied(left, CPU), trees.copied(right, CPU)))


class Change(NamedTuple):
    """What a run has made of one weight W_0: W = decay W_0 + left @ right, read as the matrix of its layout.

    Args:
        name: The parameter's name.
        layout: How the weight is read as a matrix [m, n].
        factors: The factors, on the CPU; None where nothing was added.
        decay: By what decoupled decay has multiplied W_0; 1 without decay.
    """

    name: str
    layout: Layout
    factors: Factors | None
    decay: float


def total(parts: Sequence[Factors], last: Factors | None) -> Factors | None:
    """The sum of a weight's changes on the CPU, None where there is none."""
    every = [part.to(device="cpu") for part in (*parts, *([] if last is None else [last]))]
    if not every:
        return None
    widest = max((part.left.dtype for part in every), key=lambda dtype: torch.finfo(dtype).bits)
    return stack([part.to(dtype=widest) for part in every])
