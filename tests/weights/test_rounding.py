"""Weights in 16 and 8 bits that are rounded by chance, or with the error kept."""

import copy

import pytest
import torch
from torch import nn

import lingrad
from lingrad import memory
from lingrad.errors import CheckpointError, ModeError, SpecError
from lingrad.transforms.linalg import derive_seed
from lingrad.weights.rounding import FINE, FINER, FULL, Rounding
from tests.support.packed import go, layer

HALF = (torch.bfloat16, torch.float16)
KINDS = ("stochastic", "compensated")
MODES = {"optimizer": lingrad.wrap, "adapter": lingrad.adapt}


def numbers(dtype, shape=(24, 40)):
    """Of all sizes: zeros, denormal numbers, powers of two with neighbours at different distances, and both signs."""
    found = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found[0], found[1] = 0.0, found[1] * torch.finfo(dtype).tiny
    found[2] = 2.0 ** (torch.arange(shape[1]) % 30 - 15) * found[2].sign()
    return found.to(dtype)


def neighbours(dtype):
    """All finite numbers of a dtype in order, float64."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return every[every.isfinite()].double().unique()


@pytest.mark.parametrize("dtype", HALF)
def test_by_chance_to_one_of_two_neighbours_and_exact_in_the_mean(dtype):
    before = numbers(dtype)
    change = torch.randn(before.shape, generator=torch.Generator().manual_seed(2)) * before.float().abs() * 1e-3
    exact = before.double() + change.double()
    grid = neighbours(dtype)
    above = torch.searchsorted(grid, exact.contiguous()).clamp(1, len(grid) - 1)
    low, high = grid[above - 1], grid[above]
    low = torch.where(exact == high, high, low)
    total, draws = torch.zeros_like(exact), 400
    for seed in range(draws):
        rounded = before.clone()
        Rounding("stochastic", derive_seed(seed)).add_(rounded, change)
        assert bool(((rounded.double() == low) | (rounded.double() == high)).all())
        total += rounded.double()
    # the mean of draws of a Bernoulli variable: five standard errors of at most half a gap; sums in float32 round by 2^-24
    room = 5 * (high - low) / 2 / draws**0.5 + exact.abs() * 2.0**-23
    assert bool(((total / draws - exact).abs() <= room).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", HALF)
def test_what_is_not_finite_stays_so(dtype, kind):
    odd = torch.tensor([[torch.nan, torch.inf, -torch.inf, 1.0]]).to(dtype)
    Rounding(kind, 0).add_(odd, torch.zeros(1, 4))
    assert odd[0].isnan().tolist() == [True, False, False, False]
    assert odd[0, 1:].tolist() == [torch.inf, -torch.inf, 1.0]


@pytest.mark.parametrize("dtype", HALF)
def test_with_the_error_kept_it_is_as_good_as_float32(dtype):
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact, rounding, generator = weight.double(), Rounding("compensated", 0), torch.Generator().manual_seed(2)
    for _ in range(300):
        change = torch.randn(weight.shape, generator=generator) * 1e-5
        rounding.add_(weight, change, 1 - 1e-6)
        exact = exact * (1 - 1e-6) + change.double()
    gap = torch.finfo(dtype).eps * torch.maximum(exact.abs(), torch.tensor(1e-3))
    # each sum is rounded in float32, and the error to 2^-16 of a gap
    assert bool(((weight.double() - exact).abs() <= gap / 2 + 300 * (2.0**-23 * exact.abs() + gap / FINER)).all())


@pytest.mark.parametrize("dtype", HALF)
def test_the_share_of_small_steps_that_is_lost(dtype):
    """Steps of a hundredth of a gap, 200 of them: to the nearest all are lost, in the other ways none."""
    weight = torch.full((16, 32), 1.5)
    change = torch.full((16, 32), torch.finfo(dtype).eps / 100)
    nearest = weight.to(dtype)
    for _ in range(200):
        nearest.add_(change)
    assert float((nearest - 1.5).abs().max()) == 0.0
    for kind in KINDS:
        rounded, rounding = weight.to(dtype), Rounding(kind, 3)
        for _ in range(200):
            rounding.add_(rounded, change)
        moved = float((rounded.float() - 1.5).mean()) / float(200 * change[0, 0])
        assert moved == pytest.approx(1.0, abs=0.1 if kind == "stochastic" else 1e-3)  # 5 standard errors: 1.4 / 512 ** 0.5


def test_a_part_of_a_weight_is_rounded_as_in_the_whole():
    whole, change = numbers(torch.bfloat16), torch.randn(24, 40) * 1e-3
    expected = whole.clone()
    Rounding("stochastic", derive_seed(5)).add_(expected, change)
    for rows, columns in ((slice(7, 19), slice(0, 40)), (slice(0, 24), slice(11, 30))):
        part, own = whole[rows, columns].clone(), Rounding("stochastic", derive_seed(5))
        own.first = (rows.start, columns.start)
        own.add_(part, change[rows, columns])
        assert torch.equal(part, expected[rows, columns])


def test_random_numbers_are_uniform_and_independent():
    drawn = [Rounding("stochastic", derive_seed(seed))._uniform(torch.zeros(400, 500), 0) for seed in (0, 1)]
    again = Rounding("stochastic", derive_seed(0))
    again.count = 1
    drawn.append(again._uniform(torch.zeros(400, 500), 0))
    for one in drawn:
        assert 0 <= float(one.min()) <= float(one.max()) < 1
        counts = torch.histc(one, 64, 0, 1)
        assert float((counts - 3125).square().sum() / 3125) < 120  # chi squared of 63 degrees: 120 has odds of 1e-5
    pairs = [(drawn[0], drawn[1]), (drawn[0], drawn[2]), (drawn[0][1:], drawn[0][:-1]), (drawn[0][:, 1:], drawn[0][:, :-1])]
    for a, b in pairs:
        assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 0.012  # 5 / 2e5 ** 0.5


def test_codes_of_eight_bits():
    matrix = torch.randn(24, 40, generator=torch.Generator().manual_seed(1))
    scales = matrix.abs().amax(1, keepdim=True)
    steps = matrix * FULL / scales
    total, draws = torch.zeros_like(matrix), 400
    for seed in range(draws):
        codes = torch.empty(24, 40, dtype=torch.int8)
        Rounding("stochastic", derive_seed(seed)).encode_(codes, matrix, scales)
        assert bool(((codes - steps).abs() < 1 + 1e-4).all())  # the product rounds too
        total += codes
    assert bool(((total / draws - steps).abs() <= 5 * 0.5 / draws**0.5 + 1e-4).all())
    kept, codes = Rounding("compensated", 0), torch.empty(24, 40, dtype=torch.int8)
    kept.encode_(codes, matrix, scales)
    found = codes * scales / FULL + kept.kept(scales)
    assert bool(((found - matrix).abs() <= scales / FULL / FINE).all())


def half_model(dtype=torch.bfloat16):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 8))
    return model.to(dtype)


def batches(steps, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(24, 64, generator=generator).to(dtype), torch.randint(0, 8, (24,), generator=generator))
        for _ in range(steps)
    ]


RULES = {"0": "svd(rank=4, every=3)", "2": "power(rank=4, every=3)", "*": "none"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_to_the_bit(kind, mode):
    data = batches(9)
    make = lambda model: MODES[mode](model, RULES, lr=1e-3, weight_decay=0.1, rounding=kind)  # noqa: E731
    model = half_model()
    optimizer = make(model)
    go(model, optimizer, data[:5])
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    go(model, optimizer, data[5:])
    other = half_model()
    resumed = make(other)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    go(other, resumed, data[5:])
    resumed.detach(), optimizer.detach()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_barely_move_follow_those_of_float32(kind):
    """At a rate at which rounding to the nearest keeps most weights where they are, the mean move is that of float32."""
    found = {}
    for name in ("nearest", kind, "float32"):
        dtype = torch.float32 if name == "float32" else torch.bfloat16
        model = half_model().to(dtype)  # the same numbers in both
        before = model[0].weight.detach().double()
        options = {} if name in ("nearest", "float32") else {"rounding": name}
        optimizer = lingrad.wrap(model, {"0": "svd(rank=4, every=3)", "*": "none"}, lr=1e-5, weight_decay=1.0, **options)
        go(model, optimizer, batches(40, dtype))
        kept = optimizer.state_dict()["state"][0].get("subspace.rounding.error", torch.zeros(())).double()
        gaps = 2.0 ** (model[0].weight.detach().float().abs().log2().floor() - 7)  # between neighbours
        found[name] = model[0].weight.detach().double() - before + kept * gaps / FINER
    exact = found["float32"]
    along = {name: float((one * exact).sum() / exact.square().sum()) for name, one in found.items()}
    assert along["nearest"] < 0.3
    assert along[kind] == pytest.approx(1.0, abs=0.2)  # bfloat16 gradients differ by some per cent


def test_strides_that_allow_no_view():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 4)).to(torch.bfloat16)
    model = model.to(memory_format=torch.channels_last)
    optimizer = lingrad.wrap(model, {"0": "svd(rank=2)", "*": "none"}, lr=1e-4, weight_decay=0.1, rounding="compensated")
    before = model[0].weight.detach().clone()
    for _ in range(30):
        optimizer.zero_grad()
        model(torch.randn(2, 4, 8, 8).to(torch.bfloat16)).sum().backward()
        optimizer.step()
    assert bool((model[0].weight != before).any())


class TestInEightBits:
    def model(self):
        torch.manual_seed(0)
        return nn.Sequential(
            layer("int8", 64, 128), nn.Tanh(), layer("int8", 128, 64, bias=False), nn.Tanh(), nn.Linear(64, 8)
        ).to("cpu")

    @pytest.mark.parametrize("kind", KINDS)
    def test_optimizer_mode_trains(self, kind):
        model = self.model()
        optimizer = lingrad.wrap(model, {"0": "svd(rank=8, every=5)", "2": "svd(rank=8)", "*": "none"}, lr=3e-3, rounding=kind)
        x, y = batches(1, torch.float32)[0]
        losses = []
        for _ in range(40):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
        assert losses[-1] < losses[0] / 2
        assert model[0].weight.dtype == torch.int8

    def test_small_steps_arrive(self):
        """Steps of a hundredth of a code; adapter mode would keep them in its coordinates."""
        along = {}
        for kind in KINDS:
            model, twin = self.model(), half_model(torch.float32)
            start = model[0].weight.data.float() * model[0].weight.SCB[:, None] / FULL
            twin[0].weight.data.copy_(start)
            optimizer = lingrad.wrap(model, {"0": "random(rank=8, every=0)", "*": "frozen"}, lr=1e-5, rounding=kind)
            other = lingrad.wrap(twin, {"0": "random(rank=8, every=0)", "*": "frozen"}, lr=1e-5)
            for _ in range(60):
                for run in (optimizer, other):
                    for param in run.param_groups[0]["params"]:
                        param.grad = torch.ones_like(param)
                    run.step()
            exact = twin[0].weight.detach() - start
            kept = optimizer.state_dict()["state"][0].get("subspace.rounding.error", torch.zeros(()))
            moved = (model[0].weight.data.float() + kept / FINE) * model[0].weight.SCB[:, None] / FULL - start
            along[kind] = float((moved * exact).sum() / exact.square().sum())
        assert along["compensated"] == pytest.approx(1.0, abs=0.3)
        assert along["stochastic"] == pytest.approx(1.0, abs=0.5)

    @pytest.mark.parametrize("kind", KINDS)
    def test_resumed_to_the_bit(self, kind):
        data = batches(6, torch.float32)
        make = lambda model: lingrad.wrap(model, {"0": "svd(rank=4, every=3)", "*": "none"}, lr=1e-3, rounding=kind)  # noqa: E731
        model = self.model()
        optimizer = make(model)
        go(model, optimizer, data[:4])
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        go(model, optimizer, data[4:])
        other = self.model()
        resumed = make(other)
        other.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
        go(other, resumed, data[4:])
        assert torch.equal(model[0].weight, other[0].weight)
        assert torch.equal(model[0].state.SCB, other[0].state.SCB)

    def test_to_the_nearest_is_refused_in_optimizer_mode(self):
        with pytest.raises(ModeError, match="Or round in another way: rounding='stochastic' or 'compensated'"):
            lingrad.wrap(self.model(), RULES, lr=1e-3)

    def test_four_bits_have_no_other_rounding(self):
        model = nn.Sequential(layer("nf4", 64, 64), nn.Linear(64, 8)).to("cpu")
        with pytest.raises(ModeError, match="is stored as nf4, which is rounded to the nearest code only"):
            lingrad.adapt(model, {"0": "svd(rank=4)", "*": "none"}, lr=1e-3, rounding="stochastic")


@pytest.mark.parametrize("mode", MODES)
def test_what_is_kept_is_counted(mode):
    options = {"mode": mode, "lr": 1e-3}
    build = lambda: half_model()  # noqa: E731
    loss = lambda model: model(torch.zeros(8, 64, dtype=torch.bfloat16, device=model[0].weight.device)).sum()  # noqa: E731
    rules = {"0": "svd(rank=4)", "2": "svd(rank=4)", "*": "none"}
    found = {}
    for kind in ("nearest", *KINDS):
        run = memory.simulate(build, rules, "adamw", loss=loss, device="cpu", rounding=kind, steps=3, **options)
        closed = memory.estimate(build(), rules, "adamw", rounding=kind, **options)
        assert run.steady_breakdown["moments"] == closed.totals["moments"]
        found[kind] = closed.totals["moments"]
    assert found["stochastic"] == found["nearest"]
    assert found["compensated"] == found["nearest"] + 2 * 2 * 64 * 128


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounding": "random"}, "rounding must be one of nearest, stochastic, compensated"),
        ({"rounding": "stochastic", "merge": "fast"}, "merge='fast' rounds S z"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(SpecError, match=message):
        lingrad.wrap(half_model(), RULES, lr=1e-3, **options)


def test_no_effect_in_float32():
    with pytest.raises(SpecError, match="is for weights in 16 or 8 bits, and none that is transformed is"):
        lingrad.wrap(half_model(torch.float32), RULES, lr=1e-3, rounding="stochastic")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entries: entries.update({"subspace.rounding.count": -1}), "rounding.count' of 0.weight is -1"),
        (lambda entries: entries.pop("subspace.rounding.count"), "has no 'subspace.rounding.count'"),
        (lambda entries: entries.pop("subspace.rounding.error"), "has no 'subspace.rounding.error'"),
        (lambda entries: entries.update({"subspace.rounding.error": torch.zeros(3)}), "rounding.error' of 0.weight is float32"),
    ],
)
def test_a_damaged_checkpoint(change, message):
    model = half_model()
    optimizer = lingrad.wrap(model, RULES, lr=1e-3, rounding="compensated")
    go(model, optimizer, batches(2))
    state = copy.deepcopy(optimizer.state_dict())
    change(state["state"][0])
    with pytest.raises(CheckpointError, match=message):
        optimizer.load_state_dict(state)


def test_a_checkpoint_from_before_there_was_rounding():
    model = half_model()
    optimizer = lingrad.wrap(model, RULES, lr=1e-3)
    go(model, optimizer, batches(2))
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        del group["rounding"], group["residual"]
    optimizer.load_state_dict(state)
    with pytest.raises(CheckpointError, match="the checkpoint has rounding 'nearest', this run has 'stochastic'"):
        lingrad.wrap(half_model(), RULES, lr=1e-3, rounding="stochastic").load_state_dict(state)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_is_cast_to_float32_goes_on(kind, mode):
    model = half_model()
    optimizer = MODES[mode](model, RULES, lr=1e-3, rounding=kind)
    go(model, optimizer, batches(2))
    model.to(torch.float32)
    before = model[0].weight.detach().clone()
    go(model, optimizer, batches(4, torch.float32))
    optimizer.detach()
    assert bool(model[0].weight.isfinite().all())
    assert bool((model[0].weight != before).any())
