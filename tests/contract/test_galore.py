"""Against galore_torch 1.0 itself: ``compat="galore"`` reproduces it to rounding, in both modes."""

import warnings

import pytest

import lingrad
from tests.support.models import gap, llama, text_batches, train

galore_torch = pytest.importorskip("galore_torch", reason="make test installs it (extra: peers)", exc_type=ImportError)
pytestmark = pytest.mark.peers

PROJECTIONS = {"std": "short", "reverse_std": "long", "left": "left", "right": "right", "full": "both"}


def train_galore(model, batches, proj_type, scale, **options):
    targets = [p for name, p in model.named_parameters() if "proj" in name]
    chosen = {id(p) for p in targets}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in chosen]},
        {"params": targets, "rank": 4, "update_proj_gap": 7, "scale": scale, "proj_type": proj_type},
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its AdamW announces its own deprecation
        optimizer = galore_torch.GaLoreAdamW(groups, **options)
    train(model, optimizer, batches)
    return dict(model.named_parameters())


@pytest.mark.thinned(3)
@pytest.mark.parametrize("mode", [lingrad.wrap, lingrad.adapt])
@pytest.mark.parametrize(("proj_type", "side"), PROJECTIONS.items())
def test_same_trajectory(mode, proj_type, side):
    """40 steps, refresh every 7, 3 micro-batches, cosine schedule, decay 0.1. Both take the SVD of the gradient rounded to
    float32, so that bases are equal to the bit and only the order of sums differs: 1e-12 is 1000 times what is seen."""
    batches = text_batches(40)
    theirs = train_galore(llama(), batches, proj_type, 0.25, lr=1e-2, weight_decay=0.1)
    model = llama()
    spec = f"svd(rank=4, every=7, side={side})"
    optimizer = mode(model, spec, lr=1e-2, weight_decay=0.1, scale=0.25, compat="galore")
    train(model, optimizer, batches)
    optimizer.detach()
    assert gap(dict(model.named_parameters()), theirs) <= 1e-12


@pytest.mark.parametrize("options", [{"eps": 1e-3}, {"betas": (0.8, 0.9)}, {"weight_decay": 0.0}])
def test_options_mean_the_same(options):
    batches = text_batches(12)
    theirs = train_galore(llama(), batches, "std", 2.0, lr=1e-2, **options)
    model = llama()
    optimizer = lingrad.wrap(model, "svd(rank=4, every=7)", lr=1e-2, scale=2.0, compat="galore", **options)
    train(model, optimizer, batches)
    assert gap(optimizer.weights(), theirs) <= 1e-12


def test_without_compat_the_details_show():
    """The emulated details are real: without them eps and decay differ visibly."""
    batches = text_batches(12)
    theirs = train_galore(llama(), batches, "std", 0.25, lr=1e-2, weight_decay=0.1, eps=1e-3)
    model = llama()
    optimizer = lingrad.wrap(model, "svd(rank=4, every=7)", lr=1e-2, weight_decay=0.1, scale=0.25, eps=1e-3)
    train(model, optimizer, batches)
    assert gap(optimizer.weights(), theirs) > 1e-6
