"""What a refresh reads, of one weight or of several that share a basis: weights, gradients and sketches, stacked."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lingrad.engine.run import Run
from lingrad.errors import ModeError
from lingrad.gradients import DenseGradient, FactoredGradient, Gradient
from lingrad.gradients.stacked import StackedGradient
from lingrad.parallel import Processes
from lingrad.subspaces.basis import Basis
from lingrad.subspaces.subspace import Subspace
from lingrad.tensors import whole
from lingrad.transforms import Probe, Sketch

WEIGHT_NOT_FINITE = "the weight is not finite, and no basis can be chosen from it; the old basis stays"


def weights(run: Run, basis: Basis) -> Gradient | None:
    """The weights of the forward that use a basis, one under the other.

    Args:
        run: The run.
        basis: The basis.

    Returns:
        [sum of m_i, n]; None, with a warning, if one is not finite.

    Raises:
        ModeError: They have no values yet.
    """
    subs = [attachment.sub for attachment in run.of(basis)]
    seen = stacked([DenseGradient(sub.weight.layout.matrix(whole(sub.effective()))) for sub in subs])
    try:
        finite = bool(seen.norm().isfinite())
    except RuntimeError as error:
        raise ModeError(
            f"the basis of {basis.name} is chosen from the weight's values, which cannot be read on the {seen.device.type} "
            f"device ({error}); load the model before the run is made (lingrad.memory.simulate takes it without values)"
        ) from error
    if not finite:
        basis.warn_once(WEIGHT_NOT_FINITE)
    return seen if finite else None


def gathered(subs: Sequence[Subspace], probes: Sequence[Probe], processes: Processes) -> Sketch | None:
    """The products of the stacked gradient, from what each weight's backwards recorded; the mean over processes.

    Args:
        subs: The subspaces that use one basis.
        probes: What was asked.
        processes: Those of the run.

    Returns:
        The products; None where nothing was recorded.
    """
    found = [sub.pending.total if isinstance(sub.pending.total, tuple) else None for sub in subs]
    known = next((total for total in found if total is not None), None)
    if known is None:
        return None
    products = []
    for i, (left, _) in enumerate(probes):
        if left is not None:
            terms = [total[i] for total in found if total is not None]
            products.append(processes.reduce(terms[0] if len(terms) == 1 else torch.stack(terms).sum(0)))
            continue
        rows = [
            known[i].new_zeros(sub.weight.layout.shape[0], known[i].shape[1]) if total is None else total[i]
            for sub, total in zip(subs, found, strict=True)
        ]
        products.append(processes.reduce(rows[0] if len(rows) == 1 else torch.cat(rows)))
    return tuple(products)


def stacked(parts: Sequence[Gradient]) -> Gradient:
    """Gradients [m_i, n] one under the other; of one, that itself."""
    return parts[0] if len(parts) == 1 else StackedGradient(parts)


def nothing(sub: Subspace, template: Gradient | None) -> FactoredGradient:
    """A gradient of no tokens, which is zero."""
    m, n = sub.weight.layout.shape
    dtype = sub.coords.dtype if template is None else template.dtype
    return FactoredGradient(sub.coords.new_empty(0, m, dtype=dtype), sub.coords.new_empty(0, n, dtype=dtype))
