"""A gradient held as a matrix, or as the two factors a linear layer has; their laws, against the dense matrix."""

import pytest
import torch

from lingrad.gradients.local import DenseGradient, FactoredGradient, accumulate
from lingrad.maps import KroneckerMap
from tests.support.algebra import COLUMNS, GRADIENTS, INPUT, LEFT, OUT_GRAD, ROWS, M, N, P, Q, assert_close, draw, each_gradient


@each_gradient
def test_gradient_products_match_the_matrix(grad):
    dense, left, right = grad.dense(), draw(M, P, seed=1), draw(N, Q, seed=2)
    assert grad.shape == tuple(dense.shape) == (M, N)
    assert_close(grad.matmul(right), dense @ right)
    assert_close(grad.rmatmul(left), left.t() @ dense)
    assert_close(grad.product(left, right), left.t() @ dense @ right)
    assert_close(grad.T.dense(), dense.t())
    assert_close(grad.norm(), dense.norm())
    assert_close(grad.select(ROWS, COLUMNS).dense(), dense[ROWS][:, COLUMNS])
    assert_close(grad.select(None, COLUMNS).dense(), dense[:, COLUMNS])
    assert_close(grad.select(ROWS, None).dense(), dense[ROWS])
    assert grad.to(torch.float32).dtype == grad.to(torch.float32).dense().dtype == torch.float32
    assert grad.nbytes == 8 * (M * N if isinstance(grad, DenseGradient) else grad.input.shape[0] * (M + N))


@pytest.mark.parametrize("first", GRADIENTS)
@pytest.mark.parametrize("second", GRADIENTS)
def test_accumulate_is_a_sum_that_keeps_the_smaller_form(first, second):
    def fresh(name):
        grad = GRADIENTS[name]
        return DenseGradient(grad.dense().clone()) if isinstance(grad, DenseGradient) else grad

    total = accumulate(accumulate(None, fresh(first)), fresh(second))
    assert_close(total.dense(), GRADIENTS[first].dense() + GRADIENTS[second].dense())
    # two tokens of a 7 x 5 weight are 24 numbers, the matrix is 35, four tokens would be 48
    assert isinstance(total, DenseGradient)
    assert isinstance(accumulate(None, fresh("few tokens")), FactoredGradient)
    one = FactoredGradient(OUT_GRAD[:1], INPUT[:1])
    assert isinstance(accumulate(one, one), FactoredGradient)


def test_the_first_micro_batch_is_held_dense_where_that_is_smaller():
    assert isinstance(accumulate(None, GRADIENTS["factored"]), DenseGradient)


def test_factored_norm_of_a_vanishing_gradient_is_zero():
    grad = FactoredGradient(torch.zeros(1, M), torch.ones(1, N))
    assert grad.norm() == 0


def test_factored_norm_where_rounding_leaves_a_negative_sum():
    """Three tokens whose gradients cancel: the Gram products sum to a rounding error of either sign."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        a, b = torch.randn(2, 40, generator=generator)
        x = torch.randn(1, 50, generator=generator).expand(3, -1)
        norm = FactoredGradient(torch.stack((a, b, -(a + b))), x).norm()
        assert norm <= 1e-2 * a.norm() * x[0].norm()  # NaN fails too


def test_low_precision_gradients_multiply_in_their_own_dtype():
    grad = FactoredGradient(OUT_GRAD.bfloat16(), INPUT.bfloat16())
    assert KroneckerMap(LEFT.float(), None).project(grad).dtype == torch.bfloat16
    assert grad.norm().dtype == torch.float32
