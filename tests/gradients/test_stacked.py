"""Gradients of several weights as one, and of one of several fused, against the dense matrix."""

import pytest
import torch

from lingrad.gradients.local import DenseGradient, FactoredGradient, RowsGradient, accumulate
from lingrad.gradients.stacked import StackedGradient


class TestOfSeveralWeights:
    def draw(self, *shape, seed):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    @pytest.fixture(params=["stacked", "rows"])
    def pair(self, request):
        """The gradient, the matrix, and the elements that it and its transpose keep."""
        out, x = self.draw(6, 7, seed=0), self.draw(6, 5, seed=1)
        if request.param == "stacked":
            parts = [FactoredGradient(out[:, :3], x), DenseGradient(out[:, 3:].t() @ x)]
            return StackedGradient(parts), out.t() @ x, 6 * (3 + 5) + 4 * 5
        dense = torch.zeros(7, 5, dtype=torch.float64)
        dense[2:5] = out[:, 2:5].t() @ x
        return RowsGradient(FactoredGradient(out[:, 2:5], x), 2, 7), dense, 6 * (3 + 5)

    def test_its_laws(self, pair):
        grad, dense, kept = pair
        left, right = self.draw(7, 2, seed=2), self.draw(5, 3, seed=3)
        for one, other in ((grad, dense), (grad.T, dense.t())):
            p, q = (left, right) if one is grad else (right, left)
            assert one.shape == other.shape
            for a, b in ((p, q), (p, None), (None, q), (None, None)):
                expected = other if a is None else a.t() @ other
                expected = expected if b is None else expected @ b
                torch.testing.assert_close(one.product(a, b), expected, rtol=1e-13, atol=1e-13)
            torch.testing.assert_close(one.dense(), other, rtol=1e-13, atol=1e-13)
            torch.testing.assert_close(one.norm(), other.norm(), rtol=1e-13, atol=0)
            rows, columns = torch.tensor([0, 4]), torch.tensor([1])
            for r, c in ((rows, columns), (None, columns), (rows, None), (None, None)):
                expected = other if r is None else other[r]
                expected = expected if c is None else expected[:, c]
                torch.testing.assert_close(one.select(r, c).dense(), expected, rtol=1e-13, atol=1e-13)
            assert one.to(torch.float32).dtype == torch.float32
            assert one.dtype == torch.float64
            assert one.device == dense.device
            assert one.nbytes == 8 * kept
        torch.testing.assert_close(grad.T.T.dense(), dense, rtol=1e-13, atol=1e-13)

    def test_is_added_to_others(self, pair):
        grad, dense, _ = pair
        other = self.draw(7, 5, seed=4)
        for first, second in ((grad, DenseGradient(other.clone())), (DenseGradient(other.clone()), grad)):
            found = accumulate(accumulate(None, first), second)
            torch.testing.assert_close(found.dense(), dense + other, rtol=1e-13, atol=1e-13)
