"""Two one-sided transforms as one."""

import torch

from lingrad.config import spec
from lingrad.gradients import DenseGradient
from lingrad.transforms import When


def test_a_first_refresh_that_comes_late_is_of_both_sides():
    """The weight had no gradient in step 0; neither side is due by its own schedule in step 1."""
    kron, shape = spec.parse("kron(left=svd(rank=2, every=5), right=svd(rank=3, every=7))"), (6, 8)
    start = kron.init(shape, seed=0, device=torch.device("cpu"), dtype=torch.float64)
    grad = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    first = kron.refresh(start, DenseGradient(grad), When(1, 0, 0, shape))
    u, _, vh = torch.linalg.svd(grad)
    for basis, expected in ((first.left.left, u[:, :2]), (first.right.right, vh[:3].t())):
        torch.testing.assert_close(basis @ basis.t(), expected @ expected.t(), rtol=1e-12, atol=1e-12)
    again = kron.refresh(first, DenseGradient(torch.flip(grad, (0, 1))), When(6, 1, 0, shape))
    assert torch.equal(again.left.left, first.left.left)
    assert torch.equal(again.right.right, first.right.right)
