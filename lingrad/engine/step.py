"""The order of a step, for all weights or for one inside the backward.

a new basis, where one is due that reads the gradient -> (clip) -> decay -> base -> merge, in optimizer mode
-> a new basis, where one is due that reads a sketch -> a new basis for the next forward, where it reads nothing
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lingrad import parallel
from lingrad.adapters import Attachment
from lingrad.engine.arithmetic import Arithmetic
from lingrad.engine.build import Pairs, build_stock, pull, push
from lingrad.engine.layerwise import Layerwise
from lingrad.engine.moments import Moments
from lingrad.engine.refresh import choose, commit, redraw, renew
from lingrad.engine.run import StatefulOptimizer
from lingrad.errors import SpecError
from lingrad.subspaces.ledger import Ledger
from lingrad.subspaces.subspace import Subspace, hold
from lingrad.transforms.sketch import forget_draws


class SteppingOptimizer(StatefulOptimizer):
    """How a run steps; `lingrad.SubspaceOptimizer` adds how it is made, and what else it can do."""

    _arithmetic: Arithmetic
    _degrees: Mapping[str, int]
    _layerwise: Layerwise | None
    _merge_every: int | None
    _stock: list[tuple[Optimizer, Pairs]]
    _stock_of: dict[int, list[tuple[Optimizer, Pairs]]]  # of one parameter each, where layerwise
    _compiled: dict[str, Any] | None  # options of torch.compile, where the base's step goes through it

    @property
    def base(self) -> Optimizer:
        """The stock optimizer that steps the coordinates; built at the first use."""
        return self._stocks()[0][0]

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the run.

        Args:
            closure: Evaluates the model once and returns the loss, as in torch.

        Returns:
            What the closure returned.

        Raises:
            ModeError: On a refresh step the gradient of some coordinates was changed by more than one factor.
        """
        self._require_attached()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._follow(self._params()):
            self._stock.clear()
            self._stock_of.clear()
        probe = self._is_probe()
        if self._layerwise is not None:
            self._layerwise.flush()
        self._advance(self._stocks(), self.attachments, probe=probe)
        if not probe:
            self._renew()
            self._step += 1
            self._schedule()
        if self._layerwise is not None:
            self._layerwise.begin()
        return loss

    def compile_step(self, **options: Any) -> None:
        """Have the base's step go through ``torch.compile``, from the next step on.

        Args:
            **options: As for ``torch.compile``.

        Raises:
            SpecError: A learning rate is a plain number, with which torch compiles anew at each change of it; or the base's
                moments are quantised.
        """
        if self._base.quantizer is not None:
            kind = self._base.quantizer.kind
            raise SpecError(f"with moments='{kind}' a step has parts, which torch would compile anew for each; leave one out")
        plain = [group["name"] for group in self.param_groups if not isinstance(group["lr"], Tensor)]
        if plain:
            raise SpecError(
                f"the learning rate of group '{plain[0]}' is a number, and a compiled step would be compiled anew whenever a "
                "schedule changes it; make the optimizer with a tensor: lr=torch.tensor(1e-3)",
                option="lr",
            )
        self._compiled, self._base = options, self._base.unfused()
        self._stock.clear()

    def _advance(self, stocks: list[tuple[Optimizer, Pairs]], attachments: list[Attachment], *, probe: bool = False) -> None:
        """Refresh where due, decay, step and merge whatever of these has a gradient."""
        if not probe:
            self._change(attachments)
        served = [(own, param) for _, pairs in stocks for own, group in pairs for param in group["params"]]
        live = [attachment for attachment in attachments if attachment.sub.coords.grad is not None]
        if not self._arithmetic.decay_last:
            self._decay(served)
        hold(attachment.sub for attachment in live)
        for stock, pairs in stocks:
            for own, group in pairs:
                push(own, group, self._arithmetic, self._step + 1)
            try:
                stock.step()
            except BaseException:
                if stock is stocks[0][0] and not self._arithmetic.decay_last:
                    self._decay(served, undo=True)  # nothing was stepped: the weights stay as the step found them
                raise
            for own, group in pairs:
                pull(own, group)
        if self._arithmetic.decay_last:
            self._decay(served)
        if self.mode == "optimizer":
            for attachment in live:
                attachment.merge(release=True)
        elif self._merge_every is not None and (self._step + 1) % self._merge_every == 0:
            for attachment in live:
                attachment.merge()

    def _advance_one(self, param: Tensor) -> None:
        """Step one parameter inside the backward and free its gradient."""
        attachment = self._by_coords.get(id(param))
        if self._follow([param]):
            self._stock.clear()
            self._stock_of.pop(id(param), None)
        if id(param) not in self._stock_of:
            group = next(group for group in self.param_groups if any(param is other for other in group["params"]))
            stock, pairs = build_stock([{**group, "params": [param]}], self._base, self._base_state)[0]
            self._stock_of[id(param)] = [(stock, [(group, served) for _, served in pairs])]
        self._advance(self._stock_of[id(param)], [] if attachment is None else [attachment])
        param.grad = None

    def _stocks(self) -> list[tuple[Optimizer, Pairs]]:
        if not self._stock:
            self._stock = build_stock(self.param_groups, self._base, self._base_state)
            for stock, _ in self._stock:
                if self._compiled is not None:
                    vars(stock)["step"] = torch.compile(stock.step, **self._compiled)
        return self._stock

    def _moments(self, sub: Subspace) -> Moments:
        def initial() -> dict[str, Any]:
            return dict(self._base.build([sub.coords]).state.get(sub.coords, {}))

        return Moments(self._base_state.get(sub.coords, {}), self._carry, self._degrees, initial, self._base.quantizer)

    def _change(self, attachments: Iterable[Attachment]) -> None:
        """Move over to the bases that read this step's gradient; make sure that the other gradients are of the bases in use."""
        due = []
        for attachment in attachments:
            if attachment.sub.due and attachment.sub.transform.reads == "gradient":
                due.append(attachment.sub)
            else:
                attachment.sub.refuse_stale()
            missing = attachment.sub.coords.grad is None and attachment.sub.coords.requires_grad
            if missing and self._layerwise is None and attachment.replaced:  # where layerwise, gradients are gone by now
                attachment.sub.warn_once(
                    "it has no gradient. The forward of its layer was replaced after lingrad had wrapped it; if the new one "
                    "does not call the one it found, the weight is not trained: replace forwards first, then call lingrad"
                )
        self._choose(due)
        for sub in reversed(due):  # who leads holds the old map, which the others merge through
            self._commit(sub)

    def _choose(self, subs: Iterable[Subspace]) -> None:
        """Choose the new bases of weights that are due, from the gradients that backward captured."""
        due = [sub for sub in subs if sub.proposal is None and sub.coords.grad is not None]
        factors = [sub.captured.outside_factor(sub.coords) for sub in due]
        # where backward left zeros, the factor is the one seen everywhere else
        common = next((factor for factor in factors if factor is not None), 1.0)
        seen = {id(sub): common if factor is None else factor for sub, factor in zip(due, factors, strict=True)}
        for lead in dict.fromkeys(sub.leader or sub for sub in due):
            choose(lead.members, next(seen[id(sub)] for sub in lead.members if id(sub) in seen))

    def _renew(self) -> None:
        """Change the bases that are learned from what this step's backwards gathered."""
        due = (sub for sub in self.subspaces if sub.due and sub.transform.reads == "sketch")
        # who dropped a gradient meant its sketch too; where layerwise, it was dropped by us
        kept = (sub for sub in due if sub.coords.grad is not None or self._layerwise is not None)
        found = (sub for sub in kept if sub.captured.total is not None or parallel.ranks() > 1)
        leads = dict.fromkeys(sub.leader or sub for sub in found)
        if leads:
            renew([lead.members for lead in leads], self._commit)
            forget_draws()

    @torch.no_grad()
    def _schedule(self) -> None:
        """Look ahead to the next step."""
        drawn = [sub for sub in self.subspaces if sub.schedule(self._step)]
        for lead in dict.fromkeys(sub.leader or sub for sub in drawn):
            redraw(lead.members, self._commit)

    def _commit(self, sub: Subspace) -> None:
        commit(sub, self._by_coords[id(sub.coords)], self._moments(sub))

    def _decay(self, served: list[tuple[dict[str, Any], Tensor]], *, undo: bool = False) -> None:
        """Multiply weights and coordinates that have a gradient by 1 - lr * weight_decay, each param group in one call."""
        tensors: dict[int, tuple[dict[str, Any], list[Tensor], list[Ledger]]] = {}
        for group, param in served:
            if group["weight_decay"] == 0 or param.grad is None:
                continue
            attachment = self._by_coords.get(id(param))
            found = [param] if attachment is None else attachment.decaying()
            entry = tensors.setdefault(id(group), (group, [], []))
            entry[1].extend(found)
            if attachment is not None and attachment.sub.ledger is not None:
                entry[1].extend(attachment.sub.ledger.tensors())
                entry[2].append(attachment.sub.ledger)
        for group, decayed, ledgers in tensors.values():
            factor = 1.0 - group["lr"] * group["weight_decay"]
            if undo:
                factor = 1.0 / factor if factor else 1.0
            torch._foreach_mul_(decayed, factor)
            number = float(factor) if ledgers else 1.0  # of a learning rate that is a tensor, once
            for ledger in ledgers:
                ledger.decay(number)
