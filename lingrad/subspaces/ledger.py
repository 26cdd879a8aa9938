"""What one weight's run has merged so far, as thin factors: what a low-rank adapter of the whole run is made of.

With decoupled decay a run of T steps, whose decays multiply to d(t) by step t, leaves
W_T = d(T) W_0 + sum over merges k of d(T) / d(t_k) S_k z_k. What is kept is S_k, or the seed it is drawn from, and z_k; merges
through one basis add up in its coordinates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lingrad.errors import CheckpointError
from lingrad.maps.factors import Factors, stack
from lingrad.subspaces import trees as trees
from lingrad.transforms.base import Transform
from lingrad.weights.layout import Layout


class Part(NamedTuple):
    """What was merged through one basis that is gone.

    Args:
        kept: The decay at the time its coordinates are in.
        coords: z [p, q] of a basis that its transform draws from a seed; otherwise None.
        state: The transform's state, with such coordinates.
        factors: S z, where the basis is not drawn.
    """

    kept: float
    coords: Tensor | None = None
    state: Any = None
    factors: Factors | None = None


class Ledger:
    """The merges of one weight, on the CPU once their basis is gone.

    Args:
        transform: The transform of the weight; makes the maps of seeds again.

    Attributes:
        kept: What decay has left of the weight that the run started from, 1 without decay.
    """

    def __init__(self, transform: Transform) -> None:
        self.transform = transform
        self.kept = 1.0
        self._parts: list[Part] = []
        self._open: Tensor | None = None  # merged through the basis in use, decayed up to now

    def decay(self, factor: float) -> None:
        """Follow a decoupled decay of the weight.

        Args:
            factor: By which the weight was multiplied, and `tensors` with it.
        """
        self.kept *= factor
        if self.kept == 0.0:  # nothing is left, and nothing can be told apart by what decayed since
            self._parts.clear()

    def merged(self, coords: Tensor) -> None:
        """Note that coordinates of the basis in use are being merged.

        Args:
            coords: z [p, q].
        """
        if self._open is None:
            self._open = torch.zeros_like(coords)
        self._open += coords

    def tensors(self) -> list[Tensor]:
        """What stays on the weight's device: the sum of the coordinates that were merged through the basis in use."""
        return [] if self._open is None else [self._open]

    def close(self, state: Any, factors: Any) -> None:
        """The basis in use goes.

        Args:
            state: The state of the transform that has it.
            factors: Gives S z for coordinates z.
        """
        if self._open is None:
            return
        coords, self._open = self._open, None
        if not coords.any():
            return
        cpu = torch.device("cpu")
        if self.transform.reads == "nothing":
            self._parts.append(Part(self.kept, coords.to(cpu), trees.moved(state, cpu)))
        else:
            found: Factors = factors(coords)
            self._parts.append(Part(self.kept, factors=Factors(*(trees.copied(t, cpu) for t in (found.left, found.right)))))

    def open(self, coords: Tensor) -> Tensor:
        """All that the basis in use has brought: what was merged through it, and coordinates that are not merged yet."""
        return coords if self._open is None else self._open + coords

    def closed(self) -> list[Factors]:
        """What was merged through bases that are gone, as it stands in the weight now.

        Returns:
            Factors on the CPU, one for each basis.
        """
        found = []
        for part in self._parts:
            factors = part.factors or self.transform.map(part.state).factors(part.coords)  # type: ignore[arg-type]
            found.append(Factors(factors.left * (self.kept / part.kept), factors.right))
        return found

    def pack(self) -> dict[str, Any]:
        """The flat entries of a checkpoint: tensors, numbers, no more."""
        flat: dict[str, Any] = {"kept": self.kept, "parts": len(self._parts)}
        if self._open is not None:
            flat["open"] = self._open
        for i, part in enumerate(self._parts):
            fields = {"kept": part.kept, "coords": part.coords, "state": part.state}
            if part.factors is not None:
                fields |= {"left": part.factors.left, "right": part.factors.right}
            flat |= trees.flatten(fields, str(i))
        return flat

    def unpack(self, flat: Mapping[str, Any], like: Any, coords: Tensor, name: str) -> Ledger:
        """The ledger that `pack` wrote, as a new one.

        Args:
            flat: Its entries.
            like: A state of the transform.
            coords: Coordinates of the weight.
            name: The weight's name, for messages.

        Returns:
            A ledger that shares no memory with the entries.

        Raises:
            CheckpointError: An entry is missing, or of another kind.
        """
        found = Ledger(self.transform)
        found.kept = trees.checked(self.kept, flat, "kept", f"the ledger of {name}")
        if "open" in flat:
            found._open = trees.copied(trees.checked(coords, flat, "open", f"the ledger of {name}"), coords.device)
        cpu = torch.device("cpu")
        for i in range(trees.checked(0, flat, "parts", f"the ledger of {name}")):
            owner = f"merge {i} of {name}"
            kept = trees.checked(1.0, flat, f"{i}.kept", owner)
            if self.transform.reads == "nothing":
                state = trees.restore(trees.moved(like, cpu), flat, f"{i}.state", owner)
                part = Part(kept, trees.copied(trees.checked(coords, flat, f"{i}.coords", owner), cpu), state)
            else:
                sides = [flat.get(f"{i}.{side}") for side in ("left", "right")]
                if not all(isinstance(side, Tensor) and side.dim() == 2 for side in sides):
                    raise CheckpointError(f"the checkpoint has no factors of {owner}")
                part = Part(kept, factors=Factors(*(trees.copied(side, cpu) for side in sides)))
            found._parts.append(part)
        return found


class Change(NamedTuple):
    """What a run has made of one weight W_0: W = kept W_0 + left @ right, read as the matrix of its layout.

    Args:
        name: The parameter's name.
        layout: How the weight is read as a matrix [m, n].
        factors: The factors, on the CPU; None where nothing was added.
        kept: What decay has left of W_0; 1 without decay.
    """

    name: str
    layout: Layout
    factors: Factors | None
    kept: float


def total(parts: list[Factors], last: Factors | None) -> Factors | None:
    """The sum of a weight's changes on the CPU, None where there is none."""
    every = [part.to(device="cpu") for part in (*parts, *([] if last is None else [last]))]
    if not every:
        return None
    wide = max((part.left.dtype for part in every), key=lambda dtype: torch.finfo(dtype).bits)
    return stack([part.to(dtype=wide) for part in every])
