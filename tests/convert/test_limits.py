"""What a conversion may leave out: refused with the cause, allowed by a number, and never called all of the change."""

import json
from dataclasses import replace

import pytest
import torch

from lingrad import convert
from lingrad.convert.limits import require_allowed, words
from lingrad.convert.lowrank import Goal
from lingrad.convert.output import Output
from lingrad.errors import ExportError, SpecError
from lingrad.peft import ChangedTensor, check_adapter
from lingrad.peft.fit import rounded_up
from tests.support.folders import edit, make
from tests.support.models import llama

pytest.importorskip("peft", reason="make test installs it (extra: hf)", exc_type=ImportError)

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make(tmp_path_factory.mktemp("models"), others=False)


def test_a_rank_that_leaves_out_half(folders, tmp_path):
    with pytest.raises(
        ExportError, match=r"the adapter leaves 0\.\d+ of its change, over 0\.02: the goal is rank 3\. allow_"
    ) as caught:
        convert.convert(*folders, tmp_path / "out", rank=3)
    assert not (tmp_path / "out").exists()
    allowed = float(str(caught.value).split("allow_residual=")[1].split(" ")[0])
    seen = []
    report = convert.convert(*folders, tmp_path / "out", rank=3, allow_residual=allowed, tick=lambda *done: seen.append(done))
    assert 0.02 < report.largest_residual <= allowed
    assert len(seen) == report.equal + len(report.rows)
    assert f"({report.goal})" in report.table()
    assert report.goal == "rank 3"


def test_decay_that_peft_cannot_express(tmp_path):
    base, tuned = make(tmp_path, kept=0.97, others=False)
    with pytest.raises(
        ExportError, match=r"over 0\.02: the weight was decayed, .* --decayed-start DIR .*--allow-residual 0\.\d+\) acc"
    ):
        convert.convert(base, tuned, tmp_path / "out")
    report = convert.convert(base, tuned, tmp_path / "out", allow_residual=1)
    assert "all of the change" not in report.table()
    assert report.goal == f"a part of the change: {report.residual:.2g} of it is left out"
    exact = convert.convert(base, tuned, tmp_path / "exact", decayed_start=tmp_path / "decayed")
    assert exact.goal == "all of the change, down to rounding"


def test_a_remainder_without_a_cause_is_noise(tmp_path):
    """A weight that was rounded at every step, of whose change factors hold a little: refused, and not called all of it."""
    rows = [ChangedTensor(UP, "low_rank", (88, 32), 100, rank=2, residual=left, without_decay=left) for left in (0.001, 0.944)]
    output = Output(tmp_path / "out", Goal())
    with pytest.raises(
        ExportError, match=r"leaves 0\.94 of its change, over 0\.02: it is spread over all .*allow_residual=0\.95 "
    ):
        require_allowed(output, rows, ())
    require_allowed(replace(output, allow_residual=0.95), rows, ())
    assert words(output, rows, [1.0, 1.0]) == "a part of the change: 0.67 of it is left out"  # (0.944^2 / 2)^(1/2)
    assert words(output, rows[:1], [1.0]) == "all of the change, down to rounding"


@pytest.mark.parametrize("goal", [{"energy": 0.9}, {"max_error": 0.4}])
def test_a_goal_that_says_what_may_be_lost_is_permission(folders, tmp_path, goal):
    assert convert.convert(*folders, tmp_path / "out", **goal).largest_residual > 0.02


def test_a_checkpoint_cut_to_a_rank(tmp_path, recwarn):
    import lingrad
    from tests.support.models import text_batches, train

    model = llama(torch.float32)
    optimizer = lingrad.wrap(model, "svd(rank=4, every=3)", lr=1e-2, ledger=True, train_only="transformed")
    train(model, optimizer, text_batches(5, micro=1))
    model.save_pretrained(tmp_path / "run")
    torch.save(optimizer.state_dict(), tmp_path / "run/optimizer.pt")
    with pytest.raises(ExportError, match="the goal is rank 2"):
        convert.convert_run(tmp_path / "run", tmp_path / "out", rank=2)
    convert.convert_run(tmp_path / "run", tmp_path / "all", target="vllm", base_model="org/model")
    assert check_adapter(tmp_path / "all", "vllm").findings[0].verdict == "loads"
    assert not [w for w in recwarn if "base_model_name_or_path" in str(w.message)]  # PEFT's, which compares names with folders


class TestTargets:
    @pytest.mark.parametrize("target", ["vllm", "llama.cpp", "diffusers"])
    def test_ranks_that_differ_are_made_one(self, tmp_path, target):
        base, tuned = make(tmp_path, rank=3, others=False)
        edit(tuned, lambda tensors: tensors[UP].add_(torch.randn(88, 7) @ torch.randn(7, 32) / 10))
        report = convert.convert(base, tuned, tmp_path / "out", target=target)
        config = json.loads((tmp_path / "out/adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (10, 10, {}, {})
        assert {row.rank for row in report.rows} == {10}
        assert check_adapter(tmp_path / "out", target).findings[0].verdict == "loads"

    def test_for_peft_a_note_names_who_would_change_it(self, tmp_path):
        base, tuned = make(tmp_path, rank=3, others=False)
        edit(tuned, lambda tensors: tensors[UP].add_(torch.randn(88, 7) @ torch.randn(7, 32) / 10))
        report = convert.convert(base, tuned, tmp_path / "out")
        assert report.notes[0].startswith("llama.cpp would multiply the change by 0.3 in 1 of 14 modules")

    def test_what_changed_in_full_is_refused(self, tmp_path):
        base, tuned = make(tmp_path)
        with pytest.raises(ExportError, match="vLLM loads nothing but factors, and '.*' and 6 more would be saved in full"):
            convert.convert(base, tuned, tmp_path / "out", target="vllm")

    def test_a_change_of_full_rank_has_factors(self, tmp_path):
        """For PEFT its layer is saved in full, in half the bytes; a server would refuse that."""
        base, tuned = make(tmp_path, rank=3, others=False)
        edit(tuned, lambda tensors: tensors[UP].add_(torch.randn(88, 32)))
        assert convert.convert(base, tuned, tmp_path / "peft").saved_modules == ("model.layers.0.mlp.up_proj",)
        report = convert.convert(base, tuned, tmp_path / "vllm", target="vllm")
        assert report.saved_modules == ()
        assert {row.rank for row in report.rows} == {32}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allow_residual": -1}, "allow_residual must be a number from 0, not -1"),
        ({"allow_residual": True}, "allow_residual must be a number from 0, not True"),
        ({"target": "tgi"}, "target must be one of peft, vllm, llama.cpp, diffusers, not 'tgi'"),
    ],
)
def test_wrong_options(folders, tmp_path, options, message):
    with pytest.raises(SpecError, match=message):
        convert.convert(*folders, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("residual", "text"), [(0.944, "0.95"), (0.94, "0.94"), (0.0561, "0.057"), (1.01, "1.1"), (0.0, "0"), (1e-9, "1e-09")]
)
def test_what_a_message_says_to_allow_is_enough(residual, text):
    assert rounded_up(residual) == text
    assert float(text) >= residual
