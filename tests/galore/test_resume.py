"""Runs of galore_torch 1.0 and of the Trainer's own GaLore: gone on with exactly, and turned into adapters that PEFT loads."""

import copy
import warnings

import pytest
import torch

from lingrad import convert
from lingrad.convert.logits import outputs_of
from lingrad.errors import CheckpointError, DataError
from lingrad.models import load_model
from tests.contract.test_galore import PROJECTIONS
from tests.support.folders import Malicious
from tests.support.models import gap, llama, text_batches, text_loss, train
from tests.support.trainers import arguments, examples

galore_torch = pytest.importorskip("galore_torch", reason="make test installs it (extra: peers)", exc_type=ImportError)
peft = pytest.importorskip("peft", reason="make test installs it (extra: hf)", exc_type=ImportError)
pytestmark = pytest.mark.peers

OPTIONS = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.99), "eps": 1e-4}


def galore(model, proj_type="std", rank=4, gap=7, scale=0.25, cls=None, **options):
    targets = {name for name, _ in model.named_parameters() if "proj" in name}
    groups = [
        {"params": [param for name, param in model.named_parameters() if name not in targets]},
        {
            "params": [param for name, param in model.named_parameters() if name in targets],
            **{"rank": rank, "update_proj_gap": gap, "scale": scale, "proj_type": proj_type},
        },
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its AdamW announces its own deprecation
        return (cls or galore_torch.GaLoreAdamW)(groups, **OPTIONS | options)


def halfway(tmp_path, steps=10, proj_type="std", **options):
    """A run that was saved: the model, its optimizer, its batches to come, the file."""
    model, batches = llama(), text_batches(30)
    optimizer = galore(model, proj_type, **options)
    train(model, optimizer, batches[:steps], schedule=False)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    return model, optimizer, batches[steps:]


class TestContinued:
    @pytest.mark.thinned(3)
    @pytest.mark.parametrize("mode", ["optimizer", "adapter"])
    @pytest.mark.parametrize("proj_type", PROJECTIONS)
    def test_the_same_trajectory(self, tmp_path, proj_type, mode):
        """20 more steps, over refreshes at 14, 21 and 28: those of galore_torch, to 1000 times the rounding seen."""
        model, optimizer, batches = halfway(tmp_path, proj_type=proj_type)
        ours = copy.deepcopy(model)
        continued = convert.from_galore(tmp_path / "optimizer.pt", ours, ["attn", "mlp"], mode)
        train(model, optimizer, batches, schedule=False)
        train(ours, continued, batches, schedule=False)
        assert continued.mode == mode
        assert gap(continued.weights(), dict(model.named_parameters())) <= 1e-12

    @pytest.mark.parametrize("steps", [1, 6, 7, 8, 14])
    def test_saved_at_any_step(self, tmp_path, steps):
        """Before, at and after a refresh."""
        model, optimizer, batches = halfway(tmp_path, steps)
        ours = copy.deepcopy(model)
        continued = convert.from_galore(tmp_path, ours, ["attn", "mlp"])
        train(model, optimizer, batches[:9], schedule=False)
        train(ours, continued, batches[:9], schedule=False)
        assert gap(continued.weights(), dict(model.named_parameters())) <= 1e-12

    def test_options_of_the_file_and_a_checkpoint_of_ours(self, tmp_path):
        """What the groups said is taken over; the state saves and loads as any other; ledger and switch work from there."""
        model, _, batches = halfway(tmp_path, scale=2.0)
        continued = convert.from_galore(tmp_path, model, r".*_proj", ledger=True)
        for group in continued.param_groups:
            assert {key: group[key] for key in OPTIONS} == OPTIONS
        assert continued.param_groups[0]["scale"] == 2.0
        assert set(continued.param_groups[0]["specs"]) == {"svd(rank=4, every=7, clip=true, precision=float32, align=false)"}
        start = {name: weight.clone() for name, weight in continued.weights().items()}
        train(model, continued, batches[:6], schedule=False)
        continued.switch("adapter")
        train(model, continued, batches[6:12], schedule=False)
        for name, change in continued.changes().items():
            expected = change.decay * start[name] + change.factors.dense()
            assert (continued.weights()[name] - expected).norm() <= 1e-12 * expected.norm()

    def test_groups_of_ones_own(self, tmp_path):
        """Two GaLore groups of different rank, in an order no rule tells: the names do."""
        batches = text_batches(20)
        model = llama()
        names = [[n for n, _ in model.named_parameters() if part in n] for part in ("mlp", "attn")]
        names.append([n for n, _ in model.named_parameters() if n not in names[0] + names[1]])
        params = dict(model.named_parameters())
        shared = {"update_proj_gap": 5, "scale": 0.5, "proj_type": "std"}
        groups = [
            {"params": [params[name] for name in part], **extra}
            for part, extra in zip(names, ({"rank": 3, **shared}, {"rank": 5, **shared}, {}), strict=True)
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            optimizer = galore_torch.GaLoreAdamW(groups, lr=1e-2)
        train(model, optimizer, batches[:8], schedule=False)
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        ours = copy.deepcopy(model)
        with pytest.raises(CheckpointError, match=r"has the param groups \['galore', 'galore', 'plain'\].* give names"):
            convert.from_galore(tmp_path, ours, ["attn", "mlp"])
        continued = convert.from_galore(tmp_path, ours, names=[name for part in names for name in part])
        train(model, optimizer, batches[8:], schedule=False)
        train(ours, continued, batches[8:], schedule=False)
        assert gap(continued.weights(), dict(model.named_parameters())) <= 1e-12


class TestRefused:
    def refused(self, path, message, model=None, error=CheckpointError, **options):
        """And the model is as it was: it can be wrapped by another call."""
        model = llama() if model is None else model
        with pytest.raises(error, match=message):
            convert.from_galore(path, model, **{"target_modules": ["attn", "mlp"], **options})
        assert not [name for name, _ in model.named_modules() if "lingrad" in name]

    def test_another_selection_or_model(self, tmp_path):
        halfway(tmp_path)
        self.refused(tmp_path, "14 projected .* and 7 others; .* selects 6 and leaves 15", target_modules=["mlp"])
        self.refused(tmp_path, "is .* in the file; expected|has bases for", model=llama(hidden_size=64))
        self.refused(tmp_path, "selects 28 and leaves", model=llama(num_hidden_layers=4))
        names = [name for name, _ in llama().named_parameters()]
        self.refused(tmp_path, "another selection or order", names=names, target_modules=None)
        self.refused(tmp_path, "the file has 21 parameters; 20 different names", names=names[:20], target_modules=None)
        self.refused(tmp_path, "'nothing' is not a parameter", names=["nothing", *names[1:]], target_modules=None)
        self.refused(tmp_path, "give target_modules, .* or names, one of the two", target_modules=None)

    def test_a_frozen_parameter_that_trained(self, tmp_path):
        halfway(tmp_path)
        model = llama()
        model.model.embed_tokens.weight.requires_grad_(False)
        self.refused(tmp_path, "'model.embed_tokens.weight' was trained in the file and is frozen", model=model)

    def test_other_arithmetic(self, tmp_path):
        halfway(tmp_path, correct_bias=False)
        self.refused(tmp_path, "the run had correct_bias=False")

    def test_adafactor(self, tmp_path):
        model = llama(torch.float32)
        options = {"lr": 1e-2, "betas": None, "eps": (1e-30, 1e-3), "relative_step": False, "scale_parameter": False}
        options |= {"beta1": 0.9, "warmup_init": False}
        del options["betas"]
        targets = [param for name, param in model.named_parameters() if "proj" in name]
        others = [param for name, param in model.named_parameters() if "proj" not in name]
        shared = {"rank": 4, "update_proj_gap": 7, "scale": 1.0, "proj_type": "std"}
        optimizer = galore_torch.GaLoreAdafactor([{"params": others}, {"params": targets, **shared}], **options)
        for batch in text_batches(1)[0]:
            text_loss(model, batch).backward()
        optimizer.step()
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        self.refused(tmp_path, "an 8-bit or Adafactor state, which cannot be resumed exactly")

    @pytest.mark.parametrize("entries", [{1: 2, "a": 3}, {"exp_avg": 1, 2.0: 3}, {True: 0, "step": 1}], ids=str)
    def test_entries_of_other_kinds(self, tmp_path, entries):
        state = halfway(tmp_path)[1].state_dict()
        state["state"][next(iter(state["state"]))] = entries
        torch.save(state, tmp_path / "optimizer.pt")
        self.refused(tmp_path, "cannot be resumed exactly; expected exp_avg and exp_avg_sq")

    def test_layerwise_runs_save_nothing(self, tmp_path):
        optimizer = galore(llama())
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        self.refused(tmp_path, "no moments: the Trainer saves nothing of a layerwise run")

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda state, group: state.pop("step"), "the 'step' of '.*' in the file is not a whole number"),
            (lambda state, group: state.update(exp_avg=5), "'exp_avg' of '.*' is not a tensor of finite numbers"),
            (lambda state, group: state["exp_avg_sq"].fill_(float("nan")), "'exp_avg_sq' of '.*' is not a tensor of finite"),
            (
                lambda state, group: state["projector"].ortho_matrix.fill_(float("inf")),
                "basis' of '.*' is not a tensor of finite",
            ),
            (lambda state, group: setattr(state["projector"], "proj_type", ["std"]), "no projector of galore_torch for"),
            (lambda state, group: group.update(lr={}), "'lr' in the file's param groups is neither a number nor a pair"),
            (lambda state, group: group.pop("params"), "is damaged: expected dicts"),
            (lambda state, group: group.update(lr=float("nan")), "lr must be a number, 0 or more|'lr' must be one number"),
            (lambda state, group: state.update(step=-1), "the 'step' of '.*' in the file is -1"),
            (lambda state, group: state.update(step=10**400), "the 'step' of '.*' in the file is 1000"),
            (lambda state, group: state["exp_avg_sq"].fill_(-1), "'exp_avg_sq' of '.*' is negative somewhere"),
            (lambda state, group: state.update(exp_avg=state["exp_avg"].to_sparse()), "cannot be read as plain tensors"),
            (lambda state, group: state.update(exp_avg=state["exp_avg"].to("meta")), "cannot be read as plain tensors"),
        ],
    )
    def test_a_state_that_is_spoilt(self, tmp_path, spoil, message):
        _, optimizer, _ = halfway(tmp_path)
        saved = optimizer.state_dict()
        spoil(saved["state"][20], saved["param_groups"][1])
        torch.save(saved, tmp_path / "optimizer.pt")
        self.refused(tmp_path, message)

    @pytest.mark.parametrize(
        "options",
        [{"lr": float("nan")}, {"lr": -1.0}, {"weight_decay": -1.0}, {"betas": (float("nan"), 0.9)}, {"eps": -1.0}],
        ids=str,
    )
    def test_hyper_parameters_that_nobody_trains_with(self, tmp_path, options):
        _, optimizer, _ = halfway(tmp_path)
        saved = optimizer.state_dict()
        for group in saved["param_groups"]:
            group.update(options)
        torch.save(saved, tmp_path / "optimizer.pt")
        self.refused(tmp_path, f"{next(iter(options))} must be|'{next(iter(options))}' must be one")

    def test_steps_that_differ(self, tmp_path):
        _, optimizer, _ = halfway(tmp_path)
        state = optimizer.state_dict()
        state["state"][3]["step"] = 4
        torch.save(state, tmp_path / "optimizer.pt")
        self.refused(tmp_path, "'step' must be one number for all parameters .* the file has 4, 10")

    @pytest.mark.parametrize("what", ["none", "cut", "a model", "another class", "code", "code in a projector"])
    def test_files(self, tmp_path, what):
        _, optimizer, _ = halfway(tmp_path)
        path = tmp_path / "optimizer.pt"
        message, error = "cannot be read as plain tensors and numbers, and nothing else is read", CheckpointError
        if what == "none":
            path.unlink()
            message, error = "there is no '.*optimizer.pt'", DataError
        elif what == "cut":
            path.write_bytes(path.read_bytes()[:-1000])
        elif what == "a model":
            torch.save(llama().state_dict(), path)
            message = "is not an optimizer's state dict, which has 'state' and 'param_groups'"
        else:
            state = optimizer.state_dict()
            if what == "another class":
                state["state"][20]["projector"] = torch.nn.Linear(2, 2)
            elif what == "code":
                state["more"] = Malicious(tmp_path / "ran")
            else:
                state["state"][20]["projector"].verbose = Malicious(tmp_path / "ran")
            torch.save(state, path)
        self.refused(path, message, error=error)
        assert not (tmp_path / "ran").exists()

    def test_a_projector_of_another_kind(self, tmp_path):
        _, optimizer, _ = halfway(tmp_path)
        for change, message in (
            ({"proj_type": "diagonal"}, "has no projector of galore_torch for"),
            ({"ortho_matrix": None}, "has no projector of galore_torch for"),
            ({"ortho_matrix": torch.ones(3, 3)}, r"has bases for \[.*\] rows and columns, rank 4, the weight is"),
        ):
            state = copy.deepcopy(optimizer.state_dict())
            vars(state["state"][20]["projector"]).update(change)
            torch.save(state, tmp_path / "optimizer.pt")
            self.refused(tmp_path, message)


def test_a_run_of_the_stock_trainer_becomes_an_adapter(tmp_path):
    """transformers' own optim="galore_adamw", no lingrad in it: 12 steps, refreshes at 0, 5 and 10. The rank is 4 x 3, the
    residual at most 1e-5 in float32, and the logits through PEFT are the tuned model's within it: |x| |D| residual bounds what
    one weight can do to an output, and 1e-5 of the largest logit is 100 times what is seen."""
    from transformers import Trainer

    model = llama(torch.float32, num_key_value_heads=4)  # of 16 x 32 weights nobody can tell rank 12 from noise
    model.save_pretrained(tmp_path / "base")
    options = {"optim": "galore_adamw", "optim_args": "rank=4, update_proj_gap=5, scale=0.25"}
    options |= {"optim_target_modules": ["attn", "mlp"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(model, arguments(tmp_path / "run", max_steps=12, **options), train_dataset=examples())
        trainer.train()
    trainer.save_model(tmp_path / "tuned")
    report = convert.convert(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", logits=True)
    low = [row for row in report.rows if row.kind == "low_rank"]
    assert len(low) == 14
    assert {row.rank for row in low} == {12}
    assert {row.decay for row in low} == {1.0}
    assert report.residual <= 1e-5
    adapted = peft.PeftModel.from_pretrained(load_model(tmp_path / "base"), str(tmp_path / "out"))
    expected = outputs_of(load_model(tmp_path / "tuned").eval())["logits"]
    start = outputs_of(load_model(tmp_path / "base").eval())["logits"]
    far = (outputs_of(adapted.eval())["logits"] - expected).abs().max()
    assert far <= 1e-5 * expected.abs().max()
    assert far <= report.residual * 10 * (expected - start).abs().max()
    assert report.outputs.difference == pytest.approx(float(far), rel=1e-6)


@pytest.mark.parametrize("mode", ["optimizer", "adapter"])
def test_a_checkpoint_of_the_stock_trainer_is_gone_on_with(tmp_path, mode):
    """Its optimizer.pt cannot be read by the Trainer itself. Three more steps equal those of the optimizer that was saved, in
    float32: 1e-5, since sums are in another order."""
    from transformers import Trainer

    options = {
        "optim": "galore_adamw",
        "optim_target_modules": ["attn", "mlp"],
        "optim_args": "rank=4, update_proj_gap=4, scale=1.0",
    }
    options |= {"save_strategy": "steps", "save_steps": 6, "lr_scheduler_type": "constant", "warmup_steps": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(llama(torch.float32), arguments(tmp_path, max_steps=6, **options), train_dataset=examples())
        trainer.train()
    theirs = copy.deepcopy(trainer.model)
    optimizer = galore(theirs, scale=1.0, gap=4)
    optimizer.load_state_dict(trainer.optimizer.state_dict())
    model = load_model(tmp_path / "checkpoint-6")
    continued = convert.from_galore(tmp_path / "checkpoint-6", model, ["attn", "mlp"], mode)
    batches = text_batches(3)
    train(theirs, optimizer, batches, schedule=False)
    train(model, continued, batches, schedule=False)
    assert gap(continued.weights(), dict(theirs.named_parameters())) <= 1e-5
