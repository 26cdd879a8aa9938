"""`lingrad export`: the ledger of a run as an adapter, for transforms, modes, decay, shared bases."""

import pytest
import torch

import lingrad
from lingrad import convert
from lingrad.errors import CheckpointError, DataError, ExportError, SpecError
from lingrad.models import load_model
from tests.support.folders import Malicious, edit, left_over
from tests.support.models import gpt2, llama, text_batches, train

pytest.importorskip("peft", reason="make test installs it (extra: hf)", exc_type=ImportError)

RUNS = {
    "svd": ("svd(rank=4, every=3)", {}, 12),
    "svd, left": ("svd(rank=4, every=3, side=left)", {}, 12),
    "random": ("random(rank=4, every=3)", {}, 12),
    "rows": ("random(rank=4, every=3, kind=rows)", {}, 12),
    # a sketch's first step is in a random basis, so that there is one basis more
    "power, both sides": ("power(rank=3, every=4, side=both)", {}, 9),
    "decay": ("svd(rank=4, every=3)", {"weight_decay": 0.3}, 12),
    "a shared basis": ("power(rank=4, every=3, side=right)", {"share": "input"}, 16),
    "8-bit moments": ("svd(rank=4, every=3)", {"moments": "8bit"}, 12),
}


def run(folder, build=llama, mode="optimizer", spec="svd(rank=4, every=3)", dtype=torch.float32, ledger=True, **options):
    """Train 8 steps, so that bases were merged and one is in use; save as a Trainer does. Paths of base and run."""
    model = build(dtype)
    model.save_pretrained(folder / "base")
    make = {"optimizer": lingrad.wrap, "adapter": lingrad.adapt}[mode]
    optimizer = make(model, spec, lr=1e-2, ledger=ledger, **options)
    train(model, optimizer, text_batches(8))
    model.save_pretrained(folder / "run", state_dict=model.state_dict())
    torch.save(optimizer.state_dict(), folder / "run/optimizer.pt")
    return folder / "base", folder / "run", optimizer


@pytest.mark.thinned(6)
@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("mode", ["optimizer", "adapter"])
@pytest.mark.parametrize("what", RUNS)
def test_exact(tmp_path, what, mode, build):
    """In float64: what the adapter leaves of kept START + learned is the rounding of 8 steps, and the rank is at most that of
    the bases used. Decay is known from the ledger, to the last digit."""
    if build is gpt2 and "share" in RUNS[what][1]:
        pytest.skip("GPT-2 has one layer for q, k and v: nothing shares an input")
    spec, options, rank = RUNS[what]
    self_contained = {"self_contained": True} if mode == "adapter" else {}
    base, folder, optimizer = run(tmp_path, build, mode, spec, torch.float64, **self_contained, **options)
    allowed = {"allow_residual": 1.0} if "weight_decay" in options else {}  # decay is no part of an adapter
    report = convert.convert_run(folder, tmp_path / "out", start=base, **allowed)
    low = {row.name: row for row in report.rows if row.kind == "low_rank"}
    changes = optimizer.changes()
    whole = changes.keys() - low.keys()  # of full rank in this small model, so that factors would be larger
    assert low.keys() | whole == changes.keys()
    assert all(min(changes[name].layout.shape) <= rank for name in whole)
    for name, row in low.items():
        assert 1 <= row.rank <= rank
        assert row.decay == changes[name].decay
        assert (row.decay < 1) == ("weight_decay" in options)
        assert row.without_decay <= 1e-12
        assert ("weight_decay" in options) or row.residual <= 1e-12
    assert {row.name for row in report.rows if row.kind == "full"} == set(optimizer.weights()) - set(low)
    assert not left_over(tmp_path)


def test_without_a_base(tmp_path):
    """The same factors to the byte; what cannot be known is not claimed."""
    base, folder, _ = run(tmp_path)
    convert.convert_run(folder, tmp_path / "with", start=base)
    report = convert.convert_run(folder, tmp_path / "without")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("with", "without")]
    assert files[0] == files[1]
    assert all(row.floor is None for row in report.rows)


def test_rank_and_dtype(tmp_path):
    base, folder, _ = run(tmp_path)
    whole = convert.convert_run(folder, tmp_path / "whole", start=base)
    report = convert.convert_run(
        folder, tmp_path / "out", start=base, rank=3, dtype="bf16", uniform_rank=True, logits=True, allow_residual=1
    )
    assert {row.rank for row in report.rows if row.kind == "low_rank"} == {3}
    assert whole.residual < 1e-5 < report.residual < 1
    assert report.nbytes < whole.nbytes
    assert report.outputs.difference > 0


def test_it_agrees_with_a_search(tmp_path):
    """The search, which knows nothing of the run, finds the rank and the decay that the ledger has."""
    base, folder, _ = run(tmp_path, spec="svd(rank=2, every=3)", weight_decay=0.3)
    known = convert.convert_run(folder, tmp_path / "known", start=base, allow_residual=1)
    found = convert.convert(base, folder, tmp_path / "found", allow_residual=1)
    for a, b in zip(known.rows, found.rows, strict=True):
        assert a.name == b.name
        assert b.rank <= a.rank
        assert a.decay == pytest.approx(b.decay, abs=1e-5)


def test_decayed_start(tmp_path):
    base, folder, _ = run(tmp_path, weight_decay=0.3)
    report = convert.convert_run(folder, tmp_path / "out", start=base, decayed_start=tmp_path / "decayed", logits=True)
    assert report.outputs.difference <= 1e-6
    assert (tmp_path / "decayed/model.safetensors").exists()


def test_the_old_name_of_start(tmp_path):
    base, folder, _ = run(tmp_path)
    with pytest.warns(DeprecationWarning, match="base of lingrad.convert.convert_run is deprecated; use start") as caught:
        report = convert.convert_run(folder, tmp_path / "out", base=base)
    assert [warning.filename for warning in caught if warning.category is DeprecationWarning] == [__file__]
    assert report.start == str(base)


class TestRefused:
    def refused(self, tmp_path, folder, message, error=CheckpointError, **options):
        with pytest.raises(error, match=message):
            convert.convert_run(folder, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    def test_a_run_without_a_ledger(self, tmp_path):
        _, folder, _ = run(tmp_path, ledger=False)
        self.refused(tmp_path, folder, "has no ledger for 'model.layers.0.self_attn.q_proj.weight': .* without ledger=True")

    def test_coordinates_that_are_elsewhere(self, tmp_path):
        _, folder, optimizer = run(tmp_path, mode="adapter", self_contained=False)
        optimizer.detach()
        optimizer.model.save_pretrained(folder)  # without coordinates
        self.refused(tmp_path, folder, "has coordinates that are not in optimizer.pt; save the run in optimizer mode")

    def test_another_optimizer(self, tmp_path):
        _, folder, _ = run(tmp_path)
        torch.save(torch.optim.AdamW(llama().parameters()).state_dict(), folder / "optimizer.pt")
        self.refused(tmp_path, folder, "was not written by lingrad's optimizer")

    def test_another_model(self, tmp_path):
        _, folder, _ = run(tmp_path)
        _, other, _ = run(tmp_path / "b", gpt2)
        (other / "optimizer.pt").rename(folder / "optimizer.pt")
        self.refused(tmp_path, folder, "is of another model: rule .* matches no trainable parameter")

    @pytest.mark.parametrize("with_base", [False, True])
    def test_a_weight_that_is_not_in_the_files(self, tmp_path, with_base):
        """The ledger knows what became of it; an adapter without it would not be the run's."""
        base, folder, _ = run(tmp_path)
        for path in (base, folder):
            edit(path, lambda t: t.pop("model.layers.0.mlp.up_proj.weight"))
        options = {"start": base} if with_base else {}
        self.refused(tmp_path, folder, "the run changed 'model.layers.0.mlp.up_proj.weight', and the files of", **options)

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda saved: saved["param_groups"].append(5),
            lambda saved: saved["param_groups"][0].pop("params"),
            lambda saved: saved["param_groups"][0].update(params=["a"]),
            lambda saved: saved["param_groups"][0]["param_names"].pop(),
            lambda saved: saved["param_groups"][0].update(specs=None),
            lambda saved: saved["param_groups"][0].update(format={}),
            lambda saved: saved["state"].update({0: 3}),
        ],
    )
    def test_a_state_that_is_spoilt(self, tmp_path, spoil):
        _, folder, _ = run(tmp_path)
        saved = torch.load(folder / "optimizer.pt")
        spoil(saved)
        torch.save(saved, folder / "optimizer.pt")
        self.refused(tmp_path, folder, "is damaged|has format {}")

    @pytest.mark.parametrize("value", [3e38, float("nan"), float("inf")])
    def test_factors_that_no_dtype_can_hold(self, tmp_path, value):
        """They would be published as infinities, with a residual of nothing."""
        _, folder, _ = run(tmp_path)
        saved = torch.load(folder / "optimizer.pt")
        factors = [key for key in saved["state"][0] if key.startswith("subspace.ledger.0.") and key.endswith(("left", "right"))]
        for key in factors:
            saved["state"][0][key].fill_(value)
        torch.save(saved, folder / "optimizer.pt")
        assert factors
        with pytest.raises((CheckpointError, ExportError), match=r"is not finite: the run has diverged|cannot hold"):
            convert.convert_run(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_another_base(self, tmp_path):
        """The same architecture, other weights."""
        _, folder, _ = run(tmp_path)
        model = load_model(tmp_path / "base")
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.add_(1e-3)
        model.save_pretrained(tmp_path / "other")
        message = "'model.layers.1.mlp.up_proj.weight' of .* it is not the model that the run started from"
        self.refused(tmp_path, folder, message, start=tmp_path / "other")

    def test_options_that_need_the_base(self, tmp_path):
        _, folder, _ = run(tmp_path)
        self.refused(tmp_path, folder, "logits needs the model that the run started from", SpecError, logits=True)
        self.refused(tmp_path, folder, "decayed_start needs the model", SpecError, decayed_start=tmp_path / "x")
        message = "no decoupled decay was recognised"
        self.refused(tmp_path, folder, message, ExportError, start=tmp_path / "base", decayed_start=tmp_path / "x")

    @pytest.mark.parametrize("damage", ["none", "cut", "code"])
    def test_a_file_that_is_not_one(self, tmp_path, damage):
        _, folder, _ = run(tmp_path)
        path = folder / "optimizer.pt"
        if damage == "none":
            path.unlink()
            self.refused(tmp_path, folder, "there is no '.*optimizer.pt'", DataError)
            return
        if damage == "cut":
            path.write_bytes(path.read_bytes()[:5000])
        else:
            torch.save({"state": {0: Malicious(tmp_path / "ran")}, "param_groups": []}, path)
        self.refused(tmp_path, folder, "cannot be read as plain tensors and numbers, and nothing else is read")
        assert not (tmp_path / "ran").exists()
