"""What becomes of the part of a gradient that its basis drops; over many steps and refreshes in contract/test_reference.py.

Tolerance: 1e-11 in float64. A basis of normal numbers is solved through its Gram matrix, whose condition, here up to 1e4, is
the square of its own.
"""

import contextlib
import copy
import itertools
import re

import pytest
import torch
from torch import nn

import lingrad
from lingrad.errors import CheckpointError, ModeError, SpecError
from tests.support.cases import SIDED, SIDES, UNSIDED
from tests.support.models import (
    every_kind,
    gap,
    llama,
    text_batches,
    text_loss,
    token_batches,
    token_loss,
    train,
    zoo,
    zoo_batches,
    zoo_loss,
)
from tests.support.processes import each_rank
from tests.support.residuals import gradients, nearest
from tests.support.runs import assert_equal_bits, through_a_file, weights_of

TOLERANCE = 1e-11
RULES = ("scaled", "sign", "feedback", "sampled(q=0.5)")
SPECS = [text.format(side=side) for text in SIDED for side in SIDES[:1] + SIDES[-1:]] + list(UNSIDED)
each_rule = pytest.mark.parametrize("rule", RULES)
every_gradient = pytest.mark.parametrize("rule", [*RULES[:3], "sampled(q=1)"])  # rules that read it in every step


def run(
    rule,
    spec="svd(rank=3, every=3)",
    steps=1,
    build=zoo,
    data=zoo_batches,
    loss=zoo_loss,
    micro=2,
    make=lingrad.wrap,
    **options,
):
    model = build()
    optimizer = make(model, {"*": spec}, options.pop("base", "adamw"), residual=rule, **{"lr": 1e-2, "eps": 1e-4} | options)
    train(model, optimizer, data(steps, micro=micro), loss, schedule=False)
    return model, optimizer


def along(sub, gradient, change):
    """Fira's first step beyond the one of the coordinates, block by block of experts."""
    stepped, projected = nearest(sub.map(), sub.coords, change), sub.map().project(gradient)
    rest = gradient - sub.map().lift(nearest(sub.map(), sub.coords, gradient))
    p, q = sub.basis.transform.ranks(sub.basis.shape)
    found = []
    blocks = sub.basis.transform.blocks
    for z, g, r in zip(stepped.chunk(blocks), projected.chunk(blocks), rest.chunk(blocks), strict=True):
        across = (0, 1) if None not in (p, q) else 1 if p is None else 0
        found.append(-r * z.norm(dim=across, keepdim=True) / (g.norm(dim=across, keepdim=True) + 1e-8))
    return torch.cat(found)


@pytest.mark.thinned(3)
@pytest.mark.rare(3)
@pytest.mark.parametrize("spec", SPECS)
def test_one_step_of_every_transform_on_every_kind_of_weight(spec):
    """The step beyond that of the coordinates, against autograd's own gradient and S as a dense matrix."""
    first = {sub.name: sub for sub in run(None, spec, steps=0)[1].subspaces}
    start = weights_of(run(None, spec, steps=0)[1])
    plain = weights_of(run(None, spec)[1])
    found = gradients()
    signs, scaled = (run(rule, spec)[1] for rule in ("sign", "scaled"))
    for sub in signs.subspaces:
        name, matrix = sub.name, sub.weight.layout.matrix
        # a basis that reads the gradient is refreshed before the step, any other was there before
        used = sub if sub.basis.transform.reads == "gradient" else first[name]
        rest = matrix(found[name]) - used.map().lift(nearest(used.map(), used.coords, matrix(found[name])))
        extra = matrix(weights_of(signs)[name] - plain[name])
        sure = rest.abs() > 1e-9  # the sign of what is zero but for rounding is rounding
        assert ((extra + 1e-2 * rest.sign())[sure]).abs().max() <= 1e-12 if sure.any() else not extra.any(), name
        extra = matrix(weights_of(scaled)[name] - plain[name])
        expected = along(used, matrix(found[name]), matrix(plain[name] - start[name]))
        assert (extra - expected).abs().max() <= TOLERANCE, name


@each_rule
def test_layerwise_is_the_same(rule):
    options = {"build": llama, "data": text_batches, "loss": text_loss, "micro": 1, "steps": 8, "carry": "transport"}
    expected = weights_of(run(rule, **options)[1])
    assert gap(weights_of(run(rule, layerwise=True, **options)[1]), expected) <= TOLERANCE


@each_rule
@pytest.mark.parametrize(
    "spec", ["power(rank=3, every=3)", "svd(rank=3, every=3)", "random(rank=3, every=3, store=false)", "pca(rank=3)"]
)
def test_micro_batches_are_one_batch(rule, spec):
    """What a sketch reads comes out of the same sum as the residual."""

    def trained(micro):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 8)).double()
        optimizer = lingrad.wrap(model, {"*": spec}, "adamw", lr=1e-2, residual=rule, carry="transport")
        data = torch.randn(9, 12, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        for x in data:
            optimizer.zero_grad()
            for part in x.chunk(micro):
                (model(part).square().mean() / micro).backward()
            optimizer.step()
        return weights_of(optimizer)

    assert gap(trained(3), trained(1)) <= TOLERANCE


@each_rule
def test_a_sketch_is_that_of_the_run_without(rule):
    """A basis that is learned from products is the same at its first refresh, where gradients still are."""
    with_rule, without = (
        run(each, "power(rank=3, every=2)", build=llama, data=text_batches, loss=text_loss)[1] for each in (rule, None)
    )
    for one, other in zip(with_rule.subspaces, without.subspaces, strict=True):
        for a, b in zip(one.map().tensors, other.map().tensors, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)
        assert one.basis.energy == pytest.approx(other.basis.energy, abs=TOLERANCE)


@each_rule
def test_gradients_may_be_scaled_by_one_factor(rule):
    """As GradScaler and accumulation do it; what is fed back is of the size that gradients have at the step."""

    def trained(factor):
        model = llama()
        optimizer = lingrad.wrap(model, "svd(rank=3, every=3)", "adamw", lr=1e-2, residual=rule)
        for (batch,) in text_batches(7, micro=1):
            optimizer.zero_grad()
            (text_loss(model, batch) * factor).backward()
            for param in (param for group in optimizer.param_groups for param in group["params"]):
                param.grad.div_(factor)
            optimizer.step()
        return weights_of(optimizer)

    assert gap(trained(1024.0), trained(1.0)) <= TOLERANCE


@each_rule
def test_mixed_precision_in_16_bits_with_a_loss_scale(rule):
    """G is computed in float32: in float16 its entries overflow where those of the projection do not."""

    def trained(dtype, scale):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 20))
        lr = 5e-3 if rule.startswith("sampled") else 1e-2  # its steps are 1/q times as long
        optimizer = lingrad.wrap(model, {"*": "svd(rank=3, every=3)"}, "sgd", lr=lr, momentum=0.9, residual=rule)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)
        for x in torch.randn(8, 32, 24, generator=torch.Generator().manual_seed(1)):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = (30 * model(x)).float().square().sum() / 1000
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return weights_of(optimizer)

    exact = trained(torch.float32, 1.0)
    assert gap(trained(torch.float32, 2.0**8), exact) <= 1e-5  # float32
    for dtype, scale in ((torch.bfloat16, 1.0), (torch.float16, 2.0**8)):
        found = trained(dtype, scale)
        assert all(weight.isfinite().all() for weight in found.values())
        assert gap(found, exact) <= 0.1 if rule != "sign" else gap(found, exact) <= 0.3  # signs of entries near zero flip


@every_gradient
def test_a_gradient_changed_in_another_way_is_refused(rule):
    model = llama()
    optimizer = lingrad.wrap(model, "random(rank=3, every=0)", "adamw", lr=1e-2, residual=rule)
    text_loss(model, text_batches(1)[0][0]).backward()
    optimizer.subspaces[2].coords.grad.clamp_(-1e-3, 1e-3)
    with pytest.raises(ModeError, match="in another way than by one factor"):
        optimizer.step()


@every_gradient
def test_a_refused_step_changes_nothing(rule):
    """It is refused before anything is stepped, and the next step is as if it had not been."""

    def trained(bad):
        model = zoo()
        optimizer = lingrad.wrap(model, {"*": "svd(rank=3, every=3)"}, "adamw", lr=1e-2, residual=rule, weight_decay=0.1)
        for i, batches in enumerate(zoo_batches(5, micro=1)):
            optimizer.zero_grad()
            zoo_loss(model, batches[0]).backward()
            if i == 2:
                if bad:
                    nn.utils.clip_grad_value_([optimizer.subspaces[3].coords], 1e-4)
                    with pytest.raises(ModeError, match="in another way than by one factor"):
                        optimizer.step()
                continue
            optimizer.step()
        return weights_of(optimizer)

    assert_equal_bits(trained(bad=True), trained(bad=False))


@every_gradient
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_small_change_of_a_gradient_is_refused_too(rule, dtype):
    model = nn.Sequential(nn.Linear(32, 32)).to(dtype)
    optimizer = lingrad.wrap(model, {"0": "random(rank=4, every=0)"}, "sgd", lr=1.0, residual=rule)
    model(torch.randn(9, 32, generator=torch.Generator().manual_seed(0)).to(dtype)).float().square().mean().backward()
    grad = optimizer.subspaces[0].coords.grad
    grad[0, 0] *= 1.01
    with pytest.raises(ModeError, match="in another way than by one factor"):
        optimizer.step()


@pytest.mark.parametrize("rule", ["scaled", "sign", "sampled(q=0.5)"])
def test_maximize_climbs_along_the_residual_too(rule):
    climbed, fell = (run(rule, base="adamw", maximize=up)[1] for up in (True, False))
    start = weights_of(run(rule, steps=0)[1])
    for name, weight in weights_of(climbed).items():
        torch.testing.assert_close(weight - start[name], start[name] - weights_of(fell)[name], rtol=0, atol=1e-12)


@each_rule
def test_a_learning_rate_may_be_a_tensor_of_one_element(rule):
    models = [nn.Sequential(nn.Linear(8, 8)).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, lr in zip(models, (1e-2, torch.tensor([1e-2], dtype=torch.float64)), strict=True):
        optimizer = lingrad.wrap(model, {"0": "svd(rank=2)"}, "sgd", lr=lr, residual=rule)
        model(torch.ones(2, 8, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(models[0][0].weight, models[1][0].weight, rtol=0, atol=1e-12)


@every_gradient
def test_a_gradient_from_elsewhere_is_refused_and_zeros_are_not(rule):
    model = llama()
    optimizer = lingrad.wrap(model, "random(rank=3, every=0)", "adamw", lr=1e-2, residual=rule)
    before = weights_of(optimizer)
    for sub in optimizer.subspaces:
        sub.coords.grad = torch.zeros_like(sub.coords)
    optimizer.step()
    assert_equal_bits(weights_of(optimizer), before)
    optimizer.subspaces[0].coords.grad.fill_(1.0)
    with pytest.raises(ModeError, match="did not come from a backward"):
        optimizer.step()


@each_rule
def test_zeroed_gradients_take_what_was_fed_back_with_them(rule):
    """A clip feeds the error in; zeroing the gradients after it starts again from the same error."""
    expected = weights_of(run(rule, build=llama, data=text_batches, loss=text_loss, steps=6, micro=1)[1])
    for zero in ("zero_grad", "set_to_zero"):
        model = llama()
        optimizer = lingrad.wrap(model, {"*": "svd(rank=3, every=3)"}, "adamw", residual=rule, lr=1e-2, eps=1e-4)
        for (batch,) in text_batches(6, micro=1):
            text_loss(model, batch.flip(0) * 0 + 5).backward()
            optimizer.clip_grad_norm_(1e-3)
            optimizer.zero_grad(set_to_none=zero == "zero_grad")
            text_loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert gap(weights_of(optimizer), expected) <= TOLERANCE, zero


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("rule", "spec", "carry", "layerwise", "dtype"),
    [
        (rule, spec, carry, layerwise, dtype)
        for (i, (rule, spec)), dtype in itertools.product(
            enumerate(
                itertools.product(
                    RULES, ["svd(rank=3, every=3)", "power(rank=3, every=2)", "random(rank=3, every=4, kind=rows)"]
                )
            ),
            [torch.float64, torch.bfloat16],
        )
        for carry, layerwise in [(("keep", "reset", "rotate", "transport")[i % 4], bool(i % 2))]
    ],
)
def test_resumed_it_is_the_same_to_the_bit(rule, spec, carry, layerwise, dtype):
    options = {"residual": rule, "carry": carry, "layerwise": layerwise, "lr": 1e-2, "weight_decay": 0.1}
    batches = token_batches(9, micro=1)

    def start():
        model = every_kind(dtype)
        return model, lingrad.wrap(model, {"*": spec}, "adamw", **options)

    model, optimizer = start()
    train(model, optimizer, batches[:4], token_loss, schedule=False)
    saved = through_a_file([model.state_dict(), optimizer.state_dict()])
    train(model, optimizer, batches[4:], token_loss, schedule=False)
    again, resumed = start()
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(again, resumed, batches[4:], token_loss, schedule=False)
    assert_equal_bits(weights_of(resumed), weights_of(optimizer))


@each_rule
def test_model_to_is_followed(rule):
    """What is kept goes where the weights go, in their dtype."""
    model, optimizer = run(rule, build=llama, data=text_batches, loss=text_loss, steps=2)
    model.to(torch.float32)
    for (batch,) in text_batches(3, micro=1):
        optimizer.zero_grad()
        text_loss(model, batch).backward()
        optimizer.step()
    kept = list(optimizer._run.residuals.tensors())
    assert {tensor.dtype for tensor in kept} <= {torch.float32}
    assert all(weight.isfinite().all() for weight in weights_of(optimizer).values())


def test_a_checkpoint_of_another_rule_is_refused():
    saved = {rule: run(rule, build=llama, data=text_batches, loss=text_loss)[1].state_dict() for rule in (*RULES, None)}
    for (was, state), now in itertools.product(saved.items(), (*RULES, None)):
        optimizer = run(now, build=llama, data=text_batches, loss=text_loss)[1]
        if was == now:
            optimizer.load_state_dict(state)
            continue
        with pytest.raises(CheckpointError, match=re.escape(f"the checkpoint has residual {was!r}, this run has {now!r}")):
            optimizer.load_state_dict(state)


def test_checkpoints_from_before_there_were_rules_load():
    optimizer = run(None, build=llama, data=text_batches, loss=text_loss)[1]
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        del group["residual"]
    optimizer.load_state_dict(state)


def test_a_damaged_entry_is_refused():
    optimizer = run("feedback", build=llama, data=text_batches, loss=text_loss)[1]
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["subspace.residual.error"] = state["state"][0]["subspace.residual.error"][:-1]
    with pytest.raises(CheckpointError, match=r"subspace\.residual\.error"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize(
    ("rule", "key", "value"), [("feedback", "error", torch.nan), ("scaled", "norm", torch.nan), ("scaled", "norm", -3.0)]
)
def test_values_that_no_run_leaves_are_refused(rule, key, value):
    optimizer = run(rule, build=llama, data=text_batches, loss=text_loss)[1]
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0][f"subspace.residual.{key}"].fill_(value)
    with pytest.raises(CheckpointError, match=rf"subspace\.residual\.{key}.*has values that no run leaves"):
        optimizer.load_state_dict(state)


def test_weights_in_16_bits_are_rounded_once():
    """S z and the step along the residual are added up first."""
    model = nn.Sequential(nn.Linear(16, 12, bias=False)).to(torch.bfloat16)
    start = model[0].weight.detach().clone()
    optimizer = lingrad.wrap(model, {"*": "random(rank=4, every=0)"}, "sgd", lr=0.1, residual="sign")
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    model(x).float().square().sum().backward()
    sub = optimizer.subspaces[0]
    seen, grad = sub.pending.total.dense().float(), sub.coords.grad.clone()
    optimizer.step()
    change = -0.1 * sub.map().lift(grad) - 0.1 * sub.map().residual(seen).sign()
    assert torch.equal(model[0].weight, (start.float() + change).bfloat16())


def trained_on(rank, world):
    """Half of every batch in each of two processes, with micro-batches and a clip; None as a rank is one process."""
    found = {}
    for rule, spec in itertools.product(RULES, ("svd(rank=3, every=3)", "power(rank=3, every=2)", "random(rank=3, every=3)")):
        # the zoo's layers have units that are off, for which R is zero but for rounding, and so are its signs
        build, batches, loss = (llama, text_batches, text_loss) if rule == "sign" else (zoo, zoo_batches, zoo_loss)
        inner = build()
        options = {"lr": 1e-2, "eps": 1e-4, "weight_decay": 0.1, "carry": "transport", "residual": rule}
        optimizer = lingrad.wrap(inner, {"*": spec}, "adamw", **options)
        model = inner if rank is None else nn.parallel.DistributedDataParallel(inner)
        for early, last in batches(4, micro=2):
            optimizer.zero_grad()
            for i, batch in enumerate((early, last)):
                with contextlib.nullcontext() if rank is None or i else model.no_sync():
                    loss(model, batch if rank is None else batch.chunk(world)[rank]).backward()
            optimizer.clip_grad_norm_(0.5)
            optimizer.step()
        found[rule, spec] = weights_of(optimizer)
    return found


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    """By every rule; to start processes takes longer than what they train."""
    first, second = each_rank(trained_on, 2, tmp_path)
    for key, expected in trained_on(None, 1).items():
        assert_equal_bits(first[key], second[key])
        assert gap(first[key], expected) <= TOLERANCE, key


@pytest.mark.slow
@each_rule
def test_a_compiled_model_trains_as_it_does_eagerly(rule):
    """Layers that read gradients are left out of the graphs."""

    def trained(compiled):
        model = llama()
        optimizer = lingrad.wrap(model, "svd(rank=3, every=3)", "adamw", lr=1e-2, residual=rule)
        runs = torch.compile(model, backend="aot_eager") if compiled else model
        train(runs, optimizer, text_batches(5), text_loss, schedule=False)
        return weights_of(optimizer)

    assert gap(trained(compiled=True), trained(compiled=False)) <= TOLERANCE


def test_a_cuda_graph_of_steps_is_refused():
    optimizer = run("scaled", build=llama, data=text_batches, loss=text_loss)[1]
    with pytest.raises(SpecError, match="'residual' is followed in Python at each step"):
        optimizer.capture(lambda: None)


class TestScaled:
    def test_its_growth_is_limited(self):
        """From one step to the next by the limit, whatever the learning rate does."""
        model = llama()
        optimizer = lingrad.wrap(model, "svd(rank=3, every=50)", "adamw", lr=1e-2, residual="scaled(limit=1.05)")
        sizes = []
        for step, (batch,) in enumerate(text_batches(12, micro=1)):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * (1 + step)
            (text_loss(model, batch) * 3**step).backward()
            optimizer.step()
            optimizer.zero_grad()
            sizes.append({sub.name: float(optimizer._run.residuals.norms[sub.name]) for sub in optimizer.subspaces})
        growth = [now[name] / was[name] for was, now in itertools.pairwise(sizes) for name in now]
        assert max(growth) <= 1.05 * (1 + 1e-12)
        assert sum(abs(g - 1.05) < 1e-9 for g in growth) > 5  # it does limit

    @pytest.mark.parametrize("tensor", [False, True])
    def test_a_first_step_without_a_learning_rate_limits_nothing(self, tensor):
        """As in a warm-up from zero."""
        model = llama()
        rate = torch.tensor(0.0) if tensor else 0.0
        optimizer = lingrad.wrap(model, "svd(rank=3, every=50)", "adamw", lr=rate, residual="scaled")
        before = weights_of(optimizer)
        for step, (batch,) in enumerate(text_batches(2, micro=1)):
            for group in optimizer.param_groups:
                group["lr"] = (torch.tensor if tensor else float)(1e-2 * step)
            text_loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 0:
                assert_equal_bits(weights_of(optimizer), before)
        assert all(float(norm) > 1e-3 for norm in optimizer._run.residuals.norms.values())
