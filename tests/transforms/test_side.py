"""What the base class does for a transform that writes one method: sides, dtypes, shapes, memory, and its messages."""

import weakref

import pytest
import torch

import lingrad
from lingrad.config import spec
from lingrad.errors import ShapeError, SpecError
from lingrad.gradients.local import DenseGradient
from lingrad.transforms import SVD, Sides, SideTransform, When, registry
from lingrad.transforms.sketch import range_probes, sketched

CPU = torch.device("cpu")
SHAPE = (12, 7)


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


def gradient(shape=SHAPE, seed=0, dtype=torch.float64):
    return DenseGradient(torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype))


def spy(reads="gradient", k=None):
    """A transform that records what it is given."""
    calls = []

    @registry.register(f"spy_{reads}")
    class Spy(SideTransform):
        def basis(self, seen, old, when):
            calls.append((seen, old, when))
            return old + 1

        if k is not None:

            def columns(self, rank):
                return k

    Spy.reads = reads
    return Spy, calls


def refreshed(transform, grad, *, dtype=torch.float64, step=3):
    state = transform.init(grad.shape, seed=5, device=CPU, dtype=dtype)
    return state, transform.refresh(state, grad, When(step, 1, 5, grad.shape))


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_each_side_is_in_the_rows_of_what_it_sees(side):
    make, calls = spy()
    grad = gradient()
    old, new = refreshed(make(rank=3, side=side), grad)
    seen = {when.side: (found, basis) for found, basis, when in calls}
    assert list(seen) == (["left", "right"] if side == "both" else [side])
    for name, (found, basis) in seen.items():
        assert torch.equal(found.dense(), grad.dense() if name == "left" else grad.dense().t())
        assert basis is getattr(old, name)
        assert torch.equal(getattr(new, name), basis + 1)
    for name in {"left", "right"} - seen.keys():
        assert getattr(old, name) is None
        assert getattr(new, name) is None


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_each_side_is_in_the_rows_of_its_sketch(side):
    make, calls = spy("sketch")
    transform, grad = make(rank=3, side=side), gradient()
    old, _ = refreshed(transform, grad)
    products = list(sketched(grad, range_probes(old, 3, When(3, 1, 5, SHAPE))))
    for found, _, when in calls:
        expected = products.pop(0)
        assert found.shape == ((12, 3) if when.side == "left" else (7, 3))
        assert torch.equal(found.dense(), expected if when.side == "left" else expected.t())
    assert not products


def test_columns_are_those_of_the_sketch():
    make, calls = spy("sketch", k=5)
    refreshed(make(rank=3, side="both"), gradient())
    assert [found.shape for found, _, _ in calls] == [(12, 5), (7, 5)]
    make, calls = spy("sketch", k=9)  # a sketch of a left basis would not be smaller than the gradient
    refreshed(make(rank=3, side="both"), gradient())
    assert [found.shape for found, _, _ in calls] == [(12, 7), (7, 9)]


def test_a_step_that_reads_a_sketch_starts_from_an_orthonormal_basis():
    start = {}
    for reads in ("gradient", "sketch"):
        make, _ = spy(reads)
        start[reads] = make(rank=3, side="left").init(SHAPE, seed=5, device=CPU, dtype=torch.float64).left
        square = start[reads].t() @ start[reads]
        assert torch.allclose(square, torch.eye(3, dtype=torch.float64)) == (reads == "sketch")


@pytest.mark.parametrize("reads", ["gradient", "sketch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_it_sees_at_least_float32_and_keeps_the_dtype_of_the_weight(reads, dtype):
    make, calls = spy(reads)
    old, new = refreshed(make(rank=3, side="both"), gradient(dtype=dtype), dtype=dtype)
    assert {found.dtype for found, _, _ in calls} == {torch.promote_types(dtype, torch.float32)}
    assert {basis.dtype for basis in (*old, *new)} == {dtype}


def test_a_slice_does_not_keep_the_other_columns_in_memory():
    @registry.register("sliced")
    class Sliced(SideTransform):
        def basis(self, seen, old, when):
            return torch.linalg.svd(seen.dense(), full_matrices=False).U[:, : old.shape[1]]

    _, new = refreshed(Sliced(rank=3, side="both"), gradient())
    for basis in new:
        assert basis.is_contiguous()
        assert basis.untyped_storage().nbytes() == basis.numel() * basis.element_size()
    expected = refreshed(SVD(rank=3, side="both", align=False), gradient())[1]
    torch.testing.assert_close(new.left.abs(), expected.left.abs(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("reads", ["gradient", "sketch"])
def test_the_left_basis_is_cast_before_the_right_one_is_computed(reads):
    wide = []

    @registry.register(f"slim_{reads}")
    class Slim(SideTransform):
        def basis(self, seen, old, when):
            assert not any(ref() is not None for ref in wide)
            found = old.float() + 1
            wide.append(weakref.ref(found))
            return found

    Slim.reads = reads
    refreshed(Slim(rank=3, side="both"), gradient(dtype=torch.bfloat16), dtype=torch.bfloat16)
    assert len(wide) == 2


def test_both_sides_at_once():
    """`bases` is the one method to override where one computation gives both."""
    seen = []

    @registry.register("at_once")
    class AtOnce(SideTransform):
        def basis(self, seen, old, when):
            raise AssertionError

        def bases(self, grad, old, when):
            seen.append(when)
            return Sides(*(None if b is None else 2 * b.double() for b in old))

    old, new = refreshed(AtOnce(rank=3, side="right"), gradient(), dtype=torch.float32)
    assert new.left is None
    assert torch.equal(new.right, 2 * old.right)
    assert new.right.dtype == torch.float32
    assert seen == [When(3, 1, 5, SHAPE)]


class TestRanks:
    @pytest.mark.parametrize(
        ("text", "ranks"),
        [
            ("svd(rank=4, side=left)", (4, None)),
            ("svd(rank=4, side=short)", (None, 4)),
            ("power(rank=4, side=both)", (4, 4)),
            ("random(rank=4, side=long, kind=rows, store=false)", (4, None)),
            ("kron(left=svd(rank=4), right=pca(rank=3))", (4, 3)),
            ("full()", (None, None)),
        ],
    )
    def test_the_coordinates_have_them(self, text, ranks):
        transform = spec.parse(text)
        assert transform.ranks(SHAPE) == ranks
        assert transform.coords_shape(SHAPE) == (ranks[0] or 12, ranks[1] or 7)

    def test_a_rank_as_large_as_the_side_is_a_rank(self):
        transform = spec.parse("svd(rank=7, side=right)")
        assert transform.coords_shape(SHAPE) == SHAPE  # from which nobody could guess the side
        assert transform.ranks(SHAPE) == (None, 7)


class TestMessages:
    @pytest.mark.parametrize(
        ("returned", "words"),
        [
            (lambda old: old[:, :1], r"a tensor of shape \(7, 1\) and torch.float32"),
            (lambda old: old.t(), r"a tensor of shape \(3, 7\) and torch.float32"),
            (lambda old: old.long(), r"a tensor of shape \(7, 3\) and torch.int64"),
            (lambda old: None, "None"),
            (lambda old: "basis", "a str"),
        ],
    )
    def test_a_result_that_is_no_basis(self, returned, words):
        @registry.register("mine")
        class Mine(SideTransform):
            def basis(self, seen, old, when):
                return returned(old)

        model = torch.nn.Sequential(torch.nn.Linear(7, 12))
        optimizer = lingrad.wrap(model, "mine(rank=3)", lr=0.1)
        model(torch.ones(1, 7)).sum().backward()
        expected = r"expected the old one's shape, \(7, 3\), in a floating dtype"
        with pytest.raises(ShapeError, match=f"mine returned {words} as its right basis; {expected}"):
            optimizer.step()

    @pytest.mark.parametrize(
        ("returned", "words"),
        [
            (lambda old: Sides(old.right, old.right), "mine returned a tensor .* as its left basis; expected None, since"),
            (lambda old: old.right, r"the bases method of mine returned a tensor .*; expected Sides\(left, right\)"),
            (lambda old: None, r"the bases method of mine returned None; expected Sides\(left, right\)"),
            (lambda old: (*old, None), r"the bases method of mine returned a tuple; expected Sides\(left, right\)"),
        ],
    )
    def test_a_result_that_is_no_pair_of_bases(self, returned, words):
        @registry.register("mine")
        class Mine(SideTransform):
            def basis(self, seen, old, when):
                raise AssertionError

            def bases(self, grad, old, when):
                return returned(old)

        with pytest.raises(ShapeError, match=words):
            refreshed(Mine(rank=3, side="right"), gradient())

    @pytest.mark.parametrize("reads", ["gradients", "nothing", None])
    def test_reads(self, reads):
        make, _ = spy(reads)
        message = f"Spy.reads must be 'gradient', 'sketch' or 'weight', not {reads!r}; a transform that reads nothing derives"
        with pytest.raises(SpecError, match=message):
            make(rank=3)
        with pytest.raises(SpecError, match=message):
            spec.parse(f"spy_{reads}(rank=3)")

    @pytest.mark.parametrize("columns", [0, 2.5, None, True])
    def test_columns(self, columns):
        make, _ = spy("sketch")
        make.columns = lambda self, rank: columns
        with pytest.raises(SpecError, match=f"columns method of spy_sketch returned {columns}; expected a whole number, 1 or"):
            refreshed(make(rank=3), gradient())

    def test_a_refresh_without_a_gradient(self):
        make, _ = spy()
        transform = make(rank=3)
        state = transform.init(SHAPE, seed=0, device=CPU, dtype=torch.float32)
        with pytest.raises(SpecError, match="spy_gradient reads a gradient; it cannot be refreshed without one"):
            transform.refresh(state, None, When(0, 0, 0, SHAPE))
