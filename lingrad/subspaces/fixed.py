"""A basis that is chosen once, from the weight or from a seed, and stays: what several coordinates of one weight share."""

from __future__ import annotations

import torch

from lingrad.errors import ModeError, SpecError
from lingrad.gradients import DenseGradient
from lingrad.subspaces.basis import Basis
from lingrad.transforms import Transform
from lingrad.transforms.linalg import derive_seed
from lingrad.weights.dense import DenseWeight


@torch.no_grad()
def fixed_basis(name: str, transform: Transform, weight: DenseWeight, seed: int) -> Basis:
    """The basis that a run of the same seed begins with.

    Args:
        name: The parameter's name.
        transform: How the map is chosen.
        weight: W [m, n].
        seed: The seed of the run; the basis derives its own from it and the name.

    Returns:
        The basis, in the weight's dtype, not to be refreshed.

    Raises:
        SpecError: The transform reads a gradient, of which there is none yet, or refreshes its basis later.
        ModeError: The basis is chosen from the weight, and that is not finite.
    """
    if not transform.before_step:
        raise SpecError(
            f"{transform.name} chooses the basis of {name} from a gradient, and a basis that several adapters share is chosen "
            "before there is any, since each has gradients of its own; take random(rank=..., every=0) or weight(rank=...)"
        )
    if transform.period:
        raise SpecError(
            f"{transform.name} changes the basis of {name} every {transform.period} steps, and one that several adapters share "
            "must stay as it is; write every=0"
        )
    basis = Basis(name, transform, weight.layout.shape, seed=derive_seed(seed, name), run_seed=seed, like=weight.param)
    if basis.schedule(0).redraw:
        seen = DenseGradient(weight.layout.matrix(weight.dense())) if transform.reads == "weight" else None
        if seen is not None and not bool(seen.norm().isfinite()):
            raise ModeError(
                f"{name} has values that are not finite, and {transform.name} chooses its basis from them; load the model first"
            )
        state = transform.refresh(basis.state, seen, basis.when)
        basis.propose(state, transform.map(state))
        basis.commit()
    return basis
