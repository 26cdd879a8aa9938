"""The optimizer: the public face of a run, in both modes, with any base.

The modes differ only in when coordinates are merged into weights: at every step (optimizer mode), at each refresh
(adapter mode), or every few steps between the two (``merge_every``). The order of a step is in `lingrad.engine.step`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lingrad.adapters import Attachment
from lingrad.config.rules import Rules
from lingrad.config.settings import Mode, Settings
from lingrad.engine import checkpoint, grouping, state_hooks
from lingrad.engine.adaptive import next_refresh
from lingrad.engine.build import Trainable, build, start
from lingrad.engine.capture import CapturedStep
from lingrad.engine.changes import changes
from lingrad.engine.rounds import exchange
from lingrad.engine.run import Run
from lingrad.engine.step import clip, step
from lingrad.errors import ModeError, require_one_of
from lingrad.optimizers import Base, BaseLike
from lingrad.subspaces.ledger import Change
from lingrad.subspaces.schedule import NextRefresh
from lingrad.subspaces.subspace import Subspace
from lingrad.weights.base import MergeLoss


class SubspaceOptimizer(Optimizer):
    """A ``torch.optim.Optimizer`` whose parameters are coordinates, and the untransformed parameters of the model.

    Made by `lingrad.wrap` and `lingrad.adapt`, whose arguments it takes. ``param_groups`` are ``coords``, ``matrices`` and
    ``vectors`` (by ``group["name"]``); schedulers act on them as on any optimizer's. ``lr`` is the plain learning rate; that of
    the coordinates is multiplied by ``group["scale"]`` when it reaches the base.

    Where torch.distributed has several processes they train one model on parts of a batch: gradients are averaged over all of
    them. Wrap the model in DistributedDataParallel after this.
    """

    def __init__(self, model: Trainable, rules: Rules, base: BaseLike = "adamw", *, mode: Mode, **options: Any) -> None:
        self._run: Run
        self._run, groups = build(model, rules, base, mode, options)
        super().__init__(groups, {})
        self.defaults = {k: v for k, v in groups[0].items() if k != "params"}  # where schedulers look what they may cycle
        start(self._run, mode)

    @property
    def mode(self) -> Mode | None:
        """``optimizer`` or ``adapter``; None once detached."""
        return self._run.mode

    @property
    def settings(self) -> Settings:
        """The options of the run."""
        return self._run.settings

    @property
    def model(self) -> nn.Module | None:
        """The model; None where only parameters were given."""
        return self._run.model

    @property
    def attachments(self) -> list[Attachment]:
        """The connections to the model, one for each transformed weight; each has its ``sub``."""
        return self._run.attachments

    @property
    def subspaces(self) -> list[Subspace]:
        """The subspace of every transformed weight."""
        return self._run.subspaces

    @property
    def base(self) -> Optimizer:
        """The base optimizer that steps the coordinates; built at the first use."""
        return self.bases()[0]

    def bases(self) -> list[Optimizer]:
        """The base optimizers, that of the coordinates first; built at the first use."""
        return [built.optimizer for built in self._run.stepper.built(self.param_groups)]

    def base_of(self, kind: str) -> Base:
        """The base that steps the param groups of a kind: ``coords``, ``matrices`` or ``vectors``."""
        return self._run.stepper.base_of(kind)

    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the run.

        Args:
            closure: Evaluates the model once and returns the loss, as in torch.

        Returns:
            What the closure returned. Raises `ModeError` where, on a refresh step, the gradient of some coordinates was changed
            by more than one factor.
        """
        return step(self._run, closure)

    def compile_step(self, **options: Any) -> None:
        """Have the base's step go through ``torch.compile``, from the next step on; with ``moments="8bit"``, their coding.

        Args:
            **options: As for ``torch.compile``. Raises `SpecError` where a learning rate is a plain number, for which torch
                compiles again at each change of it, or the base is ``adamw8bit``.
        """
        self._run.stepper.compile(self.param_groups, options)

    def capture(self, body: Callable[[], Any], *, warmup: int = 3) -> CapturedStep:
        """Have ordinary steps launched from a CUDA graph; those in which a basis changes run as they are.

        Args:
            body: One whole step on inputs that stay in place: ``zero_grad``, forward, backward, ``step``; it waits for nothing.
            warmup: Ordinary steps before the first is recorded. The base needs what torch asks for: tensors as ``lr``,
                ``capturable=True``.

        Returns:
            What to call for each step; it returns what ``body`` does. Raises `SpecError` where a graph would freeze an option.
        """
        return CapturedStep(self._run, body, warmup=warmup)

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clip the gradient of all that trains by its norm, coordinates counting as they are, in the small space.

        Where a refresh is due the new basis is chosen first, so that the norm is that of the gradient the step will use; it is
        committed by `step`. Clipping by the norm of full gradients has no counterpart in adapter mode, which never sees them.

        Args:
            max_norm: The largest norm allowed.
            norm_type: Which norm.

        Returns:
            The norm before clipping, 0-d. Raises `ModeError` where the run is layerwise: gradients never exist together.
        """
        return clip(self._run, max_norm, norm_type)

    def exchange(self) -> None:
        """End a round of `lingrad.decentralized` here, as after the last step of a run; all workers call it."""
        exchange(self._run, self._run.step)

    def switch(self, mode: Mode) -> None:
        """Continue in the other mode from here; the trajectory stays the same.

        Subspaces and base stay as they are. Into optimizer mode the coordinates are merged.

        Args:
            mode: ``optimizer`` or ``adapter``. Raises `ModeError` where only parameters are known, not their modules, and
                adapter mode is asked for.
        """
        require_one_of(mode, get_args(Mode), "mode")
        self._run.require_attached()
        self._run.switch(mode)

    def detach(self) -> None:
        """Merge all coordinates into the weights and give the model back as it was found: no hook, no extra module.

        The optimizer is of no use afterwards; detaching twice does nothing.
        """
        self._run.detach()

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, and what was recorded for a refresh.

        Args:
            set_to_none: Free them instead of filling them with zeros.
        """
        super().zero_grad(set_to_none)
        self._run.forget()

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """The effective weights, by parameter name: W + S z where there is a subspace, the parameter itself elsewhere.

        Returns:
            Name -> tensor in the parameter's shape; in adapter mode a new one, otherwise not a copy.
        """
        return {n.name: n.param if n.attachment is None else n.attachment.sub.effective() for n in self._run.named()}

    @torch.no_grad()
    def changes(self) -> dict[str, Change]:
        """What the run has made of every transformed weight, as thin factors; what trains in full is not among them.

        Returns:
            Parameter name -> change, of rank r for each basis that was used; on the CPU, exact to rounding. Raises `ModeError`
            where something was merged or decayed, and the run was made without ``ledger=True``; a plain model was loaded
            into the run, and no state of the optimizer after it; or the run has a ``residual``.
        """
        return changes(self._run)

    def merge_losses(self) -> dict[str, MergeLoss]:
        """What merges into quantised weights have lost, relative to what they merged.

        Returns:
            Parameter name -> the loss of the last merge, and of all; only weights that are stored in 4 or 8 bits.
        """
        return {sub.name: sub.weight.loss for sub in self.subspaces if sub.weight.loss is not None}

    def captured_energy(self) -> dict[str, float]:
        """How much of its gradient each weight's basis captured at its last refresh, |S S^T G| / |G|.

        Returns:
            Parameter name -> the share; of a refresh from a sketch an estimate. Weights whose basis reads nothing of the
            gradient, or was not refreshed yet, are left out.
        """
        return {sub.name: sub.basis.energy for sub in self.subspaces if sub.basis.energy is not None}

    def ranks(self) -> dict[str, int]:
        """Columns of each weight's basis that are in use: its rank, or fewer where ``energy`` of ``svd`` decides."""
        return {sub.name: rank for sub in self.subspaces if (rank := sub.basis.rank) is not None}

    def refreshes(self) -> dict[str, int]:
        """How often the basis of each transformed weight has changed, by parameter name."""
        return {sub.name: sub.basis.refreshes for sub in self.subspaces}

    def next_refreshes(self) -> dict[str, NextRefresh]:
        """When the basis of each transformed weight is refreshed next, or its schedule checks whether to; not if never."""
        return {sub.name: one for sub in self.subspaces if (one := next_refresh(self._run, sub.basis)) is not None}

    def held(self) -> Iterator[tuple[Tensor, str]]:
        """(tensor, what it is) of those that stay in memory: ``weight`` if transformed, ``coords``, ``basis``, ``moments``."""
        return self._run.held()

    def exclude_from_decay(self, decaying: Callable[[str], bool]) -> None:
        """Split the param groups so that some parameters do not decay.

        Args:
            decaying: Whether a parameter decays, by its name. What decays stays in its group; the rest goes to one of the same
                hyper-parameters without decay, called ``<name>.no_decay`` where the group is split.
        """
        self.param_groups = grouping.split_groups(self.param_groups, decaying)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The param groups, as torch has them."""
        return self._run.groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self._run.groups = value
        self._run.stepper.rebuild()

    @property
    def state(self) -> defaultdict[Tensor, dict[str, Any]]:
        """What the base and the subspaces keep, by parameter; a copy of the mapping, for reading.

        torch.distributed.checkpoint learns from it what a checkpoint holds.
        """
        return checkpoint.state(self._run)

    @state.setter
    def state(self, value: defaultdict[Tensor, dict[str, Any]]) -> None:
        self._run.stepper.state = value
        self._run.stepper.rebuild()

    @override
    def state_dict(self) -> dict[str, Any]:
        """The state in torch's layout: ``state`` by index, with ``subspace.*`` next to the base's entries, and groups.

        Returns:
            Tensors and plain values only; loads with ``weights_only=True``.
        """
        self._run.require_attached()
        return state_hooks.with_hooks(self, lambda: checkpoint.save(self._run))

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a saved state; nothing is changed unless all of it fits.

        Args:
            state_dict: What `state_dict` gave, in the same mode. Raises `CheckpointError` where it belongs to other
                parameters or another spec, base, carry, seed or mode; the first difference is named.
        """
        self._run.require_attached()
        state_hooks.load_with_hooks(self, lambda given: checkpoint.load(self._run, given), state_dict)

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only used while the optimizer is made; see `lingrad.wrap` for groups.

        Args:
            param_group: A param group. Raises `ModeError` where the optimizer exists already.
        """
        if self.defaults:  # empty until the optimizer is made
            raise ModeError("param groups cannot be added to a running optimizer; pass them all to lingrad.wrap")
        super().add_param_group(param_group)

    @override
    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ModeError(
            "this optimizer is tied to its model by hooks and cannot be copied or pickled; "
            "save opt.state_dict() and model.state_dict(), and load them into a new model and optimizer"
        )
