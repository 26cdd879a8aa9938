"""Baselines that are written out in the package, against the papers' formulas in plain torch, in float64."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lingrad.errors import SpecError
from lingrad.methods import baseline
from lingrad.methods.apollo import ScaledGradients
from tests.support.models import gpt2, llama, text_batches, text_loss

ADAM = 1e-8  # Adam divides rounding errors of gradients, some 1e-15, by eps, 1e-8, at each of the steps; times LR
LR = 1e-2


def losses(model_of, steps):
    """For each step the loss of the weights that ``model_of`` gives then."""
    for i, (batch,) in enumerate(text_batches(steps, micro=1)):
        torch.manual_seed(100 + i)  # of the factors that the step draws
        yield text_loss(model_of(), batch)


class WithWeights:
    """A model called with some of its weights replaced."""

    def __init__(self, model, weights):
        self.model, self.weights = model, weights

    def __call__(self, *args, **kwargs):
        return functional_call(self.model, self.weights, args, kwargs)


def adam_step(param, grad, state, step):
    """Adam of Kingma and Ba with the defaults of torch."""
    state["m"] = 0.9 * state["m"] + 0.1 * grad
    state["v"] = 0.999 * state["v"] + 0.001 * grad.square()
    update = state["m"] / (1 - 0.9**step) / ((state["v"] / (1 - 0.999**step)).sqrt() + 1e-8)
    with torch.no_grad():
        param -= LR * update


def pruned(moment, share):
    """Without the smallest entries, by sorting in pure Python."""
    flat = moment.flatten().tolist()
    smallest = sorted(range(len(flat)), key=lambda i: abs(flat[i]))[: math.floor(share * len(flat))]
    for i in smallest:
        flat[i] = 0.0
    return torch.tensor(flat, dtype=moment.dtype).view_as(moment)


@pytest.mark.parametrize("prune", [0.9, 1.0])
def test_relora_by_hand(prune):
    """Lialin et al., arXiv 2307.05695, algorithm 1: W + B A, merged and drawn again in every second of five steps."""
    pytest.importorskip("peft")
    rank, small = 3, {"num_hidden_layers": 1}
    torch.manual_seed(1)
    training = baseline("relora", rank=rank, every=2, prune=prune, lr=LR, weight_decay=0.0).prepare(llama(**small))

    plain = llama(**small)
    layers = [f"{name}.weight" for name, module in plain.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    weights = {name: param.detach().clone() for name, param in plain.named_parameters()}
    own = dict(training.model.named_parameters())
    start = {name: own[f"base_model.model.{name.removesuffix('.weight')}.lora_A.default.weight"] for name in layers}
    a = {name: start[name].detach().clone().requires_grad_() for name in layers}
    b = {name: torch.zeros(len(weights[name]), rank, dtype=torch.float64, requires_grad=True) for name in layers}
    full = {name: weights[name].requires_grad_() for name in weights if name not in layers}
    trained = [*a.values(), *b.values(), *full.values()]
    states = {param: {"m": torch.zeros_like(param), "v": torch.zeros_like(param)} for param in trained}

    def effective():
        return {name: weights[name] + b[name] @ a[name] if name in layers else weights[name] for name in weights}

    for step, loss in enumerate(losses(lambda: WithWeights(plain, effective()), 5), 1):
        for param, grad in zip(trained, torch.autograd.grad(loss, trained), strict=True):
            adam_step(param, grad, states[param], step)
        if step % 2 == 0:
            with torch.no_grad():
                for name in layers:
                    weights[name] = weights[name] + b[name] @ a[name]
                    bound = 1 / math.sqrt(a[name].shape[1])  # kaiming_uniform_ of a = sqrt(5)
                    a[name].uniform_(-bound, bound)
                    b[name].zero_()
                    for param in (a[name], b[name]):
                        states[param] = {key: pruned(moment, prune) for key, moment in states[param].items()}

    for loss in losses(lambda: training.model, 5):
        training.zero_grad()
        loss.backward()
        training.step()
    model = training.model.merge_and_unload()
    expected = effective()
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.detach(), expected[name].detach(), rtol=0, atol=ADAM)
        assert float((param - dict(llama(**small).named_parameters())[name]).detach().norm()) > 1e-3  # it trains


@pytest.mark.parametrize("build", [llama, gpt2])
def test_scale_by_hand(build):
    """Glentis et al., arXiv 2506.16659, algorithm 1, with columns of W [in, out]; vectors by AdamW."""
    model, plain = build(), build()
    training = baseline("scale", lr=LR, weight_decay=0.1, momentum=0.8).prepare(model)
    head = plain.get_output_embeddings().weight
    mean, states = torch.zeros_like(head), {}
    for step, loss in enumerate(losses(lambda: plain, 4), 1):
        params = list(plain.parameters())
        for param, grad in zip(params, torch.autograd.grad(loss, params), strict=True):
            with torch.no_grad():
                param *= 1 - LR * 0.1
            if param.dim() < 2:
                state = states.setdefault(param, {"m": torch.zeros_like(param), "v": torch.zeros_like(param)})
                adam_step(param, grad, state, step)
                continue
            if param is head:
                mean = 0.8 * mean + 0.2 * grad
                grad = mean
            owners = [module for module in plain.modules() if param in set(module._parameters.values())]
            stored_in_out = any(isinstance(owner, nn.Embedding) or type(owner).__name__ == "Conv1D" for owner in owners)
            columns = grad if stored_in_out else grad.t()  # [in, out]
            sizes = [max(math.sqrt(sum(float(x) ** 2 for x in column) / len(column)), 1e-8) for column in columns.t()]
            step_of = columns / torch.tensor(sizes, dtype=torch.float64)
            with torch.no_grad():
                param -= LR * (step_of if stored_in_out else step_of.t())
    for loss in losses(lambda: model, 4):
        training.zero_grad()
        loss.backward()
        training.step()
    for ours, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.detach(), expected.detach(), rtol=0, atol=ADAM)
    kept = [param for optimizer in training.optimizers for param in optimizer.state if param.dim() > 1]
    assert len(kept) == 1
    assert kept[0] is model.get_output_embeddings().weight


@pytest.mark.parametrize("mini", [False, True])
@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_apollo(shape, mini):
    """Algorithm 1 with its limit on growth, in columns of a weight that is wider than tall."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    rank, lr, every, steps = (1 if mini else 3), 0.1, 4, 9
    optimizer = ScaledGradients([weight], lr, rank=rank, whole=mini, scale=2.0, every=every, weight_decay=0.01, seed=5)
    turn = shape[0] > shape[1]
    expected = (weight.detach().T if turn else weight.detach()).clone()
    m = v = torch.zeros(rank, 10, dtype=torch.float64)
    before = None
    limited = 0
    for t in range(1, steps + 1):
        grad = torch.randn(6, 10, dtype=torch.float64) * 1.5**t
        if (t - 1) % every == 0:
            draw = torch.Generator().manual_seed(5 + 104729 * ((t - 1) // every))
            p = torch.randn(rank, 6, generator=draw).double() / rank**0.5
        r = p @ grad
        m, v = 0.9 * m + 0.1 * r, 0.999 * v + 0.001 * r**2
        stepped = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        if mini:
            scaled = grad * (stepped.norm() / r.norm())
        else:
            scaled = torch.stack([grad[:, j] * stepped[:, j].norm() / r[:, j].norm() for j in range(10)], dim=1)
        if before is not None and scaled.norm() > 1.01 * before:
            scaled, limited = scaled * (1.01 * before / scaled.norm()), limited + 1
        before = scaled.norm()
        expected = (1 - lr * 0.01) * expected - lr * 2.0 * scaled
        weight.grad = (grad.T if turn else grad).contiguous()
        optimizer.step()
        assert torch.allclose(weight.detach(), expected.T if turn else expected, rtol=0, atol=1e-12)
    assert 0 < limited < steps - 1  # both are seen


def test_apollo_mini_steps_linear_layers_by_one_scale_and_stores_little():
    model = llama(torch.float32)
    low, rest = baseline("apollo_mini", lr=1e-2, every=7).prepare(model).optimizers
    (group,) = low.param_groups
    assert (group["whole"], group["rank"], group["every"], group["scale"]) == (True, 1, 7, 128.0**0.5)
    stepped = {id(p) for optimizer in (low, rest) for g in optimizer.param_groups for p in g["params"]}
    assert stepped == set(map(id, model.parameters()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every of APOLLO must be a whole number, 1 or more, not 0"),
        ({"scale": -1.0}, "scale of APOLLO must be above 0"),
    ],
)
def test_what_apollo_refuses(options, message):
    with pytest.raises(SpecError, match=message):
        baseline("apollo_mini", **options).prepare(llama(torch.float32))
