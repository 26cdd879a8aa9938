"""Beside the rest of torch: scalers, schedulers, autocast, checkpointing, generation, accelerate, parametrizations."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.optim import lr_scheduler as schedulers

import lingrad
from tests.support.models import gap, llama, text_batches, text_loss, train, zoo_batches, zoo_loss
from tests.support.runs import LINEAR, MODELS, MODES, assert_equal_bits, each_mode, each_model

# In float64 two runs of the same mathematics part by rounding, 1e-16 a step, times the inverse gaps of singular values.
TOLERANCE = 1e-12

# A basis of full rank: P P^T G = G, on refresh steps and off them, so that SGD in the subspace is plain SGD.
WHOLE = "svd(rank=1000, clip=true, every=2)"


SCHEDULES = {
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, 8, eta_min=1e-4),
    "one cycle": lambda o: schedulers.OneCycleLR(o, max_lr=2e-2, total_steps=9),
    "one cycle of each group": lambda o: schedulers.OneCycleLR(o, max_lr=[2e-2, 1e-2, 5e-3], total_steps=9),
    "cyclic": lambda o: schedulers.CyclicLR(o, 1e-3, 1e-2, step_size_up=3, cycle_momentum=True),
    "plateau": lambda o: schedulers.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "sequential": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=3), schedulers.CosineAnnealingLR(o, 5)], milestones=[3]
    ),
    "a function of each group": lambda o: schedulers.LambdaLR(o, [lambda t: 1 / (1 + t), lambda t: 0.9**t, lambda t: 0.0]),
}


@each_mode
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedulers_act_as_on_a_stock_optimizer(schedule, mode):
    """Full rank is stock AdamW, so that a schedule must give the same weights. ``scale`` reaches the step of the coordinates
    and not their decay: in a stock group it is a factor of the learning rate, and its inverse one of the decay."""
    scale, batches = 0.25, text_batches(8, micro=1)
    losses = [3.0, 2.0, 2.5, 2.5, 2.5, 2.5, 2.5, 2.5]  # what a plateau is seen in

    def advance(scheduler, step):
        scheduler.step(losses[step]) if schedule == "plateau" else scheduler.step()

    model, plain = llama(), llama()
    optimizer = MODES[mode](model, "full()", "adamw", lr=1e-2, weight_decay=0.1, scale=scale)
    params = dict(plain.named_parameters())
    groups = [{"params": [params[name] for name in group["param_names"]]} for group in optimizer.param_groups]
    groups[0]["weight_decay"] = 0.1 / scale
    stock = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)
    scheduler, expected = SCHEDULES[schedule](optimizer), SCHEDULES[schedule](stock)
    seen = set()
    for step, (ids,) in enumerate(batches):
        for m, o in ((model, optimizer), (plain, stock)):
            o.zero_grad()
            text_loss(m, ids).backward()
        lrs = [group["lr"] for group in optimizer.param_groups]
        assert lrs == [group["lr"] for group in stock.param_groups]
        optimizer.step()
        base = optimizer.base.param_groups
        assert [group["lr"] for group in base] == [lrs[0] * scale, *lrs[1:]]
        assert [group["betas"] for group in base] == [group["betas"] for group in stock.param_groups]
        seen.add((lrs[0], base[0]["betas"]))
        stock.param_groups[0]["lr"] *= scale
        stock.step()
        stock.param_groups[0]["lr"] = lrs[0]
        advance(scheduler, step)
        advance(expected, step)
    assert len(seen) > 2
    assert (len({betas for _, betas in seen}) > 2) == ("cycl" in schedule)
    assert gap(optimizer.weights(), params) <= TOLERANCE


@each_model
@each_mode
def test_micro_batches_are_one_large_batch(kind, mode):
    """The mean over a batch is the mean over its parts weighted by their sizes, on and off refresh steps."""
    build, rules, batches_of, loss_of = MODELS[kind]
    sizes, weights = (1, 3, 4), []
    for split in (False, True):
        model = build()
        optimizer = MODES[mode](model, rules, lr=1e-2, weight_decay=0.1)
        for (batch,) in batches_of(7, micro=1, rows=sum(sizes)):
            optimizer.zero_grad()
            for part in batch.split(sizes) if split else (batch,):
                (loss_of(model, part) * len(part) / len(batch)).backward()
            optimizer.step()
        assert {sub.basis.refreshes for sub in optimizer.subspaces} == {3}
        weights.append(optimizer.weights())
    assert gap(*weights) <= TOLERANCE


class Twice(nn.Module):
    """Every layer is used twice in a forward."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.conv = nn.Conv1d(5, 5, 3, padding=1)
        self.linear = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, ids):
        x = self.embed(ids) + self.embed(ids.flip(1))
        x = self.conv(self.conv(x).tanh())
        x = self.linear(self.linear(x).tanh())
        return self.attention(x, *[self.attention(x, x, x)[0]] * 2)[0]


@each_mode
def test_layers_used_twice_train_as_plain_ones(mode):
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Twice().double())
    plain, model = models
    optimizer = MODES[mode](model, {"*": WHOLE}, "sgd", lr=5.0)
    stock = torch.optim.SGD(plain.parameters(), lr=5.0)
    batches = zoo_batches(5)
    for trained, with_optimizer in ((plain, stock), (model, optimizer)):
        train(trained, with_optimizer, batches, lambda m, ids: m(ids).square().mean())
    assert {sub.basis.refreshes for sub in optimizer.subspaces} == {3}
    assert gap(optimizer.weights(), dict(plain.named_parameters())) <= TOLERANCE


@each_model
@each_mode
def test_forwards_without_a_backward_leave_no_trace(kind, mode):
    """Evaluation between micro-batches and before a step, with gradients or without, on refresh steps and off them."""
    build, rules, batches_of, loss_of = MODELS[kind]
    states = []
    for evaluated in (False, True):
        model = build()
        optimizer = MODES[mode](model, rules, lr=1e-2)
        for micro_batches in batches_of(5):
            optimizer.zero_grad()
            for batch in micro_batches:
                (loss_of(model, batch) / len(micro_batches)).backward()
                if evaluated:
                    model.eval()
                    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
                        with context():
                            loss_of(model, batch)
                    model.train()
            optimizer.step()
        states.append((model.state_dict(), optimizer.weights()))
    for first, second in zip(*states, strict=True):
        assert_equal_bits(first, second)


def generated(model, ids, *, use_cache):
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=10,
        do_sample=False,
        use_cache=use_cache,
        pad_token_id=0,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences, torch.stack(out.logits)


@each_mode
def test_generation_with_a_cache(mode):
    """In mid-run: as without a cache, and as a plain model with the same weights; and the run goes on as if there was none."""
    batches, ids = text_batches(6), text_batches(1, seed=3)[0][0]
    model, untouched = llama(), llama()
    optimizer, expected = (MODES[mode](m, LINEAR, lr=1e-2) for m in (model, untouched))
    train(model, optimizer, batches[:5], schedule=False)
    assert any(sub.coords.any() for sub in optimizer.subspaces) == (mode == "adapter")
    plain = llama()
    plain.load_state_dict(optimizer.weights())
    tokens, logits = generated(plain, ids, use_cache=True)
    assert len(tokens[0]) == len(ids[0]) + 10
    for use_cache in (True, False):
        own_tokens, own_logits = generated(model, ids, use_cache=use_cache)
        assert torch.equal(own_tokens, tokens)
        # attention over a cache sums in another order, at 1e-16 a product
        torch.testing.assert_close(own_logits, logits, rtol=1e-10, atol=1e-10)
    model.train()
    train(model, optimizer, batches[5:], schedule=False)
    train(untouched, expected, batches, schedule=False)
    assert_equal_bits(optimizer.weights(), expected.weights())


@each_model
def test_optimizer_mode_saves_the_plain_model_s_tensors(kind):
    build, rules, batches_of, loss_of = MODELS[kind]
    model, plain = build(), build()
    optimizer = lingrad.wrap(model, rules, lr=1e-2)
    train(model, optimizer, batches_of(4), loss_of)
    saved = model.state_dict()
    assert list(saved) == list(plain.state_dict())
    assert_equal_bits({name: saved[name] for name, _ in plain.named_parameters()}, optimizer.weights())
    plain.load_state_dict(saved)
    with torch.no_grad():
        batch = batches_of(1, seed=3)[0][0]
        assert torch.equal(loss_of(plain, batch), loss_of(model, batch))
    optimizer.detach()
    assert_equal_bits(model.state_dict(), plain.state_dict())


@each_mode
def test_save_pretrained_in_optimizer_mode(mode, tmp_path):
    from transformers import LlamaForCausalLM

    model = llama(torch.float32)
    optimizer = MODES[mode](model, LINEAR, lr=1e-2)
    train(model, optimizer, text_batches(4))
    optimizer.switch("optimizer")
    model.save_pretrained(tmp_path)
    loaded, report = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert_equal_bits(loaded.state_dict(), model.state_dict())


@each_mode
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_gradient_checkpointing_of_transformers(mode, reentrant):
    """The forward is run again inside backward, so that every layer is tied twice."""
    found = []
    for checkpointed in (False, True):
        model = llama()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        optimizer = MODES[mode](model, LINEAR, lr=1e-2, weight_decay=0.1)
        calls = []
        model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        train(model.train(), optimizer, text_batches(6), clip=1.0)
        assert len(calls) == 18 * (1 + checkpointed)
        assert {sub.basis.refreshes for sub in optimizer.subspaces} == {2}
        found.append(optimizer.weights())
    assert gap(*found) <= TOLERANCE


class TestAccelerate:
    @pytest.fixture
    def accelerator(self):
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, GradientState

        yield lambda **options: Accelerator(cpu=True, **options)
        for state in (AcceleratorState, GradientState):  # singletons, which other tests must not see
            state._reset_state()

    @staticmethod
    def run(accelerator, model, optimizer, scheduler, batches, loss_of):
        for micro_batches in batches:
            for batch in micro_batches:
                with accelerator.accumulate(model):
                    accelerator.backward(loss_of(model, batch))
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 0.5)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()

    @staticmethod
    def make(kind, mode):
        build, rules, _, _ = MODELS[kind]
        model = build(torch.float32)
        optimizer = MODES[mode](model, rules, lr=1e-2, weight_decay=0.1)
        return model, optimizer, schedulers.CosineAnnealingLR(optimizer, 8)

    @each_model
    @each_mode
    def test_a_prepared_run_is_the_bare_one_and_its_state_survives_saving(self, kind, mode, accelerator, tmp_path):
        _, _, batches_of, loss_of = MODELS[kind]
        batches = batches_of(8, micro=2)
        model, bare, scheduler = self.make(kind, mode)
        for micro_batches in batches:
            for batch in micro_batches:
                (loss_of(model, batch) / 2).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            bare.step()
            scheduler.step()
            bare.zero_grad()

        accelerate = accelerator(gradient_accumulation_steps=2)
        model, optimizer, scheduler = self.make(kind, mode)
        prepared = accelerate.prepare(model, optimizer, scheduler)
        self.run(accelerate, *prepared, batches[:4], loss_of)
        accelerate.save_state(tmp_path)
        self.run(accelerate, *prepared, batches[4:], loss_of)
        assert_equal_bits(optimizer.weights(), bare.weights())

        model, optimizer, scheduler = self.make(kind, mode)
        accelerate = accelerator(gradient_accumulation_steps=2)
        prepared = accelerate.prepare(model, optimizer, scheduler)
        accelerate.load_state(tmp_path)
        self.run(accelerate, *prepared, batches[4:], loss_of)
        assert_equal_bits(optimizer.weights(), bare.weights())

    @each_mode
    def test_preparing_changes_nothing_in_mid_run(self, mode, accelerator):
        model, optimizer, _ = self.make("every kind", mode)
        train(model, optimizer, zoo_batches(4), zoo_loss)
        before = copy.deepcopy(optimizer.state_dict())
        accelerator().prepare(model, optimizer)
        after = optimizer.state_dict()
        assert after["param_groups"] == before["param_groups"]
        assert after["state"].keys() == before["state"].keys()
        for index, entries in before["state"].items():
            assert entries.keys() == after["state"][index].keys()
            for key, value in entries.items():
                own = after["state"][index][key]
                if isinstance(value, torch.Tensor):
                    assert own.dtype == value.dtype
                    assert torch.equal(own, value), key
                else:
                    assert own == value


class Skew(nn.Module):
    """A parametrization as geotorch and others make them."""

    def forward(self, x):
        return x.triu(1) - x.triu(1).t()


def parametrized():
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
            "skew": nn.Linear(8, 8),
            "first": nn.Linear(8, 8),
            "frozen": nn.Linear(8, 8),
            "conv": nn.Conv1d(4, 4, 3, padding=1),
            "last": nn.Linear(8, 5),
        }
    ).double()
    parametrize.register_parametrization(model["skew"], "weight", Skew())
    parametrize.register_parametrization(model["conv"], "bias", nn.Softplus())
    model["frozen"].requires_grad_(False)
    return model


def through(model, x):
    for layer in model.values():
        x = layer(x).tanh()
    return x.square().sum()


@each_mode
@pytest.mark.parametrize("rules", [WHOLE, {"first": WHOLE, "conv.weight": WHOLE, "last": WHOLE}])
def test_parametrizations_and_frozen_layers_beside_transformed_ones(mode, rules):
    plain, model = parametrized(), parametrized()
    names = [list(m.state_dict()) for m in (plain, model)]
    optimizer = MODES[mode](model, rules, "sgd", lr=0.05)
    stock = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.05)
    transformed = {sub.name for sub in optimizer.subspaces}
    assert transformed == {"first.weight", "last.weight"} | ({"conv.weight"} if rules != WHOLE else set())
    batches = [
        [torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(10 * step + i)).double() for i in range(2)]
        for step in range(5)
    ]
    train(plain, stock, batches, through)
    train(model, optimizer, batches, through, switches=(2,))
    optimizer.switch(mode)
    assert "frozen.weight" not in optimizer.weights()
    optimizer.detach()
    assert [list(m.state_dict()) for m in (plain, model)] == names
    assert gap(dict(model.named_parameters()), dict(plain.named_parameters())) <= TOLERANCE
    assert torch.equal(model["frozen"].weight, parametrized()["frozen"].weight)
    assert not model["frozen"].weight.requires_grad
    assert torch.equal(model["skew"].weight, -model["skew"].weight.t())
    assert all(parametrize.is_parametrized(model[name]) for name in ("normed", "skew", "conv"))
