"""The laws of `LinearMap`, each against a dense oracle in float64."""

import copy
import dataclasses

import pytest
import torch

from lingrad.errors import DualityError
from lingrad.gradients.local import FactoredGradient
from lingrad.maps import KroneckerMap, SelectionMap, TwoSidedMap, two_sided
from tests.support.algebra import (
    COLUMNS,
    INPUT,
    LEFT,
    OUT_GRAD,
    RIGHT,
    ROWS,
    TOKENS,
    M,
    N,
    P,
    Q,
    assert_close,
    draw,
    each_gradient,
)
from tests.support.watch import Launches, NoTensorOfShape, NoWaiting

MAPS = {
    "identity": KroneckerMap(None, None),
    "left": KroneckerMap(LEFT, None),
    "right": KroneckerMap(None, RIGHT),
    "both": KroneckerMap(LEFT, RIGHT),
    "rows": SelectionMap(ROWS, None, (M, N)),
    "columns": SelectionMap(None, COLUMNS, (M, N)),
    "entries": SelectionMap(ROWS, COLUMNS, (M, N)),
    "rows x right": two_sided(SelectionMap(ROWS, None, (M, N)), KroneckerMap(None, RIGHT)),
    "left x columns": two_sided(KroneckerMap(LEFT, None), SelectionMap(None, COLUMNS, (M, N))),
    "left x right": two_sided(KroneckerMap(LEFT, None), KroneckerMap(None, RIGHT)),
    "rows x columns": two_sided(SelectionMap(ROWS, None, (M, N)), SelectionMap(None, COLUMNS, (M, N))),
}

each_map = pytest.mark.parametrize("smap", MAPS.values(), ids=MAPS.keys())


def coords_shape(smap):
    return tuple(smap.project(torch.zeros(M, N, dtype=torch.float64)).shape)


def matrix_of(smap):
    """S as a matrix [m n, p q], column by column."""
    p, q = coords_shape(smap)
    units = torch.eye(p * q, dtype=torch.float64).view(p * q, p, q)
    return torch.stack([smap.lift(unit).flatten() for unit in units], dim=1)


@each_map
@each_gradient
def test_project_is_the_adjoint_of_lift(smap, grad):
    assert_close(smap.project(grad).flatten(), matrix_of(smap).t() @ grad.dense().flatten())


@each_map
def test_lift_is_linear_and_its_autograd_is_project(smap):
    coords = draw(*coords_shape(smap), seed=5).requires_grad_()
    weights = draw(M, N, seed=6)
    assert_close(smap.lift(coords).flatten(), matrix_of(smap) @ coords.flatten())
    (smap.lift(coords) * weights).sum().backward()
    assert_close(coords.grad, smap.project(weights))


@each_map
def test_apply_acts_as_the_lifted_weight(smap):
    x, coords = draw(2, 4, N, seed=7), draw(*coords_shape(smap), seed=5)
    assert_close(smap.apply(x, coords), x @ smap.lift(coords).t())


@each_map
def test_expand_takes_products_with_coordinates_to_the_output(smap):
    x, coords, out_grad = draw(2, 4, N, seed=7), draw(*coords_shape(smap), seed=5), draw(2, 4, M, seed=8)
    product = smap.reduce(x) @ coords.t()
    assert_close(smap.expand(product), x @ smap.lift(coords).t())
    assert_close((smap.expand(product) * out_grad).sum(), (product * smap.reduce_grad(out_grad)).sum())


@each_map
def test_transpose(smap):
    coords = draw(*coords_shape(smap), seed=5)
    assert_close(smap.T.lift(coords.t()), smap.lift(coords).t())
    grad = OUT_GRAD.t() @ INPUT
    assert_close(smap.T.project(grad.t()), smap.project(grad).t())


@each_map
def test_reduced_inputs_are_enough(smap):
    x, coords = draw(TOKENS, N, seed=7), draw(*coords_shape(smap), seed=5)
    reduced = smap.reduce(x)
    assert_close(smap.inner.apply(reduced, coords), smap.apply(x, coords))
    assert_close(smap.inner.project(FactoredGradient(OUT_GRAD, reduced)), smap.project(FactoredGradient(OUT_GRAD, x)))


@each_map
@pytest.mark.parametrize("block", [2**22, 1, 3 * N])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_add_lift_in_place(smap, dtype, block, monkeypatch):
    monkeypatch.setattr("lingrad.maps.kronecker.BLOCK", block)
    coords = draw(*coords_shape(smap), seed=5)
    weight = draw(M, N, seed=8).to(dtype)
    expected = (weight.double() + smap.lift(coords)).to(dtype)
    pointer = weight.data_ptr()
    smap.add_lift_(weight, coords)
    assert weight.data_ptr() == pointer
    # float64 coordinates are summed in float64 and rounded once
    torch.testing.assert_close(weight, expected, rtol=1e-13 if dtype == torch.float64 else 1.2e-7, atol=1e-13)


@each_map
def test_a_rounded_lift_in_place(smap):
    """In float64 nothing is rounded. In 16 bits z, two bases and P z are, each by a share u of itself, and then the sum."""
    coords, weight = draw(*coords_shape(smap), seed=5), draw(M, N, seed=8)
    exact = weight.clone()
    smap.add_rounded_lift_(exact, coords)
    assert_close(exact, weight + smap.lift(coords))
    sizes = (matrix_of(smap).abs() @ coords.flatten().abs()).view(M, N)
    for dtype in (torch.bfloat16, torch.float16):
        rounded, u = weight.to(dtype), torch.finfo(dtype).eps / 2
        expected = rounded.double() + smap.lift(coords)
        pointer = rounded.data_ptr()
        smap.add_rounded_lift_(rounded, coords.float())
        assert rounded.data_ptr() == pointer
        assert torch.all((rounded.double() - expected).abs() <= u * expected.abs() + 1.05 * 4 * u * sizes)


@pytest.mark.parametrize(
    ("name", "operators"),
    [
        ("identity", ["add_"]),
        ("left", ["_to_copy", "addmm_"]),
        ("right", ["_to_copy", "addmm_"]),
        ("both", ["_to_copy", "mm", "addmm_"]),
        ("rows", ["index_select", "add_", "index_copy_"]),
        ("columns", ["index_select", "add_", "index_copy_"]),
        ("rows x right", ["_to_copy", "mm", "index_add_"]),
        ("left x columns", ["_to_copy", "new_zeros", "index_copy", "addmm_"]),
    ],
)
def test_a_rounded_lift_launches_few_kernels(name, operators):
    """However large the weight is: one cast and one product where one side has a basis, and never a second weight."""
    smap = MAPS[name]
    if isinstance(smap, KroneckerMap):
        smap = KroneckerMap(*(None if side is None else side.bfloat16() for side in (smap.left, smap.right)))
    elif name == "rows x right":
        smap = TwoSidedMap(smap.left, KroneckerMap(None, RIGHT.bfloat16()))
    elif name == "left x columns":
        smap = TwoSidedMap(KroneckerMap(LEFT.bfloat16(), None), smap.right)
    coords, weight = draw(*coords_shape(MAPS[name]), seed=5).float(), draw(M, N, seed=8).bfloat16()
    with NoTensorOfShape([(M, N)]) as whole, Launches() as launches:
        smap.add_rounded_lift_(weight, coords)
    assert launches.names == operators
    assert not whole.found


OTHERS = {
    "identity": KroneckerMap(None, None),
    "left": KroneckerMap(draw(M, P, seed=9), None),
    "right": KroneckerMap(None, draw(N, Q, seed=10)),
    "both": KroneckerMap(draw(M, P, seed=9), draw(N, Q, seed=10)),
    "rows": SelectionMap(torch.tensor([0, 2, 6]), None, (M, N)),
    "columns": SelectionMap(None, torch.tensor([0, 4]), (M, N)),
    "entries": SelectionMap(torch.tensor([0, 2, 6]), torch.tensor([0, 4]), (M, N)),
    "rows x right": two_sided(SelectionMap(torch.tensor([0, 2, 6]), None, (M, N)), KroneckerMap(None, draw(N, Q, seed=10))),
}


@pytest.mark.parametrize("name", OTHERS)
def test_transport_is_project_after_lift(name):
    old, new = MAPS[name], OTHERS[name]
    overlap = matrix_of(new).t() @ matrix_of(old)
    coords = draw(*coords_shape(old), seed=5)
    assert_close(new.transport(old, coords).flatten(), overlap @ coords.flatten())
    squares = coords.square()
    assert_close(new.transport_squares(old, squares).flatten(), overlap.square() @ squares.flatten())


def test_maps_of_different_kinds_transport_means_but_not_squares():
    old, new = MAPS["rows"], MAPS["left"]
    coords = draw(*coords_shape(old), seed=5)
    assert_close(new.transport(old, coords), new.project(old.lift(coords)))
    for one, other in ((new, old), (old, new), (MAPS["rows x right"], MAPS["both"])):
        with pytest.raises(DualityError, match="carry='rotate' and 'transport' need the square of"):
            one.transport_squares(other, coords)


def test_two_kronecker_maps_join_into_one():
    assert isinstance(MAPS["left x right"], KroneckerMap)
    assert isinstance(MAPS["rows x right"], TwoSidedMap)


def test_a_selection_is_merged_into_bfloat16_with_one_rounding():
    smap = SelectionMap(torch.tensor([0, 2, 6]), None, (M, N))
    coords = draw(3, N, seed=5).float()
    weight = draw(M, N, seed=8).bfloat16()
    expected = (weight.float() + smap.lift(coords)).bfloat16()
    smap.add_lift_(weight, coords)
    assert torch.equal(weight, expected)


@each_map
def test_a_map_is_immutable_and_compared_by_identity(smap):
    for field in dataclasses.fields(smap):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(smap, field.name, None)
    assert smap == smap
    assert smap != copy.copy(smap)
    assert hash(smap) != hash(copy.copy(smap))


@each_map
def test_factors_multiply_to_the_lift_and_are_as_thin_as_the_thinner_side(smap):
    coords = draw(*coords_shape(smap), seed=5)
    found = smap.factors(coords)
    assert_close(found.dense(), smap.lift(coords))
    # of entries, and of two sides that are no KroneckerMap, the factors have as many columns as the left side
    thin = isinstance(smap, KroneckerMap) or None in (getattr(smap, "rows", 0), getattr(smap, "columns", 0))
    assert found.rank == (min(coords.shape) if thin else coords.shape[0])


@pytest.mark.parametrize("smap", [m for m in MAPS.values() if isinstance(m, SelectionMap)])
def test_what_a_selection_leaves_for_reduced_inputs_knows_its_shape(smap):
    coords = draw(*coords_shape(smap), seed=5)
    assert tuple(smap.inner.lift(coords).shape) == smap.inner.shape
    assert tuple(smap.T.lift(coords.t()).shape) == smap.T.shape


def test_the_norm_of_coordinates_whose_lift_vanishes_is_no_nan():
    """P = [a, 3 a, 7 a] and z = [-10, 1, 1]: what is summed is a rounding error of either sign."""
    for seed in range(20):
        column = draw(40, 1, seed=seed).float()
        smap = KroneckerMap(column * torch.tensor([1.0, 3.0, 7.0]), None)
        assert smap.norm(torch.tensor([[-10.0], [1.0], [1.0]])) <= 1e-2 * column.norm()  # NaN fails too


class TestFit:
    def test_of_many_coordinates_it_is_right_to_rounding(self):
        """Conjugate gradients that stop where the rest is rounding, before they have come to an end by their number."""
        smap, matrix = KroneckerMap(draw(200, 20, seed=1), draw(100, 10, seed=2)), draw(200, 100, seed=3)
        expected = torch.linalg.lstsq(smap.left, torch.linalg.lstsq(smap.right, matrix.t()).solution.t()).solution
        assert (smap.fit(matrix) - expected).norm() <= 1e-13 * expected.norm()

    def test_of_orthonormal_columns_one_product_is_enough(self, monkeypatch):
        lifts, lift = [], KroneckerMap.lift
        monkeypatch.setattr(KroneckerMap, "lift", lambda self, coords: lifts.append(coords) or lift(self, coords))
        KroneckerMap(torch.linalg.qr(draw(20, 4, seed=1)).Q, None).fit(draw(20, 9, seed=2))
        assert len(lifts) <= 2  # the second one finds that nothing is left


class TestResidual:
    @each_map
    def test_it_is_what_no_coordinates_can_express(self, smap):
        matrix = draw(M, N, seed=5)
        flat, columns = matrix.flatten(), matrix_of(smap)
        expected = flat - columns @ torch.linalg.lstsq(columns, flat[:, None]).solution[:, 0]
        found = smap.residual(matrix)
        assert_close(found.flatten(), expected)
        # a basis of normal numbers is solved through its Gram matrix, whose condition is the square of its own
        assert smap.project(found).abs().max() <= 1e-12

    @pytest.mark.parametrize("columns", [[[1.0, 1.0], [2.0, 2.0], [0.0, 0.0]], [[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]]])
    def test_columns_may_be_zero_or_depend_on_each_other(self, columns):
        basis, matrix = torch.tensor(columns, dtype=torch.float64), draw(3, 4, seed=1)
        expected = matrix - basis @ torch.linalg.pinv(basis) @ matrix
        torch.testing.assert_close(KroneckerMap(basis, None).residual(matrix), expected, rtol=0, atol=1e-7)  # eps^(1/2)

    def test_it_reads_nothing_on_the_host(self):
        with NoWaiting():
            KroneckerMap(LEFT, RIGHT).residual(draw(M, N, seed=5))
