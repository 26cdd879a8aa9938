"""The optimizer: one class for both modes, round any base.

The modes differ in nothing else than when coordinates are merged into weights: at every step (optimizer mode), at each refresh
(adapter mode), or every few steps between the two (``merge_every``). The order of a step is told in `lingrad.engine.step`.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lingrad import optimizers, parallel
from lingrad.adapters import Attachment, Mode, make_attachment
from lingrad.config.rules import Rules
from lingrad.config.sharing import Place, Share, places, require_shared
from lingrad.engine.arithmetic import Compat, arithmetic, as_published
from lingrad.engine.build import Pairs, Trainable, check_not_negative, make_groups, resolve_groups
from lingrad.engine.layerwise import Layerwise
from lingrad.engine.moments import Carry
from lingrad.engine.telling import TellingOptimizer
from lingrad.errors import ModeError, require, require_one_of
from lingrad.optimizers import checks
from lingrad.subspaces.ledger import Ledger
from lingrad.subspaces.subspace import Subspace, hold


class SubspaceOptimizer(TellingOptimizer):
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
        base: optimizers.BaseLike = "adamw",
        *,
        mode: Mode,
        weight_decay: float = 0.0,
        scale: float = 1.0,
        carry: Carry = "keep",
        seed: int = 0,
        compat: Compat | None = None,
        layerwise: bool = False,
        stagger: bool = False,
        share: Share | None = None,
        ledger: bool = False,
        self_contained: bool = False,
        merge_every: int | None = None,
        keep_remainder: bool = False,
        **base_kwargs: Any,
    ) -> None:
        require_one_of(mode, get_args(Mode), "mode")
        require_one_of(carry, get_args(Carry), "carry")
        for option, value in (("weight_decay", weight_decay), ("scale", scale)):
            check_not_negative(option, value)
        flags = {"layerwise": layerwise, "stagger": stagger, "ledger": ledger}
        flags |= {"self_contained": self_contained, "keep_remainder": keep_remainder}
        for option, value in flags.items():
            require(type(value) is bool, option, f"{option} must be True or False, not {value!r}")
        require(type(seed) is int, "seed", f"seed must be a whole number, not {seed!r}")
        _check_sharing(share, layerwise)
        _check_merging(merge_every, mode)
        self._base = optimizers.find(base, base_kwargs, decay=False)
        checks.check_reads_only_gradients(self._base)
        self._carry = carry
        self._degrees = checks.moment_degrees(self._base) if carry == "rotate" else {}
        self._arithmetic = arithmetic(compat, self._base.name)
        self._merge_every = merge_every
        self._seed, self._compat, self._stagger, self._share = seed, compat, stagger, share
        self._ledger, self._self_contained, self._keep_remainder = ledger, self_contained, keep_remainder
        self._step = 0
        self._places: dict[int, tuple[torch.dtype, torch.device]] = {}
        self._stock: list[tuple[Optimizer, Pairs]] = []
        self._stock_of: dict[int, list[tuple[Optimizer, Pairs]]] = {}  # of one parameter each, where layerwise
        self._compiled: dict[str, Any] | None = None
        self._layerwise = Layerwise(self._advance_one) if layerwise else None
        if layerwise:
            checks.check_keeps_nothing_for_all(self._base)
        if self._base.quantizer is not None:
            checks.check_keeps_nothing_for_all(self._base, f"moments='{self._base.quantizer.kind}'")
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
        placed = [places(plan.targets, share) for plan, _ in plans]
        if share is not None:
            require_shared([place for found in placed for place in found])
        for i, (plan, options) in enumerate(plans):
            subs: dict[str, Subspace] = {}
            for place in placed[i]:
                subs[place.target.name] = self._subspace(place, subs.get(place.group[0].name))
            options_of = {"plain": self_contained, "keep_remainder": keep_remainder}
            made = [make_attachment(target, subs[target.name], **options_of) for target in plan.targets]
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
        for attachment in self.attachments:
            attachment.require(mode)
        _check_quantised(self.subspaces, merge_every, keep_remainder=keep_remainder)
        for sub in self.subspaces if ledger else ():
            sub.ledger = Ledger(sub.transform)
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
            self._choose(sub for sub in self.subspaces if sub.due and sub.transform.reads == "gradient")
        params = [p for group in self.param_groups for p in group["params"]]
        return torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type)

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
        for attachment in self.attachments:
            attachment.require(mode)
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
            attachment.merge()
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

    def _subspace(self, place: Place, lead: Subspace | None) -> Subspace:
        """The subspace of a weight; on the basis of another that leads, if there is one."""
        name, layout, param = place.target.name, place.target.layout, place.target.like
        if lead is not None:
            return lead.join(name, layout, param)
        transform = as_published(self._compat, place.target.transform)
        return Subspace.create(name, layout, transform, param, self._seed, stacked=place.shape[0] - layout.shape[0])

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
        if mode == "adapter":
            hold(self.subspaces)
        else:
            for sub in self.subspaces:
                sub.release()
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


def _check_sharing(share: Any, layerwise: bool) -> None:
    require(share is None or share in get_args(Share), "share", f"share must be 'input' or None, not {share!r}")
    require(
        share is None or not layerwise,
        "share",
        "share='input' refreshes several weights together, and layerwise=True steps one after the other; leave one of them out",
    )


def _check_quantised(subs: list[Subspace], merge_every: int | None, *, keep_remainder: bool) -> None:
    quantised = any(sub.loss is not None for sub in subs)
    require(
        quantised or not keep_remainder,
        "keep_remainder",
        "keep_remainder is of weights that are held in 4 or 8 bits, and none that is transformed is; leave it out",
    )
    require(
        merge_every is None or not quantised,
        "merge_every",
        "merge_every merges more often than refreshes do, and a merge into a quantised weight loses what is smaller than a "
        "step of its grid; leave it out",
    )


def _check_merging(merge_every: Any, mode: Mode) -> None:
    fits = merge_every is None or (type(merge_every) is int and merge_every >= 1)
    require(fits, "merge_every", f"merge_every must be a number of steps, 1 or more, or None, not {merge_every!r}")
    require(
        merge_every is None or mode == "adapter",
        "merge_every",
        "merge_every is for adapter mode; optimizer mode merges at every step. Use lingrad.adapt(..., merge_every=...)",
    )
