"""Tensor parallelism: processes that each compute a part of every layer train as one process.

Tolerance: 1e-12 in float64, as for the modes: sums over ranks are taken in another order.
"""

import pytest
import torch
from torch import distributed, nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

import lingrad
from benchmarks.traffic import Wire
from tests.support.cases import variants
from tests.support.models import gap, llama, text_batches, text_loss
from tests.support.processes import Attempts, each_rank
from tests.support.runs import MODES
from tests.support.sharded import full, train, weights_of

TOLERANCE = 1e-12
BY_ROWS, BY_COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")
ATTENTION = {**{f"self_attn.{name}": ColwiseParallel() for name in BY_ROWS[:3]}, "self_attn.o_proj": RowwiseParallel()}
MLP = {**{f"mlp.{name}": ColwiseParallel() for name in BY_ROWS[3:]}, "mlp.down_proj": RowwiseParallel()}
ENDS = {
    "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
    "lm_head": ColwiseParallel(output_layouts=Replicate()),
}


def parallel(model, plan=ATTENTION | MLP, ends=False):
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan)
    return parallelize_module(model, mesh, ENDS) if ends else model


def rules(spec):
    """The basis of each weight on the side that is not cut."""
    right = {f"*{name}": spec.format(side="right") for name in BY_ROWS}
    return {**right, **{f"*{name}": spec.format(side="left") for name in BY_COLUMNS}, "*": "none"}


def cases(specs, options):
    """(rules, mode, options, whether clipped): of each transform in both modes."""
    for i, spec in enumerate(specs):
        for k, mode in enumerate(MODES):
            yield rules(spec.replace("every=7", "every=3")), mode, options[i % len(options)], (i + k) % 2 == 0


DEFAULT = list(
    cases(
        ("svd(rank=4, every=3, side={side})", "power(rank=4, every=3, side={side})", "random(rank=4, every=3, side={side})"),
        ({}, {"carry": "rotate"}, {"ledger": True, "stagger": True}),
    )
)
# what is in float32, or has signs that rounding decides, is not equal to 1e-12
SIDED = [
    text for text in variants() if ("{side}" in text or text == "full()") and "align=" not in text and "precision=" not in text
]
SLOW = list(cases(SIDED, ({"carry": "reset"}, {}, {"scale": 0.25})))
SHARED = [
    (rules(spec), mode, {"share": "input"}, False)
    for spec in ("power(rank=4, every=3, side={side})", "svd(rank=4, every=3, side={side})")
    for mode in MODES
]


def work(rank, world, chosen, plan=ATTENTION | MLP, ends=False):
    return [train(*case, model=parallel(llama(), plan, ends)) for case in chosen]


def assert_one(folder, world, chosen, *how):
    first, *others = each_rank(work, world, folder, chosen, *how)
    for i, case in enumerate(chosen):
        weights, norms = first[i]
        for other in others:
            assert all(torch.equal(weight, other[i][0][name]) for name, weight in weights.items()), case
        expected, expected_norms = train(*case)
        assert gap(weights, expected) <= TOLERANCE, case
        assert [float(norm) for norm in norms] == pytest.approx([float(norm) for norm in expected_norms], rel=TOLERANCE)


def test_two_processes_are_one(tmp_path):
    assert_one(tmp_path, 2, DEFAULT)


@pytest.mark.slow
def test_two_processes_are_one_with_every_transform(tmp_path):
    assert_one(tmp_path, 2, SLOW)


@pytest.mark.slow
def test_shared_bases(tmp_path):
    assert_one(tmp_path, 2, SHARED)


@pytest.mark.slow
def test_embeddings_and_heads_that_are_cut_train_in_full(tmp_path):
    assert_one(tmp_path, 2, DEFAULT[:4], ATTENTION | MLP, True)


@pytest.mark.slow
def test_some_layers_only_and_parts_that_are_not_equal(tmp_path):
    """Three processes, of 88 hidden units; the weights of the attention are whole in each."""
    assert_one(tmp_path, 3, DEFAULT, MLP)


class Block(nn.Module):
    """A norm and two layers with biases, as parts of a sequence under sequence parallelism."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def blocks():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block()).double()


BLOCK_RULES = {"*.up": "power(rank=3, every=2, side=right)", "*.down": "svd(rank=3, every=2, side=left)"}
STYLES = {
    "plain": {"up": ColwiseParallel(), "down": RowwiseParallel()},
    "distributed outputs": {
        "up": ColwiseParallel(use_local_output=False),
        "down": RowwiseParallel(),
    },
    "sequence": {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
    },
}


def train_blocks(model, mode, parts=lambda x: x, whole=lambda loss: loss, base="adamw"):
    optimizer = MODES[mode](model, BLOCK_RULES, base, lr=1e-2, weight_decay=0.1)
    for step in range(5):
        optimizer.zero_grad()
        for micro in range(2):
            x = torch.randn(2, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * step + micro))
            whole(model(parts(x)).square().sum()).backward()
        optimizer.step()
    return weights_of(optimizer)


def styles(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    found = []
    for style, plan in STYLES.items():
        for mode in MODES:
            model = blocks()
            for block in model:
                parallelize_module(block, mesh, plan)
            split = style == "sequence"
            found.append(train_blocks(model, mode, parts=lambda x, split=split: x.chunk(world, 1)[rank] if split else x))
    return found


@pytest.mark.slow
def test_biases_and_layouts(tmp_path):
    first, other = each_rank(styles, 2, tmp_path)
    for i, weights in enumerate(first):
        assert all(torch.equal(weight, other[i][name]) for name, weight in weights.items())
        assert gap(weights, train_blocks(blocks(), list(MODES)[i % 2])) <= TOLERANCE, list(STYLES)[i // 2]


def bases(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    found = {}
    for base in ("sgd", "adam", "rmsprop", "adagrad"):
        model = blocks()
        for block in model:
            parallelize_module(block, mesh, STYLES["plain"])
        found[base] = train_blocks(model, "optimizer", base=base)
    return found


@pytest.mark.slow
def test_other_bases(tmp_path):
    for base, weights in each_rank(bases, 2, tmp_path)[0].items():
        assert gap(weights, train_blocks(blocks(), "optimizer", base=base)) <= TOLERANCE, base


def groups(rank, world):
    """Two runs of two processes each."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("runs", "parts"))["parts"]
    model = llama()
    for layer in model.model.layers:
        parallelize_module(layer, mesh, ATTENTION | MLP)
    given = {"process_group": mesh.get_group(), "seed": rank // 2}
    return train(DEFAULT[2][0], "adapter", given, False, model=model)[0]


@pytest.mark.slow
def test_two_runs_of_two_processes(tmp_path):
    found = each_rank(groups, 4, tmp_path)
    for pair in (0, 1):
        assert gap(found[2 * pair], train(DEFAULT[2][0], "adapter", {"seed": pair}, False)[0]) <= TOLERANCE
        assert all(torch.equal(w, found[2 * pair + 1][name]) for name, w in found[2 * pair].items())


SENT = rules("random(rank=4, every=3, side={side})")


def sent(rank, world):
    """Bytes of each step, of AdamW and of runs in both modes."""
    found = []
    for mode in (None, *MODES):
        model = parallel(llama())
        if mode is None:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
        else:
            optimizer = MODES[mode](model, SENT, lr=1e-2)
        for batch, *_ in text_batches(7):
            with Wire() as wire:
                optimizer.zero_grad()
                text_loss(model, batch).backward()
                optimizer.step()
            found.append(sum(wire.sent.values()))
    return found


@pytest.mark.slow
def test_nothing_is_sent_but_what_the_layers_send(tmp_path):
    counts = each_rank(sent, 2, tmp_path)[0]
    plain, optimizer, adapter = counts[:7], counts[7:14], counts[14:]
    assert plain[0] > 0
    assert optimizer == plain  # at refreshes too, of what reads no gradient
    assert adapter[2] > plain[2]  # the first merge asks whether there is anything to merge
    assert adapter[:2] + adapter[3:] == plain[:2] + plain[3:]


BEFORE, BATCHES = 4, text_batches(8)
SAVED = [("power", "adapter"), ("svd", "optimizer")]


def resumable(spec, mode, seed, world):
    model = llama()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(seed * 1e-3)
    if world > 1:
        parallel(model)
    return model, MODES[mode](model, rules(f"{spec}(rank=4, every=3, side={{side}})"), lr=1e-2, weight_decay=0.1)


def go_on(model, optimizer, batches):
    for batch, *_ in batches:
        optimizer.zero_grad()
        text_loss(model, batch).backward()
        optimizer.step()
    return weights_of(optimizer)


def states(model, optimizer):
    from torch.distributed.checkpoint.state_dict import get_state_dict

    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optimizer": of_optimizer}


def save(rank, world, folder):
    from torch.distributed import checkpoint

    found = []
    for i, (spec, mode) in enumerate(SAVED):
        model, optimizer = resumable(spec, mode, 0, world)
        go_on(model, optimizer, BATCHES[:BEFORE])
        checkpoint.save(states(model, optimizer), checkpoint_id=f"{folder}/{i}")
        found.append(go_on(model, optimizer, BATCHES[BEFORE:]))
    return found


def load(rank, world, folder):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import set_state_dict

    found = []
    for i, (spec, mode) in enumerate(SAVED):
        model, optimizer = resumable(spec, mode, 7, world)
        saved = states(model, optimizer)
        checkpoint.load(saved, checkpoint_id=f"{folder}/{i}")
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
        found.append(go_on(model, optimizer, BATCHES[BEFORE:]))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_checkpoint_of_two_processes_goes_on(tmp_path, world):
    expected = each_rank(save, 2, tmp_path, str(tmp_path))[0]
    found = each_rank(load, world, tmp_path, str(tmp_path))[0]
    for case, one, other in zip(SAVED, expected, found, strict=True):
        assert gap(other, one) <= (0 if world == 2 else TOLERANCE), case


def plain_states(rank, world):
    """In adapter mode the model's state is the plain model's, W + S z."""
    model, optimizer = resumable("power", "adapter", 0, world)
    go_on(model, optimizer, BATCHES[:2])
    state = {name: full(value) for name, value in model.state_dict().items()}
    return state, weights_of(optimizer)


@pytest.mark.slow
def test_the_state_of_a_model_is_that_of_the_plain_model(tmp_path):
    (state, weights), _ = each_rank(plain_states, 2, tmp_path)
    assert all(torch.equal(state[name], weight) for name, weight in weights.items())
    assert not any("lingrad" in name for name in state)


def refused(rank, world):
    messages = attempt = Attempts()

    mesh = init_device_mesh("cpu", (world,))
    power = "power(rank=4, every=3, side={side})"

    def wraps(given, model=None, **options):
        lingrad.wrap(parallel(llama()) if model is None else model, given, lr=1e-2, **options)

    attempt(lambda: wraps(power.format(side="left")))
    attempt(lambda: wraps(power.format(side="right")))
    attempt(lambda: wraps(power.format(side="both")))
    attempt(lambda: wraps({**rules(power), "*q_proj": "kron(left=svd(rank=4), right=random(rank=3))"}))
    attempt(lambda: wraps(rules(power), moments="8bit"))
    attempt(lambda: wraps(rules(power), layerwise=True))
    attempt(lambda: wraps({"*embed_tokens": "svd(rank=4)", **rules(power)}, parallel(llama(), ends=True)))
    half = {"self_attn.q_proj": ColwiseParallel(output_layouts=Replicate())}
    attempt(lambda: wraps(rules(power), parallel(llama(), half), share="input"))
    both = init_device_mesh("cpu", (1, world), mesh_dim_names=("data", "parts"))
    model = llama()
    for layer in model.model.layers:
        parallelize_module(layer, both["parts"], ATTENTION | MLP)
        fully_shard(layer, mesh=both["data"])
    attempt(lambda: wraps(rules(power), fully_shard(model, mesh=both["data"])))

    def reads():
        model = blocks()
        parallelize_module(model, mesh, {"0.up": ColwiseParallel()})
        optimizer = lingrad.wrap(model, {"0.up": "svd(rank=2, side=right)", "*": "none"}, lr=1e-2)
        model[0].up.weight.square().sum().backward()
        optimizer.step()

    attempt(reads)

    def without_hooks(placement):
        model = nn.Sequential(nn.Linear(4, 4))
        parallelize_module(model, mesh, {"0": ColwiseParallel()})
        model[0]._forward_pre_hooks.clear()
        lingrad.wrap(model, "svd(rank=2, side=right)", lr=1e-2)
        x = torch.ones(2, 4 if placement is None else 2)
        model(x if placement is None else DTensor.from_local(x, mesh, [placement]))

    attempt(lambda: without_hooks(None))
    attempt(lambda: without_hooks(Shard(1)))
    return list(messages)


@pytest.mark.slow
def test_what_does_not_work_is_refused(tmp_path):
    left, right, both, kron, codes, layerwise, embedding, shared, meshes, read, plain, cut = each_rank(refused, 2, tmp_path)[0]

    layer = "model.layers.0.self_attn"

    def side(name, style, spec, needed, one_sided):
        return (
            f"{layer}.{name}.weight [32, 32] is cut by {style}, and the basis of '{spec}' is not on the {needed} side "
            "alone: a part of the weight would need all of the coordinates. Give such weights "
            f"side={needed} by a rule: {{'*{name}': '{one_sided}', ...}}"
        )

    by_rows, by_columns = "rows (ColwiseParallel)", "columns (RowwiseParallel)"
    power = "power(rank=4, every=3, side={})".format
    assert left == side("q_proj", by_rows, power("left"), "right", power("right"))
    assert right == side("o_proj", by_columns, power("right"), "left", power("left"))
    assert both == side("q_proj", by_rows, power("both"), "right", power("right"))
    of_kron = "kron(left=svd(rank=4), right=random(rank=3))"
    assert kron == side("q_proj", by_rows, of_kron, "right", "svd(rank=64, side=right)")
    assert codes.startswith("8-bit moments are coded in blocks of 256, which the shards of a weight cut in other places")
    assert layerwise.startswith("layerwise=True steps weights in the order in which gradients arrive")
    assert embedding == (
        "model.embed_tokens.weight is sharded and not the weight of one linear layer (an embedding, a convolution, GPT-2's "
        "Conv1D, fused experts, a tied weight); only linear layers are trained in a subspace under fully_shard and tensor "
        "parallelism. Leave it out by a rule: 'none'"
    )
    assert shared == (
        f"{layer}.q_proj.weight and {layer}.k_proj.weight share a basis, and tensor parallelism has cut one of them only; "
        "parallelize both, leave share out, or leave one of the weights out by a rule: 'none'"
    )
    assert meshes == (
        f"{layer}.q_proj.weight (32, 32) is cut as (_StridedShard(dim=0, sf=2), Shard(dim=0)); only matrices that fully_shard "
        "has cut by rows, or ColwiseParallel or RowwiseParallel over a mesh of one dimension, not both together, can "
        "be trained in a subspace. Leave it out by a rule: 'none'"
    )
    assert "0.up.weight is sharded and read by another than its layer's own call" in read
    expected = (
        "expected one that every process has, as the hooks of ColwiseParallel give it. Apply these styles by parallelize_module"
    )
    assert plain == f"the layer of 0.weight is cut by rows, and its input is a plain tensor; {expected}"
    assert cut == f"the layer of 0.weight is cut by rows, and its input is (Shard(dim=1),); {expected}"
