"""Pipelines: each process trains some stages, in a run of its own, and all of them the model that one process trains.

Tolerance: 1e-12 in float64, as for the modes: micro-batches are summed in another order.
"""

import itertools

import pytest
import torch
from torch import distributed, nn
from torch.distributed import pipelining
from torch.nn.parallel import DistributedDataParallel

from lingrad.errors import ModeError
from tests.support.models import gap
from tests.support.processes import each_rank
from tests.support.runs import MODES

TOLERANCE = 1e-12
STEPS, STAGES, MICRO = 6, 4, 4
WHOLE = ("ScheduleGPipe", "Schedule1F1B", "ScheduleInterleaved1F1B", "ScheduleLoopedBFS")
ZERO_BUBBLE = ("ScheduleInterleavedZeroBubble", "ScheduleZBVZeroBubble", "ScheduleDualPipeV")
SPECS = [f"{name}(rank=3, every=3)" for name in ("svd", "power", "random")]
RANDOM = "random(rank=3, every=3)"
ALL = [*itertools.product(WHOLE, SPECS, MODES), *itertools.product(ZERO_BUBBLE, (RANDOM,), MODES)]
DEFAULT = [case for case in ALL if case[0] in WHOLE[:2] and case[1] != RANDOM]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(8, 12), nn.Linear(12, 8), nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(x + self.down(torch.tanh(self.up(x))))


class Blocks(nn.ModuleDict):
    """Some blocks, one after the other, under the names of the whole model, which give bases their seeds."""

    def forward(self, x):
        for block in self.values():
            x = block(x)
        return x


def build(chosen=range(STAGES)):
    torch.manual_seed(0)
    whole = Blocks({str(i): Block() for i in range(STAGES)}).double()
    return Blocks({str(i): whole[str(i)] for i in chosen})


def data(step):
    draw = torch.Generator().manual_seed(step)
    return tuple(torch.randn(8, 5, 8, dtype=torch.float64, generator=draw) for _ in range(2))


def loss(out, target):
    return (out - target).square().mean()


def start(model, spec, mode, **options):
    return MODES[mode](model, spec, lr=1e-2, weight_decay=0.1, eps=1e-4, **options)


def weights_of(optimizer):
    return {name: w.detach().clone() for name, w in optimizer.weights().items()}


def one_process(spec, mode):
    model = build()
    optimizer = start(model, spec, mode)
    for step in range(STEPS):
        x, target = data(step)
        optimizer.zero_grad()
        loss(model(x), target).backward()
        optimizer.step()
    return weights_of(optimizer)


def stages_of(name, rank):
    """The stages of this process: two of the first and the last half, or for a V the first and the last."""
    if name in ("ScheduleGPipe", "Schedule1F1B"):
        return [2 * rank, 2 * rank + 1]
    return [rank, STAGES - 1 - rank] if "V" in name else [rank, rank + 2]


def schedule_of(name, model, mine, rank, group=None):
    device, cls = torch.device("cpu"), getattr(pipelining, name)
    if name in ("ScheduleGPipe", "Schedule1F1B"):
        return cls(pipelining.PipelineStage(model, rank, 2, device, group=group), MICRO, loss_fn=loss)
    return cls([pipelining.PipelineStage(model[str(i)], i, STAGES, device) for i in mine], MICRO, loss_fn=loss)


def train(schedule, optimizer, mine, part=slice(None), steps=STEPS):
    for step in range(steps):
        x, target = (one[part] for one in data(step))
        optimizer.zero_grad()
        schedule.step(*([x] if 0 in mine else []), **({"target": target} if STAGES - 1 in mine else {}))
        optimizer.step()
    return weights_of(optimizer)


def work(rank, world, cases):
    groups = [distributed.new_group([other]) for other in range(world)]
    found = []
    for name, spec, mode in cases:
        mine = stages_of(name, rank)
        model = build(mine)
        optimizer = start(model, spec, mode, process_group=groups[rank])
        found.append(train(schedule_of(name, model, mine, rank), optimizer, mine))
    return found


def assert_one(folder, cases):
    for case, first, last in zip(cases, *each_rank(work, 2, folder, cases), strict=True):
        assert gap(first | last, one_process(*case[1:])) <= TOLERANCE, case


def test_stages_train_as_one_process(tmp_path):
    assert_one(tmp_path, DEFAULT)


@pytest.mark.slow
def test_other_schedules(tmp_path):
    assert_one(tmp_path, [case for case in ALL if case not in DEFAULT])


def replicas(rank, world):
    """Two pipelines of two stages, each with half of a batch; a run of two processes for each stage."""
    stage, replica = divmod(rank, 2)
    of_stage = [distributed.new_group([0, 1]), distributed.new_group([2, 3])][stage]
    pipelines = [distributed.new_group([0, 2]), distributed.new_group([1, 3])]
    found = []
    for spec, mode in itertools.product(SPECS[:2], MODES):
        mine = [2 * stage, 2 * stage + 1]
        model = build(mine)
        optimizer = start(model, spec, mode, process_group=of_stage)
        ddp = DistributedDataParallel(model, process_group=of_stage)
        schedule = schedule_of("Schedule1F1B", ddp, mine, stage, pipelines[replica])
        found.append(train(schedule, optimizer, mine, slice(4 * replica, 4 * replica + 4)))
    return found


@pytest.mark.slow
def test_pipelines_in_parallel(tmp_path):
    found = each_rank(replicas, 4, tmp_path)
    for i, (spec, mode) in enumerate(itertools.product(SPECS[:2], MODES)):
        assert all(torch.equal(found[0][i][name], w) for name, w in found[1][i].items())
        assert gap(found[0][i] | found[2][i], one_process(spec, mode)) <= TOLERANCE, (spec, mode)


def refused(rank, world):
    groups = [distributed.new_group([other]) for other in range(world)]
    messages = []

    def attempt(function):
        try:
            function()
        except ModeError as error:
            messages.append(str(error))
        else:
            messages.append("nothing was raised")

    def others(spec="svd(rank=3)"):
        """Stages in one run, whose names differ."""
        start(build(stages_of("ScheduleGPipe", rank)), spec, "optimizer")

    def repeated(spec):
        """And stages whose names are alike."""
        mine = stages_of("ScheduleGPipe", rank)
        model = nn.Sequential(*build(mine).values())
        train(schedule_of("ScheduleGPipe", model, mine, rank), start(model, spec, "optimizer"), mine, steps=1)

    def apart(name, spec):
        mine = stages_of(name, rank)
        model = build(mine)
        optimizer = start(model, spec, "optimizer", process_group=groups[rank])
        train(schedule_of(name, model, mine, rank), optimizer, mine, steps=1)

    attempt(others)
    for spec in SPECS:
        attempt(lambda spec=spec: repeated(spec))
    for name in ZERO_BUBBLE:
        for spec in SPECS[:2]:
            attempt(lambda name=name, spec=spec: apart(name, spec))
    return messages


def test_what_does_not_work_is_refused(tmp_path):
    first, other = each_rank(refused, 2, tmp_path)
    names, *repeated = first[:4]
    assert first[:4] == other[:4]  # both say it, and neither waits
    assert names == (
        "the 2 processes of this run do not train the same: rank 0 has 0.up.weight [12, 8] in float64: svd(rank=3); rank 1 has "
        "2.up.weight [12, 8] in float64: svd(rank=3). Build the model and call lingrad alike in all of them; where processes "
        "hold different layers (pipeline stages), or train models of their own, give each set its group: process_group="
    )
    for message in repeated:
        assert message == (
            "the gradient of 0.up.weight is not the same in the 2 processes of this run: nothing has averaged it, and their "
            "weights would part. Build DistributedDataParallel(model) after lingrad was called; processes with models of their "
            "own (pipeline stages, local SGD) need a process_group each"
        )
    for message in first[4:] + other[4:]:
        assert message.partition(".weight ")[2] == (
            "came, in part, from torch.autograd.grad, which leaves nothing for the refresh of this step to read; zero-bubble "
            "schedules of pipelines compute it so. Use backward(), a schedule of whole backwards (GPipe, 1F1B, "
            "Interleaved1F1B), or bases that read nothing (random)"
        )
