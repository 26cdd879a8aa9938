"""offload=...: what is in host memory between steps, and that nothing else differs."""

import itertools
from collections import Counter
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import lingrad
from lingrad import optimizers
from lingrad.config.cutting import check_cut
from lingrad.decentralized import Rounds, simulate
from lingrad.engine import offload
from lingrad.engine.capture import CapturedStep
from lingrad.errors import SpecError
from lingrad.tensors import host_like, on_host, storage
from tests.support.models import llama, text_batches, text_loss, train, zoo, zoo_batches, zoo_loss
from tests.support.runs import MODES, assert_equal_bits, assert_same, each_mode, through_a_file, weights_of

SVD = "svd(rank=3, every=3)"
ALL = "moments, bases, ledger"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Models as small as these would be one block otherwise."""
    monkeypatch.setattr(offload, "BLOCK", 100)


def run(mode, spec=SVD, base="adamw", *, build=zoo, dtype=torch.float64, micro=1, clip=None, **options):
    """A model and its optimizer, and a function that trains them for some batches."""
    batches, loss = (zoo_batches(7, micro=micro), zoo_loss) if build is zoo else (text_batches(7, micro=micro), text_loss)
    model = build(dtype)
    options = {"lr": 1e-2, "weight_decay": 0.1, "scale": 0.25, **options}
    optimizer = MODES[mode](model, {"*": spec} if build is zoo else spec, base, **options)
    return model, optimizer, lambda start, end: train(model, optimizer, batches[start:end], loss, clip=clip, schedule=False)


def state_of(model, optimizer):
    return through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})


# A run in which the words may matter, one for each way in which moments, bases and the record are read or written.
CASES = {
    "keep": {"clip": 0.05, "micro": 2},
    "reset": {"carry": "reset"},
    "rotate": {"carry": "rotate", "spec": "power(rank=3, every=2)"},
    "transport": {"carry": "transport", "spec": "kron(left=svd(rank=3, every=2), right=random(rank=3, every=3))"},
    "learned basis": {"spec": "pca(rank=3)"},
    "coded basis": {"spec": "coded(each=svd(rank=3, every=3), bits=4)"},
    "drawn basis": {"spec": "random(rank=3, every=3, side=both)"},
    "chosen rows": {"spec": "dct(rank=3, every=3)"},
    "own schedule": {"spec": "svd(rank=3, every=2, schedule=energy())"},
    "8-bit moments": {"moments": "8bit", "min_8bit_size": 16, "carry": "rotate"},
    "adamw8bit": {"base": "adamw8bit", "min_8bit_size": 16, "dtype": torch.float32},
    "two bases": {"base": "muon"},
    "adafactor": {"base": "adafactor"},
    "state from the start": {"base": "adagrad", "carry": "reset"},
    "sgd": {"base": "sgd", "momentum": 0.9, "carry": "rotate"},
    "in bfloat16": {"dtype": torch.bfloat16, "rounding": "compensated"},
    "layerwise": {"layerwise": True, "carry": "rotate"},
    "layerwise coordinates": {"layerwise": "coordinates"},
    "shared basis": {"build": llama, "spec": "svd(rank=3, every=3, side=right)", "share": "input"},
    "rate as a tensor": {"lr": torch.tensor(1e-2, dtype=torch.float64)},
    "with galore's arithmetic": {"compat": "galore", "build": llama},
    "stagger": {"stagger": True, "spec": "power(rank=3, every=3)"},
}
# Of one mode only; a run with a residual records nothing
OPTIMIZER = {
    "feedback": {"residual": "feedback", "carry": "rotate", "build": llama},
    "feedback, reset": {"residual": "feedback", "carry": "reset", "build": llama},
    "scaled": {"residual": "scaled", "build": llama},
    "sampled": {"residual": "sampled", "build": llama},
}
ADAPTER = {"merge_every": {"merge_every": 2}}
EVERY = [
    *itertools.product(("optimizer", "adapter"), CASES),
    *(("optimizer", name) for name in OPTIMIZER),
    *(("adapter", name) for name in ADAPTER),
]


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("mode", "name"), EVERY)
def test_a_run_is_the_same_to_the_bit(mode, name):
    """Weights, moments, bases, the record of merges, and what the run says of itself."""
    options = {**CASES, **OPTIMIZER, **ADAPTER}[name]
    records = "residual" not in options
    plain, out = (run(mode, ledger=records, offload=words, **options) for words in (None, ALL if records else "moments, bases"))
    for _, _, trains in (plain, out):
        trains(0, 7)
    assert_same(state_of(*out[:2]), state_of(*plain[:2]))
    assert_equal_bits(weights_of(out[1]), weights_of(plain[1]))
    assert out[1].captured_energy() == plain[1].captured_energy()
    if records:
        changes = [optimizer.changes() for _, optimizer, _ in (plain, out)]
        for weight, change in changes[0].items():
            other = changes[1][weight]
            assert change.decay == other.decay
            assert (change.factors is None) is (other.factors is None)
            for side in ("left", "right") if change.factors is not None else ():
                assert torch.equal(getattr(change.factors, side), getattr(other.factors, side)), weight


WORDS = (None, "moments", ALL)


@pytest.mark.thinned(3)
@each_mode
@pytest.mark.parametrize(("before", "after"), list(itertools.product(WORDS, WORDS))[1:])
def test_a_checkpoint_is_of_any_run(mode, before, after):
    """Saved and loaded with other words, to the bit; the state that is loaded is where the run keeps it."""
    options = {"ledger": True, "carry": "rotate"}
    straight, first, second = (run(mode, offload=words, **options) for words in (None, before, after))
    straight[2](0, 7)
    first[2](0, 4)
    saved = state_of(*first[:2])
    second[0].load_state_dict(saved["model"])
    second[1].load_state_dict(saved["optimizer"])
    assert_same(state_of(*second[:2]), saved)
    placed(second[1])
    second[2](4, 7)
    assert_same(state_of(*second[:2]), state_of(*straight[:2]))


def placed(optimizer):
    """Make sure that what the words name is in host memory, and nothing else."""
    words = optimizer.settings.offloaded
    for entries in optimizer.state.values():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor) and not key.startswith("subspace."):
                assert on_host(value) is ("moments" in words and value.numel() > 1), key
    for sub in optimizer.subspaces:
        assert [on_host(one) for one in sub.basis.tensors()] == ["bases" in words] * len(sub.basis.tensors())
        assert [on_host(one) for one in sub.ledger.tensors()] == ["ledger" in words] * len(sub.ledger.tensors())


@each_mode
@pytest.mark.parametrize("words", ["moments", "bases", "ledger", "bases,moments", ALL])
def test_what_the_words_name_is_in_host_memory(mode, words):
    model, optimizer, trains = run(mode, offload=words, ledger="ledger" in words, carry="rotate")
    placed(optimizer)
    for step in range(4):  # the last one refreshes
        trains(step, step + 1)
        placed(optimizer)
    model.to(torch.float32)  # the state follows in the next step
    train(model, optimizer, zoo_batches(1), zoo_loss, schedule=False)
    placed(optimizer)


class Copies(TorchDispatchMode):
    """Counts copies to and from host memory."""

    def __init__(self):
        super().__init__()
        self.to_host, self.to_device = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default:
            target, source = args[:2]
            assert storage(target) != storage(source)  # two places
            (self.to_host if on_host(target) else self.to_device if on_host(source) else Counter())[tuple(target.shape)] += 1
        return out


class TestCopies:
    """Four layers of one shape, each a block of its own; coordinates are [12, 9], bases [12, 9]."""

    def steps(self, mode, words, steps=3, spec="svd(rank=9, every=100, side=right)", **options):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(12, 12, bias=False) for _ in range(4)))
        optimizer = MODES[mode](model, {"*": spec}, lr=1e-2, offload=words, **options)
        found = []
        for step in range(steps):
            x = torch.randn(20, 12, generator=torch.Generator().manual_seed(step))
            with Copies() as copies:
                model(x).square().mean().backward()
                optimizer.step()
            optimizer.zero_grad()
            found.append((copies.to_device, copies.to_host))
        return found

    @each_mode
    def test_each_moment_goes_once_each_way(self, mode):
        first, *others = self.steps(mode, "moments")
        assert first == ({}, {(12, 9): 8})  # two moments of each weight are made in the first step
        assert others == [({(12, 9): 8}, {(12, 9): 8})] * 2

    @pytest.mark.parametrize(("mode", "uses"), [("optimizer", 3), ("adapter", 2)])
    def test_a_basis_comes_once_for_each_use(self, mode, uses):
        """Forward, backward, and in optimizer mode the merge; none goes back but at a refresh."""
        _, *others = self.steps(mode, "bases")
        assert others == [({(12, 9): 4 * uses}, {})] * 2

    def test_a_refresh_puts_each_basis_back_once(self):
        *_, last = self.steps("adapter", "bases", steps=3, spec="svd(rank=9, every=2, side=right)")
        assert last[1] == {(12, 9): 4}

    def test_a_shared_basis_comes_once_for_all_layers(self):
        """q, k and v read one input: their forward is one use."""
        counts = []
        for share in (None, "input"):
            model, _, trains = run("adapter", "svd(rank=3, every=100, side=right)", build=llama, offload="bases", share=share)
            trains(0, 1)
            with Copies() as copies:
                text_loss(model, text_batches(1)[0][0])
            counts.append(sum(copies.to_device.values()))
        assert counts == [14, 8]  # of 7 layers in each of 2 blocks q, k and v are one use, and gate and up another

    def test_no_more_than_three_blocks_are_on_the_device(self, monkeypatch):
        alive, most = set(), 0
        enter, leave, wait = offload.Offload._fetch, offload.Offload._leave, offload.Offload._wait

        def fetch(self, state, params):
            nonlocal most
            alive.update(map(id, params))
            most = max(most, len(alive))
            return enter(self, state, params)

        def left(self, state, params, *copies):
            leave(self, state, params, *copies)
            self.gone = getattr(self, "gone", set()) | set(map(id, params))

        def waited(self):
            wait(self)
            alive.difference_update(getattr(self, "gone", ()))

        for name, function in (("_fetch", fetch), ("_leave", left), ("_wait", waited)):
            monkeypatch.setattr(offload.Offload, name, function)
        self.steps("adapter", "moments")
        assert most == 3
        assert not alive


class Failing(torch.optim.AdamW):
    """AdamW that fails before it steps a parameter of some shape."""

    shape = None

    def step(self, closure=None):
        for group in self.param_groups:
            if any(tuple(param.shape) == self.shape for param in group["params"]):
                raise RuntimeError("out of order")
        return super().step(closure)


class TestAStepThatFails:
    """Coordinates [3, 12] and [14, 3], then the biases, [10] and [14]: three blocks, of which one fails."""

    @staticmethod
    def stepped(mode, monkeypatch, shape):
        """The run after two steps and a third in which a shape fails; its state before that, and how to go on."""
        monkeypatch.setattr(offload, "BLOCK", 40)
        monkeypatch.setattr(Failing, "shape", None)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 14)).double()
        optimizer = MODES[mode](model, {"*": SVD}, Failing, lr=1e-2, weight_decay=0.1, offload=ALL, ledger=True)
        x = torch.randn(20, 12, dtype=torch.float64)

        def backward():
            optimizer.zero_grad()
            model(x).square().mean().backward()

        for _ in range(2):
            backward()
            optimizer.step()
        backward()
        before = through_a_file({"moments": moments_of(optimizer), "model": model.state_dict()})
        monkeypatch.setattr(Failing, "shape", shape)
        if shape is None:
            optimizer.step()
        else:
            with pytest.raises(RuntimeError, match="out of order"):
                optimizer.step()
            monkeypatch.setattr(Failing, "shape", None)
        return model, optimizer, before, backward

    @each_mode
    @pytest.mark.parametrize(("shape", "done"), [((3, 12), 0), ((14, 3), 1), ((14,), 2)], ids=["first", "second", "third"])
    def test_no_moment_is_lost(self, mode, shape, done, monkeypatch):
        """Those of the blocks before are of the new step, the others are what they were."""
        _, whole, *_ = self.stepped(mode, monkeypatch, None)
        model, optimizer, before, backward = self.stepped(mode, monkeypatch, shape)
        after, expected = moments_of(optimizer), moments_of(whole)
        assert_same(after[:done], expected[:done])
        assert_same(after[done:], before["moments"][done:])
        placed(optimizer)
        if done == 0:  # nothing was stepped, and the decay is taken back, to rounding
            torch.testing.assert_close(dict(model.state_dict()), dict(before["model"]), rtol=1e-15, atol=0)
        backward()
        optimizer.step()
        placed(optimizer)
        assert [int(entries["step"]) for entries in moments_of(optimizer)] == [4 if i < done else 3 for i in range(4)]


def moments_of(optimizer):
    """The base's entries of every parameter, in the order of the groups."""
    entries = optimizer.state
    every = (param for group in optimizer.param_groups for param in group["params"])
    return [{k: v for k, v in entries[param].items() if not k.startswith("subspace.")} for param in every]


class Stream:
    """What a stream of CUDA is told, in order; there is no device."""

    log: ClassVar[list[str]] = []
    current: ClassVar[list["Stream"]] = []
    names: ClassVar[list[str]] = []

    def __init__(self, device):
        self.name = self.names.pop()

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self):
        return self

    def synchronize(self):
        self.log.append(f"the host waits for {self.name}")

    def __enter__(self):
        self.current.append(self)

    def __exit__(self, *exception):
        self.current.pop()


def test_streams_of_cuda_wait_for_each_other(monkeypatch):
    """On fake tensors. A step waits for what it reads; a copy back waits for the step, and the host for that."""
    Stream.names[:] = ["back", "there", "main"]
    Stream.log.clear()
    Stream.current[:] = [Stream("cuda")]
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream.current[-1])

    def to_host(value, memory, *, wait):
        Stream.log.append(f"{Stream.current[-1].name}: to host")
        assert not wait
        return memory if memory is not None else host_like(value)

    def to_device(value, device):
        Stream.log.append(f"{Stream.current[-1].name}: to device")
        return torch.empty_like(value, device=device)

    class Momentum(torch.optim.SGD):
        def step(self, closure=None):
            Stream.log.append(f"{Stream.current[-1].name}: step")
            return super().step(closure)

    monkeypatch.setattr(offload, "to_host", to_host)
    monkeypatch.setattr(offload, "to_device", to_device)
    kept = offload.Offload(optimizers.find("sgd", {"lr": 0.1, "momentum": 0.9}))
    with FakeTensorMode():
        params = [nn.Parameter(torch.empty(12, 9, device="cuda")) for _ in range(2)]
        for param in params:
            param.grad = torch.empty(12, 9, device="cuda")
        optimizer = Momentum(params, lr=0.1, momentum=0.9, foreach=False)
        kept.step(optimizer)
        assert all(optimizer.state[param]["momentum_buffer"].device.type == "cpu" for param in params)
        Stream.log.clear()
        kept.step(optimizer)
    assert Stream.log == [
        "there: to device",  # the first block
        "there: to device",  # the next one, ahead
        "main waits for there",
        "main: step",
        "back waits for main",
        "back: to host",
        "the host waits for back",
        "main waits for there",
        "main: step",
        "back waits for main",
        "back: to host",
        "the host waits for back",
    ]


class Counting(torch.optim.SGD):
    """Counts its steps in the param group."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
        return super().step(closure)


class TestRefusals:
    def wrap(self, **options):
        return lingrad.wrap(nn.Sequential(nn.Linear(8, 8)), {"*": "svd(rank=2)"}, **{"lr": 1e-2, **options})

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"offload": "moment"}, "'moment' cannot be in host memory; did you mean 'moments'?"),
            ({"offload": "moments, "}, "'' cannot be in host memory; expected moments, bases or ledger"),
            ({"offload": True}, "offload must be words, not True: expected moments, bases or ledger"),
            ({"offload": "ledger"}, "names the ledger, and this run records none; make it with ledger=True"),
            ({"offload": "moments", "base": Counting}, "base 'Counting' has one 'count' for all of them; leave offload out"),
        ],
        ids=str,
    )
    def test_options_that_cannot_be(self, options, message):
        with pytest.raises(SpecError) as caught:
            self.wrap(**options)
        assert message in str(caught.value)

    def test_bases_where_there_are_none(self):
        with pytest.raises(SpecError, match="where nothing is transformed there is no 'bases'"):
            lingrad.wrap(nn.Sequential(nn.Linear(8, 8)), {"*": "none"}, lr=1e-2, offload="bases")

    def test_a_compiled_step(self):
        with pytest.raises(SpecError, match="with offload='moments' each block has others; leave compile_step or offload out"):
            self.wrap(offload="moments", lr=torch.tensor(1e-2)).compile_step()

    def test_a_captured_step(self):
        optimizer = self.wrap(offload="bases", lr=torch.tensor(1e-2))
        with pytest.raises(SpecError, match="'offload' is followed in Python at each step, which a graph leaves out"):
            CapturedStep(optimizer._run, lambda: None, warmup=0, record=lambda body: (body(), body))

    def test_workers(self):
        def work(workers):
            rounds = Rounds(workers=workers, every=2)
            lingrad.adapt(nn.Sequential(nn.Linear(8, 8)), {"*": "svd(rank=2)"}, lr=1e-2, offload="bases", rounds=rounds)

        with pytest.raises(SpecError, match="leave offload or rounds out"):
            simulate(work, 1)

    def test_sharded_weights(self):
        with pytest.raises(SpecError, match="offload='moments' copies tensors of one process"):
            check_cut("adamw", coded=False, layerwise=False, offload="moments")
