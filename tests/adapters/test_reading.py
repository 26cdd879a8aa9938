"""Whoever reads or writes the weight of a wrapped layer reads and writes the weight of its forward."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

import lingrad
from lingrad.errors import ModeError
from lingrad.subspaces.subspace import Subspace
from tests.support.runs import MODES, each_mode

# In float64 the layer's sums in another order: some thousand roundings of 1e-16.
EXACT = 1e-12


def close(one, other, tolerance=EXACT):
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


class Several(nn.Module):
    """Weights by every route into a forward."""

    def __init__(self):
        super().__init__()
        self.linear, self.conv, self.embed = nn.Linear(8, 6), nn.Conv1d(8, 8, 3, padding=1), nn.Embedding(10, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, ids):
        x = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        return self.linear(self.attention(x, x, x, need_weights=False)[0])


RULES = {"*": "svd(rank=3, every=4)"}
NAMES = ["linear.weight", "conv.weight", "embed.weight", "attention.in_proj_weight", "attention.out_proj.weight"]
IDS = torch.arange(20).reshape(4, 5) % 10


def trained(mode, steps=1, **options):
    torch.manual_seed(0)
    model = Several().double()
    optimizer = MODES[mode](model, RULES, lr=1e-2, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        model(IDS).square().sum().backward()
        optimizer.step()
    optimizer.zero_grad()
    if mode == "adapter":
        assert all(sub.coords.any() for sub in optimizer.subspaces)
    return model, optimizer


def held(model, name):
    *path, attribute = name.split(".")
    return getattr(model.get_submodule(".".join(path)), attribute)


READERS = {
    "itself": lambda w: w + 0,
    "transpose": lambda w: w.transpose(0, 1) * 2,
    "row": lambda w: w[1],
    "slices": lambda w: w[1:3, ..., 2:],
    "norm": lambda w: w.norm(),
    "product": lambda w: w.flatten(1) @ torch.ones(w.flatten(1).shape[1], dtype=w.dtype),
    "linear": lambda w: nn.functional.linear(torch.ones(2, w.flatten(1).shape[1], dtype=w.dtype), w.flatten(1)),
    "several": lambda w: torch.stack([w, w * 2]),
    "list": lambda w: torch._foreach_mul([w], 2.0)[0],
    "clone": lambda w: w.clone(),
    "other dtype": lambda w: w.float(),
    "data": lambda w: w.data * 1,
    "detached": lambda w: w.detach() * 1,
    "view of a view": lambda w: w.detach().flatten()[3:].unsqueeze(0) * 1,
    "numpy": lambda w: torch.from_numpy(w.detach().numpy().copy()),
    "list of numbers": lambda w: torch.tensor(w.tolist(), dtype=w.dtype),
    "copied": lambda w: copy.deepcopy(w.detach()),
    "saved": lambda w: save(w.detach()),
    "quantised": lambda w: torch.quantize_per_tensor(w.detach().float(), 0.05, 0, torch.qint8).dequantize(),
    "into another": lambda w: torch.zeros_like(w).copy_(w),
}


def save(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("reader", READERS)
@each_mode
def test_a_reader_gets_the_weight_of_the_forward(mode, reader):
    model, optimizer = trained(mode)
    effective = {name: weight.detach().clone() for name, weight in optimizer.weights().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, of its quantized tensors
        for name in NAMES:
            right = READERS[reader](effective[name])
            close(READERS[reader](held(model, name)).detach(), right)
            with torch.no_grad():
                close(READERS[reader](held(model, name)), right)
    after = optimizer.weights()
    assert all(torch.equal(after[name], effective[name]) for name in NAMES)


@each_mode
def test_a_weight_has_the_looks_of_a_parameter_and_forms_nothing_to_show_them(mode, monkeypatch):
    model, _ = trained(mode)
    plain = Several().double()
    monkeypatch.setattr(Subspace, "add_to", None)
    for name in NAMES:
        weight, like = held(model, name), held(plain, name)
        for look in ("shape", "dtype", "device", "ndim", "is_cuda", "layout", "grad"):
            assert getattr(weight, look) == getattr(like, look)
        assert weight.stride() == like.stride()
        assert isinstance(weight, nn.Parameter)
        assert weight.numel() == like.numel()
        assert weight.requires_grad
        assert torch.is_floating_point(weight)
    assert model.get_parameter("linear.weight").shape == (6, 8)
    assert type(model.linear).__name__ == "Linear"
    assert isinstance(model.linear, nn.Linear)


@pytest.mark.parametrize(
    "rules", ["svd(rank=3, every=4)", "power(rank=2, every=2)", "pca(rank=2, side=left)", "random(rank=2)"]
)
@pytest.mark.parametrize("name", NAMES[:3])
def test_a_penalty_on_a_weight_trains_it_alike_in_both_modes(rules, name):
    found = []
    for mode in MODES:
        torch.manual_seed(0)
        model = Several().double()
        optimizer = MODES[mode](model, {"*": rules}, "adam", lr=1e-2)
        for i in range(6):
            optimizer.zero_grad()
            (0.1 * model(IDS.roll(i, 0)).square().mean() + held(model, name).square().sum()).backward()
            optimizer.step()
        found.append(optimizer.weights())
    for key, weight in found[0].items():
        close(found[1][key], weight)


@pytest.mark.parametrize("name", NAMES)
@each_mode
def test_the_gradient_of_a_penalty_is_projected(mode, name):
    model, optimizer = trained(mode)
    sub = next(sub for sub in optimizer.subspaces if sub.name == name)
    weight = sub.effective().clone()
    (held(model, name) ** 2).sum().backward()
    close(sub.coords.grad, sub.map().project(sub.weight.layout.matrix(2 * weight)))
    assert dict(model.named_parameters()).get(name, sub.weight.param).grad is None


@each_mode
def test_a_layer_that_is_read_and_never_called_trains_like_one_that_is_called(mode):
    found = []
    for reads in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).double()
        optimizer = MODES[mode](model, RULES, lr=1e-2)
        for i in range(6):
            x = torch.randn(5, 8, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
            hidden = nn.functional.linear(x, model[0].weight, model[0].bias) if reads else model[0](x)
            optimizer.zero_grad()
            model[2](model[1](hidden)).square().sum().backward()
            optimizer.step()
        found.append(optimizer.weights())
    for key, weight in found[0].items():
        close(found[1][key], weight)


WRITERS = {
    "div_": lambda w: w.div_(4.0),
    "clamp_": lambda w: w.clamp_(-0.05, 0.05),
    "copy_": lambda w: w.copy_(torch.full_like(w, 0.25)),
    "fill": lambda w: nn.init.constant_(w, 0.5),
    "operator": lambda w: w.__imul__(0.5),
    "fill_": lambda w: w.fill_(2.0),
}


@pytest.mark.parametrize("way", ["attribute", "data", "parameters", "parameters' data"])
@pytest.mark.parametrize("writer", WRITERS)
@each_mode
def test_what_is_written_to_a_weight_is_the_weight_of_the_forward(mode, writer, way):
    model, optimizer = trained(mode)
    expected = {name: WRITERS[writer](weight.detach().clone()) for name, weight in optimizer.weights().items() if name in NAMES}
    with torch.no_grad():
        for sub in optimizer.subspaces:
            weight = held(model, sub.name) if "parameters" not in way else sub.weight.param
            WRITERS[writer](weight.data if "data" in way else weight)
        found = optimizer.weights()
        for name, weight in expected.items():
            close(found[name], weight)
        plain = Several().double()
        plain.load_state_dict({name: value.detach() for name, value in found.items()})
        close(model(IDS), plain(IDS))
    model(IDS).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("when", ["before forward", "before step"])
@pytest.mark.parametrize("layerwise", [False, True])
@each_mode
def test_data_that_is_only_looked_at_changes_nothing(mode, layerwise, when):
    """As a program that logs norms does; in adapter mode W is merged, which the trajectory does not depend on."""
    found = []
    for looks in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).double()
        optimizer = MODES[mode](model, RULES, lr=1e-2, layerwise=layerwise)

        def look(now, model=model, looks=looks):
            if looks and now == when:
                assert all(p.data.norm() >= 0 for p in model.parameters())

        for i in range(6):
            optimizer.zero_grad()
            x = torch.randn(5, 8, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
            look("before forward")
            loss = model(x).square().sum()
            loss.backward()
            look("before step")
            optimizer.step()
        found.append(optimizer.weights())
    for key, weight in found[0].items():
        close(found[1][key], weight)


def test_a_weight_that_may_be_written_to_between_forward_and_backward_is_an_error():
    """The backward needs the W and z of its forward; autograd sees that they were merged."""
    model, _ = trained("adapter")
    loss = model(IDS).square().sum()
    assert dict(model.named_parameters())["linear.weight"].data.norm() > 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_part_of_a_sum_cannot_be_written_to():
    model, _ = trained("adapter")
    with torch.no_grad(), pytest.raises(ModeError, match=r"a part of linear.weight is written to.*layer.weight.copy_"):
        model.linear.weight[0].zero_()


@each_mode
def test_a_weight_that_is_put_in_its_place_is_followed_and_watched(mode):
    model, optimizer = trained(mode)
    before = optimizer.weights()["linear.weight"].detach().clone()
    model.linear.weight = nn.Parameter(model.linear.weight.detach() * 0.5)
    close(optimizer.weights()["linear.weight"], before * 0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(IDS).square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        dict(model.named_parameters())["linear.weight"].fill_(0.25)
    assert (optimizer.weights()["linear.weight"] == 0.25).all()


@each_mode
def test_torch_s_fused_encoder_evaluates_the_weights_of_the_forward(mode):
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True), 2)
    x = torch.randn(4, 6, 16)
    optimizer = MODES[mode](model, "svd(rank=4, every=100)", lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        (model(x) - x.flip(1)).square().mean().backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        fused = model(x)
        optimizer.detach()
        close(fused, model(x), 1e-5)  # float32, some hundred roundings of 1e-7


@each_mode
def test_an_average_of_the_parameters_is_right_or_refused(mode):
    """As diffusers' EMAModel does: what does not train is copied."""
    model, optimizer = trained(mode)
    shadow = [p.detach().clone() for p in model.parameters()]
    right = {name: p.detach().clone() for name, p in optimizer.weights().items()}
    for _ in range(5):
        optimizer.zero_grad()
        model(IDS).square().sum().backward()
        optimizer.step()
        right = {name: value.lerp(optimizer.weights()[name].detach(), 0.1) for name, value in right.items()}
        for mean, p in zip(shadow, model.parameters(), strict=True):
            if p.requires_grad:
                mean.lerp_(p.detach(), 0.1)
            else:
                mean.copy_(p)
    for mean, p in zip(shadow, model.parameters(), strict=True):
        p.data.copy_(mean)
    if mode == "adapter":
        with pytest.raises(ModeError, match=r"written into .* and into its coordinates.*Average opt.weights\(\)"):
            model(IDS)
        return
    for name, value in optimizer.weights().items():
        close(value, right[name])


def sam(model, optimizer, loss, radius=0.05):
    """Sharpness-aware minimization over what the optimizer hands out."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    loss().backward()
    with torch.no_grad():
        moves = [p.grad * radius for p in params]
        for p, move in zip(params, moves, strict=True):
            p.add_(move)
    for p in params:
        p.grad = None
    optimizer.zero_grad()
    loss().backward()
    with torch.no_grad():
        for p, move in zip(params, moves, strict=True):
            p.sub_(move)
    optimizer.step()
    optimizer.zero_grad()


def test_coordinates_can_be_moved_for_a_forward_in_both_modes():
    found = []
    for mode in MODES:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).double()
        optimizer = MODES[mode](model, {"*": "random(rank=3, every=3)"}, lr=1e-2)
        for i in range(6):
            x = torch.randn(5, 8, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
            sam(model, optimizer, lambda x=x, model=model: (model(x) - x).square().sum())
        found.append(optimizer.weights())
    for key, weight in found[0].items():
        close(found[1][key], weight)


def test_moved_coordinates_that_a_layer_does_not_read_are_refused():
    model, optimizer = trained("optimizer")
    with pytest.raises(ModeError, match=r"coordinates of .* were written to \(as SAM does\).*lingrad.adapt"):
        sam(model, optimizer, lambda: model(IDS).square().sum())


@pytest.mark.parametrize("options", [{}, {"self_contained": True}])
def test_a_state_in_memory_is_the_model_of_then(options):
    """Kept over a refresh, and loaded into the run and into a plain model."""
    model, optimizer = trained("adapter", **options)
    best, then = copy.deepcopy(model.state_dict()), model(IDS).detach()
    for _ in range(7):
        optimizer.zero_grad()
        model(IDS).square().sum().backward()
        optimizer.step()
    model.load_state_dict(best)
    close(model(IDS).detach(), then)
    plain = Several().double()
    plain.load_state_dict(best)
    close(plain(IDS).detach(), then)


@each_mode
def test_layerwise_steps_a_weight_that_is_read_only_and_refuses_one_that_is_called_too(mode):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).double()
    optimizer = MODES[mode](model, RULES, lr=1e-2, layerwise=True)
    before = {name: value.detach().clone() for name, value in optimizer.weights().items()}
    x = torch.randn(5, 8, dtype=torch.float64)
    (model[0](x) @ model[1].weight).square().sum().backward()
    optimizer.step()
    assert all((value != before[name]).any() for name, value in optimizer.weights().items() if "weight" in name)
    if mode == "optimizer":
        with pytest.raises(ModeError, match="a second backward reached"):
            (model[1](x).sum() + model[1].weight.square().sum()).backward()


@each_mode
def test_nothing_of_it_is_left_after_detach(mode):
    model, optimizer = trained(mode)
    optimizer.detach()
    for name, param in model.named_parameters():
        assert type(param) is nn.Parameter
        assert held(model, name) is param
        assert param.requires_grad
    assert type(model.linear) is nn.Linear


@pytest.mark.parametrize("fused", [True, False])
def test_a_state_dict_that_is_kept_does_not_make_the_next_one_old(fused):
    """Fused optimizers step coordinates without raising their version."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = lingrad.adapt(model, {"*": "random(rank=2, every=50)"}, "adamw", lr=0.05, fused=fused)
    kept = []
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        kept.append(model.state_dict())
        torch.testing.assert_close(kept[-1]["1.weight"], optimizer.weights()["1.weight"], rtol=0, atol=0)


def test_a_sum_that_is_loaded_into_the_run_it_came_from_changes_nothing():
    """As torch.distributed.checkpoint does, which loads the optimizer's state before the model's: both parts stay."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 6)).double()
    optimizer = lingrad.adapt(model, "random(rank=2)", lr=1e-2, ledger=True)
    model(torch.randn(3, 6, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    before = [(sub.coords.detach().clone(), sub.weight.param.detach().clone()) for sub in optimizer.subspaces]
    assert all(bool(coords.any()) for coords, _ in before)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    for sub, (coords, weight) in zip(optimizer.subspaces, before, strict=True):
        assert torch.equal(sub.coords, coords)
        assert torch.equal(sub.weight.param, weight)
    optimizer.changes()  # they are still this run's
    other = {name: value + 1 for name, value in model.state_dict().items()}
    model.load_state_dict(other)
    for sub in optimizer.subspaces:
        assert not bool(sub.coords.any())
        assert torch.equal(sub.weight.param, other[sub.name])


def test_a_load_that_names_the_weights_themselves_or_fails_changes_nothing():
    """torch.distributed.checkpoint fills in what a partial state leaves out by the model's own parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 6)).double()
    optimizer = lingrad.adapt(model, "random(rank=2)", lr=1e-2)
    model(torch.randn(3, 6, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    before = {name: weight.clone() for name, weight in optimizer.weights().items()}
    model.load_state_dict({**model.state_dict(), **dict(model.named_parameters())}, strict=False)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**model.state_dict(), "0.weight": torch.zeros(3, 3)})
    for name, weight in optimizer.weights().items():
        assert torch.equal(weight, before[name]), name
