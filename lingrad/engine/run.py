"""A run: all that there is between two steps. The functions of the engine take it and change it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lingrad.adapters import Attachment, Gathering
from lingrad.config.names import parameter_at
from lingrad.config.residual import parse_residual
from lingrad.config.settings import Mode, Settings
from lingrad.engine.layerwise import Layerwise
from lingrad.engine.residual_state import ResidualState
from lingrad.engine.stepper import Group, Stepper
from lingrad.errors import ModeError
from lingrad.parallel import Processes, check_around, initialized
from lingrad.subspaces.basis import Basis
from lingrad.subspaces.subspace import Subspace
from lingrad.subspaces.watched import allocate, release
from lingrad.tensors import own, whole
from lingrad.weights.dense import DenseWeight


class Named(NamedTuple):
    """One parameter of a run.

    Args:
        group: Its param group.
        name: Its name; of coordinates that of their weight.
        param: The parameter.
        attachment: Of coordinates, their connection to the model.
    """

    group: Group
    name: str
    param: Tensor
    attachment: Attachment | None


@dataclass
class Run:
    """A model in training, between two steps.

    Args:
        settings: The options.
        stepper: The base optimizers.
        attachments: The connections to the model, one for each transformed weight, in its order.
        bases: The bases, in the order of the first weight that uses each.
        gathering: What its layers have in common in the step that is being prepared.
        processes: The processes that train the model together.
        groups: The param groups; the optimizer's own list.
        model: The model; None where only parameters were given.
        frozen: (name, parameter) of those that were frozen when the run was made, and not reported since.
        ruled_out: (name, parameter) of those that a rule freezes, until the run is detached.
        layerwise: What steps each weight inside the backward, where the run does so.
        mode: ``optimizer`` or ``adapter``; None while detached.
        step: Steps finished.
        compared: Whether its processes have had the same gradients in a step.
        quiet_until: The first step in which any basis changes, or a gradient that is left from before must be refused; what is
            done for single weights at such steps is left out before.

    Attributes:
        outer: The momentum of the outer step of a decentralised run, by weight.
        ended: Steps that were finished when the last of its rounds ended.
        failed: What the exchange of a step has failed with; the run does not go on.
        residuals: What becomes of the part of a gradient that its basis drops; None where it is dropped.
        tied: (name, weight) of those that several layers hold.
        count: How many processes there were when the run was made.
    """

    settings: Settings
    stepper: Stepper
    attachments: list[Attachment]
    bases: list[Basis]
    gathering: Gathering
    processes: Processes
    groups: list[Group] = field(default_factory=list)
    model: nn.Module | None = None
    frozen: list[tuple[str, weakref.ref[Tensor]]] = field(default_factory=list)
    ruled_out: list[tuple[str, weakref.ref[Tensor]]] = field(default_factory=list)
    layerwise: Layerwise | None = None
    mode: Mode | None = None
    step: int = 0
    compared: bool = False
    quiet_until: int = 0
    outer: dict[str, Tensor] = field(default_factory=dict, init=False)
    ended: int = field(default=0, init=False)
    failed: str | None = field(default=None, init=False)
    residuals: ResidualState | None = field(default=None, init=False)
    tied: list[tuple[str, DenseWeight]] = field(init=False)
    count: int = field(init=False)
    _check: Any = None
    _members: dict[int, list[Attachment]] = field(default_factory=dict)
    _of_coords: dict[int, Attachment] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Index the attachments."""
        for attachment in self.attachments:
            self._members.setdefault(id(attachment.sub.basis), []).append(attachment)
            self._of_coords[id(attachment.sub.coords)] = attachment
        self.count = self.processes.count
        if self.settings.residual is not None:
            self.residuals = ResidualState(parse_residual(self.settings.residual))
        weights = ((attachment.sub.name, attachment.sub.weight) for attachment in self.attachments)
        self.tied = [(name, one) for name, one in weights if isinstance(one, DenseWeight) and len(one.owners) > 1]

    @property
    def subspaces(self) -> list[Subspace]:
        """The subspace of every transformed weight."""
        return [attachment.sub for attachment in self.attachments]

    def of(self, basis: Basis) -> list[Attachment]:
        """The attachments of the weights that use a basis, in the model's order."""
        return self._members[id(basis)]

    def attachment_of(self, param: Tensor) -> Attachment | None:
        """The attachment whose coordinates a parameter is; None for one that is trained in full."""
        return self._of_coords.get(id(param))

    def lacks(self, params: Iterable[Tensor]) -> bool:
        """Whether some coordinates of the run are not among the parameters that are to be stepped."""
        return bool(self._of_coords.keys() - set(map(id, params)))

    def named(self) -> Iterator[Named]:
        """Every parameter that is stepped.

        Yields:
            The parameters, in the order of the groups.
        """
        for group in self.groups:
            for name, param in zip(group["param_names"], group["params"], strict=True):
                yield Named(group, name, param, self._of_coords.get(id(param)))

    def held(self) -> Iterator[tuple[Tensor, str]]:
        """The tensors that stay in this process's memory between steps, for memory reports.

        Yields:
            (tensor, what it is): ``weight`` for those that are transformed, ``coords``, ``basis``, ``moments``.
        """
        for sub in self.subspaces:
            yield from ((tensor, "weight") for tensor in sub.weight.tensors())
            yield from ((tensor, "moments") for tensor in (sub.weight.rounding.tensors() if sub.weight.rounding else ()))
            yield own(sub.coords), "coords"
            yield from ((own(tensor), "coords") for tensor in sub.ledger.tensors())
        for basis in self.bases:
            yield from ((tensor, "basis") for tensor in basis.tensors())
        yield from ((tensor, "moments") for tensor in self.outer.values())
        yield from ((tensor, "moments") for tensor in (() if self.residuals is None else self.residuals.tensors()))
        for entries in self.stepper.state.values():
            yield from ((own(value), "moments") for value in entries.values() if isinstance(value, Tensor))

    @property
    def is_quiet(self) -> bool:
        """Whether no basis changes in the step that is being prepared."""
        return self.step < self.quiet_until

    def require_attached(self) -> None:
        """Make sure that the run is connected to its model.

        Raises:
            ModeError: It was detached; torch.distributed has other processes by now.
        """
        if self.mode is None:
            raise ModeError("this optimizer was detached from its model; call lingrad.wrap or lingrad.adapt again")
        if self.processes.count > self.count:
            raise ModeError(
                f"torch.distributed was initialized after lingrad was called, which knows of {self.count} process only, and "
                f"would not average over {self.processes.count}; call init_process_group first, then lingrad"
            )

    def attach(self, mode: Mode) -> None:
        """Connect all weights in a mode; with nothing changed where one of them does not support it.

        Args:
            mode: ``optimizer`` or ``adapter``.
        """
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
        for group in self.groups:
            group["mode"] = mode  # as a checkpoint says it
        if mode == "adapter":
            allocate([sub.coords for sub in self.subspaces])
        else:
            release(sub.coords for sub in self.subspaces)
        if self.layerwise is not None:
            self.layerwise.listen((n.param, n.name, None if n.attachment is None else n.attachment.sub) for n in self.named())
        self._exclude_from_ddp(self.attachments)
        if self.model is not None and initialized():
            refreshes = any(basis.transform.period for basis in self.bases)
            sends = any(basis.transform.reads != "nothing" for basis in self.bases) or any(a.averages for a in self.attachments)
            check = partial(check_around, self.processes, refreshes, sends)
            self._check = self.model.register_forward_pre_hook(check)

    def freeze(self) -> None:
        """Have the parameters that a rule freezes require no gradient, until the run is detached."""
        for _, ref in self.ruled_out:
            param = ref()
            if param is not None:
                param.requires_grad_(False)
                param.grad = None  # of a backward before the run
        self.frozen += self.ruled_out

    def detach(self) -> None:
        """Merge all coordinates, disconnect, and unfreeze what a rule has frozen; detaching twice does nothing."""
        if self.mode is None:
            return
        self._disconnect()
        for name, ref in self.ruled_out:
            # load_state_dict with assign=True puts another parameter in its place, as frozen as the one it replaces
            current = None if self.model is None else parameter_at(self.model, name)
            for param in (ref(), current):
                if param is not None and param.is_floating_point():
                    param.requires_grad_(True)

    @torch.no_grad()
    def _disconnect(self) -> None:
        mode = self.mode
        if mode is None:
            return
        merged = [sub for sub in self.subspaces if not sub.released and bool(whole(sub.coords).any())]
        for sub in merged:
            sub.require_intact()
        for sub in merged:  # all of them first: where one cannot be merged, the run stays attached
            sub.merge()
        for i, attachment in enumerate(self.attachments):
            try:
                attachment.detach()
            except BaseException:
                for done in self.attachments[:i]:
                    done.attach(mode)
                raise
        for sub in self.subspaces:
            sub.on_gradient = None
        if self.layerwise is not None:
            self.layerwise.stop()
        self.mode = None
        if self._check is not None:
            self._check.remove()
            self._check = None
        self._exclude_from_ddp([])

    def switch(self, mode: Mode) -> None:
        """Continue in the other mode; as it was where a weight does not support that.

        Args:
            mode: ``optimizer`` or ``adapter``.
        """
        before = self.mode
        if mode == before or before is None:
            return
        for attachment in self.attachments:
            attachment.require(mode)
        if self.settings.rounds is not None or self.settings.residual is not None:
            self.settings.check_mode(mode)
        self._disconnect()
        try:
            self.attach(mode)
        except BaseException:
            self.attach(before)
            raise

    def forget(self) -> None:
        """Drop the gradients that were not stepped, and what was recorded for a refresh."""
        quiet = self.is_quiet
        for attachment in self.attachments:
            attachment.sub.weight.param.grad = None  # from before it was lingrad's, or from a backward that failed
            if not quiet or attachment.shares:
                attachment.forget()
        if self.layerwise is not None:
            self.layerwise.begin()

    def is_dry_run(self) -> bool:
        """Whether this is the step by which torch.distributed.checkpoint makes a fresh optimizer allocate its state."""
        if self.step or self.stepper.state or any(float(group["lr"]) for group in self.groups):
            return False
        return not any(bool(whole(named.param.grad).any()) for named in self.named() if named.param.grad is not None)

    def _exclude_from_ddp(self, attachments: list[Attachment]) -> None:
        """Leave the gradients that are averaged here out of a DistributedDataParallel that is built later."""
        if self.model is not None:
            own = [a.sub.coords for a in attachments if a.averages]
            # in optimizer mode a weight has a gradient only where it is read without its layer, which is averaged here too
            weights = [a.sub.weight.param for a in attachments if a.averages or self.mode == "optimizer"]
            self.processes.exclude(self.model, own + weights)
