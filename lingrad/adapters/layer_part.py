"""Linear layers of which each process computes a part (tensor parallelism: ``ColwiseParallel``, ``RowwiseParallel``).

A layer that is cut by rows takes the whole input and gives some of the outputs; one that is cut by columns takes some of the
inputs and gives a summand of the output. Torch's hooks on the layer bring the input and fetch the output; what is in between is
the layer of one process, with this process's part of the weight and of the coordinates.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor
from typing_extensions import override

from lingrad.adapters.functions import applied, run
from lingrad.adapters.linear import LinearAttachment
from lingrad.adapters.projected import Projected, Way
from lingrad.config.settings import Mode
from lingrad.errors import ModeError
from lingrad.tensors import is_sharded, own


@final
class LayerPartAttachment(LinearAttachment):
    """A linear layer whose weight is cut over processes that see the same batch; arguments as for `LinearAttachment`."""

    @override
    def require(self, mode: Mode) -> None:
        super().require(mode)
        if "forward" in vars(self.module) and self.overridden:
            raise ModeError(
                f"another program has replaced the forward of the layer of {self.sub.name}, which tensor parallelism has cut; "
                "what it gives cannot be tied to a part of the coordinates. Leave the weight out by a rule: 'none'"
            )

    @override
    def _tied(self, *args: Any, **kwargs: Any) -> Tensor:
        weight, coords = self._held(), self.sub.coords
        active = not self.sub.released
        if not active and not (torch.is_grad_enabled() and coords.requires_grad and weight.requires_grad):
            return self._previous(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        return self._project(x, weight.detach(), "apply" if active else None, True)

    @override
    def _project(self, x: Any, weight: Tensor, way: Way, trains: bool) -> Tensor:
        from torch.distributed.tensor import DTensor, Partial, Shard

        sharding, last = self.layer.sharding, x.dim() - 1
        assert sharding is not None  # noqa: S101 - see make_attachment
        by_rows = sharding.dim == 0
        placements = x.placements if is_sharded(x) and x.device_mesh == sharding.mesh else ()
        if not placements or not all(p.is_replicate() if by_rows else p.is_shard(last) for p in placements):
            raise ModeError(
                f"the layer of {self.sub.name} is cut by {'rows' if by_rows else 'columns'}, and its input is "
                f"{placements or 'a plain tensor'}; expected one that "
                f"{'every process has' if by_rows else 'is cut along its last dimension'}, as the hooks of "
                f"{'ColwiseParallel' if by_rows else 'RowwiseParallel'} give it. Apply these styles by parallelize_module"
            )
        # by rows, each process has the gradient that its own outputs give to the input: torch's hook adds them up
        part = x.to_local(grad_placements=[Partial()] if by_rows else None)
        bias: Any = self.module._parameters.get("bias")
        if bias is not None:
            bias = bias.to_local() if by_rows else applied(_Once, bias.to_local(), sharding.mesh.get_local_rank() == 0)
        out: Tensor = run(Projected, part, bias, self.sub.coords, own(weight), self.layer, way, trains, *self.layer.leaves())
        shape = torch.Size((*out.shape[:-1], weight.shape[0]))  # of parts that need not be equal
        stride = torch.empty(shape, device="meta").stride()
        placement = Shard(last) if by_rows else Partial()
        return DTensor.from_local(out, sharding.mesh, [placement], run_check=False, shape=shape, stride=stride)


class _Once(torch.autograd.Function):
    """A bias of which every process has all, for one of them to add to its summand; each has all of its gradient."""

    @staticmethod
    @override
    def forward(ctx: Any, bias: Tensor, adds: bool) -> Tensor:
        return bias.detach() if adds else torch.zeros_like(bias)

    @staticmethod
    @override
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
