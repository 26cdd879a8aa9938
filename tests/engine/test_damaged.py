"""States that are damaged, foreign or hostile: an error of lingrad's that names the entry, and a run as it was."""

import copy

import pytest
import torch

import lingrad
from lingrad.errors import CheckpointError
from lingrad.transforms import PCA
from tests.support.models import llama, text_batches, train

NAN = float("nan")
BASIS, MOMENT = "subspace.state.right", "exp_avg"


def build(mode="wrap", steps=0, spec="svd(rank=4, every=3, side=right)", **options):
    model = llama()
    optimizer = getattr(lingrad, mode)(model, spec, **{"lr": 1e-2, **options})
    if steps:
        train(model, optimizer, text_batches(steps))
    return model, optimizer


@pytest.fixture(scope="module")
def good():
    return build(steps=4)[1].state_dict()


def every_group(**values):
    def change(state):
        for group in state["param_groups"]:
            group.update(values)

    return change


def entry(key, make):
    def change(state):
        state["state"][0][key] = make(state["state"][0].get(key))

    return change


def fill(value):
    return lambda tensor: torch.full_like(tensor, value)


def expanded(tensor):
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)


DAMAGE = {
    "lr nan": (every_group(lr=NAN), "lr must be a number, 0 or more"),
    "lr a word": (every_group(lr="x"), "lr must be a number, 0 or more"),
    "lr negative": (every_group(lr=-1.0), "lr must be a number, 0 or more"),
    "lr infinite": (every_group(lr=float("inf")), "lr must be a number, 0 or more"),
    "lr tensor nan": (every_group(lr=torch.tensor(NAN)), "lr must be a number, 0 or more"),
    "decay nan": (every_group(weight_decay=NAN), "weight_decay must be a number, 0 or more"),
    "scale a pair": (lambda s: s["param_groups"][0].update(scale=(1.0, 2.0)), "scale must be a number, 0 or more"),
    "eps negative": (every_group(eps=-1e-8), "eps must be a number, 0 or more"),
    "betas one": (every_group(betas=0.9), "betas must be 0 or more and below 1"),
    "betas nan": (every_group(betas=(NAN, 0.9)), "betas must be 0 or more and below 1"),
    "betas of one": (every_group(betas=(1.0, 1.0)), "betas must be 0 or more and below 1"),
    "betas vectors": (every_group(betas=(torch.ones(2), 0.9)), "betas must be 0 or more and below 1"),
    "another entry on meta": (entry("more", lambda _: torch.ones(2, device="meta")), "on the meta device"),
    "count nan": (entry("step", fill(NAN)), "'step' of .* is nan"),
    "count negative": (entry("step", fill(-5.0)), "'step' of .* is -5"),
    "basis nan": (entry(BASIS, fill(NAN)), "values that are not finite"),
    "basis infinite": (entry(BASIS, fill(float("inf"))), "values that are not finite"),
    "basis sparse": (entry(BASIS, lambda t: t.to_sparse()), "not a dense tensor"),
    "basis meta": (entry(BASIS, lambda t: t.to("meta")), "on the meta device"),
    "basis expanded": (entry(BASIS, expanded), r"elements in \d+ bytes"),
    "moment sparse": (entry(MOMENT, lambda t: t.to_sparse()), "not a dense tensor"),
    "moment meta": (entry(MOMENT, lambda t: t.to("meta")), "on the meta device"),
    "moment expanded": (entry(MOMENT, expanded), r"elements in \d+ bytes"),
    "step negative": (entry("subspace.step", lambda _: -1), "step -1"),
    "refreshes negative": (entry("subspace.refreshes", lambda _: -1), "-1 refreshes"),
    "state none": (lambda s: s.update(state=None), "'state' of this state_dict"),
    "entries none": (lambda s: s["state"].update({0: None}), "'state' of this state_dict"),
    "groups none": (lambda s: s.update(param_groups=None), "'param_groups' of this state_dict"),
    "a group none": (lambda s: s["param_groups"].__setitem__(0, None), "'param_groups' of this state_dict"),
    "params none": (lambda s: s["param_groups"][0].update(params=None), "'param_groups' of this state_dict"),
    "a key that is a number": (lambda s: s["state"][0].update({7: 1}), "called 7; expected a name"),
}


def assert_same(now, before):
    assert now.keys() == before.keys()
    for key, value in now.items():
        assert torch.equal(value, before[key]) if isinstance(value, torch.Tensor) else value == before[key], key


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_refused_and_the_run_is_as_it_was(good, damage):
    change, message = DAMAGE[damage]
    state = copy.deepcopy(good)
    change(state)
    model, optimizer = build(steps=2)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with pytest.raises(CheckpointError, match=message):
        optimizer.load_state_dict(state)
    assert_same(model.state_dict(), before[0])
    for index, entries in optimizer.state_dict()["state"].items():
        assert_same(entries, before[1]["state"][index])
    assert optimizer.state_dict()["param_groups"] == before[1]["param_groups"]
    train(model, optimizer, text_batches(1))


def laughs():
    """60 lists, each twice in the next: 2^60 words."""
    found = ["ha"]
    for _ in range(60):
        found = [found, found]
    return found


@pytest.mark.parametrize("key", ["format", "mode", "base", "lr", "betas", "seed", "name", "param_names", "specs", "params"])
@pytest.mark.parametrize("value", [laughs(), ["a" * 10**6] * 4, 10**5000], ids=["laughs", "long", "digits"])
def test_a_value_that_is_endless_is_refused_in_a_few_words(good, key, value):
    state = copy.deepcopy(good)
    state["param_groups"] = [{**group, key: value} for group in state["param_groups"]]
    _, optimizer = build(steps=1)
    with pytest.raises(CheckpointError) as caught:
        optimizer.load_state_dict(state)
    assert len(str(caught.value)) < 2000


def test_a_complete_state_that_is_damaged_at_its_end_changes_nothing():
    _, first = build("adapt", steps=4, self_contained=True)
    state = copy.deepcopy(first.state_dict())
    last = max(index for index, entries in state["state"].items() if "subspace.stored.weight" in entries)
    state["state"][last]["subspace.stored.weight"] = state["state"][last]["subspace.stored.weight"].to("meta")
    model, optimizer = build("adapt", steps=6, self_contained=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match="on the meta device"):
        optimizer.load_state_dict(state)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("mode", ["wrap", "adapt"])
def test_moments_and_bases_in_other_strides_are_stepped_alike(mode, fused):
    """Fused kernels go through memory in its order, not through elements."""
    model, optimizer = build(mode, steps=4, fused=fused)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    other = copy.deepcopy(state)
    for entries in other["state"].values():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor) and value.dim() == 2:
                entries[key] = value.t().contiguous().t()
    ends = []
    for given in (state, other):
        model, optimizer = build(mode, fused=fused)
        model.load_state_dict(weights)
        optimizer.load_state_dict(given)
        train(model, optimizer, text_batches(4))
        ends.append(optimizer.weights())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_channels_last_parameter_keeps_the_strides_of_its_moments():
    def run():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 2)).double()
        model = model.to(memory_format=torch.channels_last)
        return model, lingrad.wrap(model, {"2": "svd(rank=1)"}, lr=1e-2, fused=True)

    def step(model, optimizer):
        optimizer.zero_grad()
        model(torch.ones(2, 3, 8, 8, dtype=torch.float64)).square().sum().backward()
        optimizer.step()

    model, optimizer = run()
    step(model, optimizer)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for entries in saved[1]["state"].values():  # as a format that stores contiguous tensors only gives them back
        entries.update({k: v.contiguous() for k, v in entries.items() if isinstance(v, torch.Tensor)})
    step(model, optimizer)
    other, resumed = run()
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    step(other, resumed)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_learning_rate_that_is_a_tensor_is_not_shared_with_the_run_it_came_from():
    _, one = build(lr=torch.tensor(1e-2))
    _, two = build(lr=torch.tensor(1e-2))
    two.load_state_dict(one.state_dict())
    torch.optim.lr_scheduler.ExponentialLR(one, 0.5).step()
    assert [float(group["lr"]) for group in two.param_groups] == pytest.approx([1e-2] * len(two.param_groups))


def test_numbers_in_python_and_in_a_config_string_are_one_transform():
    _, one = build(spec=PCA(rank=2, lr=1), steps=2)
    _, two = build(spec="pca(rank=2, lr=1)")
    two.load_state_dict(one.state_dict())
    assert lingrad.spec.format(PCA(rank=2, lr=1)) == lingrad.spec.format(lingrad.spec.parse("pca(rank=2, lr=1)"))
