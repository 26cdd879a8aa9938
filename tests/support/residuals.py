"""What a residual is, from plain autograd and from S as a dense matrix."""

import torch

from tests.support.models import zoo, zoo_batches, zoo_loss


def nearest(smap, coords, matrix):
    """The coordinates, in the shape of some, whose lift is nearest to a matrix, by least squares on S as a matrix."""
    p, q = coords.shape
    units = torch.eye(p * q, dtype=torch.float64).view(p * q, p, q)
    columns = torch.stack([smap.lift(unit).flatten() for unit in units], dim=1)
    return torch.linalg.lstsq(columns, matrix.flatten()[:, None]).solution.view(p, q)


def gradients():
    """Those of the zoo's first step, by plain autograd."""
    model = zoo()
    for batch in zoo_batches(1, micro=2)[0]:
        (zoo_loss(model, batch) / 2).backward()
    return {name: param.grad for name, param in model.named_parameters()}
