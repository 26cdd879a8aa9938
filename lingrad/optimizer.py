"""The optimizer: one class for both modes, round any base.

Order of a step: refresh where due -> (clip) -> decay -> base -> merge in optimizer mode. The modes differ in nothing else than
when coordinates are merged into weights: at every step (optimizer mode) or at each refresh (adapter mode).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lingrad import bases, parallel, trials
from lingrad._typing import override
from lingrad.adapters import Attachment, Mode, make_attachment
from lingrad.compat import Compat, arithmetic, as_published
from lingrad.errors import ModeError, require, require_one_of
from lingrad.groups import Pairs, Trainable, build_stock, check_not_negative, make_groups, pull, push, resolve_groups
from lingrad.layerwise import Layerwise
from lingrad.moments import Carry, Moments
from lingrad.persistence import StatefulOptimizer
from lingrad.refresh import choose, commit, redraw, renew
from lingrad.rules import Rules, Target
from lingrad.subspace import Subspace, decay, lifted, merge
from lingrad.transforms.sketch import forget_draws


class SubspaceOptimizer(StatefulOptimizer):
    """A ``torch.optim.Optimizer`` whose parameters are coordinates, and the untransformed parameters of the model.

    Made by `lingrad.wrap` and `lingrad.adapt`, whose arguments it takes. ``param_groups`` are ``coords``, ``matrices`` and
    ``vectors`` (by ``group["name"]``); schedulers act on them as on any optimizer's. ``lr`` is the plain learning rate; that of
    the coordinates is multiplied by ``group["scale"]`` when it reaches the base.

    Where torch.distributed has several processes they train one model on parts of a batch: gradients are averaged over all of
    them. Build DistributedDataParallel round the model after this.
    """

    def __init__(
        self,
        model: Trainable,
        spec_or_rules: Rules,
        base: bases.BaseLike = "adamw",
        *,
        mode: Mode,
        weight_decay: float = 0.0,
        scale: float = 1.0,
        carry: Carry = "keep",
        seed: int = 0,
        compat: Compat | None = None,
        layerwise: bool = False,
        stagger: bool = False,
        **base_kwargs: Any,
    ) -> None:
        require_one_of(mode, get_args(Mode), "mode")
        require_one_of(carry, get_args(Carry), "carry")
        for option, value in (("weight_decay", weight_decay), ("scale", scale)):
            check_not_negative(option, value)
        for option, value in (("layerwise", layerwise), ("stagger", stagger)):
            require(type(value) is bool, option, f"{option} must be True or False, not {value!r}")
        require(type(seed) is int, "seed", f"seed must be a whole number, not {seed!r}")
        self._base = bases.find(base, base_kwargs, decay=False)
        trials.check_reads_only_gradients(self._base)
        self._carry = carry
        self._degrees = trials.moment_degrees(self._base) if carry == "rotate" else {}
        self._arithmetic = arithmetic(compat, self._base.name)
        self._seed, self._compat, self._stagger = seed, compat, stagger
        self._step = 0
        self._places: dict[int, tuple[torch.dtype, torch.device]] = {}
        self._stock: list[tuple[Optimizer, Pairs]] = []
        self._stock_of: dict[int, list[tuple[Optimizer, Pairs]]] = {}  # of one parameter each, where layerwise
        self._layerwise = Layerwise(self._advance_one) if layerwise else None
        if layerwise:
            trials.check_keeps_nothing_for_all(self._base)
        self._handles: list[Any] = []
        self._settled = False
        self._base_state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
        self._by_coords: dict[int, Attachment] = {}
        self.attachments: list[Attachment] = []
        self.mode: Mode | None = None

        self._model = model if isinstance(model, nn.Module) else None
        if self._model is not None:
            parallel.refuse_wrapped(self._model)
        groups = []
        plans = resolve_groups(model, spec_or_rules)
        for i, (plan, options) in enumerate(plans):
            made = [make_attachment(target, self._subspace(target)) for target in plan.targets]
            self.attachments += made
            groups += make_groups(
                plan,
                [attachment.sub for attachment in made],
                options,
                base=self._base,
                arithmetic=self._arithmetic,
                defaults={"weight_decay": weight_decay, "scale": scale},
                prefix=f"{i}." if len(plans) > 1 else "",
            )
        for option, unusual in (("scale", scale != 1.0), ("carry", carry != "keep"), ("compat", compat is not None)):
            idle = unusual and not self.attachments
            require(not idle, option, f"'{option}' has no effect where nothing is transformed; leave it out")
        leads = [attachment.sub for attachment in self.attachments if attachment.sub.leader is None]
        for i, lead in enumerate(leads if stagger else ()):
            for sub in lead.members:
                sub.offset = i * lead.transform.period // len(leads)
        super().__init__([group | self._identity() for group in groups], {})
        self._settled = True
        self.defaults = {k: v for k, v in groups[0].items() if k != "params"}  # where schedulers look what they may cycle
        self._by_coords = {id(attachment.sub.coords): attachment for attachment in self.attachments}
        parallel.share(attachment.weight.data for attachment in self.attachments if attachment.averages)
        self._attach(mode)
        self._schedule()

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

    def _advance(self, stocks: list[tuple[Optimizer, Pairs]], attachments: list[Attachment], *, probe: bool = False) -> None:
        """Refresh where due, decay, step and merge whatever of these has a gradient."""
        served = [(own, param) for _, pairs in stocks for own, group in pairs for param in group["params"]]
        if not probe:
            for attachment in attachments:
                if not (attachment.sub.due and attachment.sub.transform.reads == "gradient"):
                    attachment.sub.refuse_stale()
            self._choose(attachments)
            for attachment in reversed(attachments):  # who leads holds the old map, which the others merge through
                self._commit(attachment.sub)
        for attachment in attachments:
            if attachment.sub.coords.grad is not None:
                attachment.sub.hold()
        if not self._arithmetic.decay_last:
            self._decay(served)
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
            for attachment in attachments:
                if attachment.sub.coords.grad is not None:
                    merge(attachment.sub, attachment.weight)
                    attachment.sub.release()

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

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clip the gradient of all that trains by its norm, coordinates counting as they are, in the small space.

        Where a refresh is due the new basis is chosen first, so that the norm is that of the gradient the step will use; it is
        committed by `step`. Clipping by the norm of full gradients has no twin in adapter mode, which never sees them.

        Args:
            max_norm: The largest norm allowed.
            norm_type: Which norm.

        Returns:
            The norm before clipping, 0-d.

        Raises:
            ModeError: The run is layerwise, so that gradients never exist together.
        """
        if self._layerwise is not None:
            raise ModeError(
                "with layerwise=True each gradient is stepped and freed inside the backward, and there is no norm to clip by; "
                "leave layerwise out to clip"
            )
        with torch.no_grad():
            self._choose(self.attachments)
        params = [p for group in self.param_groups for p in group["params"]]
        return torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type)

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
                found[name] = param if attachment is None else lifted(attachment.sub, attachment.weight)
        return found

    def captured_energy(self) -> dict[str, float]:
        """How much of its gradient each weight's basis captured at its last refresh, |S S^T G| / |G|.

        Returns:
            Parameter name -> the share; of a refresh from a sketch an estimate. Weights whose basis reads nothing of the
            gradient, or was not refreshed in this process yet, are left out.
        """
        found = ((sub.name, (sub.leader or sub).energy) for sub in self.subspaces)
        return {name: energy for name, energy in found if energy is not None}

    def switch(self, mode: Mode) -> None:
        """Go on in the other mode from here; the trajectory does not notice.

        Subspaces and base stay as they are. Into optimizer mode the coordinates are merged.

        Args:
            mode: ``optimizer`` or ``adapter``; None once detached.

        Raises:
            ModeError: Adapter mode is asked for, but only parameters are known, not their modules.
        """
        require_one_of(mode, get_args(Mode), "mode")
        self._require_attached()
        before = self.mode
        if mode == before or before is None:
            return
        self.detach()
        try:
            self._attach(mode)
        except BaseException:
            self._attach(before)
            raise

    @torch.no_grad()
    def detach(self) -> None:
        """Merge all coordinates into the weights and give the model back as it was found: no hook, no extra module.

        The optimizer is of no use afterwards; detaching twice does nothing.
        """
        if self.mode is None:
            return
        for attachment in self.attachments:
            merge(attachment.sub, attachment.weight)
            attachment.detach()
            attachment.sub.arrived = None
        while self._handles:
            self._handles.pop().remove()
        self.mode = None
        self._exempt([])

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, those gathered for a refresh too.

        Args:
            set_to_none: Free them instead of filling them with zeros.
        """
        super().zero_grad(set_to_none)
        for attachment in self.attachments:
            attachment.weight.grad = None  # from before it was ours, or from a backward that failed before our hook
            attachment.sub.forget()
        if self._layerwise is not None:
            self._layerwise.begin()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state; nothing is changed unless all of it fits.

        Args:
            state_dict: What `state_dict` gave, in the same mode. Raises `CheckpointError` where it belongs to other
                parameters or another spec, base, carry, seed or mode; the first difference is named.
        """
        super().load_state_dict(state_dict)
        if self._layerwise is not None:
            self._layerwise.begin()

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only used while the optimizer is made; see `lingrad.wrap` for groups.

        Args:
            param_group: A param group.

        Raises:
            ModeError: The optimizer exists already.
        """
        if self._settled:
            raise ModeError("param groups cannot be added to a running optimizer; pass them all to lingrad.wrap")
        super().add_param_group(param_group)

    def _subspace(self, target: Target) -> Subspace:
        transform = as_published(self._compat, target.transform)
        return Subspace.create(target.name, target.layout, transform, target.param, self._seed)

    def _attach(self, mode: Mode) -> None:
        done: list[Attachment] = []
        try:
            for attachment in self.attachments:
                attachment.attach(mode)
                done.append(attachment)
        except BaseException:
            for attachment in done:
                attachment.detach()
            raise
        self.mode = mode
        for group in self.param_groups:
            group["mode"] = mode
        for attachment in self.attachments:
            attachment.sub.release() if mode == "optimizer" else attachment.sub.hold()
        self._listen()
        self._exempt(self.attachments)

    def _listen(self) -> None:
        """Have gradients reported as they arrive, where each is stepped at once."""
        layerwise = self._layerwise
        if layerwise is None:
            return
        for group in self.param_groups:
            for name, param in zip(group["param_names"], group["params"], strict=True):
                attachment = self._by_coords.get(id(param))
                if attachment is None:
                    report, trains = partial(layerwise.arrived, name=name, wait=False), param.requires_grad
                    self._handles.append(param.requires_grad_(True).register_post_accumulate_grad_hook(report))
                    param.requires_grad_(trains)
                else:
                    attachment.sub.arrived = partial(layerwise.arrived, param, name, wait=True)

    def _exempt(self, attachments: list[Attachment]) -> None:
        if self._model is not None:
            ours = [p for a in attachments if a.averages for p in (a.weight, a.sub.coords)]
            parallel.exempt(self._model, ours)

    def _stocks(self) -> list[tuple[Optimizer, Pairs]]:
        if not self._stock:
            self._stock = build_stock(self.param_groups, self._base, self._base_state)
        return self._stock

    def _moments(self, sub: Subspace) -> Moments:
        def initial() -> dict[str, Any]:
            return dict(self._base.build([sub.coords]).state.get(sub.coords, {}))

        return Moments(self._base_state.get(sub.coords, {}), self._carry, self._degrees, initial)

    def _choose(self, attachments: list[Attachment]) -> None:
        """Choose the new basis of every weight that is due, from the gradient that backward captured."""
        found = (a.sub for a in attachments if a.sub.due and a.sub.transform.reads == "gradient")
        due = [sub for sub in found if sub.proposal is None and sub.coords.grad is not None]
        factors = [sub.captured.outside_factor(sub.coords) for sub in due]
        # where backward left zeros, the factor is the one seen everywhere else
        common = next((factor for factor in factors if factor is not None), 1.0)
        seen = {id(sub): common if factor is None else factor for sub, factor in zip(due, factors, strict=True)}
        for lead in dict.fromkeys(sub.leader or sub for sub in due):
            choose(lead.members, next(seen[id(sub)] for sub in lead.members if id(sub) in seen))

    def _renew(self) -> None:
        """Change the bases that are learned from what this step's backwards gathered."""
        due = (a.sub for a in self.attachments if a.sub.due and a.sub.transform.reads == "sketch")
        found = (s for s in due if s.captured.total is not None or (parallel.ranks() > 1 and s.coords.grad is not None))
        leads = dict.fromkeys(sub.leader or sub for sub in found)
        if leads:
            renew([lead.members for lead in leads], self._commit)
            forget_draws()

    def _commit(self, sub: Subspace) -> None:
        commit(sub, self._by_coords[id(sub.coords)].weight, self._moments(sub))

    def _decay(self, served: list[tuple[dict[str, Any], Tensor]], *, undo: bool = False) -> None:
        for group, param in served:
            factor = 1.0 - group["lr"] * group["weight_decay"]
            if undo:
                factor = 1.0 / factor if factor else 1.0
            if group["weight_decay"] == 0 or param.grad is None:
                continue
            attachment = self._by_coords.get(id(param))
            if attachment is None:
                param.mul_(factor)
            else:
                decay(attachment.sub, attachment.weight, factor)

    @torch.no_grad()
    def _schedule(self) -> None:
        drawn = [attachment.sub for attachment in self.attachments if attachment.sub.schedule(self._step)]
        for lead in dict.fromkeys(sub.leader or sub for sub in drawn):
            redraw(lead.members, self._commit)
