"""How a gradient reaches the coordinates: one file for each route into a model's forward."""

from __future__ import annotations

from collections.abc import Sequence

from lingrad.adapters.base import Attachment as Attachment
from lingrad.adapters.base import Coords as Coords
from lingrad.adapters.base import is_attached as is_attached
from lingrad.adapters.base import refuse_attached as refuse_attached
from lingrad.adapters.batched import PerExample as PerExample
from lingrad.adapters.batched import per_example as per_example
from lingrad.adapters.compiled import Gathering as Gathering
from lingrad.adapters.layer_part import LayerPartAttachment as LayerPartAttachment
from lingrad.adapters.linear import LinearAttachment as LinearAttachment
from lingrad.adapters.packed import PackedAttachment as PackedAttachment
from lingrad.adapters.projected import Projection as Projection
from lingrad.adapters.shared import SharedInput as SharedInput
from lingrad.adapters.weight import WeightAttachment as WeightAttachment
from lingrad.config.cutting import check_target
from lingrad.config.targets import Target
from lingrad.weights.base import Weight
from lingrad.weights.bitsandbytes import packed_of
from lingrad.weights.dense import DenseWeight, Merge
from lingrad.weights.packed import PackedWeight
from lingrad.weights.sharded import ShardedWeight
from lingrad.weights.sharding import LayerSharding, sharding_of


def make_weight(target: Target, model: object, ranks: Sequence[int], merge: Merge = "auto") -> Weight:
    """The weight of a target, as its layer stores it.

    Args:
        target: The weight, its owners and its route.
        model: The model, or what was given in its place.
        ranks: The processes of the run.
        merge: See `DenseWeight`.

    Returns:
        The weight. Raises `ModeError` where it is to be quantised and is not yet, or is sharded and of another kind of layer
        than a linear one.
    """
    if target.route == "packed":
        return packed_of(target.owners[0][0], target.name)
    sharding = sharding_of(target.param, target.name, model, ranks)
    if sharding is None:
        return DenseWeight(target.layout, target.param, target.owners, merge)
    check_target(target)
    return ShardedWeight(target.layout, target.param, target.owners, sharding)


def make_attachment(target: Target, layer: Projection, *, plain: bool = False) -> Attachment:
    """The connection a target takes.

    Args:
        target: The weight, its owners and its route.
        layer: Its subspace, the input that layers on the same basis may share, and what all layers of the run have in common.
        plain: Whether the model's state_dict is to be that of the plain model in adapter mode too.

    Returns:
        The attachment, not attached yet.
    """
    sub = layer.sub
    if isinstance(sub.weight, PackedWeight):
        return PackedAttachment(sub.weight, layer, plain=plain)
    if isinstance(sub.weight.sharding, LayerSharding):
        return LayerPartAttachment(*target.owners[0], layer, plain=plain)
    if target.route == "projected":
        return LinearAttachment(*target.owners[0], layer, plain=plain)
    assert isinstance(sub.weight, DenseWeight)  # noqa: S101 - the other kind is above
    return WeightAttachment(sub, sub.weight, plain=plain)
