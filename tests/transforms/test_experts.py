"""Fused experts: a config string alone means them, each with a basis of its own."""

import pytest
import torch
from torch import nn

import lingrad
from lingrad.config import spec
from lingrad.errors import ShapeError, SpecError
from lingrad.gradients.local import DenseGradient
from lingrad.maps import BatchedMap, StackedMap
from lingrad.subspaces import trees
from lingrad.tensors import distinct
from lingrad.testing.training import token_batches, token_loss
from lingrad.transforms import Experts, When
from lingrad.transforms.linalg import derive_seed
from lingrad.weights.layout import fused_experts
from tests.support.models import gap, three_ways, train, zoo

EACH = (
    "svd(rank=2, every=3)",
    "svd(rank=2, every=3, side=both)",
    "power(rank=2, every=3)",
    "pca(rank=2)",
    "random(rank=2, every=3)",
    "random(rank=2, every=3, kind=rows)",
    "random(rank=2, every=3, store=false)",
    "kron(left=svd(rank=2, every=3), right=random(rank=2, every=2, kind=rows))",
    "full()",
)
CPU = torch.device("cpu")
EXACT = 1e-12  # the modes add up in another order: 1e-16 a step, amplified by the inverse of singular gaps


class Routed(nn.Module):
    """Three experts in one parameter; a row of ids is sent to the expert that its first token names."""

    def __init__(self, stacked=True):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 12)
        self.head = nn.Linear(10, 20, bias=False)
        weights = torch.randn(3, 10, 12).double() / 4
        self.num_experts, self.stacked = 3, stacked
        if stacked:
            self.experts = _Fused(weights)
        else:
            self.experts = nn.ModuleList([nn.Linear(12, 10, bias=False) for _ in weights])
            for expert, weight in zip(self.experts, weights, strict=True):
                expert.weight = nn.Parameter(weight.clone())
        self.double()

    def forward(self, ids):
        x, to = self.embed(ids).mean(1), ids[:, 0] % self.num_experts
        outs = [
            out * (to == e)[:, None] for e, out in enumerate(self.experts(x) if self.stacked else [e(x) for e in self.experts])
        ]
        return self.head(sum(outs).tanh())


class _Fused(nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.weight = nn.Parameter(weights)

    def forward(self, x):
        return [x @ weight.t() for weight in self.weight]


@pytest.mark.parametrize("carry", ["keep", "rotate"])
@pytest.mark.parametrize("each", EACH)
def test_the_modes_are_equal(each, carry):
    options = {"lr": 1e-2, "eps": 1e-4, "weight_decay": 0.1, "carry": carry}
    found = three_ways(zoo, each, "adamw", token_batches(5), token_loss, switches=(1, 3), **options)
    one, *others = found
    assert gap(one, {name: p.detach() for name, p in zoo().named_parameters()}) > 1e-4
    assert all(gap(one, other) <= EXACT for other in others)


@pytest.mark.parametrize("mode", ["optimizer", "adapter"])
def test_it_trains_as_layers_of_their_own_do(mode):
    """SVD depends on no seed, and rows of every expert are in each batch: the same run as on one Linear for each expert."""
    batches = [[torch.cat([ids, ids + 1, ids + 2]) % 18] for (ids,) in token_batches(6, micro=1)]
    weights = []
    for stacked in (True, False):
        model = Routed(stacked)
        make = lingrad.wrap if mode == "optimizer" else lingrad.adapt
        opt = make(model, "svd(rank=3, every=2)", lr=1e-2)
        assert len(opt.subspaces) == (1 if stacked else 3)
        train(model, opt, batches, token_loss)
        opt.detach()
        made = model.experts.weight if stacked else torch.stack([e.weight for e in model.experts])
        weights.append(made.detach())
    assert float((weights[0] - weights[1]).norm() / weights[1].norm()) <= EXACT


def test_an_expert_without_tokens_keeps_its_basis_and_its_weights():
    model = Routed()
    before = model.experts.weight.detach().clone()
    opt = lingrad.wrap(model, "svd(rank=3, every=1)", lr=1e-2)
    first = opt.subspaces[0].map().left.clone()
    ids = torch.tensor([[0, 5, 7], [3, 1, 1], [1, 2, 3]])  # none to the third expert
    for _ in range(2):
        opt.zero_grad()
        token_loss(model, ids).backward()
        opt.step()
    changed = [not torch.equal(*pair) for pair in zip(opt.subspaces[0].map().left, first, strict=True)]
    assert changed == [True, True, False]
    assert [not torch.equal(*pair) for pair in zip(model.experts.weight, before, strict=True)] == [True, True, False]
    assert opt.subspaces[0].basis.state.refreshes.of == {"0": 2, "1": 2, "2": 0}


@pytest.mark.parametrize("each", EACH)
def test_each_block_is_what_its_transform_makes_of_its_own_gradient(each):
    transform, shape = spec.parse(f"experts(each={each}, count=3)"), (21, 5)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    state = transform.init(shape, seed=3, device=CPU, dtype=grad.dtype)
    none = transform.reads == "nothing"
    state = transform.refresh(state, None if none else DenseGradient(grad), When(0, 0, 3, shape))
    smap = transform.map(state)
    assert isinstance(smap, StackedMap if "rows" in each else BatchedMap)
    projected = smap.project(grad)
    assert projected.shape == transform.coords_shape(shape)
    one = transform.each
    for e, (block, found) in enumerate(zip(grad.chunk(3), projected.chunk(3), strict=True)):
        seed = derive_seed(3, "expert", e)
        own = one.init((7, 5), seed=seed, device=CPU, dtype=grad.dtype)
        own = one.refresh(own, None if none else DenseGradient(block), When(0, 0, seed, (7, 5)))
        torch.testing.assert_close(found, one.map(own).project(block), rtol=0, atol=1e-13)  # sums of 7 products
    held = distinct([*trees.tensors(state), *(smap.tensors if transform.stores_map else ())])
    held = sum(t.untyped_storage().nbytes() for t in held)
    assert held == sum(s.nbytes for s in transform.storage(shape, grad.dtype))


def test_a_run_resumes_bit_for_bit(tmp_path):
    batches = token_batches(6)
    weights = []
    for stop in (False, True):
        model = zoo()
        opt = lingrad.wrap(model, "random(rank=2, every=2)", lr=1e-2)
        train(model, opt, batches[:3], token_loss, schedule=False)
        if stop:
            torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "s.pt")
            saved = torch.load(tmp_path / "s.pt", weights_only=True)
            model = zoo()
            opt = lingrad.wrap(model, "random(rank=2, every=2)", lr=1e-2)
            model.load_state_dict(saved["model"])
            opt.load_state_dict(saved["opt"])
        train(model, opt, batches[3:], token_loss, schedule=False)
        weights.append({name: p.detach() for name, p in model.state_dict().items()})
    assert gap(*weights) == 0.0


@pytest.mark.parametrize("each", ["svd(rank=2, every=2)", "random(rank=2, every=2)", "svd(rank=2, every=2, side=left)"])
def test_the_recorded_change_is_that_of_the_weight(each):
    model = zoo()
    before = model.experts.gate_up_proj.detach().clone()
    opt = lingrad.wrap(model, each, lr=1e-2, ledger=True)
    train(model, opt, token_batches(5), token_loss)
    change = opt.changes()["experts.gate_up_proj"]
    made = change.layout.restore(change.factors.dense()).double()
    # the coordinates of a weight in float64 are float64
    torch.testing.assert_close(made, model.experts.gate_up_proj.detach() - before, rtol=0, atol=1e-13)


def test_by_a_rule():
    assert spec.format(spec.parse("experts(each=svd(rank=2), count=3)")) == "experts(each=svd(rank=2), count=3)"
    lines = lingrad.explain(zoo(), {"experts": "experts(each=svd(rank=2))"}).lines
    (found,) = [line for line in lines if line.name == "experts.gate_up_proj"]
    shown = found.weight, found.transform, found.coords, found.basis
    assert shown == ("3 x 12 x 10", "experts(each=svd(rank=2), count=3)", "3 x 12 x 2", "3 x 10 x 2")
    (found,) = [line for line in lingrad.explain(zoo(), {"experts": "svd(rank=2)"}).lines if line.name == found.name]
    assert (found.weight, found.transform) == ("36 x 10", "svd(rank=2)")
    linear = nn.Sequential(nn.Linear(6, 12, bias=False).double())
    opt = lingrad.wrap(linear, {"0": "experts(each=svd(rank=2), count=4)"}, lr=0.1)
    linear(torch.randn(5, 6).double()).pow(2).sum().backward()
    opt.step()
    assert opt.subspaces[0].map().left.shape == (4, 3, 2)  # each block is 3 x 6


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        (
            {"biased": "experts(each=svd(rank=2))"},
            ShapeError,
            "biased.weight: .* does not say of how many experts; expected count",
        ),
        ({"biased": "experts(each=svd(rank=2), count=4)"}, ShapeError, "11 rows are not those of 4 experts"),
        ({"experts": "experts(each=svd(rank=11))"}, ShapeError, "rank 11 is larger than min.* = 10 of a 12 x 10 weight"),
        ({"experts": "experts(each=experts(each=full()))"}, SpecError, "each must be the transform of one expert's matrix"),
        ({"experts": "experts(each=full(), count=-1)"}, SpecError, "count must be 0 or more"),
        ("svd(rank=11)", ShapeError, "experts.gate_up_proj: rank 11 is larger"),
    ],
)
def test_what_does_not_fit_is_refused(rules, error, message):
    with pytest.raises(error, match=message):
        lingrad.explain(zoo(), rules)


class _Any(nn.Module):
    def __init__(self, *shape, **numbers):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, device="meta"))
        vars(self).update(numbers)


class _MyExperts(_Any):
    pass


@pytest.mark.parametrize(
    ("module", "name", "count"),
    [
        (_Any(4, 6, 5, num_experts=4), "mlp.weight", 4),
        (_Any(4, 6, 5, moe_num_experts=4), "weight", 4),
        (_Any(4, 6, 5), "block.experts.weight", 4),
        (_MyExperts(4, 6, 5), "weight", 4),
        (_MyExperts(24, 5, num_experts=4), "weight", 4),
        (_MyExperts(24, 5), "weight", 0),  # not known to be a stack
        (_MyExperts(4, 6, num_experts=4), "weight", 0),  # a bias of each, or a router
        (_Any(4, 6, 5), "weight", 0),
        (_Any(4, 6, 5, num_experts=8), "weight", 0),
        (_Any(1, 6, 5), "position.weight", 0),
        (_MyExperts(4, 1, 5), "weight", 0),
        (nn.Conv1d(6, 4, 5, device="meta"), "experts.weight", 0),
        (nn.Bilinear(3, 4, 5, device="meta"), "experts.weight", 0),
        (nn.Embedding(8, 5, device="meta"), "experts.weight", 0),
        (None, "experts.weight", 0),
    ],
)
def test_what_counts_as_fused_experts(module, name, count):
    weight = torch.empty(4, 6, 5) if module is None else module.weight
    assert fused_experts(weight, module, name) == count


def test_a_transform_of_experts_stays_one():
    assert Experts(each=spec.parse("full()")).of(3) == Experts(each=spec.parse("full()"), count=3)
    assert Experts(each=spec.parse("full()"), count=2).of(3).count == 2
