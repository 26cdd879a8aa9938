"""The public oracles: each passes on what is right, and fails on what is wrong in each of its ways, naming it."""

import dataclasses

import pytest
import torch
from torch import nn

from lingrad import LinearMap, SideTransform
from lingrad.maps import KroneckerMap
from lingrad.testing.oracles import assert_adjoint, assert_dual, assert_reads_only_gradients
from lingrad.testing.training import every_kind
from lingrad.transforms import Random
from tests.maps.test_maps import MAPS, M, N


@pytest.mark.parametrize("smap", MAPS.values(), ids=MAPS.keys())
def test_every_map_of_ours_obeys_every_law(smap):
    assert_adjoint(smap, (M, N), tolerance=1e-13)


class Scaled(LinearMap):
    """2 P z, with one of its products wrong."""

    def __init__(self, wrong=None):
        self.p = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.wrong = wrong

    def factor(self, name):
        return 1.0 if self.wrong == name else 2.0

    def lift(self, coords):
        if self.wrong == "linear":
            coords = coords + 0.1 * coords**2
        if self.wrong == "autograd":
            coords = coords.detach() * 0.5 + coords * 0.5
        return self.factor("lift") * self.p @ coords

    def project(self, grad):
        dense = grad if isinstance(grad, torch.Tensor) else grad.dense()
        if self.wrong == "factored" and not isinstance(grad, torch.Tensor):
            dense = 3 * dense
        return self.factor("project") * self.p.t() @ dense

    @property
    def T(self):
        return KroneckerMap(None, self.factor("T") * self.p)

    @property
    def tensors(self):
        return (self.p,)

    def apply(self, x, coords):
        return self.factor("apply") * x @ coords.t() @ self.p.t()

    def reduce(self, x):
        return 2 * x if self.wrong == "reduce" else x

    def add_lift_(self, weight, coords):
        weight.add_(self.factor("add_lift_") * self.p @ coords)

    def add_rounded_lift_(self, weight, coords):
        weight.add_(self.factor("add_rounded_lift_") * self.p @ coords)


@pytest.mark.parametrize(
    ("wrong", "law"),
    [
        ("lift", "project, the adjoint of lift, of a dense gradient"),
        ("project", "project, the adjoint of lift, of a dense gradient"),
        ("factored", "project, the adjoint of lift, of a factored gradient"),
        ("linear", "lift\\(z\\) as a linear function of z"),
        ("autograd", "autograd of lift, which is project,"),
        ("T", "T.lift\\(z.T\\) == lift\\(z\\).T"),
        ("apply", "apply\\(x, z\\) == x @ lift\\(z\\).T"),
        ("reduce", "inner.apply\\(reduce\\(x\\), z\\) == apply\\(x, z\\)"),
        ("add_lift_", "add_lift_\\(W, z\\), W \\+ lift\\(z\\) in place,"),
        ("add_rounded_lift_", "add_rounded_lift_\\(W, z\\), W \\+ lift\\(z\\) in place,"),
    ],
)
def test_a_wrong_product_is_named(wrong, law):
    assert_adjoint(Scaled(), (5, 4))
    with pytest.raises(AssertionError, match=f"Scaled: {law} is off by "):
        assert_adjoint(Scaled(wrong), (5, 4))
    bad = Scaled()
    bad.project = lambda grad: torch.zeros(2, 4)
    with pytest.raises(AssertionError, match=r"lift gives \(5, 4\) of 2 x 4 coordinates; expected \(5, 3\)"):
        assert_adjoint(bad, (5, 3))


def test_bases():
    assert_reads_only_gradients("adamw", lr=1e-3)
    assert_reads_only_gradients(torch.optim.NAdam)
    with pytest.raises(AssertionError, match="the update of base 'Adafactor' reads the parameter"):
        assert_reads_only_gradients(torch.optim.Adafactor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restless(SideTransform):
    """Its bases depend on how often it was called: no two runs are alike."""

    calls = 0

    def basis(self, seen, old, when):
        type(self).calls += 1
        return torch.randn(old.shape, generator=torch.Generator().manual_seed(type(self).calls), dtype=old.dtype)


Restless.name = "restless"


class TestDual:
    def test_it_returns_the_gap(self):
        assert 0 < assert_dual("svd(rank=4, every=5)") <= 1e-12
        assert assert_dual(Random(rank=3, every=4), "sgd", lr=0.1, carry="rotate", clip=0.1) <= 1e-12

    def test_it_takes_rules_and_a_model(self):
        def build():
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()

        x = torch.randn(10, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        rules = {"0": "svd(rank=2, every=3)", "*": "none"}
        gap = assert_dual(rules, build=build, batches=[[x]] * 8, loss=lambda model, x: model(x).square().mean())
        assert gap <= 1e-12

    def test_a_transform_that_is_no_function_of_its_state_is_found_out(self):
        with pytest.raises(AssertionError, match="adapter mode differs from optimizer mode by"):
            assert_dual(Restless(rank=2, every=3))

    def test_a_tolerance_that_is_too_tight_says_what_was_found(self):
        with pytest.raises(
            AssertionError, match=r"svd\(rank=4, every=5\) with adamw: adapter mode differs .*, more than 1e-30"
        ):
            assert_dual("svd(rank=4, every=5)", tolerance=1e-30)

    def test_a_run_that_trains_nothing_shows_nothing(self):
        with pytest.raises(AssertionError, match="nothing was trained"):
            assert_dual("svd(rank=4)", lr=1e-9)

    def test_the_model_is_seeded_apart_from_the_global_generator(self):
        torch.manual_seed(3)
        expected = torch.rand(1)
        torch.manual_seed(3)
        a, b = every_kind(), every_kind()
        assert torch.equal(torch.rand(1), expected)
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
