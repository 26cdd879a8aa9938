"""Details of the engine that no other test would miss."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import lingrad
from lingrad.errors import CheckpointError, ModeError
from lingrad.gradients.local import DenseGradient, FactoredGradient, accumulate
from lingrad.subspaces import trees as trees
from tests.maps.test_maps import GRADIENTS
from tests.support.models import gap, llama, text_batches, train, zoo, zoo_batches, zoo_loss

MODES = {"optimizer": lingrad.wrap, "adapter": lingrad.adapt}
each_mode = pytest.mark.parametrize("mode", MODES)


def test_factored_norm_where_rounding_leaves_a_negative_sum():
    """Three tokens whose gradients cancel: the Gram products sum to a rounding error of either sign."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        a, b = torch.randn(2, 40, generator=generator)
        x = torch.randn(1, 50, generator=generator).expand(3, -1)
        norm = FactoredGradient(torch.stack((a, b, -(a + b))), x).norm()
        assert norm <= 1e-2 * a.norm() * x[0].norm()  # NaN fails too


@each_mode
def test_a_gradient_made_finite_by_hand_keeps_the_basis_and_steps(mode):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6, bias=False)).double()
    optimizer = MODES[mode](model, "svd(rank=2)", "sgd", lr=0.1)
    (sub,) = optimizer.subspaces
    basis = sub.map().tensors[0].clone()
    (model(torch.ones(5, 8, dtype=torch.float64)).sum() * float("inf")).backward()
    sub.coords.grad.nan_to_num_(0.0, 1.0, -1.0)
    with pytest.warns(RuntimeWarning, match="not finite; the old basis stays"):
        optimizer.step()
    assert torch.equal(sub.map().tensors[0], basis)


@each_mode
def test_bases_follow_the_model_to_a_device(mode, monkeypatch):
    model = zoo()
    optimizer = MODES[mode](model, {"*": "svd(rank=1)"}, lr=1e-2)
    moved = []
    for sub in optimizer.subspaces:
        monkeypatch.setattr(sub.basis, "move", lambda device, name=sub.name: moved.append((name, device.type)))
    model.to("cpu")
    assert set(moved) == {(sub.name, "cpu") for sub in optimizer.subspaces}


@each_mode
def test_zeroed_gradients_of_a_weight_that_a_refresh_step_does_not_reach(mode):
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(8, 6, bias=False), nn.Linear(8, 6, bias=False)]).double()
    optimizer = MODES[mode](model, "svd(rank=2, every=2)", "sgd", lr=0.1)
    x = torch.ones(5, 8, dtype=torch.float64)
    for step in range(3):
        optimizer.zero_grad(set_to_none=False)
        sum(layer(x).square().sum() for layer in (model if step < 2 else model[:1])).backward()
        optimizer.step()
    assert [sub.basis.refreshes for sub in optimizer.subspaces] == [2, 1]


def test_the_first_micro_batch_is_held_dense_where_that_is_smaller():
    assert isinstance(accumulate(None, GRADIENTS["factored"]), DenseGradient)


def test_moments_of_another_shape_are_refused():
    model = llama()
    optimizer = lingrad.wrap(model, "svd(rank=4)", lr=1e-2)
    train(model, optimizer, text_batches(2))
    saved = optimizer.state_dict()
    saved["state"][0]["exp_avg"] = torch.zeros(3, 3)
    fresh = lingrad.wrap(llama(), "svd(rank=4)", lr=1e-2)
    with pytest.raises(CheckpointError, match=r"'exp_avg' of .*q_proj.weight is .*\(3, 3\) in the checkpoint, and .*\(32, 4\)"):
        fresh.load_state_dict(saved)
    assert not fresh.state


def test_loading_shares_no_memory_with_what_was_loaded():
    model = llama()
    optimizer = lingrad.wrap(model, "svd(rank=4)", lr=1e-2)
    train(model, optimizer, text_batches(2))
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    other = llama()
    optimizer = lingrad.wrap(other, "svd(rank=4)", lr=1e-2)
    optimizer.load_state_dict(saved)
    train(other, optimizer, text_batches(2))
    for index, entries in kept["state"].items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(saved["state"][index][key], value), key


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


@each_mode
def test_a_basis_made_again_from_its_seed_is_not_held(mode):
    model = nn.Sequential(nn.Linear(8, 6)).double()
    optimizer = MODES[mode](model, "random(rank=3, every=2, store=false)", "sgd", lr=0.1)
    (sub,) = optimizer.subspaces
    for _ in range(5):
        assert sub.basis.tensors() == []
        optimizer.zero_grad()
        model(torch.ones(2, 8, dtype=torch.float64)).square().sum().backward()
        optimizer.step()


@each_mode
@pytest.mark.parametrize("how", ["model", "clip"])
def test_a_gradient_that_was_dropped_refreshes_nothing(mode, how):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6, bias=False)).double()
    optimizer = MODES[mode](model, "svd(rank=2)", "sgd", lr=0.1)
    (sub,) = optimizer.subspaces
    model(torch.ones(2, 8, dtype=torch.float64)).square().sum().backward()
    if how == "clip":
        optimizer.clip_grad_norm_(1.0)
        optimizer.zero_grad()
    else:
        model.zero_grad()
    optimizer.step()
    assert sub.basis.refreshes == 0
    assert sub.coords.grad is None


def test_coordinates_of_bfloat16_weights_are_float32():
    for mode in MODES:
        optimizer = MODES[mode](zoo(torch.bfloat16), {"*": "svd(rank=1)"}, lr=1e-2)
        assert {sub.coords.dtype for sub in optimizer.subspaces} == {torch.float32}


@each_mode
def test_reading_the_state_of_a_fresh_optimizer_does_not_count_as_a_step(mode):
    """get_optimizer_state_dict steps once, on zero gradients and at lr=0, to make the state appear."""
    weights = []
    for read in (False, True):
        model = llama()
        optimizer = MODES[mode](model, "random(rank=4, every=2)", "sgd", lr=1e-2, momentum=0.9)
        if read:
            get_optimizer_state_dict(model, optimizer)
        train(model, optimizer, text_batches(4, micro=1), schedule=False)
        weights.append(optimizer.weights())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@each_mode
def test_casting_the_model_leaves_coordinates_in_float32(mode):
    model = zoo(torch.float32)
    optimizer = MODES[mode](model, {"*": "svd(rank=1)"}, lr=1e-2)
    model.bfloat16()
    assert {attachment.sub.weight.param.dtype for attachment in optimizer.attachments} == {torch.bfloat16}
    assert {sub.coords.dtype for sub in optimizer.subspaces} == {torch.float32}


@each_mode
def test_micro_batches_whose_gradient_is_one_number_expanded(mode):
    """The gradient of a sum has one entry in memory; what is added to it must go elsewhere."""

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.ones(4, 3, dtype=torch.float64))

    model = Table()
    optimizer = MODES[mode](model, {"*": "svd(rank=2)"}, "sgd", lr=0.1)
    for _ in range(2):
        model.table.sum().backward()
    assert torch.equal(optimizer.subspaces[0].pending.total.dense(), torch.full((4, 3), 2.0, dtype=torch.float64))


@each_mode
@pytest.mark.parametrize("spec", ["svd(rank=6, every=2)", "random(rank=6, every=2, kind=orthonormal)"])
def test_gradients_are_not_kept_over_a_refresh(mode, spec):
    """Coordinates of an old basis say nothing in the new one; who zeroes no gradient is told."""
    model = nn.Sequential(nn.Linear(8, 6, bias=False)).double()
    optimizer = MODES[mode](model, spec, "sgd", lr=1e-3)
    x = torch.ones(5, 8, dtype=torch.float64)
    message = "the gradient of 0.weight is from before its basis was refreshed; call zero_grad"
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()
    with pytest.raises(ModeError, match=message):
        model(x).square().sum().backward()
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()
    model(x).square().sum().backward()
    optimizer.step()
    with pytest.raises(ModeError, match=f"{message}|did not come from a backward since the last step"):
        optimizer.step()


@each_mode
def test_gradients_kept_over_steps_between_refreshes_are_those_of_torch(mode):
    weights = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 6, bias=False)).double()
        sgd = torch.optim.SGD(model.parameters(), lr=1e-3)
        optimizer = MODES[mode](model, "svd(rank=6, every=0)", "sgd", lr=1e-3) if wrapped else sgd
        for seed in range(5):
            x = torch.randn(5, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            model(x).square().sum().backward()
            optimizer.step()
        weights.append(optimizer.weights() if wrapped else dict(model.named_parameters()))
    assert gap(*weights) <= 1e-12


@pytest.mark.parametrize(
    "spec", ["svd(rank=2)", "random(rank=2, kind=rows)", "pca(rank=2)", "kron(left=pca(rank=2), right=random(rank=2))"]
)
def test_a_state_moves_to_a_device_whole(spec):
    """Meta stands for another device: every tensor arrives, numbers and structure stay."""
    state = lingrad.config.spec.parse(spec).init((6, 5), seed=0, device=torch.device("cpu"), dtype=torch.float32)
    moved = trees.moved(state, torch.device("meta"))
    flat, there = trees.flatten(state), trees.flatten(moved)
    assert type(moved) is type(state)
    assert flat.keys() == there.keys()
    for key, value in flat.items():
        if isinstance(value, torch.Tensor):
            assert (there[key].device.type, there[key].shape, there[key].dtype) == ("meta", value.shape, value.dtype)
        else:
            assert there[key] == value


@each_mode
@pytest.mark.parametrize("layerwise", [False, True])
def test_a_run_that_is_dropped_is_freed(mode, layerwise):
    def run():
        model = zoo()
        optimizer = MODES[mode](model, {"head": "none", "*": "svd(rank=2, every=2)"}, "adamw", lr=1e-3, layerwise=layerwise)
        for (batch,) in zoo_batches(3, micro=1):
            zoo_loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        kept = [model, *model.parameters(), *(sub.coords for sub in optimizer.subspaces), *optimizer.subspaces]
        kept += [tensor for sub in optimizer.subspaces for tensor in sub.basis.tensors()]
        return [weakref.ref(item) for item in kept]

    dropped = run()
    gc.collect()
    assert [item() for item in dropped if item() is not None] == []
