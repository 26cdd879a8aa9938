"""The memory of runs with offload: on the device less by what is in host memory, in closed form, simulated and measured."""

import pytest
import torch
from torch import nn

from lingrad import memory
from lingrad.engine import offload
from lingrad.testing.training import every_kind, token_loss

each_mode = pytest.mark.parametrize("mode", ["optimizer", "adapter"])

WIDTH, RANK, LAYERS = 64, 8, 6
MOMENT = BASIS = WIDTH * RANK * 4  # bytes of one, of one layer


def layers():
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))


def loss(tokens):
    return lambda model: model(torch.randn(tokens, WIDTH, device=model[0].weight.device)).square().mean()


def simulated(mode, words, *, tokens=4096, spec=f"svd(rank={RANK}, side=right)", **options):
    return memory.simulate(layers, {"*": spec}, "adamw", mode, loss=loss(tokens), lr=1e-2, offload=words, **options)


class TestOnTheDevice:
    """Six layers whose coordinates and bases have one shape."""

    @each_mode
    def test_less_by_what_is_in_host_memory(self, mode):
        plain, moments, both = (simulated(mode, words, steps=3) for words in (None, "moments", "moments, bases"))
        assert plain.host == {}
        assert moments.host == {"moments": LAYERS * 2 * MOMENT}
        assert both.host == {"basis": LAYERS * BASIS, "moments": LAYERS * 2 * MOMENT}
        for report in (moments, both):
            assert plain.steady - report.steady == sum(report.host.values())
            kept = {category: n for category, n in plain.steady_breakdown.items() if category not in report.host}
            found = {category: n for category, n in report.steady_breakdown.items() if category not in report.host}
            assert found == kept
        # and at the peak of a step without a refresh, which with so many tokens is in the loss, where no basis is in use
        first, *others = (sum(report.by_step[-1].values()) for report in (plain, moments, both))
        assert [first - other for other in others] == [sum(report.host.values()) for report in (moments, both)]

    @each_mode
    def test_a_step_has_three_blocks_on_the_device(self, mode, monkeypatch):
        monkeypatch.setattr(offload, "BLOCK", WIDTH * RANK)
        options = {"tokens": 1, "spec": f"random(rank={RANK}, side=right, every=0)"}
        plain, out = (simulated(mode, words, **options).by_phase["step"] for words in (None, "moments"))
        assert plain - out == (LAYERS - 3) * 2 * MOMENT


@pytest.mark.thinned(2)
@each_mode
@pytest.mark.parametrize(
    ("spec", "base", "layerwise"),
    [
        ("svd(rank=4)", "adamw", False),
        ("power(rank=4, side=both)", "adamw8bit", False),
        ("pca(rank=4)", "muon", False),
        ("coded(each=svd(rank=4), bits=4)", "adamw8bit", True),
        ("random(rank=4)", "sgd", False),
        ("dct(rank=4)", "adamw", False),
        ("kron(left=svd(rank=4), right=random(rank=4))", "adafactor", True),
        ("svd(rank=4, schedule=overlap())", "muon", True),
    ],
)
def test_closed_forms_are_what_a_run_holds(spec, base, mode, layerwise):
    rules, words = {"head": "none", "*": spec}, "moments, bases"
    options = {"layerwise": layerwise, "offload": words, "lr": 1e-2}
    report = memory.simulate(
        lambda: every_kind(torch.float32),
        rules,
        base,
        mode,
        loss=lambda m: token_loss(m, torch.zeros(4, 5, dtype=torch.long, device="meta")),
        **options,
    )
    with torch.device("meta"):
        model = every_kind(torch.float32)
    estimate = memory.estimate(model, rules, base, mode, **options)
    assert estimate.totals == report.steady_breakdown
    assert estimate.steady == report.steady
    assert estimate.host == report.host


@each_mode
def test_measured_on_a_cpu(mode):
    """The host is another place there too; the allocator of the CPU counts both."""
    options = {"loss": loss(64), "lr": 1e-2, "offload": "moments, bases"}
    found = memory.measure(layers, {"*": f"svd(rank={RANK}, side=right)"}, "adamw", mode, device="cpu", **options)
    expected = simulated(mode, "moments, bases", tokens=64, device="cpu")
    assert found.host == expected.host
    assert found.steady_breakdown == expected.steady_breakdown


def test_commands_say_what_is_where(lingrad):
    demo = ("--model", "demo", "--rules", "svd(rank=16)", "--length", "32", "--offload", "bases, moments")
    status, out, _ = lingrad("memory", "simulate", *demo)
    assert status == 0
    assert "in host memory between steps: " in out
    assert " of basis, " in out
    status, out, _ = lingrad("memory", "estimate", *demo)
    assert status == 0
    assert "in host memory: moments" in out
    status, _, errors = lingrad("memory", "simulate", *demo[:-1], "base")
    assert status == 2
    assert "'base' cannot be in host memory; did you mean 'bases'?" in errors
