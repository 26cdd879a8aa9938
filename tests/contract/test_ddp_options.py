"""DistributedDataParallel's own options and communication hooks: two processes train as one, or say why not.

Tolerance: 1e-12 in float64, as for the modes: sums over ranks are taken in another order.
"""

import itertools
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import lingrad
from lingrad.errors import ModeError
from tests.support.models import gap, llama, text_batches, text_loss, zoo, zoo_batches, zoo_loss
from tests.support.processes import Attempts, each_rank
from tests.support.runs import MODES

TOLERANCE = 1e-12
STEPS = 5
OPTIONS = (
    {"static_graph": True},
    {"gradient_as_bucket_view": True},
    {"find_unused_parameters": True},
    {"static_graph": True, "gradient_as_bucket_view": True},
)
# (config string, whether of every kind of weight)
SPECS = [(f"{name}(rank=4, every=3)", False) for name in ("svd", "power", "random", "pca")] + [("svd(rank=1, every=3)", True)]
ALL = list(itertools.product(SPECS, MODES, OPTIONS))


def start(spec, mode, every_kind):
    model = zoo() if every_kind else llama()
    return model, MODES[mode](model, spec, lr=1e-2, weight_decay=0.1, eps=1e-4)


def train(case, rank=None):
    """Micro-batches, the early ones under ``no_sync`` but in the first step, where torch has no static graph yet."""
    (spec, every_kind), mode, options = case
    inner, optimizer = start(spec, mode, every_kind)
    model = inner if rank is None else DistributedDataParallel(inner, **options)
    batches, loss = (zoo_batches, zoo_loss) if every_kind else (text_batches, text_loss)
    for step, (early, last) in enumerate(batches(STEPS, micro=2)):
        optimizer.zero_grad()
        if rank is None:
            (loss(model, early) + loss(model, last)).backward()
        elif step == 0:
            loss(model, early.chunk(2)[rank]).backward()
            loss(model, last.chunk(2)[rank]).backward()
        else:
            with model.no_sync():
                loss(model, early.chunk(2)[rank]).backward()
            loss(model, last.chunk(2)[rank]).backward()
        nn.utils.clip_grad_norm_(inner.parameters(), 0.5)
        optimizer.step()
    return {name: w.detach().clone() for name, w in optimizer.weights().items()}


def work(rank, world, cases):
    return [train(case, rank) for case in cases]


def assert_one(folder, cases):
    first, other = each_rank(work, 2, folder, cases)
    for case, one, two in zip(cases, first, other, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one), case
        assert gap(one, train(case)) <= TOLERANCE, case


def test_options(tmp_path):
    assert_one(tmp_path, ALL[::7])


@pytest.mark.slow
def test_options_in_every_combination(tmp_path):
    assert_one(tmp_path, [case for i, case in enumerate(ALL) if i % 7])


HOOKED = list(itertools.product(("svd", "power", "random"), MODES))


def compressed(rank, world, cases):
    found = []
    for name, mode in cases:
        model, optimizer = start(f"{name}(rank=4, every=3)", mode, False)
        ddp = DistributedDataParallel(model)
        ddp.register_comm_hook(None, fp16_compress_hook)
        for (batch,) in text_batches(STEPS, micro=1):
            optimizer.zero_grad()
            text_loss(ddp, batch.chunk(2)[rank]).backward()
            optimizer.step()
        found.append({name: w.detach().clone() for name, w in optimizer.weights().items()})
    return found


def by_arithmetic(name, mode):
    """The run in one process, which rounds what each half of a batch gives, and the sum, as the hook does."""
    model, optimizer = start(f"{name}(rank=4, every=3)", mode, False)
    seen = {}
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.register_hook(lambda grad, param=param: seen.setdefault(param, []).append(2 * grad))
    for (batch,) in text_batches(STEPS, micro=1):
        optimizer.zero_grad()
        seen.clear()
        for half in batch.chunk(2):
            (text_loss(model, half) / 2).backward()
        due = {id(sub.coords) for sub in optimizer.subspaces if sub.basis.due and sub.basis.transform.reads == "gradient"}
        for group in optimizer.param_groups:
            for param in group["params"]:
                if id(param) not in due:  # where a basis is chosen from the gradient, the exact mean is projected
                    one, two = (grad.to(torch.float16) / 2 for grad in seen[param])
                    param.grad.copy_(one + two)
        optimizer.step()
    return {name: w.detach().clone() for name, w in optimizer.weights().items()}


def assert_rounded(folder, cases):
    first, other = each_rank(compressed, 2, folder, cases)
    for case, one, two in zip(cases, first, other, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one), case
        assert gap(one, by_arithmetic(*case)) <= TOLERANCE, case


@pytest.mark.slow
def test_a_hook_that_rounds(tmp_path):
    assert_rounded(tmp_path, HOOKED[:1])


@pytest.mark.slow
def test_hooks_that_round(tmp_path):
    assert_rounded(tmp_path, HOOKED[1:])


def power_sgd(rank, world):
    """The gradients of the only parameter of a model, and those of a plain one that has the same before the hook."""

    def hook(module):
        ddp = DistributedDataParallel(module)
        state = PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2, use_error_feedback=False)
        ddp.register_comm_hook(state, powerSGD_hook)
        return ddp

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.param = nn.Parameter(torch.zeros(5, 8, dtype=torch.float64))

        def forward(self, grad):
            return (self.param * grad).sum()

    torch.manual_seed(0)
    model, plain = nn.Sequential(nn.Linear(8, 10, bias=False)).double(), Plain()
    optimizer = lingrad.wrap(model, "power(rank=5, every=3, side=left)", lr=1e-2)
    coords = optimizer.subspaces[0].coords
    locally = []
    coords.register_hook(locally.append)
    ddp, other = hook(model), hook(plain)
    found = []
    for step in range(7):
        optimizer.zero_grad()
        plain.zero_grad()
        x = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        ddp(x.chunk(2)[rank]).square().sum().backward()
        other(locally[-1]).backward()
        found.append((coords.grad.clone(), plain.param.grad.clone(), locally[-1].clone()))
        optimizer.step()
    return found


@pytest.mark.slow
def test_power_sgd_compresses_what_is_trained(tmp_path):
    first, other = each_rank(power_sgd, 2, tmp_path)
    for step, ((grad, plain, local), (_, _, elsewhere)) in enumerate(zip(first, other, strict=True)):
        assert torch.equal(grad, plain)
        exact = torch.dist(grad, (local + elsewhere) / 2) <= 1e-12 * local.norm()
        assert exact == (step < 2)  # then of rank 1


def joined(rank, world):
    """One process has two batches more."""
    model, optimizer = start("random(rank=4, every=3)", "optimizer", False)
    ddp = DistributedDataParallel(model)
    with ddp.join(divide_by_initial_world_size=False):
        for (batch,) in text_batches(STEPS + 2 * rank, micro=1):
            optimizer.zero_grad()
            text_loss(ddp, batch.chunk(2)[rank]).backward()
            optimizer.step()
    return {name: w.detach().clone() for name, w in optimizer.weights().items()}


@pytest.mark.slow
def test_a_process_that_has_no_batches_left(tmp_path):
    """Its last weights are those of the other, by torch's own broadcast; the mean is over those that are left."""
    model, optimizer = start("random(rank=4, every=3)", "optimizer", False)
    for step, (batch,) in enumerate(text_batches(STEPS + 2, micro=1)):
        optimizer.zero_grad()
        text_loss(model, batch if step < STEPS else batch.chunk(2)[1]).backward()
        optimizer.step()
    expected = {name: w.detach().clone() for name, w in optimizer.weights().items()}
    assert gap(each_rank(joined, 2, tmp_path)[1], expected) <= TOLERANCE


def refused(rank, world):
    messages = []

    def attempt(prepare, spec="random(rank=4, every=3)"):
        model, _ = start(spec, "optimizer", False)
        ddp = DistributedDataParallel(model)
        try:
            prepare(ddp)
        except ModeError as error:
            messages.append(str(error))
        else:
            messages.append("nothing was raised")

    def forward(ddp):
        text_loss(ddp, text_batches(1)[0][0].chunk(2)[rank]).backward()

    def power(ddp):
        ddp.register_comm_hook(PowerSGDState(None), powerSGD_hook)
        forward(ddp)

    def local(ddp):
        ddp.register_comm_hook(PostLocalSGDState(None, None, 1), post_localSGD_hook)
        forward(ddp)

    def join(ddp):
        with ddp.join():
            forward(ddp)

    attempt(power)
    attempt(power, "random(rank=4, every=0)")
    attempt(local)
    attempt(join, "power(rank=4, every=3)")
    return list(messages)


@pytest.mark.slow
def test_what_does_not_work_is_refused(tmp_path):
    power, fixed, local, join = each_rank(refused, 2, tmp_path)[0]
    assert power == (
        "PowerSGD's error feedback adds what it left out of a gradient to later ones, and after a refresh these are gradients "
        "in another basis; pass use_error_feedback=False to PowerSGDState, or keep the bases: every=0"
    )
    assert fixed == "nothing was raised"
    assert local == (
        "post-local SGD lets the weights of subgroups part, and bases are chosen for one model; leave the hook out, or give "
        "each subgroup a run of its own: process_group="
    )
    assert join == (
        "join() answers the messages of DistributedDataParallel for processes that have no batches left, and not those by "
        "which a refresh averages what it reads; give all processes as many batches, or use random bases in linear layers"
    )


def other_optimizers(rank, world):
    """Optimizers of torch.distributed around lingrad, in it, and beside it."""
    messages = attempt = Attempts()

    spec = "power(rank=4, every=3)"
    attempt(lambda: ZeroRedundancyOptimizer(llama().parameters(), lingrad.wrap, rules=spec, lr=1e-2))
    attempt(lambda: lingrad.wrap(llama(), spec, ZeroRedundancyOptimizer, optimizer_class=torch.optim.AdamW, lr=1e-2))
    factory = partial(ZeroRedundancyOptimizer, optimizer_class=torch.optim.AdamW)
    attempt(lambda: lingrad.adapt(llama(), spec, lambda params, lr: factory(params, lr=lr), lr=1e-2))

    def step(wrapped, mode="optimizer", spec=spec, clips=False):
        model, optimizer = start(spec, mode, False)
        outer = wrapped(optimizer)
        text_loss(model, text_batches(1)[0][0].chunk(2)[rank]).backward()
        if clips:
            optimizer.clip_grad_norm_(1.0)
        outer.step()

    averager = PeriodicModelAverager(period=2, warmup_steps=0)
    attempt(lambda: step(lambda optimizer: PostLocalSGDOptimizer(optimizer, averager)))
    for spec in ("svd", "power", "random"):
        for mode in MODES:
            text = f"{spec}(rank=4, every=3)"
            attempt(lambda text=text, mode=mode: step(lambda optimizer: optimizer, mode, text, clips=mode == "adapter"))
    return list(messages)


@pytest.mark.slow
def test_other_optimizers_of_torch_distributed_are_refused(tmp_path):
    (unnamed, base, factory, *apart), other = each_rank(other_optimizers, 2, tmp_path)
    assert unnamed == (
        "expected a model, model.named_parameters(), or groups {'params': ..., 'rules': ...} whose params are (name, "
        "parameter) pairs, since seeds, rules and checkpoints refer to names; not a Parameter"
    )
    assert base == factory
    assert base == (
        "ZeroRedundancyOptimizer keeps the moments of a parameter in one process only, and refreshes and checkpoints of a run "
        "need them where its coordinates are; pass the optimizer inside it as the base, and shard weights, coordinates and "
        "moments by fully_shard"
    )
    assert apart == other[3:]  # both say it, and neither waits
    for message in apart:  # local SGD, and a model without DistributedDataParallel
        assert message == (
            "the gradient of model.layers.0.self_attn.q_proj.weight is not the same in the 2 processes of this run: nothing "
            "has averaged it, and their weights would part. Build DistributedDataParallel(model) after lingrad was called; "
            "processes with models of their own (pipeline stages, local SGD) need a process_group each"
        )
