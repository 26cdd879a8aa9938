"""The memory estimate: closed forms against what a simulated run holds, byte for byte."""

import itertools
import json
import time
from typing import get_args

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import lingrad
from lingrad import memory, optimizers
from lingrad.config.residual import Kind
from lingrad.errors import SpecError
from lingrad.models import LLAMAS, open_model
from lingrad.testing.training import every_kind, token_loss
from lingrad.transforms import registry
from tests.support import cases

pytestmark = [pytest.mark.thinned(4), pytest.mark.rare(4)]

MODES = ("optimizer", "adapter")


def combinations():
    """Every (transform, side, mode, base) that there is."""
    for text, side, base, mode in itertools.product(cases.variants(), cases.SIDES, cases.base_options(), MODES):
        if "{side}" in text or side == "short":
            yield text, side, base, mode


ALL = list(combinations())
PAIRS = cases.covering(ALL, 2)
KEPT = {id(case) for case in PAIRS}


def label(case):
    text, side, (base, options), mode = case
    return f"{text.format(side=side)}-{base}{sorted(options.items())[:-1]}-{mode}"


def ids():
    return torch.zeros(4, 5, dtype=torch.long, device="meta")


def agree(case, dtype, *, layerwise=False, residual=None):
    text, side, (base, options), mode = case
    spec = text.format(side=side)
    options = options if residual is None else options | {"residual": residual}

    def build():
        return every_kind(dtype)

    simulated = memory.simulate(
        build, spec_rules(spec), base, mode, loss=lambda m: token_loss(m, ids()), layerwise=layerwise, **options
    )
    with torch.device("meta"):
        model = build()
    estimate = memory.estimate(model, spec_rules(spec), base, mode, layerwise=layerwise, **options)
    assert estimate.totals == simulated.steady_breakdown, (estimate.totals, dict(simulated.steady_breakdown))
    assert estimate.steady == simulated.steady
    assert sum(simulated.breakdown.values()) == simulated.peak


def spec_rules(spec):
    """On every weight with two dimensions or more: embedding, convolution, experts, Linear, but the head."""
    return {"head": "none", "*": spec}


@pytest.mark.thinned(6)
@pytest.mark.rare(8)
@pytest.mark.parametrize("case", PAIRS, ids=label)
def test_closed_forms_are_what_a_run_holds(case):
    agree(case, torch.float32)


@pytest.mark.slow
@pytest.mark.rare(60)
@pytest.mark.parametrize("case", [case for case in cases.covering(ALL, 3) if id(case) not in KEPT], ids=label)
def test_closed_forms_are_what_a_run_holds_in_every_triple(case):
    agree(case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spec", ["svd(rank=4)", "pca(rank=4)", "random(rank=4, kind=rows)"])
def test_in_other_dtypes(spec, mode, dtype):
    agree((spec, "short", ("adamw", {"lr": 1e-2}), mode), dtype)


@pytest.mark.parametrize("base", ["adamw", "adamw8bit", "adafactor", "muon"])
@pytest.mark.parametrize("mode", MODES)
def test_layerwise(mode, base):
    agree(("svd(rank=4)", "short", (base, {"lr": 1e-2}), mode), torch.float32, layerwise=True)


@pytest.mark.parametrize("residual", get_args(Kind))
@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("spec", ["svd(rank=4)", "power(rank=4, side=both)", "full()"])
def test_what_residuals_keep(spec, residual, layerwise, dtype):
    agree((spec, "short", ("adamw", {"lr": 1e-2}), "optimizer"), dtype, layerwise=layerwise, residual=residual)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layerwise", [False, True])
def test_what_a_rule_freezes_has_neither_gradient_nor_state(mode, layerwise):
    rules = {"embed": "frozen", "*bias": "frozen", "conv": "frozen", "head": "none", "*": "svd(rank=4)"}

    def build():
        return every_kind(torch.float32)

    simulated = memory.simulate(
        build, rules, "adamw", mode, loss=lambda m: token_loss(m, ids()), layerwise=layerwise, lr=1e-2, rest_lr=1e-3
    )
    with torch.device("meta"):
        model = build()
    estimate = memory.estimate(model, rules, "adamw", mode, layerwise=layerwise, lr=1e-2, rest_lr=1e-3)
    frozen = [p for n, p in model.named_parameters() if n.startswith(("embed", "conv")) or n.endswith("bias")]
    assert estimate.totals == simulated.steady_breakdown
    assert estimate.totals["frozen"] == sum(p.numel() * p.element_size() for p in frozen)
    for row in estimate.rows:
        assert not (row.frozen and (row.weight or row.gradient or row.moments or row.coords)), row.name
    assert all(param.requires_grad for param in model.parameters())  # an estimate changes nothing


@pytest.mark.parametrize("name", optimizers.names())
def test_every_base_has_a_row(name):
    assert optimizers.find(name, {"lr": 1e-2}).row is not None


@pytest.mark.parametrize("name", optimizers.names())
@pytest.mark.parametrize("shape", [(64, 96), (7,), (3, 8, 4), ()])
def test_a_row_is_what_a_step_leaves(name, shape):
    found = optimizers.find(name, {"lr": 1e-2})
    if name == "muon" and len(shape) != 2:
        found = found.fallback
    param = torch.empty(shape, device="meta")
    with lingrad.memory.kernels.as_on_cuda("flash", set()):
        kept = [
            t for key, t in found.state_of(param).items() if isinstance(t, torch.Tensor) and t.is_meta and "qmap" not in key
        ]
    assert sum(t.numel() * t.element_size() for t in kept) == sum(row.nbytes for row in found.moments(shape, torch.float32))


def test_a_base_without_a_row_is_counted_by_a_step():
    def factory(params, lr):
        return torch.optim.NAdam(params, lr=lr)

    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    estimate = memory.estimate(model, {"*": "svd(rank=2)"}, factory, lr=1e-3)
    assert estimate.totals["moments"] == 2 * 4 * (2 * 8 + 6 + 2 * 6 + 4)


@pytest.mark.parametrize("name", registry.transform_names())
def test_every_transform_says_what_it_stores(name):
    nested = {"kron": "kron(left=svd(rank=4), right=pca(rank=3))", "experts": "experts(each=pca(rank=4), count=2)"}
    nested["switch"] = "switch(rank=4, after=1)"
    nested["coded"] = "coded(each=power(rank=4), bits=4)"
    spec = {**nested, "full": "full()"}.get(name, f"{name}(rank=4)")
    model = nn.Linear(24, 16, bias=False)
    optimizer = lingrad.wrap(model, {"*": spec}, "sgd", lr=0.1)
    for _ in range(2):
        model(torch.randn(9, 24)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    (sub,) = optimizer.subspaces
    sub.map()
    held = sum(t.numel() * t.element_size() for t in sub.basis.tensors())
    # on the CPU too the step of a learned basis's own Adam is fused, and counted where the basis is
    assert held == sum(stored.nbytes for stored in sub.basis.transform.storage((16, 24), torch.float32))


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        *((mode, {}) for mode in MODES),
        ("optimizer", {"residual": "sign"}),
        ("optimizer", {"residual": "sampled(q=1)"}),
        ("optimizer", {"residual": "sampled(q=1e-9)"}),  # as good as never drawn
    ],
)
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_saved_activations_are_what_autograd_is_asked_to_keep(side, mode, options):
    model = nn.Linear(24, 16, bias=False)
    tokens, rank = 10, 4
    optimizer = {"optimizer": lingrad.wrap, "adapter": lingrad.adapt}[mode](
        model, {"*": f"svd(rank={rank}, side={side})"}, "sgd", lr=0.1, **options
    )
    x = torch.randn(tokens, 24)
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    inputs = [t for t in kept if t.shape[0] == tokens]
    (row,) = memory.estimate(
        nn.Linear(24, 16, bias=False), {"*": f"svd(rank={rank}, side={side})"}, "sgd", mode, tokens=tokens, **options
    ).rows
    assert sum(t.numel() * t.element_size() for t in inputs) == row.activations
    assert row.activations == tokens * 4 * (
        24 if side == "left" or options.get("residual") in ("sign", "sampled(q=1)") else rank
    )


class TestDuality:
    @pytest.mark.parametrize("base", optimizers.names())
    @pytest.mark.parametrize("spec", ["svd(rank=64)", "svd(rank=64, side=both)", "pca(rank=64)", "random(rank=64)"])
    def test_state_and_bases_take_the_same_in_both_modes(self, spec, base):
        model = open_model("llama-60m")
        one, other = (memory.estimate(model, spec, base, mode, lr=1e-3).totals for mode in MODES)
        assert {k: one.get(k) for k in ("basis", "moments", "coords gradient", "weight", "gradient")} == {
            k: other.get(k) for k in ("basis", "moments", "coords gradient", "weight", "gradient")
        }

    def test_the_gradients_of_coordinates_are_the_sum_of_p_q(self):
        estimate = memory.estimate(open_model("llama-60m"), "svd(rank=128)")
        layer = 4 * (512 * 128) + 3 * (1376 * 128)
        assert estimate.totals["coords gradient"] == 4 * 8 * layer


PUBLISHED = {
    "llama-60m": 58_073_600,
    "llama-130m": 134_105_856,
    "llama-350m": 367_969_280,
    "llama-1b": 1_339_082_752,
    "llama-7b": 6_738_415_616,
}


@pytest.mark.parametrize("name", LLAMAS)
def test_parameters_of_the_papers_models(name):
    estimate = memory.estimate(open_model(name), "svd(rank=128)")
    assert estimate.parameters == PUBLISHED.get(name, estimate.parameters)
    assert estimate.parameters == sum(row.weight for row in estimate.rows) // 4


def test_an_estimate_of_70b_needs_no_memory_and_reads_as_a_table():
    model = open_model("llama-70b")
    begin = time.thread_time()
    estimate = memory.estimate(model.to(torch.bfloat16), "svd(rank=1024)", "adamw8bit", lr=1e-3, tokens=2048)
    assert time.thread_time() - begin < 60  # milliseconds; a bound that only a loop over weights' numbers would miss
    text = str(estimate)
    assert "68,976,648,192 parameters" in text
    assert len({len(line) for line in text.splitlines()[3:]}) <= 2
    assert json.loads(estimate.to_json())["totals"] == estimate.totals


@pytest.mark.parametrize(
    ("old", "new"), [("ledger", "estimate"), ("Ledger", "Estimate"), ("Full", "FullRank"), ("Moments", "MomentReport")]
)
def test_old_names_work_and_warn(old, new):
    with pytest.warns(DeprecationWarning, match=f"lingrad.memory.{old} is deprecated; use lingrad.memory.{new}") as caught:
        found = getattr(memory, old)
    assert found is getattr(memory, new)
    assert caught[0].filename == __file__
    with pytest.raises(AttributeError, match="module 'lingrad.memory' has no attribute 'nothing'"):
        memory.nothing  # noqa: B018


def test_errors_are_those_of_wrap():
    with pytest.raises(SpecError, match="unknown transform 'svdd'; did you mean 'svd'"):
        memory.estimate(open_model("llama-60m"), "svdd(rank=4)")
    with pytest.raises(SpecError, match="base 'adamw' takes no option 'momentun'"):
        memory.estimate(open_model("llama-60m"), "svd(rank=4)", "adamw", momentun=0.9)


def test_what_train_only_freezes_has_no_state():
    model = open_model("demo")
    given = memory.estimate(model, "svd(rank=4)", train_only="transformed")
    assert given == memory.estimate(model, {"*_proj": "svd(rank=4)", "*": "frozen"})
    assert given.trained < memory.estimate(model, "svd(rank=4)").trained
