"""docs/loop.md: the three loops run as printed, resume bit for bit and leave plain models."""

import warnings

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.support.docs.pages import assert_adapter_is_the_model, blocks, run

PAGE = "loop.md"
PLAIN, RESUMED, FINISHED, ACCELERATE, LIGHTNING = range(5)


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def plain_of(names):
    return {name for name, _ in names["LlamaForCausalLM"](names["config"]).named_parameters()}


def test_every_block_is_run_here():
    assert len(blocks(PAGE)) == 5


def test_plain_pytorch(tmp_path):
    page = blocks(PAGE)
    names = run(page[PLAIN], {}, PAGE)
    assert names["losses"][-1] < names["losses"][0]
    assert {a.sub.coords.dtype for a in names["opt"].attachments} == {torch.float32}
    run(page[RESUMED], names, PAGE)  # it compares the losses itself
    for weight, expected in zip(names["resumed"].parameters(), names["model"].parameters(), strict=True):
        assert torch.equal(weight, expected)
    run(page[FINISHED], names, PAGE)
    assert {name for name, _ in names["model"].named_parameters()} == plain_of(names)
    assert_adapter_is_the_model(tmp_path, names["data"][0, 0])


def test_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)  # another test's, in the same process
    page = blocks(PAGE)
    names = run(page[ACCELERATE], run(page[PLAIN].partition("model, opt, schedule = build()")[0], {}, PAGE), PAGE)
    assert len(names["again"]) == 8
    assert names["losses"][-1] < names["losses"][0]
    assert {name for name, _ in names["plain"].named_parameters()} == plain_of(names)


def test_lightning():
    pytest.importorskip("lightning")
    page = blocks(PAGE)
    setup = page[PLAIN].partition("model, opt, schedule = build()")[0]
    names = run(setup, {"__name__": "loop"}, PAGE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's own, about one worker and about CPUs
        run(page[LIGHTNING], names, PAGE)  # it compares the weights itself
    assert {name for name, _ in names["run"].model.named_parameters()} == plain_of(names)
