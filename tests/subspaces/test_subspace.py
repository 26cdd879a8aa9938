"""One weight's coordinates and basis: dtypes, devices, and what is stored."""

import torch
from torch import nn

from tests.support.models import zoo
from tests.support.runs import MODES, each_mode


def test_coordinates_of_bfloat16_weights_are_float32():
    for mode in MODES:
        optimizer = MODES[mode](zoo(torch.bfloat16), {"*": "svd(rank=1)"}, lr=1e-2)
        assert {sub.coords.dtype for sub in optimizer.subspaces} == {torch.float32}


@each_mode
def test_casting_the_model_leaves_coordinates_in_float32(mode):
    model = zoo(torch.float32)
    optimizer = MODES[mode](model, {"*": "svd(rank=1)"}, lr=1e-2)
    model.bfloat16()
    assert {attachment.sub.weight.param.dtype for attachment in optimizer.attachments} == {torch.bfloat16}
    assert {sub.coords.dtype for sub in optimizer.subspaces} == {torch.float32}


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
def test_a_basis_made_again_from_its_seed_is_not_held(mode):
    model = nn.Sequential(nn.Linear(8, 6)).double()
    optimizer = MODES[mode](model, "random(rank=3, every=2, store=false)", "sgd", lr=0.1)
    (sub,) = optimizer.subspaces
    for _ in range(5):
        assert sub.basis.tensors() == []
        optimizer.zero_grad()
        model(torch.ones(2, 8, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
