"""Captured steps, by a recorder that launches the same operators on the same memory again, as a CUDA graph does."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import lingrad
from lingrad.engine.capture import CapturedStep
from lingrad.errors import ModeError, SpecError
from lingrad.models import LlamaShape, build_llama, next_token_loss

MODES = {"optimizer": lingrad.wrap, "adapter": lingrad.adapt}
STEPS = 23
each_mode = pytest.mark.parametrize("mode", MODES)


READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default, torch.ops.aten.equal.default}


class Graph(TorchDispatchMode):
    """Runs operators, keeps them with the memory that they read and write, and can run them there again.

    What CUDA refuses while it captures is an error here too: a value that the host reads.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert func not in READS, f"{func} waits for the device"
        found = func(*args, **kwargs)
        # a tensor may be given other memory later; a graph knows addresses only
        self.calls.append((func, *tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs, found))))
        return found

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, found in self.calls:
            if func._schema.is_mutable:
                func(*args, **kwargs)
            elif all(result.alias_info is None for result in func._schema.returns):  # else a view of what is there
                for old, new in zip(tree_leaves(found), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, torch.Tensor):
                        old.copy_(new)


class Run:
    """A model, its optimizer, and one step on a batch in a fixed place."""

    def __init__(self, mode, spec, base="adamw", **options):
        self.model = build_llama(LlamaShape(64, 32, 88, 1, 2, 16), seed=0, dtype=torch.float64)
        options = {"lr": torch.tensor(0.01, dtype=torch.float64)} | options
        self.optimizer = MODES[mode](self.model, spec, base, **options)
        self.ids = torch.zeros(2, 8, dtype=torch.int64)

    def step(self):
        self.optimizer.zero_grad()
        loss = next_token_loss(self.model, self.ids)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def captured(self, warmup=2):
        return CapturedStep(self.optimizer._run, self.step, warmup=warmup, record=self.record)

    def record(self, body):
        """A CUDA graph launches nothing while it is captured: what running the body has changed is put back."""
        held = [*self.model.parameters(), *(tensor for tensor, _ in self.optimizer.held())]
        before = [(tensor.detach(), tensor.detach().clone()) for tensor in held if 0 not in tensor.stride()]
        graph = Graph()
        with graph:
            result = body()
        for tensor, values in before:
            tensor.copy_(values)
        return result, graph.replay


def weights(run):
    return {name: weight.detach().clone() for name, weight in run.optimizer.weights().items()}


def batches(count=STEPS):
    return torch.randint(0, 64, (count, 2, 8), generator=torch.Generator().manual_seed(5))


SPECS = ["random(rank=4, every=7)", "power(rank=4, every=7)", "svd(rank=4, every=7)", "power(rank=4, every=7, side=both)"]


@each_mode
@pytest.mark.parametrize("spec", SPECS)
def test_the_trajectory_is_that_of_ordinary_steps(mode, spec):
    plain, graphed = (Run(mode, spec, weight_decay=0.1) for _ in range(2))
    captured = graphed.captured()
    for i, ids in enumerate(batches()):
        for run in (plain, graphed):
            run.ids.copy_(ids)
            for group in run.optimizer.param_groups:
                group["lr"].fill_(0.01 * (1 - i / STEPS))
        expected, found = plain.step(), captured()
        assert torch.equal(found, expected)
    for name, weight in weights(plain).items():
        assert torch.equal(weight, weights(graphed)[name])
    assert graphed.optimizer.refreshes() == plain.optimizer.refreshes()
    # steps 0, 7, 14, 21 refresh, two warm up, one is recorded in each period; after a sketch one more sees that no gradient
    # is left from before it
    sketch = spec.startswith("power")
    assert (captured.captures, captured.replays) == ((3, STEPS - 13) if sketch else (4, STEPS - 10))
    states = [run.optimizer.state_dict()["state"] for run in (plain, graphed)]
    for one, other in zip(*map(tree_leaves, states), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_steps_that_merge_now_and_then_run_as_they_are():
    plain, graphed = (Run("adapter", "random(rank=4, every=50)", merge_every=5) for _ in range(2))
    captured = graphed.captured(warmup=1)
    for ids in batches():
        for run in (plain, graphed):
            run.ids.copy_(ids)
        assert torch.equal(captured(), plain.step())
    assert captured.replays > STEPS / 2


def test_a_switch_of_mode_is_followed():
    plain, graphed = (Run("optimizer", "random(rank=4, every=50)") for _ in range(2))
    captured = graphed.captured(warmup=1)
    for i, ids in enumerate(batches()):
        for run in (plain, graphed):
            run.ids.copy_(ids)
            if i == 9:
                run.optimizer.switch("adapter")
        assert torch.equal(captured(), plain.step())
    assert captured.captures == 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": 0.01}, "learning rate of group 'coords' is a number"),
        ({"layerwise": True}, "layerwise"),
        ({"ledger": True}, "ledger"),
        ({"compat": "galore"}, "compat"),
        ({"spec": "random(rank=4, store=false)"}, "store=false"),
    ],
)
def test_what_a_graph_would_freeze_is_refused(options, text):
    run = Run("optimizer", options.pop("spec", "svd(rank=4, every=7)"), **options)
    with pytest.raises(SpecError, match=text):
        run.optimizer.capture(run.step)


def test_a_body_without_a_step_is_refused():
    run = Run("optimizer", "random(rank=4, every=7)")
    captured = CapturedStep(run.optimizer._run, run.optimizer.zero_grad, warmup=2, record=run.record)
    with pytest.raises(ModeError, match="made 0 steps"):
        captured()


def test_a_base_that_counts_in_python_is_refused():
    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for param in group["params"]:
                    self.state[param]["step"] = self.state[param].get("step", 0) + 1

    run = Run("optimizer", "random(rank=4, every=50)", Counting)
    captured = run.captured(warmup=2)
    for _ in range(3):
        captured()
    with pytest.raises(SpecError, match="counts 'step' in Python"):
        captured()


def _load(run):
    run.optimizer.load_state_dict(run.optimizer.state_dict())


def _there_and_back(run):
    mode = run.optimizer.mode
    run.optimizer.switch("adapter" if mode == "optimizer" else "optimizer")
    run.optimizer.switch(mode)


def _move(run):
    for weight in run.model.parameters():
        weight.data = weight.data.clone()


def _set(key, value):
    return lambda run: [group.update({key: value(group)}) for group in run.optimizer.param_groups if key in group]


CHANGES = {
    "weight decay": _set("weight_decay", lambda _: 0.5),
    "betas": _set("betas", lambda _: (0.5, 0.9)),
    "eps": _set("eps", lambda _: 1e-3),
    "scale": _set("scale", lambda _: 0.25),
    "another learning rate": _set("lr", lambda group: group["lr"] * 0.1),
    "a loaded state": _load,
    "a switch there and back": _there_and_back,
    "weights in other memory": _move,
    "frozen embeddings": lambda run: run.model.get_input_embeddings().requires_grad_(False),
}


@each_mode
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_between_steps_is_followed(mode, change):
    plain, graphed = (Run(mode, "random(rank=4, every=50)", weight_decay=0.1) for _ in range(2))
    captured = graphed.captured(warmup=1)
    for i, ids in enumerate(batches(10)):
        for run in (plain, graphed):
            run.ids.copy_(ids)
            if i == 6:
                change(run)
        assert torch.equal(captured(), plain.step())
    assert captured.captures in (2, 3)  # where coordinates had got memory, the graph is of that one step
    for name, weight in weights(plain).items():
        assert torch.equal(weight, weights(graphed)[name])


@each_mode
@pytest.mark.parametrize("spec", ["random(rank=4, every=2)", "random(rank=4, every=3)", "svd(rank=4, every=2)"])
def test_looking_ahead_is_no_part_of_a_graph(mode, spec):
    plain, graphed = (Run(mode, spec) for _ in range(2))
    captured = graphed.captured(warmup=0)
    for ids in batches(9):
        for run in (plain, graphed):
            run.ids.copy_(ids)
        assert torch.equal(captured(), plain.step())


def test_a_base_that_counts_in_its_groups_is_followed():
    class Fading(torch.optim.AdamW):
        def step(self, closure=None):
            for group in self.param_groups:
                group["count"] = group.get("count", 0) + 1
                for param in group["params"]:
                    param.grad.div_(group["count"])
            super().step(closure)

    plain, graphed = (Run("optimizer", "random(rank=4, every=50)", Fading) for _ in range(2))
    captured = graphed.captured(warmup=1)
    for ids in batches(8):
        for run in (plain, graphed):
            run.ids.copy_(ids)
        assert torch.equal(captured(), plain.step())


def test_a_model_that_is_not_on_a_gpu_is_refused_when_it_is_captured():
    made = Run("optimizer", "random(rank=4)")
    with pytest.raises(ModeError, match="records a CUDA graph, and this model is not on a CUDA device"):
        made.optimizer.capture(made.step)
