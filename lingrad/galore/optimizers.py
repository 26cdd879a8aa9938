"""galore_torch's optimizers under their own names: a script that uses them changes its import line.

    from lingrad.galore import GaLoreAdamW, GaLoreAdamW8bit, GaLoreAdafactor

They take the param groups and arguments of galore_torch 1.0 (Zhao et al., ICML 2024, arXiv 2403.03507) and make its steps. As
there, the gradient of a weight stays in ``weight.grad`` until `step`, where other code may clip or scale it. `lingrad.wrap`
projects it inside the backward and never forms it: less memory, the same steps, for a script that changes one line more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer
from typing_extensions import override

from lingrad.engine.optimizer import SubspaceOptimizer
from lingrad.errors import CheckpointError, ModeError, require
from lingrad.galore.groups import require_only, translated

_GROUPS = "galore_groups"  # in a state: the param groups as the script has them


class _GaloreOptimizer(Optimizer):
    """What the three have in common: the script's param groups outside, a `SubspaceOptimizer` inside.

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
        self.run = SubspaceOptimizer(
            [groups[i] for i in self._indices], {"*": "none"}, base, mode="optimizer", compat="galore", **fixed
        )
        for attachment in self.run.attachments:
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
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if any(param.grad is not None for param in self._frozen):
            raise ModeError(
                "a parameter that was frozen when the optimizer was made has a gradient now, and would not be trained; call "
                "requires_grad_(True) before the optimizer is made"
            )
        run = self._run
        self._sync()
        params = [param for group in self.param_groups for param in group["params"]]
        grads = [param.grad for param in params]
        run.step()  # takes the gradients that it finds in weights
        run.zero_grad()
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        return loss

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
        return {**self._run.state_dict(), _GROUPS: groups}

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
        self._run.load_state_dict({key: value for key, value in state_dict.items() if key != _GROUPS})
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


class GaLoreAdamW(_GaloreOptimizer):
    """galore_torch's AdamW, to rounding: 1e-12 in float64 (``compat="galore"``).

    Args:
        params: Parameters, or param groups. A group with ``rank``, ``update_proj_gap``, ``scale`` and ``proj_type`` (std,
            reverse_std, right, left, full) is projected: matrices [m, n] only.
        lr: Learning rate.
        betas: Decay rates of the moments.
        eps: Added to the root of the uncorrected second moment.
        weight_decay: Decoupled weight decay, after the step.
        correct_bias: Must be True.
        no_deprecation_warning: Without effect: this class is not deprecated.

    Raises:
        SpecError: An argument, or an entry of a param group, is wrong or is not supported.
        ShapeError: A parameter of a group with ``rank`` is no matrix.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        no_deprecation_warning: bool = False,
    ) -> None:
        require(correct_bias is True, "correct_bias", "correct_bias=False is not supported: no base of lingrad has it")
        super().__init__(params, "adamw", {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})


class GaLoreAdamW8bit(_GaloreOptimizer):
    """galore_torch's AdamW with moments in 8 bits, by today's bitsandbytes, of which galore_torch needs an old version.

    Args:
        params: See `GaLoreAdamW`.
        lr: Learning rate.
        betas: Decay rates of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay, after the step.
        amsgrad: Must be False.
        optim_bits: Without effect, as in galore_torch: moments have 8 bits.
        args: Must be None.
        min_8bit_size: Moments with fewer elements stay in float32.
        percentile_clipping: Must be 100; bitsandbytes has it no more.
        block_wise: Must be True; bitsandbytes has no other 8-bit moments any more.
        is_paged: Must be False; ``offload="moments"`` of `lingrad.wrap` keeps moments in host memory.

    Raises:
        SpecError: An argument, or an entry of a param group, is wrong or is not supported.
        ShapeError: A parameter of a group with ``rank`` is no matrix.
        DependencyError: bitsandbytes is not installed.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        is_paged: bool = False,
    ) -> None:
        require_only("amsgrad", amsgrad, False, "bitsandbytes has no 8-bit AMSGrad")
        require_only("args", args, None, "bitsandbytes' own object of options is not read")
        require_only("percentile_clipping", percentile_clipping, 100, "bitsandbytes has removed it; clip with clip_grad_norm_")
        require_only("block_wise", block_wise, True, "bitsandbytes has removed other 8-bit moments")
        require_only("is_paged", is_paged, False, "use lingrad.wrap(..., offload='moments')")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, "adamw8bit", defaults, min_8bit_size=min_8bit_size)


class GaLoreAdafactor(_GaloreOptimizer):
    """galore_torch's Adafactor, to rounding, where its update reads only gradients.

    Args:
        params: See `GaLoreAdamW`.
        lr: Learning rate.
        eps: Added to squared gradients; the second is for ``scale_parameter``, and has no effect.
        clip_threshold: Bound on the root mean square of an update.
        decay_rate: Exponent of the running average's decay.
        beta1: Decay rate of the first moment; None for none.
        weight_decay: Decoupled weight decay.
        scale_parameter: Must be False: the step would depend on the weight, which coordinates do not have.
        relative_step: Must be False: give ``lr``.
        warmup_init: Must be False.

    Raises:
        SpecError: An argument, or an entry of a param group, is wrong or is not supported.
        ShapeError: A parameter of a group with ``rank`` is no matrix.
        DependencyError: transformers is not installed.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
    ) -> None:
        require_only("scale_parameter", scale_parameter, False, "its step depends on the size of the weight; choose lr for it")
        require_only("relative_step", relative_step, False, "give lr, and a scheduler such as lr / sqrt(step)")
        require_only("warmup_init", warmup_init, False, "it belongs to relative_step; use a scheduler")
        require(lr is not None, "lr", "lr is needed, as relative_step=False is; such as lr=1e-3")
        defaults = {"lr": lr, "eps": eps, "clip_threshold": clip_threshold, "decay_rate": decay_rate}
        super().__init__(params, "adafactor", {**defaults, "beta1": beta1, "weight_decay": weight_decay})
