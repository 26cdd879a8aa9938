"""Checkpoints of the format before: they load, and the run continues as it did then.

`tests/data/format3` was written by `tests/data/write_checkpoints.py` on the last revision of that format. On a processor of the
kind that wrote it the weights come out bit for bit; other processors round products in another order.
"""

from pathlib import Path

import pytest
import torch

from lingrad.engine.saved import ENERGY, FORMAT, Saved
from lingrad.errors import CheckpointError
from tests.data.write_checkpoints import BEFORE, CASES, batches, make, train

FOLDER = Path(__file__).parents[1] / "data" / "format3"
# some thousand roundings of 1e-16, amplified by refreshes whose singular values are 1e-2 apart and by Adam's division
TOLERANCE = 1e-9
# galore_torch's SVD is in float32, 2^-24, which other processors round in another way; amplified as above, with gaps of 1e-2
ROUNDED = {"galore": 1e-5}


def saved(name):
    return torch.load(FOLDER / f"{name}.pt", weights_only=True)


def resumed(name, state):
    model, opt = make(name)
    model.load_state_dict(state["model"])
    opt.load_state_dict(state["optimizer"])
    return model, opt


@pytest.mark.parametrize("name", CASES)
def test_a_run_of_the_format_before_continues(name):
    state = saved(name)
    assert {group["format"] for group in state["optimizer"]["param_groups"]} == {3}
    model, opt = resumed(name, state)
    train(model, opt, list(state["inputs"]))
    for key, weight in opt.weights().items():
        allowed = ROUNDED.get(name, TOLERANCE)
        torch.testing.assert_close(weight.detach(), state["weights"][key], rtol=allowed, atol=allowed)


@pytest.mark.parametrize("name", CASES)
def test_it_continues_to_the_bits_of_the_present_format(name):
    state, found = saved(name), []
    model, opt = resumed(name, state)
    again = {"model": model.state_dict(), "optimizer": opt.state_dict()}
    assert {group["format"] for group in again["optimizer"]["param_groups"]} == {FORMAT}
    for one in (state, again):
        model, opt = resumed(name, one)
        train(model, opt, list(state["inputs"]))
        found.append({key: weight.detach().clone() for key, weight in opt.weights().items()})
    assert all(torch.equal(weight, found[1][key]) for key, weight in found[0].items())


@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_now_has_every_entry_of_then(name):
    state = saved(name)["optimizer"]
    model, opt = make(name)
    train(model, opt, batches(BEFORE))
    then, now = Saved(state), Saved(opt.state_dict())
    # a run whose state is not self-contained was the default then, and had its coordinates in the model's
    more = set() if name == "contained" else {key for entries in now.state.values() for key in entries if ".stored." in key}
    assert (name in {"adapter", "kron"}) == bool(more)
    for index, entries in then.state.items():
        assert entries.keys() - {ENERGY} == now.state[index].keys() - {ENERGY} - more
        # a flattened state is looked up by the keys of now before lingrad sees it; one with a ledger never loaded so
        if not any(".ledger." in key for key in entries):
            assert state["state"][index].keys() - {ENERGY} == now.state[index].keys() - {ENERGY} - more
    assert {group["format"] for group in state["param_groups"]} == {3}  # what was read is left as it was


@pytest.mark.parametrize(("number", "message"), [(2, "has format 2"), (5, "has format 5"), ("3", "has format '3'")])
def test_other_formats_are_refused(number, message):
    state = saved("optimizer")
    for group in state["optimizer"]["param_groups"]:
        group["format"] = number
    with pytest.raises(CheckpointError, match=f"the checkpoint {message}, this run has {FORMAT}"):
        resumed("optimizer", state)
