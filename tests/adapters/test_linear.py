"""Where coordinate gradients are born: projected backward, hooks and parametrizations, against the dense gradient."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lingrad
from lingrad.errors import ModeError
from tests.support.models import gap, gpt2, llama, text_batches, text_loss, train, zoo, zoo_batches, zoo_loss
from tests.support.runs import MODES, each_mode
from tests.support.watch import NoTensorOfShape


def linear(bias=True, dtype=torch.float64, m=6, n=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(n, m, bias=bias)).to(dtype)


def at_step_one(optimizer, model, x):
    """Past the first refresh, with coordinates that are not zero in adapter mode."""
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def dense_gradient(optimizer, layer, x, loss, weight):
    """The gradient of the weight the forward acts with, by plain autograd."""
    weight = weight.detach().clone().requires_grad_()
    loss(nn.functional.linear(x, weight, layer.bias)).backward()
    return weight.grad


@each_mode
@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_coordinate_gradient_is_the_projection_of_the_dense_one(mode, side, shape, bias):
    model = linear(bias)
    optimizer = MODES[mode](model, f"svd(rank=3, side={side})", "sgd", lr=0.1)
    (sub,) = optimizer.subspaces
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    at_step_one(optimizer, model, x)
    assert (mode == "adapter") == bool(sub.coords.any())
    x.grad = None

    expected = dense_gradient(optimizer, model[0], x, lambda y: y.square().sum(), optimizer.weights()["0.weight"])
    x_grad, x.grad = x.grad, None
    model(x).square().sum().backward()
    torch.testing.assert_close(sub.coords.grad, sub.map().project(expected), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, x_grad, rtol=1e-12, atol=1e-12)
    assert model[0].weight.grad is None


@each_mode
@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_no_full_gradient_is_ever_made_off_refresh_steps(mode, side, build):
    model = build()
    optimizer = MODES[mode](model, f"svd(rank=4, every=7, side={side})", lr=1e-2)
    batches = text_batches(2, rows=1)  # of so few tokens that adapter mode applies S z rather than forms it
    train(model, optimizer, batches[:1], schedule=False)
    shapes = [sub.weight.layout.shape for sub in optimizer.subspaces]
    optimizer.zero_grad()
    with NoTensorOfShape(shapes) as watch:
        for batch in batches[1]:
            text_loss(model, batch).backward()
    assert watch.found == []
    assert all(a.sub.weight.param.grad is None for a in optimizer.attachments)


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_in_adapter_mode_with_many_tokens_the_only_matrices_are_w_plus_s_z(side, build):
    """Formed in the forward and again in the backward of each layer, by one addmm; never two at once."""
    model = build()
    optimizer = lingrad.adapt(model, f"svd(rank=4, every=7, side={side})", lr=1e-2)
    batches = text_batches(2, micro=1, rows=9)
    train(model, optimizer, batches[:1], schedule=False)
    optimizer.zero_grad()
    with NoTensorOfShape([sub.weight.layout.shape for sub in optimizer.subspaces]) as watch:
        text_loss(model, batches[1][0]).backward()
    assert {name for name, _ in watch.found} == {"aten::addmm"}
    assert len(watch.found) == 2 * len(optimizer.subspaces)
    assert watch.most_alive == 1


def test_the_watch_sees_a_full_gradient():
    """The check above can fail: full-rank training makes one for every layer."""
    model = llama()
    shapes = [m.weight.shape for m in model.modules() if isinstance(m, nn.Linear)]
    with NoTensorOfShape(shapes) as watch:
        text_loss(model, text_batches(1)[0][0]).backward()
    assert len(watch.found) >= len(shapes)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_what_a_layer_saves_for_backward(side):
    """A right map keeps r numbers a token, a left map the input itself."""
    model = linear(bias=False, m=40, n=50)
    optimizer = lingrad.wrap(model, f"svd(rank=3, side={side})", "sgd", lr=0.1)
    x = torch.randn(7, 50, dtype=torch.float64, requires_grad=True)
    at_step_one(optimizer, model, x)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        model(x)
    assert saved == [(7, 50 if side == "left" else 3), (40, 50)]  # what we need of the input, and the frozen weight itself


@each_mode
def test_a_layer_used_twice_and_changed_in_place_afterwards(mode):
    model = linear(m=8, n=8)
    optimizer = MODES[mode](model, "svd(rank=3, every=2)", "sgd", lr=0.1)
    (sub,) = optimizer.subspaces
    x = torch.randn(5, 8, dtype=torch.float64)

    def loss(layer):
        return nn.functional.relu(layer(nn.functional.relu(layer(x), inplace=True)), inplace=True).square().sum()

    for _ in range(4):  # on and off refresh steps
        weight = optimizer.weights()["0.weight"].detach().clone().requires_grad_()
        bias = model[0].bias.detach()
        loss(lambda y, w=weight, b=bias: nn.functional.linear(y, w, b)).backward()
        optimizer.zero_grad()
        loss(model).backward()
        torch.testing.assert_close(sub.coords.grad, sub.map().project(weight.grad), rtol=1e-12, atol=1e-12)
        if sub.basis.due:
            torch.testing.assert_close(sub.pending.total.dense(), weight.grad, rtol=1e-12, atol=1e-12)
        optimizer.step()


@each_mode
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(mode, reentrant):
    gradients = []
    for checkpointed in (False, True):
        model = linear(m=8, n=8)
        optimizer = MODES[mode](model, "svd(rank=3, every=3)", "sgd", lr=0.1)
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
        for _ in range(4):
            optimizer.zero_grad()
            hidden = checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)
            hidden.tanh().sum().backward()
            optimizer.step()
        gradients.append(optimizer.subspaces[0].coords.grad)
        assert optimizer.subspaces[0].basis.refreshes == 2
    assert torch.equal(*gradients)


@each_mode
def test_autocast_computes_as_the_layer_does(mode):
    model = linear(dtype=torch.float32)
    optimizer = MODES[mode](model, "svd(rank=3, side=both)", "sgd", lr=0.01)
    (sub,) = optimizer.subspaces
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        assert sub.coords.grad.dtype == torch.float32
        weight = optimizer.weights()["0.weight"].detach().clone().requires_grad_()
        nn.functional.linear(x, weight, model[0].bias).square().sum().backward()
        # bfloat16 carries 8 bits: sums of five products agree to a few per cent of the largest entry
        torch.testing.assert_close(
            sub.coords.grad, sub.map().project(weight.grad), rtol=0, atol=0.05 * float(weight.grad.norm())
        )
        optimizer.step()


def test_optimizer_mode_forward_is_the_plain_layer_to_the_bit():
    plain, model = llama(torch.float32), llama(torch.float32)
    optimizer = lingrad.wrap(model, "svd(rank=4)", lr=1e-2)
    ids = text_batches(1)[0][0]
    assert torch.equal(model(ids).logits, plain(ids).logits)
    train(model, optimizer, text_batches(3))
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)


@each_mode
def test_evaluation_and_inference_leave_no_trace(mode):
    model = linear()
    optimizer = MODES[mode](model, "svd(rank=3, every=1)", "sgd", lr=0.1)
    x = torch.randn(5, 8, dtype=torch.float64)
    at_step_one(optimizer, model, x)
    expected = nn.functional.linear(x, optimizer.weights()["0.weight"], model[0].bias)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            torch.testing.assert_close(model.eval()(x), expected, rtol=1e-12, atol=1e-12)
    assert optimizer.subspaces[0].pending.total is None


def test_a_layer_called_with_keywords():
    model = linear()
    optimizer = lingrad.wrap(model, "svd(rank=3)", "sgd", lr=0.1)
    model[0](input=torch.ones(2, 8, dtype=torch.float64)).sum().backward()
    assert optimizer.subspaces[0].coords.grad is not None


@each_mode
def test_hooks_that_others_registered_see_the_layer_s_output(mode):
    """A hook that changes the output changes the gradient of the weight too, whether it came before us or after."""
    weights = []
    for wrapped in (False, True):
        model = linear()
        model[0].register_forward_hook(lambda module, args, out: 3 * out)
        optimizer = MODES[mode](model, "full()", "sgd", lr=0.01) if wrapped else torch.optim.SGD(model.parameters(), lr=0.01)
        model[0].register_forward_hook(lambda module, args, out: out.tanh())
        for seed in range(3):
            optimizer.zero_grad()
            x = torch.randn(5, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            model(x).square().sum().backward()
            optimizer.step()
        weights.append(optimizer.weights() if wrapped else dict(model.named_parameters()))
    assert gap(*weights) <= 1e-12


@each_mode
def test_unfreezing_the_whole_model_brings_back_no_full_gradient(mode):
    """model.requires_grad_(False) and back, as programs do around an evaluation: what trains then are the coordinates."""
    model = linear()
    optimizer = MODES[mode](model, "svd(rank=3)", "sgd", lr=0.1)
    x = torch.randn(5, 8, dtype=torch.float64)
    at_step_one(optimizer, model, x)
    model.requires_grad_(False)
    assert not model(x).requires_grad
    model.requires_grad_(True)
    model(x).square().sum().backward()
    assert model[0].weight.grad is None
    assert optimizer.subspaces[0].coords.grad.any()


@each_mode
def test_a_backward_that_asks_for_other_gradients_is_not_counted(mode):
    model = linear()
    optimizer = MODES[mode](model, "svd(rank=3)", "sgd", lr=0.1)
    (sub,) = optimizer.subspaces
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    model(x).square().sum().backward()
    once = sub.pending.total.dense().clone()
    torch.autograd.grad(model(x).square().sum(), [x])
    torch.autograd.grad(model(x).square().sum(), [x, sub.coords])
    assert torch.equal(sub.pending.total.dense(), once)
    model(x).square().sum().backward()
    torch.testing.assert_close(sub.pending.total.dense(), 2 * once, rtol=1e-12, atol=1e-12)


def test_a_map_that_reads_no_gradient_keeps_none():
    """Its refresh happens before the forward: no step forms or keeps a gradient, not even the first."""
    model = linear()
    optimizer = lingrad.wrap(model, "random(rank=3, every=2)", "sgd", lr=0.1)
    (sub,) = optimizer.subspaces
    for step in range(5):
        basis = sub.map().tensors[0].clone()
        with NoTensorOfShape([(6, 8)]) as watch:
            model(torch.randn(5, 8, dtype=torch.float64)).square().sum().backward()
        assert watch.found == []
        assert sub.pending.total is None
        optimizer.step()
        assert sub.basis.refreshes == 1 + (step + 1) // 2
        assert torch.equal(sub.map().tensors[0], basis) == ((step + 1) % 2 != 0)
        optimizer.zero_grad()


def test_a_buffer_filled_again_between_micro_batches():
    """On a refresh step the input is kept until step; an input that belongs to the caller must be copied."""
    totals = []
    for reuse in (True, False):
        model = linear()
        optimizer = lingrad.wrap(model, "svd(rank=3)", "sgd", lr=0.1)
        buffer = torch.ones(1, 8, dtype=torch.float64)
        for value in (1.0, 2.0):
            x = buffer.fill_(value) if reuse else torch.full_like(buffer, value)
            model(x).square().sum().backward()
        totals.append(optimizer.subspaces[0].pending.total.dense())
    assert torch.equal(*totals)


def test_a_refresh_between_forward_and_backward_is_refused():
    model = linear()
    optimizer = lingrad.wrap(model, "svd(rank=3, every=1)", "sgd", lr=0.1)
    x = torch.randn(5, 8, dtype=torch.float64)
    late = model(x).sum()
    at_step_one(optimizer, model, x)
    with pytest.raises(ModeError, match="the basis of 0.weight was refreshed between this forward and its backward"):
        late.backward()


def test_second_derivatives_are_refused():
    model = linear()
    lingrad.wrap(model, "svd(rank=3)", "sgd", lr=0.1)
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@each_mode
def test_other_weights_free_their_gradient(mode):
    """Hooks project and free; in adapter mode the dense gradient does not outlive the backward of its layer."""
    model = zoo()
    rules = dict.fromkeys(("embed", "conv", "experts"), "svd(rank=3, every=9)")
    optimizer = MODES[mode](model, rules, "sgd", lr=0.1)
    train(model, optimizer, zoo_batches(2), zoo_loss, schedule=False)
    optimizer.zero_grad()
    zoo_loss(model, zoo_batches(1)[0][0]).backward()
    for attachment in optimizer.attachments:
        assert attachment.sub.weight.param.grad is None
        assert attachment.sub.coords.grad is not None
        assert attachment.sub.pending.total is None


@each_mode
def test_sparse_embedding_gradients(mode):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 2)).double()
    optimizer = MODES[mode](model, {"0": "svd(rank=2)"}, "sgd", lr=0.1)
    ids = torch.tensor([1, 1, 5])
    model(ids).square().sum().backward()
    dense = nn.Embedding(9, 4, _weight=optimizer.weights()["0.weight"].detach().clone())
    model[1](dense(ids)).square().sum().backward()
    torch.testing.assert_close(optimizer.subspaces[0].pending.total.dense(), dense.weight.grad)


def test_an_embedding_that_rescales_its_rows_stays_in_optimizer_mode():
    model = nn.Sequential(nn.Embedding(9, 4, max_norm=1.0), nn.Linear(4, 2))
    with pytest.raises(
        ModeError, match=r"0.weight is an embedding with max_norm.* Use optimizer mode, or leave this weight out"
    ):
        lingrad.adapt(model, {"0": "svd(rank=2)"}, "sgd", lr=0.1)
    optimizer = lingrad.wrap(model, {"0": "svd(rank=2)"}, "sgd", lr=0.1)
    with pytest.raises(ModeError, match="max_norm"):
        optimizer.switch("adapter")
    assert optimizer.mode == "optimizer"


@each_mode
def test_other_weights_belong_to_the_model_like_any_parameter(mode):
    """zero_grad, clipping, casting and freezing of the model reach coordinates wherever their gradient is born."""
    model = zoo()
    optimizer = MODES[mode](model, {"*": "svd(rank=1, every=9)"}, "sgd", lr=0.1)
    train(model, optimizer, zoo_batches(2), zoo_loss, schedule=False)
    optimizer.zero_grad()
    zoo_loss(model, zoo_batches(1)[0][0]).backward()
    coords = [sub.coords for sub in optimizer.subspaces]
    grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
    norm = torch.stack([g.norm() for g in grads]).norm()
    torch.testing.assert_close(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]), norm)
    model.zero_grad()
    assert all(c.grad is None for c in coords)
    model.requires_grad_(False)
    other = "adapter" if mode == "optimizer" else "optimizer"
    optimizer.switch(other)
    assert not any(p.requires_grad for p in model.parameters())
    optimizer.detach()
    assert not any(p.requires_grad for p in model.parameters())


def test_two_transformed_weights_of_one_module():
    model = nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True)).double()
    optimizer = lingrad.adapt(model, {"*in_proj_weight": "svd(rank=2)", "*out_proj.weight": "svd(rank=2)"}, "sgd", lr=0.1)
    names = list(nn.Sequential(nn.MultiheadAttention(8, 2)).state_dict())
    x = torch.randn(1, 3, 8, dtype=torch.float64)
    model[0](x, x, x)[0].square().sum().backward()
    optimizer.step()
    optimizer.detach()
    assert list(model.state_dict()) == names

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.eye(4)), nn.Parameter(torch.eye(4))

    pair = Pair()
    optimizer = lingrad.adapt(pair, {"*": "svd(rank=2)"}, "sgd", lr=0.1)
    optimizer.switch("optimizer")
    optimizer.detach()
    assert list(pair.state_dict()) == ["a", "b"]


@pytest.mark.slow
@each_mode
@pytest.mark.parametrize("build", [lambda: llama(torch.float32), zoo])
def test_compiled_models_train_alike(mode, build):
    """torch.compile breaks its graph at each tie; the aot_eager backend traces as the others do, without a C++ compiler."""
    batches, loss = (zoo_batches(6), zoo_loss) if build is zoo else (text_batches(6), text_loss)
    weights = []
    for compiled in (False, True):
        model = build()
        optimizer = MODES[mode](model, {"*": "svd(rank=1, every=4)"}, "sgd", lr=0.1)
        train(torch.compile(model, backend="aot_eager") if compiled else model, optimizer, batches, loss, schedule=False)
        assert {sub.basis.refreshes for sub in optimizer.subspaces} == {2}
        weights.append(optimizer.weights())
    # fused kernels of the traced graph round differently from the eager ones
    assert gap(*weights) <= 1e-5
