"""Names of the version before keep working for one version, with a warning that says what to write instead."""

import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

import lingrad
from lingrad import convert, memory, optimizers, peft, transforms
from lingrad.deprecated import renamed_option
from lingrad.errors import DataError, SpecError
from lingrad.testing import assert_dual
from lingrad.transforms import SideTransform, registry


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("from lingrad.explain import explain as found", lambda: lingrad.explain),
        ("from lingrad import lowbit; found = lowbit.moments", lambda: memory.moments),
        ("from lingrad.lowbit import moments as found", lambda: memory.moments),
        ("import lingrad; found = lingrad.bases.names", lambda: optimizers.names),
        ("import lingrad.bases; found = lingrad.bases.names", lambda: optimizers.names),
        ("from lingrad.bases import names as found", lambda: optimizers.names),
        ("from lingrad.transforms import Bases as found", lambda: transforms.Sides),
        ("from lingrad.memory import ledger as found", lambda: memory.estimate),
        ("from lingrad.memory import Ledger as found", lambda: memory.Estimate),
        ("from lingrad.memory import Full as found", lambda: memory.FullRank),
        ("from lingrad.peft import Report as found", lambda: peft.AdapterReport),
        ("from lingrad.convert import Report as found", lambda: peft.AdapterReport),
        ("from lingrad.convert import Row as found", lambda: peft.ChangedTensor),
    ],
)
def test_an_old_name_is_the_new_one_and_warns_where_it_is_used(line, expected):
    names = {}
    with pytest.warns(DeprecationWarning, match="is deprecated; use ") as caught:
        exec(compile(line, "theirs.py", "exec"), names)  # noqa: S102 - the lines above
    assert names["found"] is expected()
    assert {warning.filename for warning in caught} == {"theirs.py"}


def test_a_transform_of_the_version_before_trains_in_both_modes():
    with pytest.warns(DeprecationWarning, match="lingrad.GradientBasis is deprecated; use lingrad.SideTransform"):
        base = lingrad.GradientBasis
    assert issubclass(base, SideTransform)
    try:

        @lingrad.register("before")
        @dataclass(frozen=True, kw_only=True)
        class Before(base):
            mix: float = 0.5

            def bases(self, grad, old, when):
                left, right = old
                if left is not None:
                    left = left + self.mix * grad.matmul(grad.rmatmul(left).t()) / grad.norm() ** 2
                if right is not None:
                    right = right + self.mix * grad.T.matmul(grad.T.rmatmul(right).t()) / grad.norm() ** 2
                return transforms.Sides(left, right)

        for side in ("left", "both"):
            assert_dual(f"before(rank=3, every=3, side={side})")
    finally:
        registry._registered.pop("before", None)


def test_a_sketch_of_the_version_before_trains_in_both_modes():
    with pytest.warns(DeprecationWarning, match="SketchBasis"):
        base = transforms.SketchBasis
    try:

        @lingrad.register("before")
        @dataclass(frozen=True, kw_only=True)
        class Before(base):
            def probes(self, state, when):
                return transforms.power.Probe(None, state.right), transforms.power.Probe(state.left, None)

            def learn(self, state, sketch, when):
                left, right = sketch[0], sketch[1].t()
                q = [
                    transforms.orthonormalize(s, seed=when.seed).to(o.dtype) for s, o in zip((left, right), state, strict=True)
                ]
                return transforms.Sides(*q)

        assert_dual("before(rank=3, every=3, side=both)")
    finally:
        registry._registered.pop("before", None)


def test_an_unknown_name_is_an_error_without_a_warning():
    for module in (lingrad, convert, memory, peft, transforms):
        with pytest.raises(AttributeError, match="has no attribute 'legder'"):
            module.legder  # noqa: B018


def test_an_option_by_its_old_name():
    options = {"base": 1, "rank": 2}
    with pytest.warns(DeprecationWarning, match="base of export is deprecated; use start"):
        renamed_option(options, "base", "start", "export")
    assert options == {"start": 1, "rank": 2}
    with pytest.raises(SpecError, match="which is now called start"):
        renamed_option({"base": 1, "start": 2}, "base", "start", "export")


def test_an_argument_by_its_old_name(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(6, 4))
    with pytest.warns(DeprecationWarning, match=r"spec_or_rules of lingrad.wrap is deprecated; use rules") as caught:
        optimizer = lingrad.wrap(model, spec_or_rules="svd(rank=2)", lr=1e-2)
    assert caught[0].filename == __file__
    assert [sub.name for sub in optimizer.subspaces] == ["0.weight"]
    with pytest.raises(SpecError, match="got spec_or_rules, which is now called rules, and rules; leave spec_or_rules out"):
        lingrad.adapt(model, "svd(rank=2)", spec_or_rules="svd(rank=2)")
    with (
        pytest.warns(DeprecationWarning, match="base of lingrad.convert.merge is"),
        pytest.raises(DataError, match="nowhere"),
    ):
        lingrad.convert.merge(base=tmp_path / "nowhere", adapter=tmp_path, out=tmp_path / "out")
    named = list(torch.nn.Linear(6, 4).named_parameters())
    group = {"params": named, "spec": "svd(rank=2)"}
    with pytest.warns(DeprecationWarning, match="spec of a param group is deprecated; use rules") as caught:
        lingrad.wrap([group], "full()", lr=1e-2)
    assert caught[0].filename == __file__
    with (
        pytest.warns(DeprecationWarning, match=r"method of lingrad.memory.simulate is deprecated"),
        pytest.raises(SpecError, match="build"),
    ):
        memory.simulate(None, method="svd(rank=2)")


def test_importing_the_package_warns_of_nothing():
    program = "import lingrad, lingrad.transforms, lingrad.memory; import lingrad.testing"
    subprocess.run([sys.executable, "-W", "error::DeprecationWarning:lingrad", "-c", program], check=True)
