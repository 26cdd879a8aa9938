"""What would fit in place of a run that does not, and the memory that a CUDA context takes."""

from dataclasses import replace

import pytest

from lingrad import memory
from lingrad.cli.common import DOES_NOT_FIT
from lingrad.errors import SpecError
from lingrad.memory import alternatives, commands
from lingrad.memory.report import WORDS
from lingrad.memory.units import readable

SMALL = commands.Question(model="demo", rules="svd(rank=64)", batch=32, length=64, context="0")


def never():
    return 0.0


@pytest.fixture(scope="module")
def run():
    return commands.simulate(SMALL)


def test_what_fits_is_found_and_simulated(run):
    """Of a little less than the run takes single changes are enough, and nothing is tried after them that has more."""
    question = replace(SMALL, capacity=f"{run.allocated - 2**20}B")
    assert not commands.simulate(question).fits
    found = alternatives.fitting(question, clock=never)
    assert found.untried == []
    fits = {label for label, report in found.reports.items() if report.fits}
    assert {"--checkpointing", "--batch 1"} <= fits
    assert [label for label in found.reports if label.count("--") > 1] == ["--checkpointing --layerwise --base adamw8bit"]
    assert "also simulated, and fits with:\n" in str(found)
    for label in ("--checkpointing", "--batch 1"):
        name, _, value = label.removeprefix("--").partition(" ")
        again = commands.simulate(replace(question, **{name: int(value) if value else True}))
        assert again.reserved == found.reports[label].reserved


def test_where_nothing_fits_the_least_is_named_and_time_is_bounded():
    ticks = iter([0.0, 1.0, 5.0, *[99.0] * 50])
    found = alternatives.fitting(replace(SMALL, capacity="1MiB"), clock=lambda: next(ticks))
    assert list(found.reports) == ["--checkpointing --layerwise --base adamw8bit", "--checkpointing"]
    assert "None fits; the least is" in str(found)
    assert (
        "not tried, for want of time: --layerwise, --base adamw8bit, --offload moments, --rules 'svd(rank=16)', --batch 1"
        in str(found)
    )


@pytest.mark.parametrize(
    ("change", "absent"),
    [
        ({"checkpointing": True}, "--checkpointing"),
        ({"layerwise": True}, "--layerwise"),
        ({"base": "sgd"}, "--base adamw8bit"),
        ({"offload": "bases"}, "--offload moments"),
        ({"batch": 1}, "--batch 1"),
        ({"rules": "*.mlp.*: svd(rank=8)"}, "--rules"),
    ],
)
def test_what_the_run_has_already_or_cannot_have_is_not_offered(change, absent):
    labels = [" ".join(parts) for parts, _, _ in alternatives._candidates(replace(SMALL, **change))]
    assert labels
    assert not any(absent in label and "LoRA" not in label for label in labels)


def test_the_context_counts_in_the_verdict(run):
    capacity = f"{run.reserved}B"
    assert commands.simulate(replace(SMALL, capacity=capacity)).fits
    context = run.reserved - run.allocated + 2**20  # what is left is less than all blocks
    report = commands.simulate(replace(SMALL, capacity=capacity, context=f"{context}B"))
    assert (report.fits, report.context) == (False, context)
    assert f"next to {readable(context)} for the CUDA context" in str(report)
    assert WORDS in str(report)
    with pytest.raises(SpecError, match="context must be a number of bytes, not -1"):
        memory.simulate(lambda: None, "svd(rank=4)", context=-1)


def test_the_exit_code_says_that_it_does_not_fit(lingrad, monkeypatch):
    monkeypatch.setattr(alternatives, "_candidates", lambda question: iter([]))
    words = ("memory", "simulate", "--model", "demo", "--rules", "svd(rank=8)", "--length", "8", "--capacity", "1MiB")
    status, out, _ = lingrad(*words)
    assert status == DOES_NOT_FIT == 3
    assert out.endswith("also simulated: nothing. None fits\n")
    status, out, _ = lingrad(*words, "--json", "-")
    assert status == DOES_NOT_FIT
    assert out.startswith("{")
