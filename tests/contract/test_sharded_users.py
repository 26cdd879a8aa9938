"""What programs around a sharded run do to it: loads, moves, writes; each as in one process, or refused in words."""

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict import get_state_dict as get_both
from torch.distributed.fsdp import FSDPModule, fully_shard

import lingrad
from lingrad.errors import LingradError, ModeError
from tests.support import sharded
from tests.support.models import gap, llama, text_batches, text_loss
from tests.support.processes import each_rank
from tests.support.runs import MODES, each_mode
from tests.support.sharded import full, weights_of

FULL = StateDictOptions(full_state_dict=True)
SPEC = "power(rank=2, every=3)"


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 6)).double()


def shard(model):
    for layer in (model[0], model[3]):  # each alone too
        fully_shard(layer)
    return fully_shard(model)


def go_on(model, optimizer, rank, world, steps):
    for step in steps:
        optimizer.zero_grad()
        x = torch.randn(12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        model(x.chunk(world)[rank]).square().mean().backward()
        optimizer.step()


def trained(mode, rank, world, steps=4):
    model = build() if world == 1 else shard(build())
    optimizer = MODES[mode](model, SPEC, lr=1e-2, eps=1e-4)
    go_on(model, optimizer, rank, world, range(steps))
    return model, optimizer


def loads_a_part(mode, rank, world):
    model, optimizer = trained(mode, rank, world)
    before = weights_of(optimizer)
    norm = {"2.weight": torch.full((8,), 2.0, dtype=torch.float64)}
    set_model_state_dict(model, norm, options=StateDictOptions(full_state_dict=True, strict=False))
    after = weights_of(optimizer)
    assert [name for name in after if not torch.equal(after[name], before[name])] == ["2.weight"]
    go_on(model, optimizer, rank, world, range(4, 8))
    return weights_of(optimizer)


def loads_all(mode, rank, world):
    model, optimizer = trained(mode, rank, world)
    state = get_model_state_dict(model, options=FULL)
    for name, weight in weights_of(optimizer).items():
        torch.testing.assert_close(full(state[name]), weight, rtol=1e-14, atol=1e-14)
    set_model_state_dict(model, state, options=FULL)
    go_on(model, optimizer, rank, world, range(4, 6))
    set_model_state_dict(model, {name: value + 0.01 for name, value in build().state_dict().items()}, options=FULL)
    go_on(model, optimizer, rank, world, range(6, 8))
    return weights_of(optimizer)


def resumes_from_rank_0(mode, rank, world):
    model, optimizer = trained(mode, rank, world)
    states = get_both(model, optimizer, options=FULL)
    other, resumed = trained(mode, rank, world, 0)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=world > 1)
    set_state_dict(other, resumed, model_state_dict=states[0], optim_state_dict=states[1], options=options)
    go_on(other, resumed, rank, world, range(4, 8))
    return weights_of(resumed)


def moves_nowhere(mode, rank, world):
    model, optimizer = trained(mode, rank, world, 2)
    model.to("cpu").to(torch.float64)
    go_on(model, optimizer, rank, world, range(2, 8))
    return weights_of(optimizer)


def fails_to_load(mode, rank, world):
    model, optimizer = trained(mode, rank, world)
    before = weights_of(optimizer)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**model.state_dict(), "0.weight": torch.zeros(3, 3, dtype=torch.float64)})
    after = weights_of(optimizer)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    go_on(model, optimizer, rank, world, range(4, 8))
    return weights_of(optimizer)


def evaluates_first(mode, rank, world):
    """After a forward without a backward the modules hold gathered weights."""
    model = build() if world == 1 else shard(build())
    model(torch.ones(2, 6, dtype=torch.float64))
    optimizer = MODES[mode](model, SPEC, lr=1e-2, eps=1e-4)
    go_on(model, optimizer, rank, world, range(4))
    model(torch.ones(2, 6, dtype=torch.float64))
    optimizer.detach()
    optimizer = MODES[mode](model, SPEC, lr=1e-2, eps=1e-4)
    go_on(model, optimizer, rank, world, range(4, 8))
    return weights_of(optimizer)


PROGRAMS = (evaluates_first, loads_a_part, loads_all, resumes_from_rank_0, moves_nowhere, fails_to_load)


def run_programs(rank, world):
    return [program(mode, rank, world) for program in PROGRAMS for mode in MODES]


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_run_is_that_of_one_process(tmp_path, world):
    found = each_rank(run_programs, world, tmp_path)
    for i, (program, mode) in enumerate((program, mode) for program in PROGRAMS for mode in MODES):
        for name, weight in program(mode, 0, 1).items():
            for one in found:
                where = f"{program.__name__}, {mode}: {name}"
                torch.testing.assert_close(one[i][name], weight, rtol=1e-12, atol=1e-13, msg=where)


def puts_back(model, optimizer, rank, world):
    go_on(model, optimizer, rank, world, [4])  # the first after a refresh
    kept = [param.detach().clone() for param in model.parameters()]
    go_on(model, optimizer, rank, world, range(5, 8))
    for param, value in zip(model.parameters(), kept, strict=True):
        with torch.no_grad():
            param.mul_(0.0).add_(value)
    go_on(model, optimizer, rank, world, [8])


def casts(model, optimizer, rank, world):
    model.to(torch.float32)


def divides(model, optimizer, rank, world):
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
    go_on(model, optimizer, rank, world, range(4, 8))


REFUSED = {
    puts_back: "another program has written into 0.weight and into its coordinates",
    casts: "0.weight is sharded and being trained: move and cast the model before fully_shard and lingrad",
    divides: "set_gradient_divide_factor was called on the model, which the gradients of coordinates do not follow",
}


def run_refused(rank, world):
    said = []
    for program in REFUSED:
        model, optimizer = trained("adapter", rank, world)
        try:
            program(model, optimizer, rank, world)
        except LingradError as error:
            said.append(str(error))
        else:
            said.append("nothing was raised")
    return said


@pytest.mark.slow
def test_what_cannot_be_followed_is_refused(tmp_path):
    for said in each_rank(run_refused, 2, tmp_path):
        for message, expected in zip(said, REFUSED.values(), strict=True):
            assert expected in message


class TestDeepSpeed:
    """What DeepSpeed's ZeRO does to parameters, done here: with DeepSpeed 0.19.8 itself the messages were the same."""

    @staticmethod
    def partitioned():
        """As in ``deepspeed.zero.Init``."""
        model = build()
        for number, param in enumerate(model.parameters()):
            param.ds_id, param.ds_shape, param.ds_tensor = number, param.shape, param.detach().flatten()
            param.data = torch.empty(0, dtype=param.dtype)
        return model

    @each_mode
    def test_zero_3(self, mode):
        with pytest.raises(ModeError) as caught:
            MODES[mode](self.partitioned(), SPEC, lr=1e-2)
        message = (
            "0.weight (8, 6) was cut into flat vectors by DeepSpeed (ZeRO-3, zero.Init), in which there are no subspaces; "
            "build the model without DeepSpeed, and shard it by torch.distributed.fsdp.fully_shard (FSDP2), then call lingrad"
        )
        assert str(caught.value) == message
        with pytest.raises(ModeError) as caught:
            lingrad.wrap(self.partitioned().named_parameters(), SPEC, lr=1e-2)
        assert str(caught.value) == message

    @each_mode
    def test_zero_1_and_2(self, mode):
        """They put flat vectors, with gradients of their own, in place of a group's parameters."""
        model = build()
        optimizer = MODES[mode](model, SPEC, lr=1e-2)
        before = {name: weight.clone() for name, weight in optimizer.weights().items()}
        model(torch.ones(2, 6, dtype=torch.float64)).sum().backward()
        for group in optimizer.param_groups:
            flat = torch.cat([param.detach().flatten() for param in group["params"]]).requires_grad_()
            flat.grad = torch.cat([param.grad.flatten() for param in group["params"]])
            group["params"] = [flat]
        with pytest.raises(ModeError) as caught:
            optimizer.step()
        assert str(caught.value) == (
            "another program has put parameters of its own into the optimizer's param groups, as DeepSpeed's ZeRO does with "
            "flat vectors: coordinates would not be merged, nor bases refreshed. Leave it out, and shard the model by "
            "torch.distributed.fsdp.fully_shard (FSDP2), then call lingrad"
        )
        assert all(torch.equal(model.get_parameter(name), weight) for name, weight in before.items())

    def test_its_engine(self):
        engine = type("DeepSpeedEngine", (nn.Sequential,), {})(build())
        with pytest.raises(ModeError) as caught:
            lingrad.wrap(engine, SPEC, lr=1e-2)
        assert str(caught.value) == (
            "this model is in DeepSpeed's engine, which trains it with an optimizer of its own; leave DeepSpeed out, and shard "
            "the model by torch.distributed.fsdp.fully_shard (FSDP2), then call lingrad"
        )


FROZEN = {"*embed*": "frozen", "*norm*": "frozen", "lm_head": "none", "*": "svd(rank=4, every=3)"}


def frozen(rank, world):
    """Of runs in both modes with a switch: the weights, whether what is frozen had a gradient, and whether it trains again."""
    found = []
    for mode in MODES:
        model = llama() if world == 1 else sharded.shard(llama())
        batches = text_batches(7, micro=1, rows=6)
        text_loss(model, batches[0][0].chunk(world)[rank]).backward()  # fully_shard has made its gathered parameters by now
        model.zero_grad()
        optimizer = MODES[mode](model, FROZEN, lr=1e-2, rest_lr=1e-3, weight_decay=0.1, eps=1e-4)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        off = [param for name, param in model.named_parameters() if "embed" in name or "norm" in name]
        held = [param.requires_grad or param.grad is not None for param in off]
        for step, (batch,) in enumerate(batches):
            if step == 4:
                optimizer.switch("adapter" if mode == "optimizer" else "optimizer")
            optimizer.zero_grad()
            text_loss(model, batch.chunk(world)[rank]).backward()
            held += [param.requires_grad or param.grad is not None for param in off]
            optimizer.step()
            schedule.step()
        weights = weights_of(optimizer)
        optimizer.detach()
        found.append((weights, any(held), all(param.requires_grad for param in off)))
    return found


@pytest.mark.slow
def test_what_a_rule_freezes(tmp_path):
    for found, (expected, *_) in zip(each_rank(frozen, 2, tmp_path)[0], frozen(0, 1), strict=True):
        weights, held, given_back = found
        assert not held
        assert given_back
        assert gap(weights, expected) <= 1e-12
