"""layerwise="coordinates": a basis is chosen inside the backward, so that no whole gradient waits for the step."""

import copy

import pytest
import torch
from torch import nn

import lingrad
from lingrad import memory
from lingrad.errors import SpecError
from lingrad.models import LlamaShape, build_llama
from tests.support.models import gap, llama, text_batches, text_loss, zoo, zoo_batches, zoo_loss
from tests.support.runs import MODES

SPECS = (
    "svd(rank=4, every=3)",
    "svd(rank=4, every=2, side=both, solver=gram)",
    "kron(left=svd(rank=4, every=2), right=random(rank=4, every=3))",
    "power(rank=4, every=2)",
    "coded(each=svd(rank=4, every=2), bits=4)",
)


def trained(build, batches, loss, mode, spec, layerwise, *, clip=None, **options):
    model = build()
    optimizer = MODES[mode](model, spec, lr=1e-2, layerwise=layerwise, weight_decay=0.1, **options)
    for micro in batches:
        for batch in micro:
            (loss(model, batch) / len(micro)).backward()
        if clip is not None:
            optimizer.clip_grad_norm_(clip)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer.weights()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("model", ["llama", "zoo"])
@pytest.mark.thinned(4)
def test_with_one_backward_a_step_it_is_any_other_run(model, spec, clip, mode):
    build, batches, loss = {
        "llama": (llama, text_batches(7, micro=1), text_loss),
        "zoo": (zoo, zoo_batches(7, micro=1), zoo_loss),
    }[model]
    spec = spec.replace("rank=4", "rank=4, clip=true")
    one, other = (
        trained(build, batches, loss, mode, spec, layerwise, clip=clip, carry="rotate") for layerwise in ("coordinates", False)
    )
    assert gap(one, other) <= 1e-12


@pytest.mark.parametrize("mode", MODES)
def test_the_first_backward_of_a_step_chooses_the_basis_and_all_of_them_are_stepped(mode):
    """Against AdamW on coordinates with the basis of the first gradient, written out."""
    torch.manual_seed(0)
    batches = [[torch.randn(20, 12, dtype=torch.float64) for _ in range(3)] for _ in range(7)]
    start = torch.randn(10, 12, dtype=torch.float64)

    def loss(weight, x):
        return (x @ weight.t()).square().sum() / len(x)

    weight, coords = start.clone(), nn.Parameter(torch.zeros(4, 12, dtype=torch.float64))
    plain, basis = torch.optim.AdamW([coords], lr=1e-2, weight_decay=0.0), torch.zeros(10, 4, dtype=torch.float64)
    for step, micro in enumerate(batches):
        grads = [2 * (x @ weight.t()).t() @ x / len(x) / 3 for x in micro]
        if step % 3 == 0:
            found = torch.linalg.svd(grads[0])[0][:, :4]
            basis = found if step == 0 else found * torch.where((found * basis).sum(0) < 0, -1.0, 1.0)
        coords.grad = basis.t() @ sum(grads)
        plain.step()
        weight = weight + basis @ coords.detach()
        coords.data.zero_()
    model = nn.Linear(12, 10, bias=False).double()
    model.weight.data.copy_(start)
    optimizer = MODES[mode](model, {"*": "svd(rank=4, every=3, side=left)"}, lr=1e-2, layerwise="coordinates")
    for micro in batches:
        for x in micro:
            (model(x).square().sum() / len(x) / 3).backward()
        optimizer.step()
        optimizer.zero_grad()
    # the first signs are free, and Adam's steps follow them
    assert gap(optimizer.weights(), {"weight": weight}) <= 1e-12


def test_one_whole_gradient_at_a_time_at_a_refresh():
    shape = LlamaShape(64, 256, 688, 4, 4, 32)
    found = {}
    for layerwise in (False, "coordinates", True):
        report = memory.simulate(
            lambda: build_llama(shape, seed=0),
            "svd(rank=4)",
            layerwise=layerwise,
            batch=8,
            length=32,
            device="cpu",
            lr=1e-3,
            dtype=torch.float32,
            checkpointing=True,
        )
        found[layerwise] = report.by_step[0]
    whole = 4 * (4 * 256 * 256 + 3 * 256 * 688)  # bytes of the gradients of one layer
    peak = {layerwise: sum(step.values()) for layerwise, step in found.items()}
    assert peak["coordinates"] <= peak[False] - 2.5 * whole  # of four layers
    # beyond what steps inside the backward, the gradients of embeddings, head, norms and coordinates wait
    assert peak["coordinates"] - peak[True] <= 2 * 4 * 64 * 256 + 4 * 4 * (4 * 4 * 256 + 3 * 4 * 688) + 4 * 9 * 256 + 4096


@pytest.mark.parametrize("mode", MODES)
def test_a_scaled_loss_whose_first_step_overflows(mode):
    def run(layerwise):
        model = llama()
        optimizer = MODES[mode](model, "svd(rank=4, every=3)", lr=1e-2, layerwise=layerwise)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        for step, ((batch,),) in enumerate(zip(text_batches(6, micro=1), strict=True)):
            loss = scaler.scale(text_loss(model, batch))
            with pytest.warns(RuntimeWarning) if step == 0 else _nothing():
                (loss * torch.inf if step == 0 else loss).backward()
                scaler.unscale_(optimizer)
                optimizer.clip_grad_norm_(0.5)
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return optimizer.weights()

    assert gap(run("coordinates"), run(False)) <= 1e-12


class _nothing:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


def test_resumed_after_a_refresh():
    batches = text_batches(8, micro=2)

    def go(model, optimizer, part):
        for micro in part:
            for batch in micro:
                (text_loss(model, batch) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()

    make = lambda model: lingrad.wrap(model, "svd(rank=4, every=3)", lr=1e-2, layerwise="coordinates")  # noqa: E731
    model = llama()
    optimizer = make(model)
    go(model, optimizer, batches[:4])
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    go(model, optimizer, batches[4:])
    other = llama()
    resumed = make(other)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    go(other, resumed, batches[4:])
    assert gap(optimizer.weights(), resumed.weights()) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layerwise": "coords"}, "layerwise must be True, False or 'coordinates', not 'coords'"),
        ({"layerwise": "coordinates", "residual": "sign"}, "reads whole gradients in the step"),
        ({"layerwise": "coordinates", "share": "input"}, "layerwise='coordinates' takes one after the other"),
    ],
)
def test_what_does_not_fit(options, message):
    with pytest.raises(SpecError, match=message):
        lingrad.wrap(llama(), "svd(rank=4)", lr=1e-3, **options)
