"""galore_torch's optimizers from `lingrad.galore`: scripts whose import line was changed."""

import copy
import gc
import io
import warnings

import pytest
import torch
from torch import nn

import lingrad.galore
from lingrad.errors import CheckpointError, ModeError, ShapeError, SpecError
from lingrad.galore import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from tests.support.models import gap, llama, text_batches, text_loss

TO_ROUNDING = 1e-12  # in float64; the bases are equal to the bit, and only the order of sums differs
STEPS = 14
PROJECTED = {"rank": 4, "update_proj_gap": 5, "scale": 0.25, "proj_type": "std"}


def galore_torch():
    return pytest.importorskip("galore_torch", reason="make test installs it (extra: peers)", exc_type=ImportError)


def split(model):
    """As galore_torch's training script sorts parameters."""
    galore_params = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(key in name for key in ("attn", "mlp"))
    ]
    chosen = {id(p) for p in galore_params}
    return [p for p in model.parameters() if id(p) not in chosen], galore_params


def groups(model, **options):
    regular_params, galore_params = split(model)
    return [{"params": regular_params}, {"params": galore_params, **PROJECTED, **options}]


def make(cls, params, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # galore_torch's AdamW announces its own deprecation
        return cls(params, **options)


def cosine(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)


def train(model, optimizer, scheduler, batches, clip=1.0, absent=None, first=0):
    """The loop of a script that knows nothing of lingrad: micro-batches, torch's clipping, a schedule.

    ``absent``: (step, number of a parameter) -> whether it has no gradient in the step.
    """
    for step, micro_batches in enumerate(batches, start=first):
        for batch in micro_batches:
            (text_loss(model, batch) / len(micro_batches)).backward()
        for number, param in enumerate(model.parameters()):
            if absent is not None and absent(step, number):
                param.grad = None
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def weights_after(package, name, model_groups=groups, clip=1.0, absent=None, **options):
    model = llama()
    optimizer = make(getattr(package, name), model_groups(model), **options)
    train(model, optimizer, cosine(optimizer), text_batches(STEPS), clip, absent)
    return dict(model.named_parameters())


@pytest.mark.peers
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right", "full"])
def test_a_script_makes_the_same_steps_after_its_import_is_changed(proj_type):
    """With clipping by the norm of all full gradients, which only works where they are left in place until the step."""

    def both(model):
        return groups(model, proj_type=proj_type)

    theirs = weights_after(galore_torch(), "GaLoreAdamW", both, lr=1e-2, weight_decay=0.1)
    assert gap(weights_after(lingrad.galore, "GaLoreAdamW", both, lr=1e-2, weight_decay=0.1), theirs) <= TO_ROUNDING
    start = dict(llama().named_parameters())
    assert gap(theirs, start) > 1e-3


@pytest.mark.peers
def test_groups_of_their_own_ranks_gaps_scales_rates_and_defaults():
    def three(model):
        regular, projected = split(model)
        return [
            {"params": projected[:5], "rank": 3, "update_proj_gap": 4, "scale": 2.0, "proj_type": "std", "lr": 3e-3},
            {"params": regular, "weight_decay": 0.3, "betas": (0.8, 0.95)},
            {"params": projected[5:], "rank": 9, "update_proj_gap": 6, "scale": 0.5, "proj_type": "right", "eps": 1e-4},
        ]

    theirs = weights_after(galore_torch(), "GaLoreAdamW", three, no_deprecation_warning=True)
    assert gap(weights_after(lingrad.galore, "GaLoreAdamW", three, no_deprecation_warning=True), theirs) <= TO_ROUNDING


def absent(step, number):
    """Some parameters have a gradient in every step, some miss one step in three, some the first six, one all."""
    kind = number % 7
    return (kind == 1 and step % 3 == 0) or (kind == 2 and step < 6) or (kind == 3 and step in (5, 10)) or number == 11


ADAFACTOR = {"lr": 1e-2, "weight_decay": 0.1, "relative_step": False, "scale_parameter": False, "beta1": 0.9}


@pytest.mark.peers
@pytest.mark.parametrize(
    ("name", "options"), [("GaLoreAdamW", {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-3}), ("GaLoreAdafactor", ADAFACTOR)]
)
def test_steps_are_counted_for_each_weight(name, options):
    """Of a weight that has no gradient in some steps: when its basis is new, the bias corrections, eps, and its decay."""
    theirs = weights_after(galore_torch(), name, absent=absent, **options)
    assert gap(weights_after(lingrad.galore, name, absent=absent, **options), theirs) <= TO_ROUNDING
    assert gap(weights_after(lingrad.galore, name, **options), theirs) > 1e-3


@pytest.mark.parametrize(
    "model_groups", [groups, lambda model: [{"params": model.parameters()}]], ids=["both", "none projected"]
)
def test_a_run_whose_weights_have_missed_steps_resumes_to_the_bit(model_groups):
    options, batches = {"lr": 1e-2, "eps": 1e-3}, text_batches(STEPS)
    through = weights_after(lingrad.galore, "GaLoreAdamW", model_groups, absent=absent, **options)
    model = llama()
    optimizer = GaLoreAdamW(model_groups(model), **options)
    scheduler = cosine(optimizer)
    train(model, optimizer, scheduler, batches[:7], absent=absent)
    resumed = llama()
    resumed.load_state_dict(model.state_dict())
    other = GaLoreAdamW(model_groups(resumed), **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    follower = cosine(other)
    follower.load_state_dict(scheduler.state_dict())
    train(resumed, other, follower, batches[7:], absent=absent, first=7)
    assert all(torch.equal(p, through[name]) for name, p in resumed.named_parameters())


def test_a_step_that_fails_is_missed_by_nothing():
    weights = [nn.Parameter(torch.ones(6, 5)) for _ in range(2)]
    optimizer = GaLoreAdamW([{"params": weights, **PROJECTED}])
    weights[0].grad = torch.ones(6, 5)
    optimizer.run._run.stepper.offload = "none"  # which cannot step
    with pytest.raises(AttributeError):
        optimizer.step()
    optimizer.run._run.stepper.offload = None
    assert optimizer.state_dict()["galore_counts"] == {"steps": 0, "missed": {}}
    optimizer.step()
    assert optimizer.state_dict()["galore_counts"] == {"steps": 1, "missed": {"0.1": 1}}
    weights[1].grad = torch.ones(6, 5)  # both are stepped now, one after the other
    optimizer.run._run.stepper.offload = "none"
    with pytest.raises(AttributeError) as caught:
        optimizer.step()
    assert [len(group["params"]) for group in optimizer.run.bases()[0].param_groups] == [2], caught


@pytest.mark.parametrize("counts", [None, {}, {"steps": 1.0, "missed": {}}, {"steps": 1, "missed": {"0.0": 2}}])
def test_counts_that_cannot_be_are_refused(counts):
    optimizer = GaLoreAdamW([{"params": [nn.Parameter(torch.ones(6, 5))], **PROJECTED}])
    with pytest.raises(CheckpointError, match="galore_counts"):
        optimizer.load_state_dict({**optimizer.state_dict(), "galore_counts": counts})


class TestAnotherOptimizer:
    """Scripts that make their optimizer again, such as after loading."""

    def test_it_takes_the_weights_over_and_resumes_to_the_bit(self):
        batches = text_batches(STEPS)
        through = weights_after(lingrad.galore, "GaLoreAdamW", lr=1e-2)
        model = llama()
        first = GaLoreAdamW(groups(model), lr=1e-2)
        scheduler = cosine(first)
        train(model, first, scheduler, batches[:7])
        state = first.state_dict()
        second = GaLoreAdamW(groups(model), lr=1e-2)
        second.load_state_dict(state)
        follower = cosine(second)
        follower.load_state_dict(scheduler.state_dict())
        train(model, second, follower, batches[7:])
        assert all(torch.equal(p, through[name]) for name, p in model.named_parameters())

    def test_the_first_says_that_it_has_no_weights_any_more(self):
        weight = nn.Parameter(torch.ones(6, 5))
        first = GaLoreAdamW([{"params": [weight], **PROJECTED}])
        GaLoreAdamW([{"params": [weight, nn.Parameter(torch.ones(4, 4))], **PROJECTED}])
        weight.grad = torch.ones(6, 5)
        for use in (first.step, first.state_dict):
            with pytest.raises(ModeError, match="another one of lingrad.galore was made for some of them.*Step the other one"):
                use()

    def test_one_that_is_gone_leaves_its_weights_free(self):
        model = nn.Linear(6, 5, bias=False).double()
        first = GaLoreAdamW([{"params": [model.weight], **PROJECTED}], lr=1e-2)
        model(torch.ones(2, 6).double()).sum().backward()
        first.step()
        del first
        gc.collect()
        optimizer = lingrad.wrap(model, "svd(rank=2)", lr=1e-2)
        before = model.weight.detach().clone()
        model(torch.ones(2, 6).double()).sum().backward()
        optimizer.step()
        assert not torch.equal(model.weight, before)

    def test_weights_without_a_rank_are_taken_over_too(self):
        a, b = nn.Parameter(torch.ones(6, 5)), nn.Parameter(torch.ones(3, 3))
        first = GaLoreAdamW([{"params": [a], **PROJECTED}, {"params": [b]}], lr=1e-2)
        second = GaLoreAdamW([{"params": [b]}], lr=1e-2)
        b.grad = torch.ones(3, 3)
        with pytest.raises(ModeError, match="another one of lingrad.galore was made for some of them"):
            first.step()
        assert torch.equal(b, torch.ones(3, 3))
        second.step()
        assert not torch.equal(b, torch.ones(3, 3))

    def test_a_state_that_names_other_weights_is_refused(self):
        weight = nn.Parameter(torch.ones(6, 5))
        optimizer = GaLoreAdamW([{"params": [weight], **PROJECTED}], lr=1e-2)
        state = optimizer.state_dict()
        state["galore_counts"] = {"steps": 0, "missed": {"nosuch": 0}}
        with pytest.raises(CheckpointError, match="'galore_counts' of the state names nosuch"):
            optimizer.load_state_dict(state)

    def test_one_that_cannot_be_made_takes_nothing(self):
        weight = nn.Parameter(torch.ones(6, 5))
        first = GaLoreAdamW([{"params": [weight], **PROJECTED}], lr=1e-2)
        with pytest.raises(SpecError, match="lr"):
            GaLoreAdamW([{"params": [weight], **PROJECTED}], lr=-1.0)
        weight.grad = torch.ones(6, 5)
        first.step()
        assert not torch.equal(weight, torch.ones(6, 5))
        assert torch.equal(weight.grad, torch.ones(6, 5))

    def test_weights_that_lingrad_wrap_has_are_refused(self):
        model = nn.Linear(6, 5)
        optimizer = lingrad.wrap(model, "svd(rank=2)")
        with pytest.raises(ModeError, match="is wrapped already; call detach"):
            GaLoreAdamW([{"params": [model.weight], **PROJECTED}])
        optimizer.detach()
        GaLoreAdamW([{"params": [model.weight], **PROJECTED}])


@pytest.mark.peers
@pytest.mark.parametrize("beta1", [None, 0.9])
def test_adafactor(beta1):
    options = {"lr": 1e-2, "beta1": beta1, "weight_decay": 0.1, "relative_step": False, "scale_parameter": False}
    theirs = weights_after(galore_torch(), "GaLoreAdafactor", **options)
    assert gap(weights_after(lingrad.galore, "GaLoreAdafactor", **options), theirs) <= TO_ROUNDING


@pytest.mark.peers
def test_one_optimizer_for_each_weight_stepped_by_hooks():
    """The README's layer-by-layer recipe: every gradient is stepped and freed inside the backward."""

    def run(package):
        model = llama()
        regular, projected = split(model)
        steps = {p: make(package.GaLoreAdamW, [{"params": p, **PROJECTED}], lr=1e-2) for p in projected}
        steps |= {p: torch.optim.AdamW([p], lr=1e-2) for p in regular}

        def hook(p):
            if p.grad is not None:
                steps[p].step()
                steps[p].zero_grad()

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(hook)
        for batches in text_batches(STEPS):
            text_loss(model, batches[0]).backward()
        assert all(p.grad is None for p in model.parameters())
        return dict(model.named_parameters())

    assert gap(run(lingrad.galore), run(galore_torch())) <= TO_ROUNDING


def test_eight_bit_moments_stay_near_full_ones():
    """The blocks are lingrad's base ``adamw8bit``; 1e-2 is the bound of its duality."""
    pytest.importorskip("bitsandbytes")
    options = {"lr": 1e-3, "weight_decay": 0.1}
    exact = weights_after(lingrad.galore, "GaLoreAdamW", eps=1e-8, **options)
    assert 0 < gap(weights_after(lingrad.galore, "GaLoreAdamW8bit", min_8bit_size=64, **options), exact) <= 1e-2


def test_a_run_resumes_to_the_bit_from_a_file_of_plain_values():
    batches = text_batches(STEPS)
    through = weights_after(lingrad.galore, "GaLoreAdamW", lr=1e-2, weight_decay=0.1)
    model = llama()
    optimizer = GaLoreAdamW(groups(model), lr=1e-2, weight_decay=0.1)
    scheduler = cosine(optimizer)
    train(model, optimizer, scheduler, batches[:7])
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()], file)
    file.seek(0)
    weights, state, schedule = torch.load(file, weights_only=True)
    resumed = llama()
    resumed.load_state_dict(weights)
    other = GaLoreAdamW(groups(resumed), lr=5.0)  # what the file says counts
    follower = cosine(other)
    other.load_state_dict(state)
    follower.load_state_dict(schedule)
    assert other.param_groups[1]["lr"] == optimizer.param_groups[1]["lr"]
    assert other.param_groups[1]["initial_lr"] == 1e-2
    train(resumed, other, follower, batches[7:])
    assert all(torch.equal(p, through[name]) for name, p in resumed.named_parameters())


def test_gradients_are_there_until_zero_grad_and_may_be_unscaled():
    model = llama()
    optimizer = GaLoreAdamW(groups(model), lr=1e-2)
    text_loss(model, text_batches(1)[0][0]).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters())
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in model.parameters())
    assert optimizer.run.captured_energy().keys() == {f"1.{i}" for i in range(14)}


def test_names_that_the_script_gives_are_kept_and_a_rank_that_is_too_large_is_cut():
    model = nn.Linear(6, 5, bias=False).double()
    optimizer = GaLoreAdamW([{"params": model.named_parameters(), **PROJECTED, "rank": 99}], lr=1e-2)
    assert [(sub.name, *sub.coords.shape) for sub in optimizer.run.subspaces] == [("weight", 5, 6)]


def test_frozen_parameters_are_left_alone_and_may_not_train_later():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double()
    model[0].requires_grad_(False)
    optimizer = GaLoreAdamW([{"params": model.parameters()}], lr=1e-2)
    before = copy.deepcopy(model.state_dict())
    model(torch.ones(2, 6).double()).sum().backward()
    optimizer.step()
    after = model.state_dict()
    assert [torch.equal(after[name], before[name]) for name in after] == [True, True, False, False]
    model[0].requires_grad_(True)
    model(torch.ones(2, 6).double()).sum().backward()
    with pytest.raises(ModeError, match="frozen when the optimizer was made has a gradient now"):
        optimizer.step()


MATRIX = {"params": [nn.Parameter(torch.ones(6, 5))], **PROJECTED}


@pytest.mark.parametrize(
    ("cls", "group", "options", "message"),
    [
        (GaLoreAdamW, {"proj_type": "stdd"}, {}, r"proj_type must be one of std, .*, not 'stdd'; did you mean 'std'"),
        (GaLoreAdamW, {"proj_type": ["std"]}, {}, r"proj_type must be one of std, .*, not \['std'\]"),
        (GaLoreAdamW, {"update_proj_gap": 0}, {}, "update_proj_gap counts steps, 1 or more, not 0"),
        (GaLoreAdamW, {"proj_quant": True}, {}, "proj_quant is not supported"),
        (GaLoreAdamW, {"rank": -1}, {}, "rank"),
        (GaLoreAdamW, {}, {"correct_bias": False}, "correct_bias=False is not supported"),
        (GaLoreAdamW, {}, {"lr": -1.0}, "lr"),
        (GaLoreAdamW8bit, {}, {"amsgrad": True}, "amsgrad must be False, not True: bitsandbytes"),
        (GaLoreAdamW8bit, {}, {"percentile_clipping": 5}, "percentile_clipping must be 100, not 5"),
        (GaLoreAdamW8bit, {}, {"is_paged": True}, r"use lingrad.wrap\(..., offload='moments'\)"),
        (GaLoreAdafactor, {}, {}, "scale_parameter must be False, not True: its step depends on the size of the weight"),
        (GaLoreAdafactor, {}, {"scale_parameter": False}, "relative_step must be False"),
        (GaLoreAdafactor, {}, {"scale_parameter": False, "relative_step": False}, "lr is needed"),
    ],
)
def test_what_is_not_supported_is_refused(cls, group, options, message):
    with pytest.raises(SpecError, match=message):
        cls([{**MATRIX, **group}], **options)


def test_groups_that_galore_would_read_otherwise_than_meant():
    vector, matrix = nn.Parameter(torch.ones(6)), MATRIX["params"]
    with pytest.raises(ShapeError, match=r"parameter '0.0' of param group 0 has shape \(6,\)"):
        GaLoreAdamW([{"params": [vector], **PROJECTED}])
    with pytest.raises(SpecError, match="param group 0 has a rank, and lacks update_proj_gap, scale, proj_type"):
        GaLoreAdamW([{"params": matrix, "rank": 4}])
    with pytest.raises(SpecError, match="param group 0 has update_proj_gap and no rank"):
        GaLoreAdamW([{"params": matrix, "update_proj_gap": 4}])


def test_a_state_of_another_program_or_run_is_refused():
    optimizer = GaLoreAdamW([{"params": [nn.Parameter(torch.ones(6, 5))], **PROJECTED}])
    with pytest.raises(CheckpointError, match="A state of galore_torch itself is resumed by lingrad.convert.from_galore"):
        optimizer.load_state_dict({"state": {}, "param_groups": [{}]})
    other = GaLoreAdamW([{"params": [nn.Parameter(torch.ones(6, 5))], **PROJECTED, "rank": 3}])
    with pytest.raises(CheckpointError, match="rank=3"):
        optimizer.load_state_dict(other.state_dict())
    with pytest.raises(ModeError, match="save and load its state_dict"):
        copy.deepcopy(optimizer)
    with pytest.raises(ModeError, match="pass them all when it is made"):
        optimizer.add_param_group({"params": []})
