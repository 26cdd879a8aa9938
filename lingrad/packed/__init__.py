"""Linear weights that bitsandbytes holds in 4 or 8 bits; its layers are recognised by their class's name and module."""

from __future__ import annotations

from torch import nn

from lingrad.errors import ModeError
from lingrad.packed.base import MergeLoss as MergeLoss
from lingrad.packed.base import Packed as Packed
from lingrad.packed.layers import EightBit as EightBit
from lingrad.packed.layers import FourBit as FourBit

_CLASSES: dict[str, type[Packed]] = {"Linear4bit": FourBit, "Linear8bitLt": EightBit}


def is_packed(module: nn.Module | None) -> bool:
    """Whether a layer holds a quantised weight, as bitsandbytes' layers for 4 and 8 bits do."""
    return _class_of(module) is not None and not getattr(getattr(module, "weight", None), "has_fp16_weights", False)


def packed_of(module: nn.Module, name: str) -> Packed:
    """The quantised weight of a layer.

    Args:
        module: One for which `is_packed` holds.
        name: The weight's name, for messages.

    Returns:
        The weight.

    Raises:
        ModeError: The layer is not quantised yet.
    """
    found = _class_of(module)
    if found is None:
        raise ModeError(f"{name} belongs to a {type(module).__name__}, which holds no weight in 4 or 8 bits")
    weight = found(module, name)
    weight.scales()
    return weight


def _class_of(module: nn.Module | None) -> type[Packed] | None:
    for cls in type(module).__mro__:
        if cls.__module__.partition(".")[0] == "bitsandbytes" and cls.__name__ in _CLASSES:
            return _CLASSES[cls.__name__]
    return None
