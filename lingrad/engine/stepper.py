"""The base optimizers behind a run: built from its param groups, kept in step with them, and stepped."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lingrad.config.settings import Carry
from lingrad.engine.arithmetic import OWN, Arithmetic, sync_to, unfit_rate
from lingrad.engine.counts import in_parts
from lingrad.engine.moments import Moments
from lingrad.engine.offload import Offload
from lingrad.errors import ShapeError, SpecError, require
from lingrad.optimizers import Base
from lingrad.optimizers.moments import MomentKinds, decay_rates
from lingrad.subspaces import trees
from lingrad.subspaces.subspace import Subspace

Group = dict[str, Any]
_Kind = tuple[torch.dtype, torch.device, torch.Size]  # of a parameter: what its state depends on


class Built(NamedTuple):
    """A base optimizer and what it steps.

    Args:
        optimizer: The optimizer, unmodified.
        pairs: The run's param groups, each with the optimizer's own.
    """

    optimizer: Optimizer
    pairs: list[tuple[Group, Group]]

    def stepped(self) -> list[tuple[Group, Tensor]]:
        """(the run's param group, parameter), in the optimizer's order."""
        return [(own, param) for own, group in self.pairs for param in group["params"]]


class Stepper:
    """The base optimizers of a run.

    Args:
        base: The base of the coordinates; its fallback steps what it cannot.
        arithmetic: Details of the step.
        kinds: Which moments are means and which are squares, where they are to be taken to another basis.
        offload: What keeps moments in host memory; None where they are on the device.

    Attributes:
        state: What the optimizers keep, by parameter; they share this mapping.
        missed: Steps of the run that a parameter had no gradient in, where they are counted for each.
    """

    def __init__(self, base: Base, arithmetic: Arithmetic, kinds: MomentKinds, offload: Offload | None = None) -> None:
        self.base = base
        self.arithmetic = arithmetic
        self.kinds = kinds
        self.state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
        self.missed: dict[Tensor, int] = {}
        self.offload = offload
        self._built: list[Built] = []
        self._single: dict[int, Built] = {}  # of one parameter each, where layerwise
        self._followed: dict[int, _Kind] = {}  # of each parameter, when its state last followed
        self._known_rates: dict[str, Mapping[str, float]] = {}  # by the hyper-parameters of a group
        self._compiled: dict[str, Any] | None = None  # options of torch.compile, where steps go through it

    def base_of(self, kind: str) -> Base:
        """The base that steps the param groups of a kind: ``coords``, ``matrices`` or ``vectors``."""
        return self.base if kind == "coords" else self.base.fallback or self.base

    def built(self, groups: list[Group]) -> list[Built]:
        """The optimizers of a run: one, or two where the base cannot step what is no matrix; that of the coordinates first.

        Args:
            groups: The run's param groups.

        Returns:
            The optimizers, built at the first use.
        """
        if not self._built:
            stepped = [(self.base, groups)]
            if self.base.fallback is not None:
                coords = [group for group in groups if group["kind"] == "coords"]
                rest = [group for group in groups if group["kind"] != "coords"]
                stepped = [(self.base, coords), (self.base.fallback, rest)]
            self._built = [self._build(base, own) for base, own in stepped if own]
            for built in self._built if self._compiled is not None else ():
                vars(built.optimizer)["step"] = torch.compile(built.optimizer.step, **self._compiled or {})
        return self._built

    def single(self, groups: list[Group], param: Tensor) -> Built:
        """The optimizer that steps one parameter alone.

        Args:
            groups: The run's param groups.
            param: The parameter, whose state is cast and moved as by `follow`.

        Returns:
            The optimizer, built at the first use.
        """
        known = self._single.get(id(param))
        if known is None:
            group = next(group for group in groups if any(param is other for other in group["params"]))
        else:
            group = known.pairs[0][0]
        self.follow(group, [param])
        if id(param) not in self._single:
            optimizer, pairs = self._build(self.base_of(group["kind"]), [{**group, "params": [param]}])
            self._single[id(param)] = Built(optimizer, [(group, own) for _, own in pairs])
        return self._single[id(param)]

    def step(self, built: Built, step: int) -> None:
        """One step of an optimizer, with the hyper-parameters that the run's groups have now.

        Args:
            built: The optimizer.
            step: The step, counted from 1.
        """
        with closing(in_parts(built.optimizer.param_groups, self.missed)) as parts:
            for missed in parts:
                for own, group in built.pairs:
                    sync_to(own, group, self.arithmetic, step - missed)
                if self.offload is None:
                    built.optimizer.step()
                else:
                    self.offload.step(built.optimizer)
        for own, group in built.pairs:
            own.update({key: group[key] for key in group.keys() - OWN})  # such as a step size that it found

    def compile(self, groups: list[Group], options: dict[str, Any]) -> None:
        """Send steps through ``torch.compile``, from the next one on; of quantised moments, encoding and decoding alone.

        Args:
            groups: The run's param groups.
            options: As for ``torch.compile``.

        Raises:
            SpecError: A learning rate is a plain number, for which torch compiles again at each change of it; or torch cannot
                compile the base.
        """
        require(
            self.offload is None or self.base.quantizer is not None,
            "offload",
            "a compiled step is compiled for the parameters that it steps, and with offload='moments' each block has others; "
            "leave compile_step or offload out",
        )
        if self.base.name == "adamw8bit":
            raise SpecError("adamw8bit is a kernel of bitsandbytes, which torch cannot compile; it gains nothing: leave it out")
        if self.base.quantizer is not None:  # the step between them has parts, each of which would be compiled again
            self.base = self.base.compiled(options)
            self.rebuild()
            return
        plain, option = unfit_rate(groups, lambda group: isinstance(group["lr"], Tensor))
        if plain is not None:
            raise SpecError(
                f"the learning rate of group '{plain['name']}' is a number, and a compiled step would be compiled again "
                f"whenever a schedule changes it; make the optimizer with a tensor: {option}=torch.tensor(1e-3)",
                option=option,
            )
        self._compiled, self.base = options, self.base.compiled(options)
        self.rebuild()

    def rebuild(self) -> None:
        """Have the optimizers built again at their next use, since what they were built from has changed."""
        self._built.clear()
        self._single.clear()

    def follow(self, group: Group, params: list[Tensor]) -> None:
        """Cast and move the state of parameters where model.to has cast or moved these since the last step.

        Which kernels an optimizer uses depends on the device: after a move optimizers are built again.

        Args:
            group: The parameters' group.
            params: The parameters.

        Raises:
            ShapeError: A parameter was resized, and has state of its old size, beyond which a fused kernel would write.
        """
        for param in params:
            now = (param.dtype, param.device, param.shape)
            was = self._followed.setdefault(id(param), now)
            if was != now:
                if was[2] != now[2]:
                    self._require_no_state(group, param, was[2])
                self._followed[id(param)] = now
                self._move(group, param, *was[:2])

    def _require_no_state(self, group: Group, param: Tensor, shape: torch.Size) -> None:
        if any(isinstance(value, Tensor) and value.dim() for value in self.state.get(param, {}).values()):
            name = next(name for name, own in zip(group["param_names"], group["params"], strict=True) if own is param)
            raise ShapeError(
                f"{name} has shape {tuple(param.shape)} now, and its moments are of its old shape {tuple(shape)}. Call "
                "detach() after such a change (resize_token_embeddings and the like), and lingrad.wrap or lingrad.adapt again"
            )

    def _move(self, group: Group, param: Tensor, dtype: torch.dtype, device: torch.device) -> None:
        entries = self.state.get(param, {})
        fresh = self.base_of(group["kind"]).state_of(param) if entries else {}
        if device != param.device:
            entries.update(trees.placed(entries, fresh, param.device))
            self._built.clear()
            self._single.pop(id(param), None)
        for key, value in entries.items():
            template = fresh.get(key)
            if isinstance(value, Tensor) and isinstance(template, Tensor) and value.dtype == dtype != template.dtype:
                entries[key] = value.to(template.dtype)  # not every base keeps its state in the parameter's dtype
        self.stowed(entries)

    def load(self, states: list[tuple[Tensor, dict[str, Any]]]) -> None:
        """Take over the state of every parameter.

        Args:
            states: Each parameter with its entries, where it has any.
        """
        for param, entries in states:
            self.state.pop(param, None)
            if entries:
                self.state[param] = entries
        self._followed = {id(param): (param.dtype, param.device, param.shape) for param, _ in states}

    def moments(self, sub: Subspace, carry: Carry, groups: list[Group]) -> Moments:
        """The state of one weight's coordinates, for a refresh to carry over.

        Args:
            sub: The weight's subspace.
            carry: How.
            groups: The run's param groups.

        Returns:
            The moments.
        """

        def initial() -> dict[str, Any]:
            return dict(self.base.build([sub.coords]).state.get(sub.coords, {}))

        def rates() -> Mapping[str, float]:
            return self._rates(next(group for group in groups if any(param is sub.coords for param in group["params"])))

        return Moments(self.state.get(sub.coords, {}), carry, self.kinds, rates, initial, self.base.quantizer)

    def _rates(self, group: Group) -> Mapping[str, float]:
        """How fast the means forget with the hyper-parameters that a group has now."""
        options = {key: value for key, value in group.items() if key not in OWN}
        now = repr(sorted(options.items(), key=lambda item: item[0]))
        if now not in self._known_rates:
            self._known_rates[now] = decay_rates(self.base, self.kinds, options)
        return self._known_rates[now]

    def fetched(self, param: Tensor, *, needed: bool = True) -> AbstractContextManager[None]:
        """Have the state of a parameter on its device, where that is needed and it is not there."""
        return self.offload.fetched(self.state, param) if self.offload is not None and needed else nullcontext()

    def stowed(self, entries: dict[str, Any]) -> dict[str, Any]:
        """The state of a parameter where it is kept between steps."""
        return entries if self.offload is None else self.offload.stow(entries)

    @property
    def has_stepped(self) -> bool:
        """Whether a step that failed has stepped some parameters in full."""
        return self.offload is not None and self.offload.stepped

    def restart(self, kind: str, param: Tensor) -> None:
        """Give a parameter the state that it had before its first step.

        Args:
            kind: Of its param group.
            param: The parameter.
        """
        entries = self.state.get(param, {})
        entries.clear()
        entries.update(self.base_of(kind).build([param]).state.get(param, {}))

    def _build(self, base: Base, groups: list[Group]) -> Built:
        optimizer = base.build([{"params": group["params"]} for group in groups])
        for param, initial in optimizer.state.items():
            if not self.state.get(param):
                self.state[param] = self.stowed(initial)
        optimizer.state = self.state
        return Built(optimizer, list(zip(groups, optimizer.param_groups, strict=True)))
