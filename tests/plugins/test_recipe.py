"""examples/plugins/recipe.py: a run that is killed and started again ends with the same weights."""

from dataclasses import replace

import pytest
import torch

from lingrad.errors import DataError
from tests.plugins.loading import load

recipe = load("recipe")
SMALL = recipe.Settings(rules="svd(rank=4, every=2)", steps=5, rows=2, length=16, save_every=2, hidden=16)


class Killed(BaseException):
    """Nothing in the recipe catches it."""


def kill(step, loss):
    if step == 3:
        raise Killed


@pytest.mark.parametrize(("mode", "bf16"), [("optimizer", False), ("adapter", True)])
def test_a_killed_run_ends_with_the_same_weights(tmp_path, mode, bf16):
    settings = replace(SMALL, mode=mode, bf16=bf16)
    straight = recipe.train(settings, tmp_path / "straight").state_dict()
    with pytest.raises(Killed):
        recipe.train(settings, tmp_path / "killed", on_step=kill)
    seen = []
    resumed = recipe.train(settings, tmp_path / "killed", on_step=lambda step, loss: seen.append(step)).state_dict()
    assert seen == [3, 4, 5]  # the checkpoint is of step 2
    assert resumed.keys() == straight.keys() == recipe.build(SMALL, "cpu")[0].state_dict().keys()
    for name, weight in straight.items():
        assert weight.dtype == (torch.bfloat16 if bf16 else torch.float32)
        assert torch.equal(resumed[name], weight), name


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    recipe.train(replace(SMALL, steps=2), tmp_path)
    with pytest.raises(DataError, match="belongs to a run with other settings; repeat those, or name another folder"):
        recipe.train(SMALL, tmp_path)


def test_micro_batches_differ():
    text = torch.arange(1000)
    ids = [recipe.batch(text, SMALL, step, part) for step in (0, 1) for part in (0, 1)]
    assert len({tuple(rows.flatten().tolist()) for rows in ids}) == 4
    assert ids[0].shape == (2, 16)
