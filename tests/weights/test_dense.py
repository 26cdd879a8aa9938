"""Weights stored as plain tensors."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import lingrad
from lingrad.errors import ModeError
from lingrad.maps import KroneckerMap
from lingrad.weights.dense import DenseWeight
from lingrad.weights.layout import layout_of
from tests.support.runs import MODES, each_mode
from tests.support.watch import Launches


def test_a_merge_reaches_a_weight_whose_strides_allow_no_view():
    """A channels_last convolution: its matrix [out, in * 9] is a copy."""
    weights = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 6, 3)).double().to(memory_format=layout)
        optimizer = lingrad.wrap(model, {"*": "svd(rank=2, every=2)"}, "sgd", lr=0.1)
        x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        start = model[0].weight.detach().clone()
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        assert not torch.equal(model[0].weight, start)
        weights.append(model[0].weight.detach().contiguous())
    torch.testing.assert_close(*weights, rtol=1e-12, atol=1e-12)


class TestMerge:
    """`merge` chooses how S z is added in 16 bits. float32 and float64 are not concerned."""

    @staticmethod
    def merged(dtype, merge, size=1.0, conv=False):
        """A matrix after one merge, which products would give the same, and the operators of the merge."""
        layer = nn.Conv2d(3, 6, 3).to(memory_format=torch.channels_last) if conv else nn.Linear(27, 6)
        draw = torch.Generator().manual_seed(0)
        layout = layout_of(layer.weight, layer, "weight")
        weight = torch.randn(layer.weight.shape, generator=draw).to(dtype)
        param = nn.Parameter(weight.to(memory_format=torch.channels_last) if conv else weight)
        smap = KroneckerMap(None, (torch.randn(27, 3, generator=draw) / 40).to(dtype))
        coords = size * torch.randn(6, 3, generator=draw).to(torch.promote_types(dtype, torch.float32))
        before = layout.matrix(param.detach()).clone()
        with Launches() as launches:
            DenseWeight(layout, param, merge=merge).add_(smap, coords)
        found = layout.matrix(param.detach())
        assert not torch.equal(found, before)
        ways = {}
        for way, add in (("exact", smap.add_lift_), ("fast", smap.add_rounded_lift_)):
            add(wanted := before.clone(), coords)
            if torch.equal(found, wanted):
                ways[way] = wanted
        return found, list(ways), launches.names

    @pytest.mark.parametrize(
        ("dtype", "tensor_cores", "merge", "way"),
        [
            (torch.bfloat16, True, "auto", "fast"),
            (torch.bfloat16, True, "exact", "exact"),
            (torch.bfloat16, False, "auto", "exact"),
            (torch.bfloat16, False, "fast", "fast"),
            (torch.float16, True, "auto", "exact"),
            (torch.float16, True, "fast", "fast"),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("conv", [False, True])
    def test_which_products(self, dtype, tensor_cores, merge, way, conv, monkeypatch):
        monkeypatch.setattr("lingrad.tensors.TENSOR_CORES", {"cpu"} if tensor_cores else set())
        assert self.merged(dtype, merge, conv=conv)[1] == [way]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_wider_weights_are_not_concerned(self, dtype, monkeypatch):
        monkeypatch.setattr("lingrad.tensors.TENSOR_CORES", {"cpu"})
        found, _, launched = self.merged(dtype, "exact")
        for merge in ("auto", "fast"):
            again, _, names = self.merged(dtype, merge)
            assert torch.equal(again, found)
            assert names == launched

    def test_float16_overflows_only_where_it_was_asked_for(self, monkeypatch):
        """Coordinates of 10^5 are beyond its largest number; S z is not, since the basis is small."""
        monkeypatch.setattr("lingrad.tensors.TENSOR_CORES", {"cpu"})
        assert self.merged(torch.float16, "auto", size=2e5)[0].isfinite().all()
        assert not self.merged(torch.float16, "fast", size=2e5)[0].isfinite().all()

    @each_mode
    def test_a_run_resumes_with_another_choice(self, mode):
        """What is saved means the same."""
        saved = trained(lambda *args, **options: MODES[mode](*args, **options, merge="exact"))[1].state_dict()
        _, optimizer = trained(lambda *args, **options: MODES[mode](*args, **options, merge="fast"))
        optimizer.load_state_dict(saved)
        assert [sub.weight.merge for sub in optimizer.subspaces] == ["fast", "fast"]


def trained(make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).double()
    optimizer = make(model, "*: svd(rank=2, every=3)", "sgd", lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(1, 8, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
    return model, optimizer


@each_mode
def test_a_parameter_that_was_replaced_is_the_weight_from_then_on(mode):
    model, optimizer = trained(MODES[mode])
    expected = optimizer.weights()["0.weight"].clone()
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    optimizer.detach()
    assert torch.equal(model[0].weight, expected)
    assert model[0].weight.requires_grad


def test_a_layer_cannot_be_parametrized_while_the_run_is_attached():
    model, optimizer = trained(lingrad.adapt)
    expected = {name: weight.clone() for name, weight in optimizer.weights().items()}
    with pytest.raises(ModeError, match=r"1.weight is made a parameter, .* call detach\(\)"):
        weight_norm(model[1])
    assert optimizer.mode == "adapter"
    optimizer.detach()
    assert not any("lingrad" in name for name, _ in model.named_modules())
    for name, param in model.named_parameters():
        torch.testing.assert_close(param, expected[name], rtol=1e-12, atol=1e-12)
