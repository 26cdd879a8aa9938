"""How a subspace is attached to a model: one file for each way a coordinate gradient is born."""

from __future__ import annotations

from lingrad.adapters.base import Attachment as Attachment
from lingrad.adapters.base import Mode as Mode
from lingrad.adapters.base import refuse_attached as refuse_attached
from lingrad.adapters.linear import LinearAttachment as LinearAttachment
from lingrad.adapters.quantized import QuantizedAttachment as QuantizedAttachment
from lingrad.adapters.weight import WeightAttachment as WeightAttachment
from lingrad.config.targets import Target
from lingrad.subspaces.subspace import Subspace


def make_attachment(target: Target, sub: Subspace, *, plain: bool = False, keep_remainder: bool = False) -> Attachment:
    """The connection a target takes.

    Args:
        target: The weight, its owners and its road.
        sub: Its subspace.
        plain: Whether the model's state_dict is to be that of the plain model in adapter mode too.
        keep_remainder: Whether what a merge into a quantised weight loses is kept in coordinates, as far as it can be.

    Returns:
        The attachment, not attached yet.
    """
    if target.road == "quantized":
        return QuantizedAttachment(sub, *target.owners[0], plain=plain, keep_remainder=keep_remainder)
    if target.road == "projected":
        return LinearAttachment(sub, *target.owners[0], plain=plain)
    return WeightAttachment(sub, target.param, target.owners, plain=plain)
