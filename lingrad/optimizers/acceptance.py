"""Whether a base optimizer can step the parameters that it is given, found when a run is made and not in its first step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

from lingrad.errors import SpecError, require
from lingrad.optimizers.base import Base


def check_accepts(base: Base, named: Iterable[tuple[str, Tensor]]) -> None:
    """Build a base on one parameter of each kind, and have it step a small one like it.

    Args:
        base: The base.
        named: The parameters that it is to step, with their names.

    Raises:
        SpecError: It refuses one of them.
    """
    tried = set()
    for name, param in named:
        kind = (param.dim(), param.dtype, param.device)
        if kind in tried:
            continue
        tried.add(kind)
        _require_capturable(base, name, param)
        small = torch.zeros([min(size, 8) for size in param.shape], dtype=param.dtype, device=param.device)
        try:
            base.build([param])
            base.state_of(small)
        except (SpecError, TypeError, ValueError, IndexError, AssertionError, RuntimeError) as error:
            why = error.__cause__ or error
            raise SpecError(
                f"base '{base.name}' cannot step {name} {list(param.shape)}: {why or type(why).__name__}. It steps all that "
                "trains, also what no rule transforms: freeze that, or choose a base that can ('muon' by its name leaves to "
                "adamw what is no matrix)"
            ) from error


def _require_capturable(base: Base, name: str, param: Tensor) -> None:
    devices = torch_optimizer._get_capturable_supported_devices()
    require(
        not base.options.get("capturable") or param.device.type in (*devices, "meta"),
        "capturable",
        f"capturable=True is for CUDA graphs, and {name} is on the device '{param.device}'; leave it out, or move the model "
        "before lingrad is called",
    )
