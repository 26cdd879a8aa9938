"""A part of a map is the map to some rows: ``part(rows, z)`` lifts to ``lift(z)[rows]``, for whoever holds only these rows."""

import pytest
import torch

from lingrad.config import spec
from lingrad.errors import ModeError
from tests.support.cases import SPECS

pytestmark = [pytest.mark.thinned(4), pytest.mark.rare(4)]

SHAPES = [(7, 5), (5, 7), (6, 6)]


def drawn(text, shape):
    transform = spec.parse(text.replace("rank=4", "rank=3"))
    torch.manual_seed(0)
    state = transform.init(shape, seed=1, device=torch.device("cpu"), dtype=torch.float64)
    return transform.map(state), torch.randn(transform.coords_shape(shape), dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("text", SPECS)
def test_it_lifts_to_the_rows(text, shape):
    current, coords = drawn(text, shape)
    whole = current.lift(coords)
    for rows in (slice(0, 0), slice(0, 2), slice(2, 5), slice(0, shape[0])):
        part, taken = current.part(rows, coords[rows] if current.aligned else coords)
        # a product of fewer rows may be summed in another order: a rounding of its terms, which are of size one
        torch.testing.assert_close(part.lift(taken), whole[rows], rtol=1e-14, atol=1e-14)
        weight = torch.zeros(rows.stop - rows.start, shape[1], dtype=torch.float64)
        part.add_lift_(weight, taken)
        torch.testing.assert_close(weight, whole[rows], rtol=1e-14, atol=1e-14)


def test_a_map_of_blocks_has_none():
    current, coords = drawn("experts(each=svd(rank=4), count=2)", (8, 6))
    with pytest.raises(ModeError, match="a BatchedMap cannot be cut by rows"):
        current.part(slice(0, 2), coords)
