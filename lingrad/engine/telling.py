"""What a run tells of itself between steps: the weights of its forward, what it made of them, how good its bases were."""

from __future__ import annotations

import torch
from torch import Tensor

from lingrad.engine.step import SteppingOptimizer
from lingrad.errors import ModeError
from lingrad.subspaces.ledger import Change, total
from lingrad.subspaces.subspace import Subspace
from lingrad.weights.base import MergeLoss


class TellingOptimizer(SteppingOptimizer):
    """What can be asked of a run; `lingrad.SubspaceOptimizer` adds how it is made and what can be done to it."""

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """The weights of the forward, by parameter name: W + S z where there is a subspace, the parameter itself elsewhere.

        Returns:
            Name -> tensor in the parameter's shape; in adapter mode a new one, otherwise not a copy.
        """
        found: dict[str, Tensor] = {}
        for group in self.param_groups:
            for name, param in zip(group["param_names"], group["params"], strict=True):
                attachment = self._by_coords.get(id(param))
                found[name] = param if attachment is None else attachment.lifted()
        return found

    @torch.no_grad()
    def changes(self) -> dict[str, Change]:
        """What the run has made of every transformed weight, as thin factors; what trains in full is not among them.

        Returns:
            Parameter name -> change, of rank r for each basis that was used; on the CPU, exact to rounding.

        Raises:
            ModeError: Something was merged or decayed, and the run was made without ``ledger=True``; or a plain model was
                loaded into the run, and no state of the optimizer after it.
        """
        found: dict[str, Change] = {}
        for group in self.param_groups:
            for name, param in zip(group["param_names"], group["params"], strict=True):
                attachment = self._by_coords.get(id(param))
                if attachment is not None:
                    found[name] = _change(attachment.sub, decayed=bool(group["weight_decay"]))
        return found

    def merge_losses(self) -> dict[str, MergeLoss]:
        """What merges into quantised weights have lost, relative to what they merged.

        Returns:
            Parameter name -> the loss of the last merge, and of all; only weights that are held in 4 or 8 bits.
        """
        return {sub.name: sub.loss for sub in self.subspaces if sub.loss is not None}

    def captured_energy(self) -> dict[str, float]:
        """How much of its gradient each weight's basis captured at its last refresh, |S S^T G| / |G|.

        Returns:
            Parameter name -> the share; of a refresh from a sketch an estimate. Weights whose basis reads nothing of the
            gradient, or was not refreshed in this process yet, are left out.
        """
        found = ((sub.name, (sub.leader or sub).energy) for sub in self.subspaces)
        return {name: energy for name, energy in found if energy is not None}


def _change(sub: Subspace, *, decayed: bool) -> Change:
    if sub.replaced:
        raise ModeError(
            f"{sub.name} was loaded into the model after it had changed, and what was kept of its change is another weight's: "
            "load the optimizer's state that was saved with it (optimizer.pt of a Trainer's checkpoint), or compare the "
            "weights with those the run started from (lingrad convert)"
        )
    if sub.ledger is None and (sub.merged or decayed):
        raise ModeError(
            f"{sub.name} {'was merged into' if sub.merged else 'decays'}, and what was merged was not kept: make the run with "
            "ledger=True to know its change as factors, or compare its weights with those it started from (lingrad convert)"
        )
    open_ = sub.coords if sub.ledger is None else sub.ledger.open(sub.coords)
    last = sub.map().factors(open_.detach()) if open_.any() else None
    parts, kept = ([], 1.0) if sub.ledger is None else (sub.ledger.closed(), sub.ledger.kept)
    return Change(sub.name, sub.layout, total(parts, last), kept)
