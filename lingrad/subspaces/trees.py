"""A transform's state as a tree: NamedTuples and dicts whose leaves are tensors, numbers and None."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lingrad.errors import CheckpointError, shown
from lingrad.tensors import on_host, to_device, to_host


def flatten(value: Any, key: str = "") -> dict[str, Any]:
    """The leaves by dotted names.

    Args:
        value: A state.
        key: The name of its root.

    Returns:
        Name -> tensor or plain value; None leaves are left out.
    """
    if value is None:
        return {}
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {k: v for name, item in value.items() for k, v in flatten(item, f"{key}.{name}").items()}
    return {key: value}


def restore(like: Any, flat: Mapping[str, Any], key: str, owner: str) -> Any:
    """The value that `flatten` named ``key``.

    Args:
        like: A state of the same kind.
        flat: Leaves by name.
        key: The name of its root.
        owner: Whose state it is, for messages.

    Returns:
        A state that shares no memory with ``flat``, on the devices of ``like``.

    Raises:
        CheckpointError: A leaf is missing, or of another type, dtype or shape.
    """
    if like is None:
        return None
    if hasattr(like, "_asdict"):
        found = type(like)(*(restore(item, flat, f"{key}.{field}", owner) for field, item in like._asdict().items()))
        for field in getattr(like, "fixed", ()):
            was, now = getattr(found, field), getattr(like, field)
            if was != now:
                raise CheckpointError(f"'{key}.{field}' of {owner} is {shown(was)} in the checkpoint, and {now} in this run")
        return found
    if isinstance(like, Mapping):
        return {name: restore(item, flat, f"{key}.{name}", owner) for name, item in like.items()}
    found = checked(like, flat, key, owner)
    return laid_out(found, like) if isinstance(like, Tensor) else found


def placed(entries: Mapping[str, Any], template: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A base's entries for one parameter on the devices where it keeps them.

    Args:
        entries: The entries, on any device.
        template: What the base keeps of such a parameter.
        device: The parameter's, for entries that ``template`` does not have.

    Returns:
        Copies.
    """
    found = {}
    for key, value in entries.items():
        like = template.get(key)
        both = isinstance(value, Tensor) and isinstance(like, Tensor)
        found[key] = laid_out(value, like) if both else copied(value, device)  # type: ignore[arg-type]
    return found


def checked(like: Any, flat: Mapping[str, Any], key: str, owner: str) -> Any:
    """One leaf by name.

    Args:
        like: What the run has in its place.
        flat: Leaves by name.
        key: The name.
        owner: Whose it is, for messages.

    Returns:
        The leaf itself.

    Raises:
        CheckpointError: It is missing, or of another type, dtype or shape.
    """
    if key not in flat:
        raise CheckpointError(f"the checkpoint has no '{key}' for {owner}")
    found = flat[key]
    if _kind(found) != _kind(like):
        raise CheckpointError(f"'{key}' of {owner} is {_kind(found)} in the checkpoint, and {_kind(like)} in this run")
    if isinstance(found, Tensor):
        require_values(found, f"'{key}' of {owner}")
    return found


def require_values(value: Tensor, what: str) -> None:
    """Make sure that a tensor of a checkpoint holds its elements, one beside the other.

    Args:
        value: The tensor.
        what: Its name, for messages.

    Raises:
        CheckpointError: It is on the meta device, sparse, or an expanded view: few bytes that would ask for all memory.
    """
    if value.is_meta or value.layout != torch.strided or value.is_quantized:
        found = "on the meta device, without values" if value.is_meta else f"not a dense tensor ({value.layout})"
        raise CheckpointError(f"{what} is {found} in the checkpoint; save dense tensors")
    held = value.untyped_storage().nbytes()
    if value.numel() * value.element_size() > held:
        raise CheckpointError(f"{what} has {value.numel()} elements in {held} bytes of the checkpoint; save it contiguous")


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def moved(value: Any, device: torch.device) -> Any:
    """The state with its tensors on a device, in the dtypes they have."""
    return mapped(value, lambda tensor: tensor.to(device))


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The state with what a function makes of each of its tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: mapped(item, change) for key, item in value.items()}
    return type(value)(*(mapped(item, change) for item in value)) if hasattr(value, "_asdict") else value


def stowed(value: Any, device: torch.device | None) -> Any:
    """The state in host memory.

    Args:
        value: A state.
        device: The device that uses it; None leaves the state as it is.

    Returns:
        The state; tensors without elements, which stand for a device, stay where they are.
    """
    if device is None:
        return value
    return mapped(value, lambda one: to_host(one, device=device) if one.numel() and not on_host(one) else one)


def fetched(value: Any, device: torch.device | None) -> Any:
    """What `stowed` gave, copied to the device; None for the device leaves it as it is."""
    return value if device is None else mapped(value, lambda one: to_device(one, device) if on_host(one) else one)


def tensors(value: Any) -> list[Tensor]:
    """The tensors among the leaves."""
    return [leaf for leaf in flatten(value).values() if isinstance(leaf, Tensor)]


def laid_out(value: Tensor, like: Tensor) -> Tensor:
    """A copy with the device and, of the same shape, the strides of another tensor: fused kernels read memory, not elements."""
    made: Tensor
    if value.shape != like.shape:
        made = copied(value, like.device)
        return made
    made = torch.empty_like(like, dtype=value.dtype, requires_grad=False)
    made.copy_(value.detach())
    return made


def copied(value: Any, device: torch.device | None = None) -> Any:
    """A leaf, a tensor in memory of its own."""
    return value.detach().clone().to(device or value.device) if isinstance(value, Tensor) else value
