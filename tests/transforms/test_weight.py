"""A basis that is read off the weight: LoRA-XS (Bałazy et al., 2024, arXiv 2405.17604) freezes singular vectors of W."""

import copy

import pytest
import torch
from torch import nn

import lingrad
from lingrad import SideTransform, memory, register
from lingrad.errors import ModeError, SpecError
from lingrad.gradients.local import DenseGradient
from lingrad.transforms import When, registry
from tests.support.cases import SIDES
from tests.support.runs import MODES, assert_equal_bits, each_mode, through_a_file, weights_of

EXACT = 1e-12
RULES = "weight(rank=3, side={side})"


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 6, dtype=dtype), nn.Tanh(), nn.Linear(6, 8, dtype=dtype))


def go(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        x = torch.randn(5, 9, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        model(x.to(model[0].weight.dtype)).square().sum().backward()
        optimizer.step()


def assert_spans(basis, vectors):
    """The columns are these vectors, but for their signs."""
    torch.testing.assert_close((basis.T @ vectors).abs(), torch.eye(3, dtype=basis.dtype), rtol=0, atol=1e-10)


@each_mode
@pytest.mark.parametrize("side", SIDES)
def test_the_leading_singular_vectors_of_the_weight_for_the_whole_run(mode, side):
    model = net()
    start = copy.deepcopy(model)
    optimizer = MODES[mode](model, {"*": RULES.format(side=side)}, lr=1e-2)
    found = [sub.map() for sub in optimizer.subspaces]
    go(model, optimizer, 5)
    for sub, chosen in zip(optimizer.subspaces, found, strict=True):
        u, _, vh = torch.linalg.svd(start.get_parameter(sub.name).detach())
        assert sub.map() is chosen
        assert sub.basis.refreshes == 1
        for basis, vectors in ((chosen.left, u), (chosen.right, vh.T)):
            if basis is not None:
                assert_spans(basis, vectors[:, :3])
    assert (model[0].weight - start[0].weight).norm() > 1e-3 if mode == "optimizer" else True


def test_lora_xs_by_hand():
    """W = W0 + U_r R V_r^T with R trained by Adam from zero, in plain torch."""
    model, plain = net(), net()
    for param in (model[0].bias, *model[2].parameters()):
        param.requires_grad_(False)
    optimizer = lingrad.adapt(model, {"0": RULES.format(side="both")}, "adam", lr=1e-2)
    w0, bias = plain[0].weight.detach(), plain[0].bias.detach()
    u, _, vh = torch.linalg.svd(w0)
    core = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    (sub,) = optimizer.subspaces
    signs = (sub.map().left * u[:, :3]).sum(0), (sub.map().right * vh.T[:, :3]).sum(0)
    left, right = u[:, :3] * signs[0], vh.T[:, :3] * signs[1]
    adam = torch.optim.Adam([core], lr=1e-2)
    for step in range(6):
        x = torch.randn(5, 9, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        adam.zero_grad()
        plain[2](torch.tanh(x @ (w0 + left @ core @ right.T).T + bias)).square().sum().backward()
        adam.step()
    go(model, optimizer, 6)
    torch.testing.assert_close(sub.coords.detach(), core.detach(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("every", [0, 3])
@pytest.mark.parametrize("mode", MODES)
def test_resumes_bit_for_bit_and_does_not_read_the_weight_again(mode, every):
    rules = {"*": f"weight(rank=3, every={every}, side=both)"}
    model = net()
    optimizer = MODES[mode](model, rules, lr=1e-2)
    go(model, optimizer, 4)
    again = net()
    again.load_state_dict(model.state_dict())
    resumed = MODES[mode](again, rules, lr=1e-2)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    go(model, optimizer, 5, first=4)
    go(again, resumed, 5, first=4)
    assert_equal_bits(weights_of(optimizer), weights_of(resumed))
    bases = [[t for sub in one.subspaces for t in sub.map().tensors] for one in (optimizer, resumed)]
    assert all(map(torch.equal, *bases))


def test_a_later_refresh_reads_the_effective_weight_in_both_modes():
    bases = []
    for mode in MODES.values():
        model = net()
        optimizer = mode(model, {"*": "weight(rank=3, every=2)"}, lr=1e-2)
        go(model, optimizer, 2)
        before = weights_of(optimizer)
        go(model, optimizer, 1, first=2)
        assert {sub.basis.refreshes for sub in optimizer.subspaces} == {2}
        for sub in optimizer.subspaces:
            _, _, vh = torch.linalg.svd(before[sub.name])
            if sub.map().right is not None:
                assert_spans(sub.map().right, vh[:3].T)
        bases.append([t for sub in optimizer.subspaces for t in sub.map().tensors])
    for a, b in zip(*bases, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("side", SIDES)
def test_signs_are_not_decided_by_rounding(side):
    """Training in a basis leaves the singular vectors outside of it orthogonal to it, and one of them may come up."""
    transform = lingrad.spec.parse(RULES.format(side=side))
    u, _ = torch.linalg.qr(torch.randn(9, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    found = []
    for nudge in (0.0, 1e-15, -1e-15):
        state = transform.init((9, 6), seed=0, device=torch.device("cpu"), dtype=torch.float64)
        for step, values in enumerate(((6.0, 5.0, 4.0, 3.0, 2.0, 1.0), (6.0, 5.0, 2.5, 3.0, 2.0, 1.0))):
            weight = u @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ v.T
            weight = weight + nudge * torch.randn(9, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
            state = transform.refresh(state, DenseGradient(weight), When(step, step, 0, (9, 6)))
        found.append([basis for basis in state if basis is not None])
    for nudged in found[1:]:
        for a, b in zip(nudged, found[0], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_zero_weight_has_an_orthonormal_basis():
    model = net()
    nn.init.zeros_(model[0].weight)
    found = lingrad.wrap(model, {"0": RULES.format(side="both")}, lr=1e-2).subspaces[0].map()
    for basis in (found.left, found.right):
        torch.testing.assert_close(basis.T @ basis, torch.eye(3, dtype=torch.float64), rtol=0, atol=EXACT)


@each_mode
def test_a_weight_that_is_not_finite(mode):
    model = net()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.warns(RuntimeWarning, match="0.weight: the weight is not finite, and no basis can be chosen from it"):
        optimizer = MODES[mode](model, {"0": RULES.format(side="left"), "*": "none"}, lr=1e-2)
    assert all(t.isfinite().all() for sub in optimizer.subspaces for t in sub.map().tensors)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_weight_is_dequantised(kind):
    from tests.support import packed

    model, plain = packed.net(kind), packed.twin(kind)
    optimizer = lingrad.adapt(model, packed.rules("weight(rank=3, side=both)"), lr=1e-2)
    for sub in optimizer.subspaces:
        u, _, vh = torch.linalg.svd(plain.get_parameter(sub.name).detach())
        for basis, vectors in ((sub.map().left, u), (sub.map().right, vh.T)):
            overlap = (basis.float().T @ vectors[:, :3]).abs()
            torch.testing.assert_close(overlap, torch.eye(3), rtol=0, atol=2e-2)  # a basis in float16, singular gaps of 1 %
    before = optimizer.subspaces[0].coords.detach().clone()
    packed.go(model, optimizer, packed.batches(2))
    assert not torch.equal(optimizer.subspaces[0].coords.detach(), before)


def test_without_values_it_is_refused_and_simulated():
    with torch.device("meta"):
        model = net()
    with pytest.raises(ModeError, match="load the model before the run is made"):
        lingrad.wrap(model, {"0": RULES.format(side="left")}, lr=1e-2)

    def loss(model):
        return model(torch.zeros(5, 9, dtype=torch.float64, device="meta")).sum()

    simulated = memory.simulate(net, {"0": RULES.format(side="both")}, "adamw", loss=loss)
    estimated = memory.estimate(model, {"0": RULES.format(side="both")}, "adamw")
    assert simulated.steady_breakdown["basis"] == estimated.totals["basis"] == (9 + 6) * 3 * 8


def test_next_to_what_reads_the_gradient_it_is_refused():
    for text in ("kron(left=weight(rank=3), right=svd(rank=3))", "kron(left=power(rank=3), right=weight(rank=3))"):
        with pytest.raises(SpecError, match="factor reads the weight, before a step, and the"):
            lingrad.spec.parse(text)
    for text, reads in (
        ("kron(left=weight(rank=3), right=random(rank=3))", "weight"),
        ("kron(left=weight(rank=3), right=weight(rank=2))", "weight"),
        ("experts(each=weight(rank=3), count=2)", "weight"),
    ):
        assert lingrad.spec.parse(text).reads == reads


def test_experts_have_the_vectors_of_their_own_matrices():
    model = net()
    optimizer = lingrad.wrap(model, {"0": "experts(each=weight(rank=2, side=right), count=2)", "*": "none"}, lr=1e-2)
    start = model[0].weight.detach().clone()
    (sub,) = optimizer.subspaces
    for part, basis in zip(start.chunk(2), sub.basis.state.each.right, strict=True):
        _, _, vh = torch.linalg.svd(part)
        torch.testing.assert_close((basis.T @ vh[:2].T).abs(), torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-10)


def test_a_transform_of_ones_own_may_read_the_weight():
    try:

        @register("of_weight")
        class OfWeight(SideTransform):
            reads = "weight"

            def basis(self, seen, old, when):
                return seen.dense()[:, : old.shape[1]]

        model = net()
        start = model[0].weight.detach().clone()
        (sub,) = lingrad.wrap(model, {"0": "of_weight(rank=2, side=right)", "*": "none"}, lr=1e-2).subspaces
        assert torch.equal(sub.map().right, start.T[:, :2])
    finally:
        registry._registered.pop("of_weight", None)
