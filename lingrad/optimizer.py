"""The optimizer: one class for both modes, round any base.

Order of a step: refresh where due -> (clip) -> decay -> base -> merge in optimizer mode. The modes differ in nothing else than
when coordinates are merged into weights: at every step (optimizer mode) or at each refresh (adapter mode).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from lingrad import bases, checkpoint
from lingrad._typing import override
from lingrad.adapters import Attachment, LinearAttachment, WeightAttachment
from lingrad.adapters.base import Mode
from lingrad.compat import Compat, arithmetic, as_published
from lingrad.errors import ModeError, SpecError, did_you_mean
from lingrad.groups import Hyper, Trainable, build_stock, push, resolve_groups
from lingrad.rules import Rules, Target
from lingrad.subspace import Carry, Subspace, decay, lifted, merge, outside_factor, refresh


class SubspaceOptimizer(Optimizer):
    """A ``torch.optim.Optimizer`` whose parameters are coordinates, and the untransformed parameters of the model.

    Made by `lingrad.wrap` and `lingrad.adapt`, whose arguments it takes. ``param_groups`` are ``coords``, ``matrices`` and
    ``vectors`` (by ``group["name"]``); schedulers act on them as on any optimizer's. ``lr`` is the plain learning rate; that of
    the coordinates is multiplied by ``group["scale"]`` when it reaches the base.

    Attributes:
        mode: ``optimizer`` or ``adapter``.
        attachments: The connections to the model, one for each transformed weight; each has its ``sub``.
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
        **base_kwargs: Any,
    ) -> None:
        _check_choice("mode", mode, get_args(Mode))
        _check_choice("carry", carry, get_args(Carry))
        for option, value in (("weight_decay", weight_decay), ("scale", scale)):
            if not value >= 0:
                raise SpecError(f"{option} must be 0 or more, not {value}", option=option)
        self.mode: Mode = mode
        self._carry = carry
        self._base = bases.find(base, base_kwargs, decay=False)
        bases.check_reads_only_gradients(self._base)
        self._degrees = bases.moment_degrees(self._base) if carry == "rotate" else {}
        self._arithmetic = arithmetic(compat, self._base.name)
        self._step = 0
        self._stock: list[tuple[Optimizer, list[tuple[Any, Any]]]] = []
        self._settled = False

        hyper = Hyper(self._base, weight_decay, scale, mode, self._arithmetic)
        plans = resolve_groups(model, spec_or_rules)
        self.attachments: list[Attachment] = []
        groups = []
        for i, (plan, options) in enumerate(plans):
            prefix = f"{i}." if len(plans) > 1 else ""
            made = [_attachment(target, as_published(compat, target.transform), seed) for target in plan.targets]
            self.attachments += made
            kinds = {
                "coords": [(a.sub.name, a.sub.coords) for a in made],
                "matrices": [(name, p) for name, p in plan.full if p.dim() >= 2],
                "vectors": [(name, p) for name, p in plan.full if p.dim() < 2],
            }
            for kind, named in kinds.items():
                if named:
                    subs = [a.sub for a in made] if kind == "coords" else []
                    groups.append(hyper.group(prefix + kind, named, options, subs))
        self._by_coords = {id(a.sub.coords): a for a in self.attachments}
        super().__init__(groups, {})
        self.defaults = {k: v for k, v in groups[0].items() if k != "params"}  # where schedulers look what they may cycle
        self._settled = True
        self._attach(mode)

    @property
    def base(self) -> Optimizer:
        """The stock optimizer that steps the coordinates; built at the first use."""
        return self._stocks()[0][0]

    @property
    def subspaces(self) -> list[Subspace]:
        """The subspace of every transformed weight."""
        return [attachment.sub for attachment in self.attachments]

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
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stocks = self._stocks()
        self._refresh_due()
        if not self._arithmetic.decay_last:
            self._decay()
        for stock, pairs in stocks:
            for own, group in pairs:
                push(own, group, self._arithmetic, self._step + 1)
            stock.step()
        if self._arithmetic.decay_last:
            self._decay()
        if self.mode == "optimizer":
            for attachment in self.attachments:
                if attachment.sub.coords.grad is not None:
                    merge(attachment.sub, attachment.weight)
        self._step += 1
        self._schedule()
        return loss

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clip the gradient of all that trains by its norm, coordinates counting as they are, in the small space.

        A refresh that is due happens first, so that the norm is that of the gradient the step will use. Clipping by the norm of
        full gradients has no twin in adapter mode, which never sees them.

        Args:
            max_norm: The largest norm allowed.
            norm_type: Which norm.

        Returns:
            The norm before clipping, 0-d.
        """
        with torch.no_grad():
            self._refresh_due()
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

    def switch(self, mode: Mode) -> None:
        """Go on in the other mode from here; the trajectory does not notice.

        Subspaces and base stay as they are. Into optimizer mode the coordinates are merged.

        Args:
            mode: ``optimizer`` or ``adapter``.

        Raises:
            ModeError: Adapter mode is asked for, but only parameters are known, not their modules.
        """
        _check_choice("mode", mode, get_args(Mode))
        if mode == self.mode:
            return
        before = self.mode
        self.detach()
        try:
            self._attach(mode)
        except ModeError:
            self._attach(before)
            raise

    def detach(self) -> None:
        """Merge all coordinates into the weights and give the model back as it was found: no hook, no extra module."""
        with torch.no_grad():
            for attachment in self.attachments:
                merge(attachment.sub, attachment.weight)
                attachment.detach()

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, those gathered for a refresh too.

        Args:
            set_to_none: Free them instead of filling them with zeros.
        """
        super().zero_grad(set_to_none)
        for sub in self.subspaces:
            sub.forget()

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

    @override
    def state_dict(self) -> dict[str, Any]:
        """The state in torch's layout: ``state`` by index, with ``subspace.*`` beside the base's entries, and groups.

        Returns:
            Tensors and plain values only; loads with ``weights_only=True``.
        """
        packed: dict[str, Any] = super().state_dict()
        packed["state"] = {index: dict(state) for index, state in packed["state"].items()}
        for index, param in enumerate(p for group in self.param_groups for p in group["params"]):
            if id(param) in self._by_coords:
                own = checkpoint.pack_subspace(self._by_coords[id(param)].sub, self._step)
                packed["state"].setdefault(index, {}).update(own)
        return packed

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state; nothing is changed unless all of it fits.

        Args:
            state_dict: What `state_dict` gave, in the same mode.

        Raises:
            CheckpointError: It belongs to other parameters, another spec or another mode; the first difference is named.
        """
        checkpoint.check_groups(state_dict["param_groups"], self.param_groups)
        params = [p for group in self.param_groups for p in group["params"]]
        loaded: list[tuple[Tensor, dict[str, Any]]] = []
        unpacked: list[tuple[Subspace, tuple[Any, int]]] = []
        step = self._step
        for index, param in enumerate(params):
            entries = state_dict["state"].get(index, {})
            if id(param) in self._by_coords:
                sub = self._by_coords[id(param)].sub
                unpacked.append((sub, checkpoint.unpack_subspace(sub, entries)))
                step = int(entries[f"{checkpoint.PREFIX}step"])
            moments = {k: v for k, v in entries.items() if not k.startswith(checkpoint.PREFIX)}
            loaded.append((param, {k: checkpoint.to_device(v, param.device) for k, v in moments.items()}))
        self._stocks()
        for param, moments in loaded:
            self.state.pop(param, None)
            if moments:
                self.state[param] = moments
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        for sub, (state, refreshes) in unpacked:
            sub.replace_state(state, refreshes)
            sub.forget()
        self._step = step
        self._schedule()

    def _attach(self, mode: Mode) -> None:
        done: list[Attachment] = []
        try:
            for attachment in self.attachments:
                attachment.attach(mode)
                done.append(attachment)
        except ModeError:
            for attachment in done:
                attachment.detach()
            raise
        self.mode = mode
        for group in self.param_groups:
            group["mode"] = mode

    def _stocks(self) -> list[tuple[Optimizer, list[tuple[Any, Any]]]]:
        if not self._stock:
            self._stock = build_stock(self.param_groups, self._base, self.state)
        return self._stock

    def _refresh_due(self) -> None:
        due = [a for a in self.attachments if a.sub.due and a.sub.coords.grad is not None]
        factors = [outside_factor(a.sub) for a in due]
        # where backward left zeros, the factor is the one seen everywhere else
        common = next((factor for factor in factors if factor is not None), 1.0)
        for attachment, factor in zip(due, factors, strict=True):
            refresh(
                attachment.sub,
                attachment.weight,
                self._step,
                carry=self._carry,
                factor=common if factor is None else factor,
                moments=self.state[attachment.sub.coords],
                degrees=self._degrees,
            )

    def _decay(self) -> None:
        for group in self.param_groups:
            factor = 1.0 - group["lr"] * group["weight_decay"]
            for param in group["params"]:
                if group["weight_decay"] == 0 or param.grad is None:
                    continue
                attachment = self._by_coords.get(id(param))
                if attachment is None:
                    param.mul_(factor)
                else:
                    decay(attachment.sub, attachment.weight, factor)

    def _schedule(self) -> None:
        for sub in self.subspaces:
            sub.forget()
            # a weight that has seen no usable gradient yet stays due until it does
            sub.due = (sub.refreshes == 0 and sub.transform.due(0)) or sub.transform.due(self._step)


def _attachment(target: Target, transform: Any, seed: int) -> Attachment:
    sub = Subspace.create(target.name, target.layout, transform, target.param, seed)
    if target.road == "projected":
        return LinearAttachment(sub, *target.owners[0])
    return WeightAttachment(sub, target.param, target.owners)


def _check_choice(option: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        near = did_you_mean(str(value), allowed)
        raise SpecError(f"{option} must be one of {', '.join(allowed)}, not {value!r}{near}", option=option)
