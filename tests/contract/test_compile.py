"""torch.compile: whole models in one graph in both modes, with the numbers of eager ones, and few graphs over a run.

The backend aot_eager traces forward and backward as inductor does, and needs no C++ compiler.
"""

from __future__ import annotations

import itertools
import pickle

import pytest
import torch
from torch._dynamo.utils import counters

import lingrad
from lingrad.errors import ModeError
from lingrad.models import LlamaShape, build_llama, next_token_loss

EVERY, STEPS = 4, 10
LR = 0.01
# float64 products in another order: each rounds by 1e-16 of its size, and Adam divides small gradients by small ones
TOLERANCE = 1e-12

SPECS = {
    "random": "random(rank=4, every=4)",
    "left": "random(rank=4, every=4, side=left)",
    "rows": "random(rank=4, every=4, kind=rows)",
    "power": "power(rank=4, every=4)",
    "svd": "svd(rank=4, every=4)",
    "randomized": "svd(rank=4, every=4, solver=randomized)",
    "pca": "pca(rank=4)",
    "both": "power(rank=4, every=4, side=both)",
    "kron": "kron(left=svd(rank=4, every=4), right=random(rank=3, every=2))",
}
each_mode = pytest.mark.parametrize("mode", ["optimizer", "adapter"])


def llama(dtype=torch.float64, layers=1):
    return build_llama(LlamaShape(64, 32, 88, layers, 2, 32), seed=0, dtype=dtype)


def gpt2(dtype=torch.float64):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=64,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        use_cache=False,
    )
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).to(dtype)


MODELS = {"llama": llama, "gpt2": gpt2}


def batches(count):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 64, (count, 2, 8), generator=generator)


def run(
    model,
    mode,
    spec,
    *,
    compiled,
    fullgraph=True,
    steps=STEPS,
    micro=1,
    after=None,
    loss=next_token_loss,
    base="adamw",
    lr=LR,
    **options,
):
    """Train; gives the run's optimizer, its losses and the number of graphs after each step."""
    torch.compiler.reset()
    counters.clear()
    start = {"optimizer": lingrad.wrap, "adapter": lingrad.adapt}[mode]
    optimizer = start(model, spec, base, lr=lr, **options)
    called = torch.compile(model, backend="aot_eager", fullgraph=fullgraph) if compiled else model
    data, losses, graphs = batches(steps * micro), [], []
    for step in range(steps):
        optimizer.zero_grad()
        for ids in data[step * micro : (step + 1) * micro]:
            value = loss(called, ids) / micro
            value.backward()
        losses.append(value.item())
        optimizer.step()
        graphs.append(counters["stats"]["unique_graphs"])
        if after is not None:
            after(optimizer, step)
    return optimizer, losses, graphs


def weights_of(optimizer):
    """Effective weights without GPT-2's key biases: softmax is blind to them, so their gradients are rounding alone."""
    weights = {name: weight.detach().clone() for name, weight in optimizer.weights().items()}
    for name, weight in weights.items():
        if name.endswith("attn.c_attn.bias"):
            weight.chunk(3)[1].zero_()
    return weights


def apart(a, b):
    """The largest difference of the effective weights, relative to the largest weight."""
    first, second = weights_of(a), weights_of(b)
    return max(float((first[k] - second[k]).abs().max() / first[k].abs().max().clamp_min(1e-6)) for k in first)


def far(a, b):
    """The norm of all differences of the effective weights."""
    first, second = weights_of(a), weights_of(b)
    return float(sum((first[k] - second[k]).double().square().sum() for k in first).sqrt())


@pytest.mark.thinned(16)
@pytest.mark.rare(3)
@each_mode
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_one_graph_with_the_numbers_of_eager(mode, spec):
    eager, losses, _ = run(llama(), mode, spec, compiled=False)
    optimizer, found, graphs = run(llama(), mode, spec, compiled=True)
    assert not counters["graph_break"]
    assert apart(eager, optimizer) < TOLERANCE
    assert found == pytest.approx(losses, rel=TOLERANCE)
    assert optimizer.refreshes() == eager.refreshes()
    assert graphs[-1] <= 2 + (spec == SPECS["kron"])  # its two sides are refreshed together and one of them alone
    energies = eager.captured_energy()
    assert optimizer.captured_energy() == pytest.approx(energies, rel=1e-9)


@pytest.mark.slow
@pytest.mark.rare(2)
@each_mode
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_sixty_steps_with_refreshes_a_schedule_and_a_switch(mode, build):
    other = "adapter" if mode == "optimizer" else "optimizer"

    def after(optimizer, step):
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 - step / 60)
        if step == 40:
            optimizer.switch(other)

    options = {"steps": 60, "after": after, "weight_decay": 0.1}
    eager, losses, _ = run(build(), mode, SPECS["power"], compiled=False, **options)
    optimizer, found, graphs = run(build(), mode, SPECS["power"], compiled=True, **options)
    assert graphs[39] == 2
    assert graphs[-1] == 4
    assert found == pytest.approx(losses, rel=TOLERANCE)
    assert apart(eager, optimizer) < TOLERANCE


@pytest.mark.slow
@each_mode
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(mode, reentrant):
    """Reentrant checkpoints are a graph break of torch's own."""

    def checkpointed():
        model = llama()
        model.config.use_cache = False  # else transformers warns of it, which is a graph break
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        return model.train()

    eager, losses, _ = run(checkpointed(), mode, SPECS["power"], compiled=False)
    optimizer, found, _ = run(checkpointed(), mode, SPECS["power"], compiled=True, fullgraph=not reentrant)
    assert found == pytest.approx(losses, rel=TOLERANCE)
    assert apart(eager, optimizer) < TOLERANCE


@pytest.mark.thinned(2)
@each_mode
def test_micro_batches_and_a_shared_basis(mode):
    spec = {"*_proj": "power(rank=4, every=4, side=right)", "*": "none"}
    eager, losses, _ = run(llama(), mode, spec, compiled=False, micro=2, share="input")
    optimizer, found, graphs = run(llama(), mode, spec, compiled=True, micro=2, share="input")
    assert graphs[-1] == 2
    assert found == pytest.approx(losses, rel=TOLERANCE)
    assert apart(eager, optimizer) < TOLERANCE


@pytest.mark.slow
@each_mode
@pytest.mark.parametrize("spec", ["random", "power"])
def test_autocast(mode, spec):
    """Compiled and eager models round to bfloat16 in other places: no farther from float32 than plain layers' products.

    That is for a basis that is drawn: one learned from a gradient of lower rank has directions that rounding decides.
    """

    def loss(model, ids):
        with torch.autocast("cpu", torch.bfloat16):
            return next_token_loss(model, ids)

    options = {"base": "sgd", "lr": 0.1, "momentum": 0.9}  # Adam's step of a gradient near zero is its rounding's sign
    true, _, _ = run(llama(torch.float32), mode, SPECS[spec], compiled=False, **options)
    plain, losses, _ = run(llama(torch.float32), "optimizer", SPECS[spec], compiled=False, loss=loss, **options)
    optimizer, found, graphs = run(llama(torch.float32), mode, SPECS[spec], compiled=True, loss=loss, **options)
    assert graphs[-1] == (1 if spec == "random" else 2)
    assert found == pytest.approx(losses, rel=1e-2)  # bfloat16 has 8 bits
    assert far(true, optimizer) > 0
    if spec == "random":
        assert far(true, optimizer) < 1.5 * far(true, plain)


@pytest.mark.slow
@each_mode
@pytest.mark.parametrize("spec", ["random(rank=4, every=4, store=false)", "power(rank=4, every=4)"])
def test_what_cannot_be_traced_breaks_the_graph_and_is_right(mode, spec):
    """A basis that is drawn at each use, and a run that steps its weights inside the backward."""
    options = {"layerwise": "power" in spec}
    eager, losses, _ = run(llama(), mode, spec, compiled=False, **options)
    optimizer, found, _ = run(llama(), mode, spec, compiled=True, fullgraph=False, **options)
    assert counters["graph_break"]
    assert found == pytest.approx(losses, rel=TOLERANCE)
    assert apart(eager, optimizer) < TOLERANCE
    with pytest.raises(RuntimeError, match="cannot be compiled in one graph with others"):
        run(llama(), mode, spec, compiled=True, **options)


@each_mode
def test_a_compiled_model_that_is_given_is_the_model_itself(mode):
    """Names, and so seeds and checkpoints, are those of the model that was compiled."""
    model = llama()
    optimizer = MODES[mode](torch.compile(model, backend="aot_eager"), "random(rank=4)", "adamw", lr=LR)
    assert optimizer.model is model
    plain = MODES[mode](llama(), "random(rank=4)", "adamw", lr=LR)
    for one, other in zip(plain.subspaces, optimizer.subspaces, strict=True):
        assert one.name == other.name
        assert all(torch.equal(a, b) for a, b in zip(one.map().tensors, other.map().tensors, strict=True))
    plain.load_state_dict(optimizer.state_dict())


@pytest.mark.thinned(2)
@each_mode
def test_a_model_that_is_compiled_in_the_middle_of_a_run(mode):
    """At a step in which every basis is refreshed, which only the trace finds out."""
    eager, _, _ = run(llama(), mode, SPECS["pca"], compiled=False, steps=6)
    torch.compiler.reset()
    model = llama()
    optimizer = {"optimizer": lingrad.wrap, "adapter": lingrad.adapt}[mode](model, SPECS["pca"], "adamw", lr=LR)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for step, ids in enumerate(batches(6)):
        optimizer.zero_grad()
        next_token_loss(compiled if step >= 3 else model, ids).backward()
        optimizer.step()
    assert apart(eager, optimizer) < TOLERANCE


@pytest.mark.slow
@each_mode
def test_evaluation_between_steps(mode):
    model = llama()
    run(model, mode, SPECS["random"], compiled=True, steps=3)
    ids = batches(1)[0]
    with torch.no_grad():
        expected = model(ids).logits
        found = torch.compile(model, backend="aot_eager", fullgraph=True)(ids).logits
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("mode", ["optimizer", pytest.param("adapter", marks=pytest.mark.slow)])
def test_a_basis_that_is_refreshed_between_forward_and_backward(mode):
    """Autograd's own check of versions finds it: the refresh has merged into the weights that the backward reads."""
    torch.compiler.reset()
    model = llama()
    optimizer = {"optimizer": lingrad.wrap, "adapter": lingrad.adapt}[mode](model, "random(rank=4, every=1)", "adamw", lr=LR)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    first, second, third = batches(3)
    next_token_loss(compiled, first).backward()
    optimizer.step()
    optimizer.zero_grad()
    late = next_token_loss(compiled, second)
    next_token_loss(compiled, third).backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


def layers(*sizes, dtype=torch.float64):
    torch.manual_seed(0)
    made = [torch.nn.Linear(n, m, dtype=dtype) for n, m in itertools.pairwise(sizes)]
    return torch.nn.Sequential(*made)


def inputs(count, width, dtype=torch.float64):
    return torch.randn(count, 6, width, dtype=dtype, generator=torch.Generator().manual_seed(1))


MODES = {"optimizer": lingrad.wrap, "adapter": lingrad.adapt}


@each_mode
@pytest.mark.parametrize("spec", ["random(rank=4, every=1)", "power(rank=4, every=1, side=left)"])
def test_a_late_backward_of_a_layer_whose_input_needs_no_gradient(mode, spec):
    torch.compiler.reset()
    model = layers(16, 12)
    optimizer = MODES[mode](model, {"*": spec}, "sgd", lr=0.0)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    first, second = inputs(2, 16)
    compiled(first).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    late = compiled(second).square().mean()
    compiled(first).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


@each_mode
@pytest.mark.parametrize("spec", ["power(rank=4, every=3)", "svd(rank=4, every=3)"])
def test_a_backward_with_chosen_inputs_is_refused_at_a_refresh(mode, spec):
    torch.compiler.reset()
    model = layers(16, 12, 8)
    optimizer = MODES[mode](model, {"*": spec}, "adamw", lr=LR)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    compiled(inputs(1, 16)[0]).square().mean().backward(inputs=params)
    with pytest.raises(ModeError, match="called with inputs="):
        optimizer.step()


@pytest.mark.parametrize("spec", ["power(rank=4, every=3)", pytest.param("svd(rank=4, every=3)", marks=pytest.mark.slow)])
def test_frozen_coordinates(spec):
    weights = []
    for compiles in (False, True):
        torch.compiler.reset()
        model = layers(16, 12, 12, 8)
        optimizer = lingrad.adapt(model, {"*": spec}, "adamw", lr=LR)
        optimizer.subspaces[1].coords.requires_grad_(False)
        called = torch.compile(model, backend="aot_eager", fullgraph=True) if compiles else model
        for x in inputs(7, 16):
            optimizer.zero_grad()
            called(x).square().mean().backward()
            optimizer.step()
        weights.append(optimizer.weights())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=TOLERANCE, atol=TOLERANCE)


@each_mode
def test_blocks_that_are_compiled_one_by_one_share_their_graphs(mode):
    torch.compiler.reset()
    counters.clear()
    model = torch.nn.Sequential(*[layers(8, 8, 8) for _ in range(12)])
    optimizer = MODES[mode](model, {"*": "power(rank=4, every=3)"}, "adamw", lr=LR)
    for block in model:
        block.compile(backend="aot_eager", fullgraph=True)
    for x in inputs(7, 8):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert counters["stats"]["unique_graphs"] <= 4  # the first block's input needs no gradient


def test_a_layer_that_never_gets_a_gradient_does_not_make_others_gather():
    torch.compiler.reset()
    model = layers(8, 8, 8)
    unused = torch.nn.Linear(8, 8, dtype=torch.float64)
    whole = torch.nn.ModuleList([model, unused])
    optimizer = lingrad.wrap(whole, {"*": "svd(rank=4, every=50)"}, "adamw", lr=LR)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for x in inputs(4, 8):
        optimizer.zero_grad()
        compiled(x).square().mean().backward()
        optimizer.step()
    assert not optimizer.attachments[0].layer.gathering.due
    for x in inputs(3, 8):  # it is used from now on, and gets a basis at its second gradient
        optimizer.zero_grad()
        unused(compiled(x)).square().mean().backward()
        optimizer.step()
    assert optimizer.refreshes()["1.weight"] > 0


def test_a_compiled_model_is_pickled_in_a_step_that_gathers():
    torch.compiler.reset()
    model = layers(8, 8)
    optimizer = lingrad.wrap(model, {"*": "pca(rank=4)"}, "adamw", lr=LR)
    (x,) = inputs(1, 8)
    torch.compile(model, backend="aot_eager", fullgraph=True)(x).sum().backward()
    optimizer.step()
    again = pickle.loads(pickle.dumps(model))  # noqa: S301 - our own bytes
    assert torch.equal(again(x), model(x))
