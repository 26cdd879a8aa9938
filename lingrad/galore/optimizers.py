"""galore_torch's optimizers under their own names: a script that uses them changes its import line.

    from lingrad.galore import GaLoreAdamW, GaLoreAdamW8bit, GaLoreAdafactor

They take the param groups and arguments of galore_torch 1.0 (Zhao et al., ICML 2024, arXiv 2403.03507) and make its steps. As
there, the gradient of a weight stays in ``weight.grad`` until `step`, where other code may clip or scale it. `lingrad.wrap`
projects it inside the backward and never forms it: less memory, the same steps, for a script that changes one line more.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lingrad.errors import require
from lingrad.galore.base import GaloreOptimizer
from lingrad.galore.groups import require_only


class GaLoreAdamW(GaloreOptimizer):
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


class GaLoreAdamW8bit(GaloreOptimizer):
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


class GaLoreAdafactor(GaloreOptimizer):
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
