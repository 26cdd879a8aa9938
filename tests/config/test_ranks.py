"""A rank for each weight under one budget, against brute force over all ranks, in float64."""

import itertools

import pytest
import torch
from torch import nn

import lingrad
from lingrad import memory, spec
from lingrad.config.ranks import ranks_by_energy
from lingrad.errors import ModeError, SpecError
from tests.support.models import gap, llama, text_batches, text_loss, three_ways

SVD = "svd(rank=1, every=3)"
ROUNDING = 1e-12  # squares of singular values by another algorithm, in float64


def with_gradients(*shapes, seed=0, decay=0.5):
    """Linear layers whose gradients have falling spectra of random sizes."""
    model = nn.Sequential(*(nn.Linear(n, m, bias=False, dtype=torch.float64) for m, n in shapes))
    generator = torch.Generator().manual_seed(seed)
    for layer in model:
        m, n = layer.weight.shape
        u, v = (torch.linalg.qr(torch.randn(k, min(m, n), generator=generator, dtype=torch.float64))[0] for k in (m, n))
        falls = 1.0 - decay * torch.rand((), generator=generator, dtype=torch.float64)
        sizes = torch.rand(min(m, n), generator=generator, dtype=torch.float64) * falls ** torch.arange(min(m, n))
        scale = 10 ** (4 * torch.rand((), generator=generator, dtype=torch.float64) - 2)
        layer.weight.grad = scale * u @ torch.diag(sizes) @ v.t()
    return model


def shares_of(model):
    """For each weight, what its r leading singular vectors capture of |G|_F^2, for r = 0, 1, ..."""
    found = []
    for layer in model:
        squares = torch.linalg.svdvals(layer.weight.grad).square()
        found.append([0.0, *(squares.cumsum(0) / squares.sum()).tolist()])
    return found


def bytes_of(model, rules, base="adamw", **options):
    """Bases and state of the base optimizer, by the library's own estimate."""
    rules = spec.parse(rules) if isinstance(rules, str) else {name: spec.parse(text) for name, text in rules.items()}
    totals = memory.estimate(model, rules, base, lr=1e-3, **options).totals
    return totals.get("basis", 0) + totals.get("moments", 0)


def ranks_in(rules):
    return [spec.parse(text).rank for text in rules.values()]


def best(model, text, budget):
    """The largest sum of shares of all ranks that fit, by trying every one."""
    shares = shares_of(model)
    cost = [
        [bytes_of(nn.Sequential(layer), {"0": text.format(r)}) for r in range(1, len(own))]
        for layer, own in zip(model, shares, strict=True)
    ]
    found = 0.0
    for ranks in itertools.product(*(range(1, len(own)) for own in shares)):
        if sum(costs[r - 1] for costs, r in zip(cost, ranks, strict=True)) <= budget:
            found = max(found, sum(own[r] for own, r in zip(shares, ranks, strict=True)))
    return found


@pytest.mark.parametrize("side", ["left", "both"])
@pytest.mark.parametrize("seed", range(2))
def test_of_equal_shapes_it_is_the_best_there_is(seed, side):
    model, text = with_gradients((6, 5), (6, 5), (6, 5), seed=seed), f"svd(rank={{}}, side={side})"
    for mean_rank in (1, 3, 4):
        rules = ranks_by_energy(model, text.format(1), mean_rank=mean_rank)
        budget = bytes_of(model, text.format(mean_rank))
        assert bytes_of(model, rules) <= budget
        reached = sum(own[r] for own, r in zip(shares_of(model), ranks_in(rules), strict=True))
        expected = best(model, text, budget)
        if side == "left":  # each column costs the same
            assert bytes_of(model, rules) == budget
            assert reached == pytest.approx(expected, rel=ROUNDING)
        # and else the largest sum is missed by less than the column that no longer fitted
        nexts = [own[r + 1] - own[r] for own, r in zip(shares_of(model), ranks_in(rules), strict=True) if r + 1 < len(own)]
        assert expected - reached <= max(nexts, default=0.0) + ROUNDING


@pytest.mark.thinned(3)
@pytest.mark.parametrize("base", ["adamw", "sgd"])
@pytest.mark.parametrize("text", ["svd(rank={})", "power(rank={})", "coded(each=svd(rank={}), bits=4)"])
def test_of_any_shapes_the_budget_holds_and_little_is_missed(text, base):
    model = with_gradients((9, 4), (5, 7), (3, 12), (6, 6), seed=4)
    shares, everywhere = (
        shares_of(model),
        lambda rank: {f"{i}.weight": text.format(min(rank, *layer.weight.shape)) for i, layer in enumerate(model)},
    )
    for mean_rank in (1, 2, 5):
        rules = ranks_by_energy(model, text.format(1), base, mean_rank=mean_rank)
        budget, taken = bytes_of(model, everywhere(mean_rank), base), bytes_of(model, rules, base)
        assert taken <= budget
        ranks = [getattr(spec.parse(line), "each", spec.parse(line)).rank for line in rules.values()]
        reached = sum(own[r] for own, r in zip(shares, ranks, strict=True))
        uniform = sum(own[min(mean_rank, len(own) - 1)] for own in shares)
        nexts = [own[r + 1] - own[r] for own, r in zip(shares, ranks, strict=True) if r + 1 < len(own)]
        assert reached >= uniform - max(nexts, default=0.0)
        # what is left does not pay for one more column of any weight that has one
        for i, rank in enumerate(ranks):
            if rank + 1 < len(shares[i]):
                more = {**rules, f"{i}.weight": text.format(rank + 1)}
                assert bytes_of(model, more, base) > budget


def test_against_brute_force_of_unequal_shapes():
    model, text = with_gradients((8, 4), (5, 7), (4, 6), seed=7), "svd(rank={})"
    missed = 0
    for mean_rank in range(1, 5):
        rules = ranks_by_energy(model, text.format(1), mean_rank=mean_rank)
        budget = bytes_of(model, {f"{i}": text.format(min(mean_rank, 4)) for i in range(3)})
        reached = sum(own[r] for own, r in zip(shares_of(model), ranks_in(rules), strict=True))
        nexts = [own[r + 1] - own[r] for own, r in zip(shares_of(model), ranks_in(rules), strict=True) if r + 1 < len(own)]
        difference = best(model, text, budget) - reached
        assert difference <= max(nexts, default=0.0) + ROUNDING
        missed += difference > ROUNDING
    assert missed < 4


def test_the_size_of_a_gradient_does_not_matter():
    """Only its spectrum: a run with Adam moves a weight with small gradients as far."""
    model = with_gradients((6, 5), (6, 5), (6, 5))
    before = ranks_by_energy(model, SVD, mean_rank=2)
    model[1].weight.grad *= 1e-6
    assert ranks_by_energy(model, SVD, mean_rank=2) == before


def test_a_column_of_a_large_weight_has_to_capture_more():
    """Spectra are flat. m + 2 n numbers a column are 70 of one weight and 16 of the other, which gets all it can take first."""
    model = with_gradients((60, 5), (6, 5))
    for layer in model:
        m, n = layer.weight.shape
        layer.weight.grad = torch.linalg.qr(torch.randn(m, n, generator=torch.Generator().manual_seed(m)).double())[0]
    assert ranks_in(ranks_by_energy(model, "svd(rank=1, side=left)", mean_rank=2)) == [1, 5]


def test_limits():
    model = with_gradients((6, 5), (6, 5), (6, 5))
    assert min(ranks_in(ranks_by_energy(model, SVD, mean_rank=3, least=2))) >= 2
    assert max(ranks_in(ranks_by_energy(model, SVD, mean_rank=3, most=3))) == 3
    assert ranks_in(ranks_by_energy(model, SVD, mean_rank=3, least=3, most=3)) == [3, 3, 3]
    assert ranks_in(ranks_by_energy(model, "svd(rank=64)", mean_rank=99)) == [5, 5, 5]


def test_directions_without_gradient_are_not_paid_for():
    """A weight of rank two takes two columns, and one without a gradient the least."""
    model = with_gradients((6, 5), (6, 5), (6, 5))
    model[0].weight.grad = torch.outer(torch.arange(6.0), torch.ones(5)).double()
    model[1].weight.grad.zero_()
    assert ranks_in(ranks_by_energy(model, SVD, mean_rank=4)) == [1, 1, 5]


def test_experts_share_a_rank():
    model = with_gradients((12, 5), (6, 5))
    rules = ranks_by_energy(model, {"0": "experts(each=svd(rank=1, side=right), count=3)", "1": SVD}, mean_rank=2)
    assert all(1 <= rank <= 4 for rank in (spec.parse(rules["0.weight"]).each.rank, spec.parse(rules["1.weight"]).rank))
    uniform = {"0": "experts(each=svd(rank=2, side=right), count=3)", "1": "svd(rank=2, every=3)"}
    assert bytes_of(model, rules) <= bytes_of(model, uniform)


def filled(**options):
    model = llama(**options)
    for (batch,) in text_batches(2, micro=1):
        text_loss(model, batch).backward()
    return model


def test_the_rules_are_those_of_a_run_in_both_modes():
    model = filled()
    rules = ranks_by_energy(model, SVD, mean_rank=4)
    assert len(set(ranks_in(rules))) > 2
    explained = str(lingrad.explain(llama(), rules, every_parameter=True))
    assert all(text in explained for text in rules.values())
    wrapped, adapted, switched = three_ways(llama, rules, "adamw", text_batches(5, micro=1), switches=(1, 4), lr=1e-2)
    assert gap(adapted, wrapped) <= 1e-12
    assert gap(switched, wrapped) <= 1e-12
    bare, own = ({t.name for t in lingrad.config.targets.resolve_model(llama(), r).targets} for r in (SVD, rules))
    assert own == bare


def test_moments_of_8_bits_are_counted_as_such():
    model = filled(hidden_size=64, intermediate_size=128)
    rules = ranks_by_energy(model, SVD, mean_rank=20, moments="8bit")
    budget = bytes_of(model, "svd(rank=20, every=3)", moments="8bit")
    assert 0.98 * budget < bytes_of(model, rules, moments="8bit") <= budget


def test_none_and_frozen_stay():
    model = filled()
    given = {"*.q_proj": SVD, "*.k_proj": "frozen", "*.v_proj": "none", "*.gate_proj": SVD}
    rules = ranks_by_energy(model, given, mean_rank=2)
    assert {name.rsplit(".", 2)[1]: text.partition("(")[0] for name, text in rules.items()} == {
        "q_proj": "svd",
        "gate_proj": "svd",
        "k_proj": "frozen",
        "v_proj": "none",
    }
    before, after = (
        {line.name: line.gradient for line in lingrad.explain(llama(), each, every_parameter=True).lines}
        for each in (given, rules)
    )
    assert before == after


@pytest.mark.parametrize(
    ("rules", "options", "message"),
    [
        (SVD, {"mean_rank": 0}, "mean_rank must be a whole number, 1 or more, not 0"),
        (SVD, {"mean_rank": 1.5}, "mean_rank must be a whole number, 1 or more, not 1.5"),
        (SVD, {"mean_rank": 2, "most": 1, "least": 2}, "most=1 is below least=2"),
        (SVD, {"mean_rank": 1, "least": 2}, "the budget of mean_rank=1 is .* bytes .* too few for rank 2 of every weight"),
        ("full()", {"mean_rank": 1}, "0.weight: full has no rank of its own to be chosen"),
        ("kron(left=svd(rank=2), right=svd(rank=2))", {"mean_rank": 1}, "kron has no rank of its own"),
        (SVD, {"mean_rank": 1, "share": "input"}, "share='input' gives several weights one basis"),
        ("galore(rank=2)", {"mean_rank": 1}, "'galore.rank=2.' is a method, .* and no transform"),
        (SVD, {"mean_rank": 1, "bettas": (0.5, 0.5)}, "bettas"),
    ],
)
def test_what_it_refuses(rules, options, message):
    with pytest.raises(SpecError, match=message):
        ranks_by_energy(with_gradients((6, 5), (6, 5)), rules, **options)


def test_gradients_that_are_missing_or_not_finite():
    model = with_gradients((6, 5), (6, 5))
    model[1].weight.grad = None
    with pytest.raises(ModeError, match="1.weight has no gradient; run forward and backward .* before lingrad.wrap"):
        ranks_by_energy(model, SVD, mean_rank=2)
    for bad in (float("nan"), float("inf")):
        model[1].weight.grad = torch.full((6, 5), bad, dtype=torch.float64)
        with pytest.raises(ModeError, match="the gradient of 1.weight is not finite; take the gradients of other batches"):
            ranks_by_energy(model, SVD, mean_rank=2)
