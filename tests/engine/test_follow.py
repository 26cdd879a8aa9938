"""A model that is changed while it is trained: followed as torch's optimizer does, or an error that names the parameter."""

import dataclasses
import gc
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

import lingrad
from lingrad.errors import LingradError, ModeError, ShapeError
from tests.support.runs import MODES, each_mode
from tests.support.small import repeat

RULES = {"embed": "svd(rank=2, every=3)", "conv": "svd(rank=2, every=3)", "inner": "svd(rank=2, every=3)"}


class Mixed(nn.Module):
    """One weight for each way to attach, and some that train in full."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.table = nn.Embedding(10, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.inner = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 10)

    def forward(self, ids):
        x = self.embed(ids) + self.table(ids)
        x = x + self.conv(x.mT).mT
        return self.out(self.norm(x + self.inner(x)))


def mixed():
    torch.manual_seed(0)
    return Mixed().double()


def resize(module, attribute, shape):
    """As transformers does: the parameter stays, and changes its size."""
    old = getattr(module, attribute)
    new = torch.zeros(shape, dtype=old.dtype)
    rows = tuple(slice(min(a, b)) for a, b in zip(old.shape, shape, strict=True))
    new[rows] = old.detach()[rows]
    old.data = new


def resize_table(model):
    resize(model.table, "weight", (14, 8))


def resize_out(model):
    resize(model.out, "weight", (14, 8))
    resize(model.out, "bias", (14,))


@dataclasses.dataclass(frozen=True)
class Change:
    """A change of a model in mid-run.

    Args:
        make: Makes it.
        named: The parameter that the error names.
        error: The error's class.
    """

    make: Callable[[nn.Module], None]
    named: str
    error: type[LingradError] = ShapeError


def assign(model):
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)


def replace(name):
    def make(model):
        fresh = mixed()
        setattr(model, name, getattr(fresh, name))

    return make


def replace_parameter(model):
    model.norm.weight = nn.Parameter(torch.ones(8, dtype=torch.float64))


RESIZED = [
    Change(resize_table, "table.weight"),
    Change(resize_out, "out.weight"),
]
REPLACED = [
    Change(replace("table"), "table.weight", ModeError),
    Change(replace("inner"), "inner.weight", ModeError),
    Change(replace("conv"), "conv.weight", ModeError),
    Change(replace("embed"), "embed.weight", ModeError),
    Change(replace_parameter, "norm.weight", ModeError),
]


@pytest.mark.parametrize("base", ["adamw", "sgd(momentum)", "adamw fused"])
@each_mode
@pytest.mark.parametrize("change", RESIZED, ids=lambda c: c.make.__name__)
def test_a_parameter_that_was_resized_after_steps_is_named_before_anything_is_stepped(mode, change, base):
    model = mixed()
    options = {"sgd(momentum)": {"base": "sgd", "momentum": 0.9}, "adamw fused": {"base": "adamw", "fused": True}}
    optimizer = MODES[mode](model, RULES, lr=1e-2, **options.get(base, {"base": "adamw"}))
    repeat(model, optimizer)
    change.make(model)
    before = {name: value.clone() for name, value in optimizer.weights().items()}
    with pytest.raises(change.error, match=rf"^{change.named} has shape .* moments are of its old shape .*detach\(\)"):
        repeat(model, optimizer, 1)
    assert all(torch.equal(value, before[name]) for name, value in optimizer.weights().items())
    optimizer.detach()
    again = MODES[mode](model, RULES, lr=1e-2)
    repeat(model, again)


@each_mode
def test_a_parameter_that_was_resized_before_its_first_step_trains_as_in_torch(mode):
    runs = []
    for make in (MODES[mode], lambda model, rules, lr: torch.optim.AdamW(model.parameters(), lr, weight_decay=0.0)):
        model = mixed()
        optimizer = make(model, {"inner": "full()"}, lr=1e-2)
        resize_table(model)
        repeat(model, optimizer)
        runs.append(model.table.weight.detach().clone())
    torch.testing.assert_close(*runs, rtol=1e-12, atol=1e-12)  # other weights are stepped by way of a map, which rounds


@each_mode
def test_without_moments_a_resized_parameter_is_followed_as_in_torch(mode):
    model = mixed()
    optimizer = MODES[mode](model, RULES, base="sgd", lr=1e-2)
    repeat(model, optimizer)
    resize_table(model)
    before = model.table.weight.detach().clone()
    repeat(model, optimizer)
    assert (model.table.weight[:10] != before[:10]).any()


@each_mode
@pytest.mark.parametrize("name", ["embed", "conv", "inner"])
def test_a_transformed_weight_that_was_resized_is_named(mode, name):
    model = mixed()
    optimizer = MODES[mode](model, RULES, lr=1e-2)
    repeat(model, optimizer)
    module = getattr(model, name)
    held = module.parametrizations.weight.original if hasattr(module, "parametrizations") else module.weight
    if name == "conv":
        held.data = nn.functional.pad(held.detach(), (1, 1))
        module.padding = (2,)
    else:
        held.data = torch.cat([held.detach(), held.detach()[:2]])
    with pytest.raises(ShapeError, match=rf"{name}.weight has shape .* when lingrad was called.*detach\(\) before"):
        repeat(model, optimizer, 1)


@each_mode
@pytest.mark.parametrize("change", REPLACED, ids=lambda c: c.named)
def test_a_parameter_that_was_replaced_is_named(mode, change):
    model = mixed()
    optimizer = MODES[mode](model, RULES, lr=1e-2)
    repeat(model, optimizer)
    change.make(model)
    with pytest.raises(change.error, match=rf"{change.named} is another parameter now"):
        repeat(model, optimizer, 1)
    optimizer.detach()
    repeat(model, MODES[mode](model, RULES, lr=1e-2))


@each_mode
def test_a_state_that_is_assigned_is_an_error_where_it_would_stand_still(mode):
    model = mixed()
    optimizer = MODES[mode](model, RULES, lr=1e-2)
    repeat(model, optimizer)
    assign(model)
    with pytest.raises(ModeError, match="is another parameter now"):
        repeat(model, optimizer, 1)
    optimizer.detach()
    assert not any(name.endswith("coords") for name, _ in model.named_parameters())


@each_mode
def test_a_state_that_is_assigned_is_followed_by_linear_layers(mode):
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 8, bias=False)).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [MODES[mode](model, {"*": "svd(rank=2, every=3)"}, lr=1e-2) for model in models]
    x = torch.randn(4, 8, dtype=torch.float64)
    for model, optimizer in zip(models, optimizers, strict=True):
        repeat(model, optimizer, 4, x)
    assign(models[1])
    for model, optimizer in zip(models, optimizers, strict=True):
        repeat(model, optimizer, 4, x)
    weights = [optimizer.weights() for optimizer in optimizers]
    # in adapter mode the state has the sum of W and S z, and the run goes on from that: float64, rounded once more
    tolerance = 0.0 if mode == "optimizer" else 1e-12
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=tolerance, atol=tolerance)


@each_mode
@pytest.mark.parametrize("name", ["inner", "conv", "embed", "table", "norm"])
def test_what_was_frozen_at_the_start_and_has_a_gradient_now_is_named_once(mode, name):
    """A warning, not an error: another optimizer may train it, as where two networks take turns."""
    model = mixed()
    getattr(model, name).requires_grad_(False)
    rules = {key: value for key, value in RULES.items() if key != name}
    optimizer = MODES[mode](model, rules, lr=1e-2)
    repeat(model, optimizer)
    getattr(model, name).requires_grad_(True)
    other = torch.optim.SGD(getattr(model, name).parameters(), 1e-2)
    before = getattr(model, name).weight.detach().clone()
    with pytest.warns(
        UserWarning, match=rf"{name}\.\w+( and 1 more)? was frozen when lingrad was called, has a gradient now"
    ) as said:
        repeat(model, optimizer, 3)
    assert len(said) == 1
    assert torch.equal(getattr(model, name).weight, before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        repeat(model, optimizer, 1)
        other.step()
    assert not torch.equal(getattr(model, name).weight, before)


@each_mode
@pytest.mark.parametrize("name", ["inner", "conv", "embed", "table", "norm"])
def test_what_was_trainable_at_the_start_can_be_frozen_and_unfrozen(mode, name):
    """The remedy that the error above gives."""
    model = mixed()
    optimizer = MODES[mode](model, RULES, lr=1e-2)
    getattr(model, name).requires_grad_(False)
    frozen = {key: value.clone() for key, value in optimizer.weights().items() if key.startswith(name)}
    repeat(model, optimizer)
    assert all(torch.equal(optimizer.weights()[key], value) for key, value in frozen.items())
    getattr(model, name).requires_grad_(True)
    repeat(model, optimizer)
    assert not any(torch.equal(optimizer.weights()[key], value) for key, value in frozen.items())


@each_mode
def test_layers_that_are_removed_stand_still_as_in_torch(mode):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)]).double()
    optimizer = MODES[mode](model, {"*": "svd(rank=2, every=3)"}, lr=1e-2)
    x = torch.randn(4, 8, dtype=torch.float64)
    repeat(model, optimizer, 2, x)
    removed = model[1]
    del model[1]  # the names of the layers behind it move up
    repeat(model, optimizer, 4, x)
    optimizer.detach()
    assert "forward" not in vars(removed)


@pytest.mark.parametrize("given", ["model", "parameters"])
@pytest.mark.parametrize("layer", [nn.LazyLinear(4), nn.LazyConv1d(4, 3), nn.LazyBatchNorm1d()], ids=lambda m: type(m).__name__)
def test_a_lazy_layer_is_named(layer, given):
    model = nn.Sequential(nn.Linear(8, 8), layer)
    with pytest.raises(ShapeError, match=r"^1\.weight has no shape yet.*Call the model once"):
        lingrad.wrap(model if given == "model" else model.named_parameters(), {"0.weight": "svd(rank=2)"})


@each_mode
@pytest.mark.parametrize("broken", ["first", "last"])
def test_detach_is_all_or_nothing(mode, broken):
    model = mixed()
    optimizer = MODES[mode](model, RULES, lr=1e-2)
    repeat(model, optimizer)
    weights = {name: value.clone() for name, value in optimizer.weights().items()}
    attachment = optimizer.attachments[0 if broken == "first" else -1]

    def fail():
        raise RuntimeError("a layer that cannot be restored")

    vars(attachment)["_disconnect"] = fail
    with pytest.raises(RuntimeError, match="cannot be restored"):
        optimizer.detach()
    assert optimizer.mode == mode
    for name, value in optimizer.weights().items():
        torch.testing.assert_close(value, weights[name], rtol=1e-12, atol=1e-12)  # merged, in another order of sums
    del vars(attachment)["_disconnect"]
    repeat(model, optimizer)
    optimizer.detach()
    assert list(model.state_dict()) == list(mixed().state_dict())


def test_a_weight_that_was_resized_is_detached_with_what_its_coordinates_held():
    """Whoever resizes it reads the sum, W + S z, and replaces it."""
    model = mixed()
    optimizer = lingrad.adapt(model, RULES, lr=1e-2)
    repeat(model, optimizer)
    sum_ = optimizer.weights()["inner.weight"].clone()
    assert any(sub.coords.any() for sub in optimizer.subspaces if sub.name == "inner.weight")
    resize(model.inner, "weight", (12, 8))
    optimizer.detach()
    assert torch.equal(model.inner.weight[:8], sum_)
    assert not model.inner.weight[8:].any()


HOOKS = {
    "mask": lambda p: p.register_hook(lambda grad: grad * 0.0),
    "afterwards": lambda p: p.register_post_accumulate_grad_hook(lambda _: None),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", ["inner", "conv", "embed"])
@each_mode
def test_hooks_on_a_gradient_that_is_never_formed_are_refused(mode, name, hook):
    model = mixed()
    HOOKS[hook](getattr(model, name).weight)
    if mode == "optimizer" and name != "inner":  # whose gradients are formed, one after the other
        MODES[mode](model, RULES, lr=1e-2)
        return
    with pytest.raises(ModeError, match=rf"^{name}\.weight has a hook on its gradient, which would never be called"):
        MODES[mode](model, RULES, lr=1e-2)
    assert list(model.state_dict()) == list(mixed().state_dict())
    MODES[mode](model, {key: rule for key, rule in RULES.items() if key != name}, lr=1e-2)  # the remedy


@pytest.mark.parametrize("name", ["conv", "embed"])
def test_a_hook_on_a_gradient_that_is_formed_is_called_as_in_torch(name):
    """Rows that a mask keeps stay: a left basis would mix them, a right one does not."""
    model = mixed()
    weight = getattr(model, name).weight
    before = weight.detach().clone()
    weight.register_hook(lambda grad: grad * (torch.arange(len(grad)) < 4).view(-1, *[1] * (grad.dim() - 1)))
    optimizer = lingrad.wrap(model, {name: "svd(rank=2, every=3, side=right)"}, lr=1e-2)
    repeat(model, optimizer, 4)
    moved = (weight.detach() - before).flatten(1).norm(dim=1)
    assert (moved[:4] > 1e-3).all()
    assert (moved[4:] == 0).all()


def test_a_hook_that_came_after_wrapping_keeps_the_run_in_its_mode():
    model = mixed()
    optimizer = lingrad.wrap(model, RULES, lr=1e-2)
    model.embed.weight.register_hook(lambda grad: grad)
    with pytest.raises(ModeError, match=r"embed\.weight has a hook"):
        optimizer.switch("adapter")
    assert optimizer.mode == "optimizer"
    repeat(model, optimizer)


def test_lingrad_s_own_hooks_do_not_count():
    model = mixed()
    optimizer = lingrad.wrap(model, RULES, lr=1e-2)
    for mode in ("adapter", "optimizer", "adapter"):
        optimizer.switch(mode)
        repeat(model, optimizer)
    optimizer.detach()
    lingrad.adapt(model, RULES, lr=1e-2)


@each_mode
def test_a_frozen_parameter_that_was_replaced_is_freed(mode):
    model = mixed()
    model.table.requires_grad_(False)
    optimizer = MODES[mode](model, RULES, lr=1e-2)
    repeat(model, optimizer)
    old = weakref.ref(model.table.weight)
    model.table.weight = nn.Parameter(torch.zeros(10, 8, dtype=torch.float64), requires_grad=False)
    gc.collect()
    assert old() is None
    repeat(model, optimizer)


class Tied(nn.Module):
    def __init__(self, rows=10):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.head = nn.Linear(8, rows, bias=False)
        self.embed.weight = self.head.weight

    def forward(self, ids):
        return self.head(self.embed(ids).tanh())


@pytest.mark.parametrize("rows", [10, 14], ids=["as many rows", "a padded head"])
@each_mode
def test_tied_weights_train_whatever_their_layers_say_of_their_sizes(mode, rows):
    torch.manual_seed(0)
    model = Tied(rows).double()
    optimizer = MODES[mode](model, {"embed": "svd(rank=2, every=3)"}, lr=1e-2)
    before = model.head.weight.detach().clone()
    repeat(model, optimizer, 4)
    optimizer.detach()
    assert model.embed.weight is model.head.weight
    assert not torch.equal(model.head.weight, before)


@each_mode
def test_tied_weights_that_are_not_tied_any_more_are_named(mode):
    torch.manual_seed(0)
    model = Tied().double()
    optimizer = MODES[mode](model, {"embed": "svd(rank=2, every=3)"}, lr=1e-2)
    repeat(model, optimizer)
    assign(model)
    with pytest.raises(ModeError, match="hold different parameters now|is another parameter now"):
        repeat(model, optimizer, 1)


@each_mode
def test_a_layer_whose_child_was_taken_away_can_be_detached(mode):
    model = mixed()
    optimizer = MODES[mode](model, RULES, lr=1e-2)
    repeat(model, optimizer)
    del model.inner.lingrad
    optimizer.detach()
    assert list(model.state_dict()) == list(mixed().state_dict())
    repeat(model, MODES[mode](model, RULES, lr=1e-2))


def test_a_resized_weight_can_be_detached_where_nothing_is_lost():
    model = mixed()
    optimizer = lingrad.adapt(model, RULES, lr=1e-2)  # no step: all coordinates are zero
    resize(model.inner, "weight", (12, 8))
    optimizer.detach()
    assert model.inner.weight.shape == (12, 8)


ASSIGNED = [
    "svd(rank=2, every=3)",
    "power(rank=2, every=3)",
    "random(rank=2, every=3)",
    "pca(rank=2)",
    "svd(rank=2, side=both)",
]


@pytest.mark.parametrize("clipped", [False, True], ids=["", "clipped"])
@pytest.mark.parametrize("rules", ASSIGNED)
@pytest.mark.parametrize(("mode", "names"), [("optimizer", ["embed", "conv", "inner"]), ("adapter", ["inner"])])
def test_gradients_that_are_assigned_by_hand_are_stepped_like_those_of_a_backward(mode, names, rules, clipped):
    """As meta-learning, federated and functional code does: ``torch.func.grad``, then ``weight.grad = ...``."""
    ends = []
    for by_hand in (False, True):
        model = mixed()
        optimizer = MODES[mode](model, dict.fromkeys(names, rules), lr=1e-2)
        for _ in range(7):
            optimizer.zero_grad()
            ids = torch.arange(10).view(2, 5)
            if by_hand:
                plain = mixed()
                plain.load_state_dict(optimizer.weights())
                plain(ids).square().mean().backward()
                for name, param in plain.named_parameters():
                    model.get_parameter(name).grad = param.grad
            else:
                model(ids).square().mean().backward()
            if clipped:
                optimizer.clip_grad_norm_(0.1)
            optimizer.step()
        ends.append(optimizer.weights())
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-10, atol=1e-10)  # sums in another order, through Adam
        assert not torch.equal(value, mixed().get_parameter(name))


@each_mode
def test_a_gradient_by_hand_is_added_to_that_of_a_backward(mode):
    model, other = mixed(), mixed()
    runs = [MODES[mode](m, {"inner": "svd(rank=2, every=3)"}, "sgd", lr=1e-1) for m in (model, other)]
    ids = torch.arange(10).view(2, 5)
    for m, optimizer in zip((model, other), runs, strict=True):
        for _ in range(2):
            m(ids).square().mean().backward()
        if m is model:
            m.inner.weight.grad = torch.zeros_like(m.inner.weight)
        optimizer.step()
        assert m.inner.weight.grad is None
    assert all(torch.equal(a, b) for a, b in zip(runs[0].weights().values(), runs[1].weights().values(), strict=True))
