"""fully_shard (FSDP2): processes that each hold some rows of every weight train as one process with the whole of it.

Tolerance: 1e-12 in float64, as for the modes: sums over ranks are taken in another order.
"""

import itertools

import pytest
import torch
from torch import nn
from torch.distributed import init_device_mesh
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from transformers.pytorch_utils import Conv1D

import lingrad
from benchmarks.traffic import Run, count
from lingrad import memory
from lingrad.errors import ModeError, SpecError
from lingrad.models import LlamaShape, build_llama
from lingrad.tensors import own
from tests.support.cases import SIDED, UNSIDED
from tests.support.models import gap, llama, text_batches, text_loss
from tests.support.processes import Attempts, each_rank
from tests.support.runs import MODES, each_mode
from tests.support.sharded import STEPS, shard, train, weights_of

TOLERANCE = 1e-12
SIDES = ("left", "right", "both", "short", "long")
SLICES = ("slice(rank=4, every=7, side={side})", "slice(rank=4, every=7, side={side}, choice=by_gradient)")
SPECS = [text.format(side=side) for text in (*SIDED, *SLICES) for side in SIDES] + list(UNSIDED)
CARRIES = ("keep", "reset", "rotate", "transport")
# what else a run may do, in turn
OPTIONS = (
    {},
    {"carry": "reset"},
    {"carry": "rotate"},
    {"stagger": True},
    {"scale": 0.25, "weight_decay": 0.0},
    {"ledger": True},
)


def matrix(kept):
    """(spec, mode, options, whether clipped): every transform on every side, and in both modes those that ``kept`` chooses."""
    for number, (spec, mode) in enumerate(itertools.product(SPECS, MODES)):
        if kept(number):
            yield spec, mode, OPTIONS[number % len(OPTIONS)], number % 4 == 0


SHARED = [
    (spec, mode, {"share": "input", "stagger": True}, False)
    for spec in ("power(rank=4, every=7, side=right)", "svd(rank=4, every=7, side=right)")
    for mode in MODES
]
DEFAULT = [*matrix(lambda number: number % 51 == 0), *SHARED[:2]]
SLOW = [*matrix(lambda number: number % 51 and number % 19 == 0), *SHARED[2:]]


def work(rank, world, cases, steps):
    return [train(*case, rank=rank, world=world, steps=steps) for case in cases]


def amplified(case, steps, expected):
    """How far a run goes where its first weights are changed by an ulp: what rounding in another order may do to it."""

    def from_others(seed):
        model, generator = llama(), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for param in model.parameters():
                ulps = torch.randint(-1, 2, param.shape, generator=generator, dtype=param.dtype)
                param.mul_(1 + torch.finfo(param.dtype).eps * ulps)
        return train(*case, model=model, steps=steps)[0]

    return max(gap(from_others(seed), expected) for seed in range(3))


def assert_one(folder, world, cases, steps=STEPS):
    first, *others = each_rank(work, world, folder, cases, steps)
    for i, case in enumerate(cases):
        weights, norms = first[i]
        for other in others:
            assert all(torch.equal(weight, other[i][0][name]) for name, weight in weights.items()), case
        expected, expected_norms = train(*case, steps=steps)
        apart = gap(weights, expected)
        # moments that start again make Adam step by the signs of gradients, which over many refreshes are decided by rounding
        assert apart <= (TOLERANCE if steps == STEPS else max(TOLERANCE, 4 * amplified(case, steps, expected))), case
        assert [float(norm) for norm in norms] == pytest.approx([float(norm) for norm in expected_norms], rel=TOLERANCE)


def test_two_processes_are_one(tmp_path):
    assert_one(tmp_path, 2, DEFAULT)


@pytest.mark.slow
def test_three_processes_with_uneven_rows_are_one(tmp_path):
    assert_one(tmp_path, 3, DEFAULT)


@pytest.mark.slow
def test_two_processes_are_one_in_many_combinations(tmp_path):
    assert_one(tmp_path, 2, SLOW)


@pytest.mark.slow
@pytest.mark.rare(10**9)
def test_three_processes_are_one_in_every_combination(tmp_path):
    assert_one(tmp_path, 3, list(matrix(lambda number: True)))


@pytest.mark.slow
@pytest.mark.rare(10**9)
def test_two_processes_are_one_over_forty_steps(tmp_path):
    """Transforms, sides, modes and what carries moments, in each combination that comes after ten others."""
    cases = itertools.islice(itertools.product(SPECS, MODES, CARRIES), 0, None, 11)
    assert_one(tmp_path, 2, [(spec, mode, {"carry": carry}, False) for spec, mode, carry in cases], steps=40)


@pytest.mark.slow
def test_other_bases(tmp_path):
    """Those that step DTensors; Muon orthogonalises in bfloat16, 2^-8, and sums in another order there."""
    case = "power(rank=4, every=7)", "optimizer", {}, False
    for base in ("sgd", "adagrad", "rmsprop", "adam", "muon"):
        found = each_rank(train_with, 2, tmp_path, *case, base)[0]
        assert gap(found, train_with(0, 1, *case, base)) <= (2e-2 if base == "muon" else TOLERANCE), base


def train_with(rank, world, spec, mode, options, clipped, base):
    return train(spec, mode, options, clipped, rank=rank, world=world, base=base)[0]


def resumable(mode, spec, world, seed, *, sharded, **options):
    model = llama()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(seed * 1e-3)
    if sharded:
        shard(model)
    return model, MODES[mode](model, spec, "adamw", lr=1e-2, weight_decay=0.1, eps=1e-4, **options)


def go_on(model, optimizer, batches, rank, world):
    for batch, _ in batches:
        optimizer.zero_grad()
        text_loss(model, batch.chunk(world)[rank]).backward()
        optimizer.step()
    return weights_of(optimizer)


POWER = "power(rank=4, every=3)"
BATCHES = text_batches(9, micro=2, rows=6)
BEFORE = 5  # steps before it is saved: two after a refresh


def state(model, optimizer, flat):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    return {"model": model_state, "optimizer": optimizer_state}, options


def save(rank, world, cases, folder):
    from torch.distributed import checkpoint

    found = []
    for i, (spec, mode, flat) in enumerate(cases):
        model, optimizer = resumable(mode, spec, world, 0, sharded=True)
        go_on(model, optimizer, BATCHES[:BEFORE], rank, world)
        checkpoint.save(state(model, optimizer, flat)[0], checkpoint_id=f"{folder}/{i}")
        found.append(go_on(model, optimizer, BATCHES[BEFORE:], rank, world))
    return found


def load(rank, world, cases, folder, sharded):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import set_state_dict

    found = []
    for i, (spec, mode, flat) in enumerate(cases):
        model, optimizer = resumable(mode, spec, world, 7, sharded=sharded)
        states, options = state(model, optimizer, flat)
        checkpoint.load(states, checkpoint_id=f"{folder}/{i}")
        set_state_dict(
            model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"], options=options
        )
        found.append(go_on(model, optimizer, BATCHES[BEFORE:], rank, world))
    return found


def ledgers(rank, world, folder):
    """The changes of runs that have recorded merges, when they are saved and as they are loaded into fresh and older ones."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import set_state_dict

    found = []
    for mode in MODES:
        model, optimizer = resumable(mode, POWER, world, 0, sharded=True, ledger=True)
        go_on(model, optimizer, BATCHES[:5], rank, world)
        checkpoint.save(state(model, optimizer, False)[0], checkpoint_id=f"{folder}/{mode}")
        changes = [optimizer.changes()]
        for steps in (0, 2, 8):  # another number of merges each
            model, optimizer = resumable(mode, POWER, world, 0, sharded=True, ledger=True)
            go_on(model, optimizer, BATCHES[:steps], rank, world)
            states, options = state(model, optimizer, False)
            checkpoint.load(states, checkpoint_id=f"{folder}/{mode}")
            set_state_dict(
                model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"], options=options
            )
            changes.append(optimizer.changes())
        with pytest.raises(NotImplementedError, match="Flattening optimizer state_dict only supports tensor, int, float, dict"):
            state(model, optimizer, True)  # torch's own words; the docs say so
        found.append([{name: change.factors.dense() for name, change in one.items()} for one in changes])
    return found


@pytest.mark.slow
def test_a_ledger_is_loaded_into_a_run_with_another_number_of_merges(tmp_path):
    for saved, *loaded in each_rank(ledgers, 2, tmp_path, str(tmp_path))[0]:
        assert all(bool(change.any()) for change in saved.values())
        for one in loaded:
            assert all(torch.equal(change, one[name]) for name, change in saved.items())


SAVED = [
    ("svd(rank=4, every=3)", "optimizer", False),
    ("power(rank=4, every=3, side=left)", "adapter", True),
    ("random(rank=4, every=5)", "adapter", False),
    ("pca(rank=4)", "optimizer", True),
    ("power(rank=4, every=3, side=left, schedule=path(threshold=0.8))", "adapter", True),
    ("svd(rank=4, every=3, schedule=path(threshold=0.3, measure=displacement))", "optimizer", False),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "sharded"),
    [(1, False), (1, True), (2, True), (3, True)],
)
def test_a_checkpoint_of_two_processes_goes_on_with_any_number(tmp_path, world, sharded):
    expected = each_rank(save, 2, tmp_path, SAVED, str(tmp_path))[0]
    found = each_rank(load, world, tmp_path, SAVED, str(tmp_path), sharded)[0]
    for case, one, other in zip(SAVED, expected, found, strict=True):
        assert gap(other, one) <= (0 if world == 2 else TOLERANCE), case


def ways(rank, world):
    """The ways to shard a model, each with the weights after a run of it."""
    found = {}
    for mode in MODES:
        for way, options in {
            "kept gathered": {"reshard_after_forward": False},
            "hybrid": {"mesh": init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("replicate", "shard"))},
            "checkpointed": {},
            "no sync": {},
        }.items():
            model = llama()
            model.config.use_cache = False
            if way == "checkpointed":
                apply_activation_checkpointing(model, check_fn=lambda module: type(module).__name__ == "LlamaMLP")
            shard(model, **options)
            found[way, mode] = train(POWER, mode, {}, False, rank=rank, world=world, model=model)[0]
    return list(found.values())


@pytest.mark.slow
def test_meshes_and_policies(tmp_path):
    first, *others = each_rank(ways, 2, tmp_path)
    for i, weights in enumerate(first):
        assert all(torch.equal(weight, others[0][i][name]) for name, weight in weights.items())
        expected = train(POWER, list(MODES)[i // 4], {}, False)[0]
        assert gap({name.replace("_checkpoint_wrapped_module.", ""): w for name, w in weights.items()}, expected) <= TOLERANCE


def hybrid(rank, world):
    model = shard(llama(), mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    return train(POWER, "optimizer", {}, True, rank=rank % 2, world=2, model=model, steps=5)[0]


@pytest.mark.slow
def test_hybrid_sharding(tmp_path):
    """Two replicas of two shards each, on the same halves of a batch: the mean over four is that over two."""
    first, *others = each_rank(hybrid, 4, tmp_path)
    for weights in others:
        assert all(torch.equal(weight, weights[name]) for name, weight in first.items())
    assert gap(first, train(POWER, "optimizer", {}, True, steps=5)[0]) <= TOLERANCE


def mixed(rank, world):
    found = []
    for mode in MODES:
        model = llama(torch.float32)
        shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
        found.append(train(POWER, mode, {}, True, rank=rank, world=world, model=model)[0])
        offloaded = llama()
        shard(offloaded, offload_policy=CPUOffloadPolicy(pin_memory=False))
        found.append(train(POWER, mode, {}, True, rank=rank, world=world, model=offloaded)[0])
    return found


@pytest.mark.slow
def test_mixed_precision_and_offloading(tmp_path):
    found = each_rank(mixed, 2, tmp_path)[0]
    for i, mode in enumerate(MODES):
        expected = train(POWER, mode, {}, True)[0]
        assert gap(found[2 * i + 1], expected) <= TOLERANCE
        assert (
            1e-6 < gap(found[2 * i], expected) < 0.1
        )  # the forward rounds to 2^-8, and Adam divides small gradients by themselves


@pytest.mark.parametrize(
    ("spec", "mode"),
    [
        pytest.param("power(rank=4, every=3)", "optimizer", marks=pytest.mark.slow),
        ("random(rank=4, every=3, side=right)", "optimizer"),
        pytest.param("random(rank=4, every=3, side=right)", "adapter", marks=pytest.mark.slow),
        pytest.param("pca(rank=4, every=3, side=left)", "adapter", marks=pytest.mark.slow),
        pytest.param("svd(rank=4, every=3, solver=randomized)", "optimizer", marks=pytest.mark.slow),
    ],
)
def test_gradients_are_reduced_in_the_small_space(tmp_path, spec, mode):
    """Off refreshes no more than r / min(m, n) of the bytes of full gradients is reduced, and never a gradient itself."""
    shape = LlamaShape(64, 32, 88, 2, 4, 12)
    full_steps, steps = (each_rank(count, 2, tmp_path, run, shape)[0] for run in (Run(""), Run(spec, mode)))
    shapes = [param.shape for name, param in build_llama(shape, seed=0).named_parameters() if "proj" in name]
    assert full_steps[1]["reduce"] == 4 * sum(m * n for m, n in shapes)
    allowed = 4 * sum(4 / min(m, n) * m * n for m, n in shapes)
    assert steps[1]["reduce"] == steps[2]["reduce"] <= 1.05 * allowed
    assert steps[1]["broadcast"] == 0
    if "right" in spec and mode == "optimizer":  # a merge needs nothing of others
        assert steps[1]["gather"] == full_steps[1]["gather"]
    refresh = max(steps[0]["reduce"], steps[3]["reduce"])
    assert refresh < full_steps[1]["reduce"]


def held(rank, world, mode, spec):
    """Bytes by kind, those of transformed weights and of all gradients among them."""
    model = shard(llama(torch.float32)) if world > 1 else llama(torch.float32)
    optimizer = MODES[mode](model, spec, lr=1e-2)
    text_loss(model, text_batches(1, rows=6)[0][0]).backward()
    optimizer.step()
    found = [(tensor, kind) for tensor, kind in optimizer.held()]
    coords = {id(sub.coords) for sub in optimizer.subspaces}
    for group in optimizer.param_groups:
        found += [(own(p.grad), "coords gradient" if id(p) in coords else "gradient") for p in group["params"]]
    return {kind: sum(t.numel() * t.element_size() for t, other in found if other == kind) for _, kind in found}


RIGHT = "random(rank=4, every=3, side=right)"
ADDS_UP = "svd(rank=4, every=3, side=right, schedule=path)"  # sums of gradients are cut as coordinates are


@each_mode
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("spec", [RIGHT, pytest.param(ADDS_UP, marks=pytest.mark.slow)])
def test_a_process_holds_its_part_as_estimated(tmp_path, mode, world, spec):
    found = each_rank(held, world, tmp_path, mode, spec)
    estimate = memory.estimate(llama(torch.float32), spec, "adamw", mode, ranks=world)
    names = {row.name: row for row in estimate.rows}
    transformed = [row for name, row in names.items() if "proj" in name]
    assert found[0]["weight"] == sum(row.weight for row in transformed)
    for kind in ("coords", "basis", "moments", "gradient", "coords gradient"):
        assert found[0][kind] == estimate.totals[kind], kind
    if spec != RIGHT:
        return
    whole = memory.estimate(llama(torch.float32), RIGHT, "adamw", "adapter").totals
    for kind in ("coords", "gradient", "coords gradient"):
        assert sum(one[kind] for one in found) == whole[kind], kind
    assert all(one["basis"] == whole["basis"] for one in found)


def test_an_estimate_for_several_processes_refuses_what_a_run_does():
    with pytest.raises(SpecError, match="8-bit moments are coded in blocks of 256"):
        memory.estimate(llama(), RIGHT, "adamw8bit", ranks=2)
    with pytest.raises(SpecError, match="layerwise=True steps weights in the order"):
        memory.estimate(llama(), RIGHT, layerwise=True, ranks=2)
    with pytest.raises(ModeError, match="embed_tokens.weight is sharded and not the weight of one linear layer"):
        memory.estimate(llama(), {"*embed_tokens": "svd(rank=4)"}, ranks=2)
    with pytest.raises(SpecError, match="ranks must be a whole number, 1 or more, not 0"):
        memory.estimate(llama(), RIGHT, ranks=0)


def refused(rank, world):
    messages = attempt = Attempts()

    model = shard(llama())
    attempt(lambda: lingrad.wrap(model, {"*embed_tokens": "svd(rank=4)"}, lr=1e-2))
    attempt(lambda: lingrad.wrap(model, POWER, lr=1e-2, moments="8bit"))
    attempt(lambda: lingrad.wrap(model, POWER, lr=1e-2, layerwise=True))
    attempt(lambda: lingrad.wrap(model, POWER, lr=1e-2, residual="sampled"))

    attempt(lambda: lingrad.wrap(model, POWER, "adafactor", lr=1e-2))

    def shards_late(mode):
        late = llama()
        optimizer = MODES[mode](late, POWER, lr=1e-2)
        shard(late)
        text_loss(late, text_batches(1, rows=6)[0][0]).backward()
        optimizer.step()

    for mode in MODES:
        attempt(lambda mode=mode: shards_late(mode))

    def reads(mode):
        optimizer = MODES[mode](model, POWER, lr=1e-2)
        try:
            batch = text_batches(1, rows=6)[0][0]
            for _ in range(2):
                optimizer.zero_grad()
                loss = text_loss(model, batch)
                layer = model.model.layers[0].self_attn.q_proj
                (loss + layer.weight.square().sum()).backward()
                optimizer.step()
        finally:
            optimizer.detach()

    attempt(lambda: reads("adapter"))
    layers = llama()
    for layer in layers.model.layers[:1]:
        fully_shard(layer)
    attempt(lambda: lingrad.wrap(layers, POWER, lr=1e-2))
    flat = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # to make one needs a GPU
    nn.Module.__init__(flat)
    attempt(lambda: lingrad.wrap(nn.Sequential(flat, nn.Linear(4, 4)), POWER, lr=1e-2))
    attempt(lambda: lingrad.wrap(shard(llama()), {"*q_proj": "experts(each=svd(rank=2), count=2)", "*": "none"}, lr=1e-2))
    conv = fully_shard(nn.Sequential(Conv1D(8, 8)).double())
    attempt(lambda: lingrad.wrap(conv, {"*": "random(rank=2)"}, lr=1e-2))
    return list(messages)


@pytest.mark.slow
def test_what_does_not_work_sharded_is_refused(tmp_path):
    embedding, codes, layerwise, residual, adafactor, *late, read, part, flat, blocks, conv = each_rank(refused, 2, tmp_path)[0]
    assert "model.embed_tokens.weight is sharded and not the weight of one linear layer" in embedding
    assert "8-bit moments are coded in blocks of 256, which the shards of a weight cut" in codes
    assert "layerwise=True steps weights in the order in which gradients arrive" in layerwise
    assert "residual='sampled' adds matrices as large as " in residual
    assert "stored in 4 or 8 bits, or cut over processes; leave residual out" in residual
    assert "base 'adafactor' cannot step sharded parameters (DTensors)" in adafactor
    assert len(late) == 2
    for message in late:
        assert "was sharded after lingrad was called" in message
        assert "shard the model first, then call lingrad on it" in message
    assert "q_proj.weight is sharded and read by another than its layer's own call" in read
    assert "layers.1.self_attn.q_proj.weight is not sharded, and model.layers.0" in part
    assert "makes flat vectors of its weights, in which there are no subspaces" in flat
    assert "a BatchedMap cannot be cut by rows; leave sharded weights to another transform" in blocks
    assert "0.weight is sharded and not the weight of one linear layer" in conv
