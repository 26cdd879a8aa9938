"""Small maps' factors and gradients in float64, drawn from seeds."""

import pytest
import torch

from lingrad.gradients.local import DenseGradient, FactoredGradient

M, N, P, Q, TOKENS = 7, 5, 3, 2, 11


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LEFT, RIGHT = draw(M, P, seed=1), draw(N, Q, seed=2)
ROWS, COLUMNS = torch.tensor([0, 3, 6]), torch.tensor([1, 4])
OUT_GRAD, INPUT = draw(TOKENS, M, seed=3), draw(TOKENS, N, seed=4)
GRADIENTS = {
    "dense": DenseGradient(OUT_GRAD.t() @ INPUT),
    "factored": FactoredGradient(OUT_GRAD, INPUT),
    "few tokens": FactoredGradient(OUT_GRAD[:2], INPUT[:2]),
}


each_gradient = pytest.mark.parametrize("grad", GRADIENTS.values(), ids=GRADIENTS.keys())


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
