"""Maps of several blocks of rows, against the dense matrix of each block's own map."""

import pytest
import torch

from lingrad.gradients.local import DenseGradient, FactoredGradient
from lingrad.maps import BatchedMap, KroneckerMap, SelectionMap, StackedMap, stacked_map
from tests.support.algebra import assert_close, draw
from tests.support.watch import Launches

COUNT, M, N, P, Q = 3, 4, 5, 2, 3


def kronecker(left, right, seed=0):
    sides = [(draw(M, P, seed=seed + 1 + 10 * e), draw(N, Q, seed=seed + 2 + 10 * e)) for e in range(COUNT)]
    return [KroneckerMap(one if left else None, other if right else None) for one, other in sides]


def selections(seed=0):
    return [SelectionMap(torch.tensor([e, 3]), None, (M, N)) for e in range(COUNT)]


KINDS = {
    "left": lambda seed=0: kronecker(True, False, seed),
    "right": lambda seed=0: kronecker(False, True, seed),
    "both": lambda seed=0: kronecker(True, True, seed),
    "identity": lambda seed=0: kronecker(False, False, seed),
    "rows": selections,
}
each_kind = pytest.mark.parametrize("parts", [make() for make in KINDS.values()], ids=KINDS)


def coords_of(parts, seed=5):
    p, q = parts[0].project(torch.zeros(M, N).double()).shape
    return draw(COUNT * p, q, seed=seed)


def lifted(parts, coords):
    return torch.cat([one.lift(z) for one, z in zip(parts, coords.chunk(COUNT), strict=True)])


@each_kind
@pytest.mark.parametrize("factored", [False, True])
def test_the_laws(parts, factored):
    smap, coords = stacked_map(parts), coords_of(parts)
    assert isinstance(smap, StackedMap if isinstance(parts[0], SelectionMap) else BatchedMap)
    expected = lifted(parts, coords)
    dy, x = draw(7, COUNT * M, seed=6), draw(7, N, seed=7)
    matrix = dy.t() @ x
    grad = FactoredGradient(dy, x) if factored else DenseGradient(matrix)
    assert_close(smap.lift(coords), expected)
    assert_close(smap.project(grad), torch.cat([one.project(g) for one, g in zip(parts, matrix.chunk(COUNT), strict=True)]))
    assert_close(smap.T.lift(coords.t()), expected.t())
    assert_close(smap.T.project(grad.T), smap.project(grad).t())
    assert_close(smap.apply(x, coords), x @ expected.t())
    assert_close(smap.core.project(FactoredGradient(smap.T.reduce(dy), smap.reduce(x))), smap.project(grad))
    assert_close(smap.factors(coords).dense(), expected)
    assert smap.factors(coords).rank <= N
    assert_close(smap.norm(coords), expected.norm())
    assert smap.T.T is smap


@each_kind
@pytest.mark.parametrize("block", [2**22, 1, 2 * M * N])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_add_lift_in_place(parts, dtype, block, monkeypatch):
    monkeypatch.setattr("lingrad.maps.stacked.BLOCK", block)
    coords, weight = coords_of(parts), draw(COUNT * M, N, seed=8).to(dtype)
    expected = (weight.double() + lifted(parts, coords)).to(dtype)
    stacked_map(parts).add_lift_(weight, coords)
    # float64 coordinates are summed in float64 and rounded once
    torch.testing.assert_close(weight, expected, rtol=1e-13 if dtype == torch.float64 else 1.2e-7, atol=1e-13)


@each_kind
def test_a_rounded_lift_in_place(parts):
    """As each block's own map adds it, in every dtype; all blocks in one batched product."""
    coords, weight = coords_of(parts), draw(COUNT * M, N, seed=8)
    exact = weight.clone()
    stacked_map(parts).add_rounded_lift_(exact, coords)
    assert_close(exact, weight + lifted(parts, coords))
    for dtype in (torch.bfloat16, torch.float16):
        found, expected = weight.to(dtype), weight.to(dtype)
        with Launches() as launches:
            stacked_map(parts).add_rounded_lift_(found, coords.float())
        for one, rows, z in zip(parts, expected.chunk(COUNT), coords.float().chunk(COUNT), strict=True):
            one.add_rounded_lift_(rows, z)
        # float32 sums of a few terms in another order, which may round to the other neighbour
        torch.testing.assert_close(found, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
        assert launches.names.count("baddbmm_") == isinstance(parts[0], KroneckerMap) * (parts[0].tensors != ())


@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_carried_block_by_block(kind):
    old, new, coords = KINDS[kind](), KINDS[kind](seed=100), coords_of(KINDS[kind]())
    parts = list(zip(new, old, coords.chunk(COUNT), strict=True))
    after, before = stacked_map(new), stacked_map(old)
    assert_close(after.transport(before, coords), torch.cat([a.transport(b, z) for a, b, z in parts]))
    squares = torch.cat([a.transport_squares(b, z.square()) for a, b, z in parts])
    assert_close(after.transport_squares(before, coords.square()), squares)


def test_slices_of_one_tensor_are_not_copied():
    bases = draw(COUNT, N, Q)
    smap = stacked_map([KroneckerMap(None, basis) for basis in bases])
    assert smap.right.data_ptr() == bases.data_ptr()
    assert torch.equal(smap.right, bases)
    for others in (bases.flip(0), bases.mT.contiguous().mT):  # in another order, with other strides
        parts = [KroneckerMap(None, basis) for basis in (others if others.is_contiguous() else reversed(list(others)))]
        assert torch.equal(stacked_map(parts).right, torch.stack([part.right for part in parts]))


@each_kind
def test_residuals_are_those_of_the_blocks(parts):
    matrix = draw(COUNT * M, N, seed=9)
    expected = torch.cat([one.residual(rows) for one, rows in zip(parts, matrix.chunk(COUNT), strict=True)])
    assert_close(stacked_map(parts).residual(matrix), expected)
