"""Methods of other packages by name: each trains, with the options that its name says."""

import pytest
import torch

from lingrad.errors import ModeError, SpecError
from lingrad.methods import BASELINES, GaloreTorch, baseline
from tests.support.models import llama, text_batches, text_loss

RATES = {"sgd_momentum": 3e-2, "apollo_mini": 1e-3, "scale": 3e-3}


def written(name, **options):
    needs = {key: 4 for key, value in BASELINES[name].options.items() if value is None}
    return baseline(name, **needs, lr=RATES.get(name, 1e-2), **options)


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_trains(name):
    pytest.importorskip("peft")
    training = written(name).prepare(llama(torch.float32))
    ((batch,),) = text_batches(1, micro=1)
    losses = []
    for _ in range(12):
        training.zero_grad()
        loss = text_loss(training.model, batch)
        loss.backward()
        training.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("name", [name for name in BASELINES if "lora" not in name or name == "relora"])
def test_what_changes_every_weight_refuses_those_in_integers(name):
    pytest.importorskip("peft")
    pytest.importorskip("galore_torch")
    model = llama(torch.float32)
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ModeError, match=r"changes every weight, and model.layers.0.mlp.up_proj.weight is stored as int8"):
        written(name).prepare(model)


def test_lora_plus_has_two_rates():
    training = written("lora_plus", ratio=8.0).prepare(llama(torch.float32))
    named = {id(param): name for name, param in training.model.named_parameters()}
    for group in training.optimizers[0].param_groups:
        assert {("lora_B" in named[id(param)]) for param in group["params"]} == {group["lr"] == 8e-2}


def test_rslora_scales_by_the_root_of_the_rank():
    scales = []
    for name in ("lora", "rslora"):
        model = written(name).prepare(llama(torch.float32)).model
        scales.append({module.scaling["default"] for module in model.modules() if hasattr(module, "lora_A")})
    assert scales == [{1.0}, {2.0}]  # alpha is the rank, 4


def test_muon_steps_matrices_and_adamw_the_rest():
    training = written("muon").prepare(llama(torch.float32))
    names = [type(optimizer).__name__ for optimizer in training.optimizers]
    assert names == ["Muon", "AdamW"]
    stepped = [id(p) for optimizer in training.optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(stepped) == sorted(map(id, training.model.parameters()))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lore", {}, "unknown baseline 'lore'; did you mean 'lora'"),
        ("lora", {}, "baseline 'lora' needs rank"),
        ("apollo", {"rank": 4, "lrr": 0.1}, "APOLLO has no option 'lrr'; did you mean 'lr'.* It takes: lr, betas, eps, .*seed"),
        ("apollo_mini", {"beta": 0.1}, "APOLLO-Mini has no option 'beta'; did you mean 'betas'"),
        ("scale", {"moment": 0.1}, "SCALE has no option 'moment'; did you mean 'momentum'"),
        ("relora", {"rank": 4, "every": 0}, "every must be a whole number, 1 or more, not 0"),
        ("relora", {"rank": 4, "prune": 1.5}, "prune is a share of the moments, from 0 to 1, not 1.5"),
    ],
)
def test_what_it_refuses(name, options, message):
    with pytest.raises(SpecError, match=message):
        baseline(name, **options)


@pytest.mark.parametrize("name", BASELINES)
def test_an_option_that_there_is_not_is_named(name):
    with pytest.raises(SpecError, match="(has|takes) no option 'weight_decoy'.* It takes: .*lr") as caught:
        written(name, weight_decoy=0.1).prepare(llama(torch.float32))
    assert caught.value.option == "weight_decoy"


@pytest.mark.peers
@pytest.mark.parametrize("base", ["adamw", "adamw8bit"])
def test_galore_torch_names_an_option_that_there_is_not_and_takes_a_rate(base):
    pytest.importorskip("galore_torch", reason="make test installs it (extra: peers)", exc_type=ImportError)
    with pytest.raises(SpecError, match="takes no option 'weight_decoy'.* It takes: lr"):
        GaloreTorch(4, base=base, options={"weight_decoy": 0.1}).prepare(llama(torch.float32))
    training = GaloreTorch(4, base=base, options={"lr": 0.5}).prepare(llama(torch.float32))
    assert {group["lr"] for group in training.optimizers[0].param_groups} == {0.5}


@pytest.mark.parametrize("name", ["relora", "scale", "apollo"])
def test_no_step_inside_the_backward(name):
    with pytest.raises(SpecError, match="is not stepped inside the backward here; leave layerwise out"):
        written(name).prepare(llama(torch.float32), layerwise=True)
