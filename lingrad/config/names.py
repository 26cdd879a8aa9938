"""A model's parameters: their names in the plain model, whatever is wrapped around its layers; that they have elements."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from lingrad.errors import ModeError, ShapeError

# what torch.compile, checkpoint_wrapper and FullyShardedDataParallel put into names
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


class HeldParameter(NamedTuple):
    """A parameter and one module that holds it.

    Args:
        name: Its name in the plain model, from which seeds are derived and by which checkpoints know it.
        param: The parameter.
        module: The module.
        attribute: Its name there.
    """

    name: str
    param: nn.Parameter
    module: nn.Module
    attribute: str


def held_parameters(model: nn.Module) -> Iterator[HeldParameter]:
    """Every parameter of a model, once for each module that holds it.

    Args:
        model: The model.

    Yields:
        The parameters, in the model's order.
    """
    for path, module in model.named_modules():
        for attribute, param in module._parameters.items():
            if param is not None:
                name = f"{path}.{attribute}" if path else attribute
                yield HeldParameter(plain(name), param, module, attribute)


def plain(name: str) -> str:
    """A parameter's name without the parts that torch's wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def require_elements(name: str, param: Tensor) -> None:
    """Make sure that a parameter has its shape and its elements.

    Args:
        name: Its name.
        param: The parameter.

    Raises:
        ShapeError: It gets them in the first forward.
        ModeError: DeepSpeed has taken them away (ZeRO-3).
    """
    if isinstance(param, nn.parameter.UninitializedParameter):
        raise ShapeError(
            f"{name} has no shape yet: a lazy layer takes it from its first input. Call the model once, and lingrad then"
        )
    if hasattr(param, "ds_id"):
        raise ModeError(
            f"{name} {tuple(getattr(param, 'ds_shape', param.shape))} was cut into flat vectors by DeepSpeed (ZeRO-3, "
            "zero.Init), in which there are no subspaces; build the model without DeepSpeed, and shard it by "
            "torch.distributed.fsdp.fully_shard (FSDP2), then call lingrad"
        )


def parameter_at(model: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter that a model holds under a name.

    Args:
        model: The model.
        name: The name, as `held_parameters` gives it.

    Returns:
        The parameter; None where there is no such layer, or it computes the tensor.
    """
    *path, attribute = name.split(".")
    module = _unwrapped(model)
    for part in path:
        found = module._modules.get(part)
        if found is None:
            return None
        module = _unwrapped(found)
    return module._parameters.get(attribute)


def _unwrapped(module: nn.Module) -> nn.Module:
    for wrapper in _WRAPPERS:
        module = module._modules.get(wrapper) or module
    return module
