"""The merges of a step of optimizer mode, for all weights together."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lingrad.subspaces.subspace import Subspace
from lingrad.subspaces.watched import release, views
from lingrad.tensors import storage
from lingrad.weights.dense import DenseWeight


def merge_all(subs: Sequence[Subspace], flats: Sequence[Tensor]) -> None:
    """``W += S z`` for every weight, then ``z = 0``, without memory.

    Args:
        subs: The subspaces, whose coordinates were stepped.
        flats: What `lingrad.subspaces.watched.allocate` gave for their coordinates; rounded as a whole where all weights round
            theirs to one dtype.
    """
    rounded: dict[int, Tensor] = {}
    dtypes = {sub.weight.merges_in for sub in subs if isinstance(sub.weight, DenseWeight)}
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    for flat in flats if dtype is not None else ():
        members = [sub for sub in subs if storage(sub.coords) == storage(flat)]
        found = views(flat.to(dtype), [sub.coords for sub in members])
        rounded.update((id(sub), view) for sub, view in zip(members, found, strict=True))
    done = []
    try:
        for sub in subs:
            sub.add(rounded.get(id(sub), sub.coords))
            done.append(sub.coords)
    finally:
        release(done)  # what was not merged still is to be
