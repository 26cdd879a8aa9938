"""What galore_torch's optimizers have in common here: its param groups outside, a run of lingrad inside."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lingrad.engine.optimizer import SubspaceOptimizer
from lingrad.engine.step import evaluate
from lingrad.errors import CheckpointError, ModeError
from lingrad.galore.groups import translated

_GROUPS = "galore_groups"  # in a state: the param groups as the script has them
_COUNTS = "galore_counts"  # in a state: steps of the run, and of each parameter that has missed some of them how many


class GaloreOptimizer(Optimizer):
    """The script's param groups outside, a `SubspaceOptimizer` inside.

    An optimizer that is made for parameters of an earlier one takes them over, and the earlier one steps no more. Steps are
    counted for each parameter: one without a gradient in a step has missed it, as in galore_torch.

    Args:
        params: Parameters, or param groups, of which those with a ``rank`` are projected.
        base: The base optimizer.
        defaults: Hyper-parameters of groups that have none of their own.
        fixed: Options of the base for the whole run.

    Attributes:
        run: The optimizer inside, with `captured_energy`, `refreshes` and the like; its names are ``group.index``, or the
            script's own where it passes named parameters.
    """

    def __init__(self, params: Iterable[Any], base: str, defaults: dict[str, Any], **fixed: Any) -> None:
        self.run: SubspaceOptimizer | None = None
        super().__init__(params, defaults)
        self._options = tuple(defaults)
        self._frozen = [param for group in self.param_groups for param in group["params"] if not param.requires_grad]
        groups = [translated(i, group, self._options) for i, group in enumerate(self.param_groups)]
        self._indices = [i for i, group in enumerate(groups) if group["params"]]
        earlier = self._detach_earlier()
        try:
            self.run = SubspaceOptimizer(
                [groups[i] for i in self._indices], {"*": "none"}, base, mode="optimizer", compat="galore", **fixed
            )
        except BaseException:
            for other in earlier:
                other._attach()
            raise
        self._leave_gradients()
        _LIVE.add(self)
        # the weights are free again when nothing refers to this any more
        weakref.finalize(self, self.run.detach).atexit = False

    def _detach_earlier(self) -> list[GaloreOptimizer]:
        """Detach the optimizers that have some of these parameters, and list them."""
        own = {id(param) for group in self.param_groups for param in group["params"]}
        earlier = [
            other
            for other in _LIVE
            if other.run is not None
            and other.run.mode is not None
            and any(id(param) in own for group in other.param_groups for param in group["params"])
        ]
        for other in earlier:
            other._run.detach()
        return earlier

    def _attach(self) -> None:
        """Go on after all."""
        if self.run is not None:
            self.run._run.attach("optimizer")
            self._leave_gradients()

    def _leave_gradients(self) -> None:
        for attachment in self._run.attachments:
            attachment.leave_gradient()

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, from the gradients that are in ``weight.grad`` now; they stay there until `zero_grad`.

        Args:
            closure: Evaluates the model once and returns the loss.

        Returns:
            What the closure returned.

        Raises:
            ModeError: A parameter was frozen when the optimizer was made, and has a gradient now.
        """
        loss = evaluate(closure)
        if any(param.grad is not None for param in self._frozen):
            raise ModeError(
                "a parameter that was frozen when the optimizer was made has a gradient now, and would not be trained; call "
                "requires_grad_(True) before the optimizer is made"
            )
        run = self._run
        self._sync()
        params = [param for group in self.param_groups for param in group["params"]]
        grads = [param.grad for param in params]
        missed, finished = self._missed(), run._run.step
        absent = {name: 1 for name, param in self._weights().items() if param.grad is None}
        self._set_missed({name: missed.get(name, 0) + absent.get(name, 0) for name in {*missed, *absent}})
        try:
            run.step()  # takes the gradients that it finds in weights
        finally:
            if run._run.step == finished:
                self._set_missed(missed)
            run.zero_grad()
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
        return loss

    def _weights(self) -> dict[str, Tensor]:
        """Name -> parameter of the script, of all that trains."""
        named = self._run._run.named()
        return {n.name: n.param if n.attachment is None else n.attachment.sub.weight.param for n in named}

    def _missed(self) -> dict[str, int]:
        """Name -> how many steps of the run a parameter has missed; those that have missed some."""
        missed = self._run._run.stepper.missed
        return {n.name: missed[n.param] for n in self._run._run.named() if n.param in missed}

    def _set_missed(self, counts: Mapping[str, int]) -> None:
        run = self._run._run
        for named in run.named():
            count, before = counts.get(named.name, 0), run.stepper.missed.pop(named.param, 0)
            if count:
                run.stepper.missed[named.param] = count
            if named.attachment is not None:
                named.attachment.sub.basis.offset += count - before  # by so much its refreshes are later

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients.

        Args:
            set_to_none: Free them instead of filling them with zeros.
        """
        super().zero_grad(set_to_none)

    @override
    def state_dict(self) -> dict[str, Any]:
        """The state: tensors and plain values only, which torch loads with ``weights_only=True``.

        Returns:
            The state of the run inside, and the script's param groups without their parameters.
        """
        self._sync()
        groups = [{k: v for k, v in group.items() if k not in ("params", "param_names")} for group in self.param_groups]
        counts = {"steps": self._run._run.step, "missed": self._missed()}
        return {**self._run.state_dict(), _GROUPS: groups, _COUNTS: counts}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a saved state; the next steps are those that the saved run would have made, to the bit.

        Args:
            state_dict: What `state_dict` gave, for the same parameters in the same groups.

        Raises:
            CheckpointError: It is another program's, or of another run; the first difference is named.
        """
        saved = state_dict.get(_GROUPS)
        if not isinstance(saved, list) or len(saved) != len(self.param_groups):
            raise CheckpointError(
                f"expected the state of an optimizer of lingrad.galore with {len(self.param_groups)} param groups, which has "
                f"them in '{_GROUPS}'. A state of galore_torch itself is resumed by lingrad.convert.from_galore"
            )
        steps, missed, before = *_counts(state_dict), self._missed()
        unknown = sorted(missed.keys() - self._weights().keys())
        if unknown:
            raise CheckpointError(f"'{_COUNTS}' of the state names {', '.join(unknown)}, which this optimizer does not have")
        self._set_missed(missed)
        try:
            self._run.load_state_dict({key: value for key, value in state_dict.items() if key not in (_GROUPS, _COUNTS)})
        except BaseException:
            self._set_missed(before)
            raise
        self._run._run.step = steps
        for group, given in zip(self.param_groups, saved, strict=True):
            group.update(given)

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Used while the optimizer is made.

        Args:
            param_group: A param group. Raises `ModeError` where the optimizer exists already.
        """
        if self.run is not None:
            raise ModeError("param groups cannot be added to a running optimizer; pass them all when it is made")
        super().add_param_group(param_group)

    @override
    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ModeError("this optimizer cannot be copied or pickled; save and load its state_dict()")

    @property
    def _run(self) -> SubspaceOptimizer:
        if self.run is None:
            raise ModeError("this optimizer is not made yet")
        if self.run.mode is None:
            raise ModeError(
                "this optimizer has no parameters any more: another one of lingrad.galore was made for some of them, or it was "
                "detached. Step the other one; to go on with the state of this one, take its state_dict() before that, and "
                "load it into the other"
            )
        return self.run

    def _sync(self) -> None:
        """Give the run inside the hyper-parameters that schedulers and scripts have set in the groups outside."""
        several = len(self._indices) > 1
        for place, index in enumerate(self._indices):
            group = self.param_groups[index]
            for own in self._run.param_groups:
                if not several or own["name"].startswith(f"{place}."):
                    names = (*self._options, "scale") if own["kind"] == "coords" else self._options
                    own.update({name: group[name] for name in names if name in own})


_LIVE: weakref.WeakSet[GaloreOptimizer] = weakref.WeakSet()


def _counts(state_dict: Mapping[str, Any]) -> tuple[int, dict[str, int]]:
    """The steps of a saved run, and how many of them each parameter has missed."""
    found = state_dict.get(_COUNTS)
    steps, missed = (found.get("steps"), found.get("missed")) if isinstance(found, dict) else (None, None)
    if type(steps) is not int or not isinstance(missed, dict):
        raise CheckpointError(f"the state has no steps and missed steps in '{_COUNTS}'; it is damaged, or of another version")
    if not all(isinstance(name, str) and type(count) is int and 0 <= count <= steps for name, count in missed.items()):
        raise CheckpointError(f"'{_COUNTS}' of the state is damaged: names and counts up to {steps} were expected")
    return steps, missed
