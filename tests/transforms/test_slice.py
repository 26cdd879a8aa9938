"""Slices: who has which columns, and the sum of several workers' changes as one map."""

import itertools

import pytest
import torch

import lingrad
from lingrad.errors import ShapeError, SpecError
from lingrad.gradients.local import DenseGradient
from lingrad.transforms import Slice, When
from lingrad.transforms.sketch import sketched
from tests.support.cases import SIDES

SHAPE = (12, 20)
CHOICES = ("identical", "independent", "orthogonal", "by_gradient")
WORKERS = 3
EXACT = 1e-12  # products of float64 in another order


def made(choice, side="short", rank=3, **options):
    cuts = {"workers": WORKERS} if choice in ("orthogonal", "by_gradient") else {}
    return Slice(rank=rank, choice=choice, side=side, **cuts, **options)


def state_of(transform, number=0, shape=SHAPE):
    state = transform.init(shape, seed=5, device=torch.device("cpu"), dtype=torch.float64)
    return transform.of_worker(state, number)


def bases(transform, side="left"):
    """The left, or right, basis of every worker."""
    return [getattr(transform.map(state_of(transform, k)), side) for k in range(WORKERS)]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_columns_are_orthonormal(choice, side):
    for basis in bases(made(choice, side), side):
        assert basis.shape == (SHAPE[side == "right"], 3)
        torch.testing.assert_close(basis.T @ basis, torch.eye(3, dtype=torch.float64), rtol=0, atol=EXACT)


def test_whose_are_equal_and_whose_orthogonal():
    equal = bases(made("identical"))
    assert all(torch.equal(basis, equal[0]) for basis in equal)
    own = bases(made("independent"))
    cut = bases(made("orthogonal"))
    for a, b in itertools.combinations(range(WORKERS), 2):
        assert (own[a].T @ own[b]).abs().max() > 0.05
        assert (cut[a].T @ cut[b]).abs().max() <= EXACT


@pytest.mark.parametrize("side", ["left", "right"])
def test_by_gradient_deals_out_the_leading_singular_vectors(side):
    """A gradient of low rank is in all workers' bases together, and worker k has the k-th, (k + N)-th, ... vector."""
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(SHAPE[0], 9, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(SHAPE[1], 9, generator=generator, dtype=torch.float64))
    grad = u @ torch.diag(2.0 ** -torch.arange(9, dtype=torch.float64)) @ v.T
    transform, when = made("by_gradient", side), When(7, 1, 3, SHAPE)
    state = state_of(transform)
    state = transform.learn(state, sketched(DenseGradient(grad), transform.probes(state, when)), when)
    found = [getattr(transform.map(transform.of_worker(state, k)), side) for k in range(WORKERS)]
    every = torch.cat(found, 1)
    turned = grad if side == "left" else grad.T
    assert (turned - every @ (every.T @ turned)).norm() <= 1e-10 * grad.norm()  # one pass over singular values down to 2^-8
    captured = [float((basis.T @ turned).norm()) for basis in found]
    assert captured == sorted(captured, reverse=True)
    assert captured[0] < 0.95 * float(grad.norm())  # the first does not have all of the leading ones


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("side", SIDES)
def test_the_joint_map_is_the_sum(choice, side):
    transform = made(choice, side)
    shape = transform.coords_shape(SHAPE)
    coords = {k: torch.randn(shape, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in (2, 0)}
    joint, z = transform.joint(state_of(transform, 1), coords)
    expected = sum(transform.map(state_of(transform, k)).lift(one) for k, one in coords.items())
    torch.testing.assert_close(joint.lift(z), expected, rtol=0, atol=EXACT)


def test_a_basis_is_that_of_its_seed_and_number():
    """What a worker that joins needs is W, a seed and a number."""
    for choice in ("identical", "independent", "orthogonal"):
        transform = made(choice)
        here, there = (transform.refresh(state_of(transform, 1), None, When(8, 1, 3, SHAPE)) for _ in range(2))
        assert torch.equal(transform.map(here).left, transform.map(there).left)
        assert not torch.equal(transform.map(here).left, transform.map(state_of(transform, 1)).left)


def test_when_bases_change():
    drawn, learned = made("orthogonal", every=4), made("by_gradient", every=4)
    assert [step for step in range(13) if drawn.due(step)] == [0, 4, 8, 12]
    assert [step for step in range(13) if learned.due(step)] == [0, 3, 7, 11]  # in use from the next step on
    assert [step for step in range(13) if made("by_gradient", every=0).due(step)] == [0]


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        (
            "slice(rank=5, workers=3)",
            (12, 20),
            "3 slices of rank 5 need 15 columns, and a basis of a 12 x 20 weight has at most 12; lower rank or workers, or let "
            "the rank be lowered where needed: clip=true",
        ),
        ("slice(rank=1, workers=13, clip=true)", (12, 20), "13 slices of rank 1 need 13 columns, and a basis of"),
        (
            "slice(rank=5, workers=3, choice=by_gradient, side=long)",
            (12, 20),
            "a basis of a 12 x 20 weight has at most 12; lower rank or workers",
        ),
    ],
)
def test_slices_that_do_not_fit(spec, shape, message):
    with pytest.raises(ShapeError) as found:
        lingrad.spec.parse(spec).ranks(shape)
    assert message in str(found.value)


def test_clip_leaves_room_for_all():
    assert made("orthogonal", rank=8, clip=True).ranks(SHAPE) == (4, None)
    assert made("orthogonal", rank=5, side="long").ranks(SHAPE) == (None, 5)
    assert made("independent", rank=8, clip=True).ranks(SHAPE) == (8, None)


def test_workers_without_a_shared_basis():
    message = "workers cuts a shared basis, and choice=identical has none; leave it out, or choose orthogonal or by_gradient"
    with pytest.raises(SpecError) as found:
        lingrad.spec.parse("slice(rank=4, choice=identical, workers=2)")
    assert message in str(found.value)


def test_a_number_beyond_the_slices():
    message = (
        "worker 3 has no slice: slice(..., workers=3) cuts the basis for numbers below 3; give workers the number of workers"
    )
    with pytest.raises(SpecError, match=message.replace("(", r"\(").replace(")", r"\)").replace("...", r"\.\.\.")):
        made("orthogonal").of_worker(state_of(made("orthogonal")), 3)
