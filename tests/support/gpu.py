"""What the tests that need a CUDA device share."""

import pytest
import torch

from tests.support.runs import weights_of

DEVICE = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing here has been shown on a GPU"),
]


TOLERANCE = 1e-12  # between two runs on one device, float64

# Between devices: kernels sum in another order, 1e-16 a sum, which the inverse gaps of singular values and Adam's division by
# small second moments amplify. On one device, weights that are changed by 1e-15 at the start part by up to 2e-14 in these runs.
ACROSS = 1e-10


RUN = {"lr": 1e-2, "weight_decay": 0.1, "scale": 0.25, "eps": 1e-4}


@pytest.fixture(autouse=True)
def same_arithmetic(monkeypatch):
    """float32 is float32, where convolutions are TF32 by default, and a run adds in the same order when it is repeated."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def moved(batches, device=DEVICE):
    return [[batch.to(device) for batch in micro_batches] for micro_batches in batches]


def changes_of(optimizer, start):
    """All that was trained, as one vector."""
    return torch.cat([(weight - start[name]).flatten() for name, weight in weights_of(optimizer).items()])


def assert_lives_on(optimizer, device):
    """All that a run keeps between steps; a base's step counters, 0-d, may stay on the CPU."""
    for attachment in optimizer.attachments:
        found = [attachment.sub.weight.param, attachment.sub.coords, *attachment.sub.basis.tensors()]
        assert {tensor.device.type for tensor in found} == {device}, attachment.sub.name
    for entries in optimizer.state.values():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor) and value.dim():
                assert value.device.type == device, key
