"""``residual="sampled(q)"``: the mean over draws, what is drawn, and what a step that is not drawn reads.

Over many steps and refreshes it is compared in contract/test_reference.py; what it shares with other rules is in
test_residual.py. Tolerance: 1e-11 in float64, as there.
"""

import itertools

import pytest
import torch
from torch import nn

import lingrad
from lingrad.memory import simulate
from lingrad.subspaces.basis import Basis
from tests.support.cases import SIDED, SIDES, UNSIDED
from tests.support.models import gap, llama, text_batches, text_loss, train, zoo, zoo_batches, zoo_loss
from tests.support.residuals import gradients, nearest
from tests.support.runs import assert_equal_bits, weights_of

TOLERANCE = 1e-11
LR, Q = 1e-2, 0.2
SPECS = [text.format(side=side) for text in SIDED for side in SIDES[:1] + SIDES[-1:]] + list(UNSIDED)

ORTHONORMAL = ("svd(", "power(", "rows(", "dct(", "weight(")  # transforms whose bases are, with any option


def one_step(spec, outcome, monkeypatch):
    """The weights after a step of SGD in which every weight is drawn, or none."""
    monkeypatch.setattr(Basis, "draws", lambda self, step: outcome and self.chance > 0)
    model = zoo()
    optimizer = lingrad.wrap(model, {"*": spec}, "sgd", lr=LR, residual=f"sampled(q={Q})")
    before = {sub.name: sub.map() for sub in optimizer.subspaces}
    train(model, optimizer, zoo_batches(1, micro=2), zoo_loss, schedule=False)
    return optimizer, before, weights_of(optimizer)


@pytest.mark.thinned(3)
@pytest.mark.rare(3)
@pytest.mark.parametrize("spec", SPECS)
def test_the_mean_of_both_outcomes_is_the_full_step(spec, monkeypatch):
    """q (drawn) + (1 - q) (not drawn) = -lr (S S^T G + R), which is -lr G where the columns of S are orthonormal."""
    drawn, before, with_residual = one_step(spec, True, monkeypatch)
    _, _, without = one_step(spec, False, monkeypatch)
    start = {name: param.detach() for name, param in zoo().named_parameters()}
    for sub in drawn.subspaces:
        name, matrix = sub.name, sub.weight.layout.matrix
        # a basis that reads the gradient is refreshed before the step, any other was there before
        used = sub.map() if sub.basis.transform.reads == "gradient" else before[name]
        full = matrix(gradients()[name])
        z = used.project(full)
        rest = full - used.lift(nearest(used, z, full))
        mean = matrix(Q * with_residual[name] + (1 - Q) * without[name] - start[name])
        assert (mean + LR * (used.lift(z) + rest)).abs().max() <= TOLERANCE, name
        if spec.startswith(ORTHONORMAL) or (spec.startswith("random") and ("orthonormal" in spec or "rows" in spec)):
            assert (mean + LR * full).abs().max() <= TOLERANCE, name


def test_with_q_of_one_it_is_sgd_on_all_weights():
    """With an orthonormal basis, over micro-batches, decay and refreshes: the basis has no part in it."""
    ends = []
    for residual, spec in (("sampled(q=1)", "svd(rank=3, every=2)"), (None, "full()")):
        model = llama()
        optimizer = lingrad.wrap(model, {"*": spec}, "sgd", lr=LR, weight_decay=0.1, residual=residual)
        train(model, optimizer, text_batches(5), schedule=False)
        ends.append(weights_of(optimizer))
    assert gap(*ends) <= TOLERANCE


def test_a_step_without_a_draw_is_that_without_the_rule():
    """To the bit, and it reads no gradient: with so small a q nothing is drawn."""
    ends = []
    for residual in ("sampled(q=1e-12)", None):
        model = llama()
        optimizer = lingrad.wrap(model, {"*": "power(rank=3, every=2)"}, "adamw", lr=LR, residual=residual)
        train(model, optimizer, text_batches(5), schedule=False)
        ends.append(weights_of(optimizer))
    assert_equal_bits(*ends)


def test_only_weights_that_are_drawn_keep_their_gradient():
    model = llama()
    optimizer = lingrad.wrap(
        model, {"*proj*": "random(rank=3, every=0)", "*": "none"}, "adamw", lr=LR, residual="sampled(q=0.4)"
    )
    seen = set()
    for (batch,) in text_batches(6, micro=1):
        optimizer.zero_grad()
        text_loss(model, batch).backward()
        for sub in optimizer.subspaces:
            assert (sub.pending.total is not None) == sub.basis.whole, sub.name
            seen.add(sub.basis.whole)
        optimizer.step()
    assert seen == {True, False}


def test_draws_are_of_chance_q_and_of_each_weight_and_step_alone():
    """Of 40 weights in 500 steps: counts within five standard deviations, sqrt(N p (1 - p)), from fixed seeds."""
    model = nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(40)])
    bases = [sub.basis for sub in lingrad.wrap(model, "random(rank=1)", "sgd", lr=LR, residual="sampled(q=0.1)").subspaces]
    drawn = torch.tensor([[basis.draws(step) for step in range(500)] for basis in bases]).double()
    products = [(0.1, drawn), (0.01, drawn[1:] * drawn[:-1]), (0.01, drawn[:, 1:] * drawn[:, :-1])]
    for p, found in products:
        assert abs(found.sum() - found.numel() * p) <= 5 * (found.numel() * p * (1 - p)) ** 0.5
    other = lingrad.wrap(nn.Sequential(nn.Linear(2, 2)), "random(rank=1)", "sgd", lr=LR, residual="sampled(q=0.1)", seed=1)
    assert [other.subspaces[0].basis.draws(step) for step in range(500)] != drawn[0].bool().tolist()


def test_a_single_weight_is_drawn_after_steps_without_a_draw():
    """Of a basis that is never refreshed, whose run has nothing else to look for between steps."""
    model = nn.Sequential(nn.Linear(6, 5, bias=False)).double()
    optimizer = lingrad.wrap(model, {"0": "random(rank=2, every=0)"}, "sgd", lr=LR, residual="sampled(q=0.3)")
    found = []
    for x in torch.randn(20, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)):
        before = model[0].weight.detach().clone()
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(bool(torch.linalg.matrix_rank(model[0].weight - before, rtol=1e-9) > 2))
    (sub,) = optimizer.subspaces
    assert found == [sub.basis.draws(step) for step in range(20)]
    assert [False, True] in [found[i : i + 2] for i in range(18)]


def test_weights_that_share_a_basis_are_drawn_together():
    model = llama()
    rules = {"*proj*": "svd(rank=3, every=3)", "*": "none"}
    optimizer = lingrad.wrap(model, rules, "adamw", lr=LR, residual="sampled(q=0.5)", share="input")
    for (batch,) in text_batches(4, micro=1):
        before = weights_of(optimizer)
        text_loss(model, batch).backward()
        drawn = {sub.name: sub.basis.whole for sub in optimizer.subspaces}
        optimizer.step()
        optimizer.zero_grad()
        for sub in optimizer.subspaces:
            change = sub.weight.layout.matrix(weights_of(optimizer)[sub.name] - before[sub.name])
            inside = torch.linalg.matrix_rank(change, rtol=1e-9) <= 3
            assert bool(inside) != drawn[sub.name], sub.name
    groups = itertools.groupby(sorted(optimizer.subspaces, key=lambda sub: id(sub.basis)), key=lambda sub: id(sub.basis))
    assert max(len(list(group)) for _, group in groups) > 1


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_a_gradient_outside_of_the_span_has_no_measure_and_no_step(base):
    """|base's step| / |S^T G| is 0 / 0, or momentum / 0."""
    model = nn.Sequential(nn.Linear(6, 5, bias=False)).double()
    optimizer = lingrad.wrap(
        model, {"0": "random(rank=2, every=0, kind=rows, side=right)"}, base, lr=LR, residual="sampled(q=1)"
    )
    (sub,) = optimizer.subspaces
    used = sub.map().lift(torch.ones_like(sub.coords)).any(dim=0)
    before = model[0].weight.detach().clone()
    model((~used).double()[None]).sum().backward()  # inputs are zero where the basis is not
    optimizer.step()
    assert torch.equal(model[0].weight, before)


def test_the_peak_of_a_simulated_run_lies_between_never_and_always():
    """A simulation draws as the run does; with q=1 it is an upper bound."""

    def peak(residual):
        batch = torch.zeros(2, 12, dtype=torch.long, device="meta")
        loss = lambda model: text_loss(model, batch)  # noqa: E731
        return simulate(llama, "random(rank=3, every=0)", "adamw", loss=loss, lr=LR, residual=residual, steps=6).peak

    never, some, always = (peak(f"sampled(q={q})") for q in (1e-12, 0.3, 1))
    assert never == peak(None)
    assert never < some < always


def test_gum_is_its_formula():
    """W <- W + P z - d (|z| / |P^T G|) (G - P P^T G) / q, for z = Muon(P^T G), and d = 1 in steps with a draw, else 0.

    Muon is torch's, and orthogonalises in bfloat16, whose rounding, 2^-9, may go the other way for inputs that differ by 1e-16.
    """
    rank, every, steps, q = 3, 4, 9, 0.4
    data = torch.randn(steps, 16, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layer = nn.Linear(10, 10, bias=False).double()
    weight = layer.weight.detach().clone()
    method = f"gum(rank={rank}, every={every}, side=left, residual=sampled(q={q}))"
    optimizer = lingrad.wrap(list(layer.named_parameters()), method, lr=LR)
    drawn = []
    for step, rows in enumerate(data):
        x, y = rows.split(10, dim=1)
        optimizer.zero_grad()
        (layer(x) - y).square().mean().backward()
        drawn.append(optimizer.subspaces[0].basis.whole)
        optimizer.step()
        gradient = 2 * (x @ weight.T - y).T @ x / y.numel()
        if step % every == 0:  # momentum starts again
            p = torch.linalg.svd(gradient)[0][:, :rank]
            z = torch.zeros(rank, 10, dtype=torch.float64)
            muon = torch.optim.Muon([z], lr=LR, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        z.zero_()
        z.grad = p.T @ gradient
        muon.step()
        rest = gradient - p @ z.grad
        weight = weight + p @ z - drawn[-1] * z.norm() / z.grad.norm() * rest / q
        assert (layer.weight - weight).norm() <= 2**-7 * LR, step
    assert len(set(drawn)) == 2
