"""8-bit moments: the quantiser against a dense oracle, every base in both modes, resumed, counted and reported."""

import io

import pytest
import torch
from torch import nn

import lingrad
from lingrad import memory, optimizers
from lingrad.config.settings import MOVES
from lingrad.errors import CheckpointError, DualityError, SpecError
from lingrad.optimizers import codes, eight_bit
from lingrad.optimizers.codes import PLAIN, code_book, dequantize, quantize
from lingrad.optimizers.eight_bit import QuantizedOptimizer
from lingrad.optimizers.moments import MomentKinds, moment_kinds
from lingrad.tensors import TensorSpec
from lingrad.testing.oracles import assert_dual
from lingrad.testing.training import every_kind, token_batches, token_loss
from tests.support import cases
from tests.support.models import gap, llama, text_batches, text_loss, train
from tests.support.runs import MODES, each_mode

pytestmark = pytest.mark.thinned(3)

KINDS = ("8bit", "8bit_linear")
SMALL = {"moments": "8bit", "min_8bit_size": 16}  # so that the moments of the tests' small coordinates are quantised too

each_kind = pytest.mark.parametrize("kind", KINDS)
each_sign = pytest.mark.parametrize("signed", [True, False])

# every base that has moments, as the matrix tries it
WITH_MOMENTS = [
    (name, options)
    for name, options in cases.base_options()
    if name != "adamw8bit" and not (name == "sgd" and "momentum" not in options)
]
each_base = pytest.mark.parametrize(("base", "options"), WITH_MOMENTS, ids=str)


def draw(*shape, signed=True, dtype=torch.float32, seed=0):
    """Numbers over seven decades, as moments are."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * 10 ** (-7 * torch.rand(shape, generator=generator))
    return (values if signed else values.square()).to(dtype)


@each_sign
def test_the_dynamic_book_is_that_of_bitsandbytes(signed):
    theirs = pytest.importorskip("bitsandbytes").functional.create_dynamic_map(signed=signed)
    ours = code_book("8bit", signed=signed).values
    assert len(ours.unique()) == 256
    assert torch.allclose(ours, theirs, rtol=2e-7, atol=0)  # theirs is computed in float32


@each_sign
@each_kind
def test_codes_are_the_nearest_of_the_book(kind, signed):
    values, book = draw(5, 200, signed=signed), code_book(kind, signed=signed)
    found, scales = quantize(values, book)
    blocks = nn.functional.pad(values.view(-1), (0, 24)).view(4, 256)
    assert torch.equal(scales, blocks.abs().amax(1))
    quotients = (blocks / scales[:, None]).view(-1)[:1000]
    far = (quotients[:, None] - book.values).abs()
    chosen = far[torch.arange(1000), found.view(-1).int()]
    floor = (quotients > 0) & (quotients < book.values[1]) if not signed else torch.zeros_like(quotients, dtype=torch.bool)
    assert torch.equal(chosen[~floor], far.min(1).values[~floor])
    assert floor.any() == (not signed)
    assert bool((found.view(-1)[floor] == 1).all())  # a square that is not zero does not become one: it divides
    assert torch.equal(dequantize(found, scales, book).view(-1), book.values[found.view(-1).int()] * blocks_of(scales)[:1000])


def blocks_of(scales):
    return scales.repeat_interleave(256)


@each_sign
@each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_numbers_come_back_in_their_dtype_and_stay_where_they_are(kind, signed, dtype):
    values, book = draw(3, 300, signed=signed, dtype=dtype), code_book(kind, signed=signed)
    coded, scales = quantize(values, book)
    found = dequantize(coded, scales, book)
    assert (coded.dtype, coded.shape, scales.dtype, found.dtype) == (torch.uint8, values.shape, dtype, dtype)
    # half of the widest gap between two values, in the book's own units: 0.9/64 of a decade with a sign, 1/127 where linear
    gap = 0.5 * (0.9 / 64 if kind == "8bit" else 1 / 127) + max(torch.finfo(t).eps for t in (dtype, torch.float32))
    assert ((found - values).view(-1).abs() <= gap * blocks_of(scales)[: values.numel()]).all()
    again, _ = quantize(found, book)
    if kind == "8bit_linear":  # the dynamic book has no -1, so a block's scale may shrink by 0.7 % once
        assert torch.equal(again, coded)


@each_kind
def test_a_block_has_nothing_to_do_with_another(kind):
    book = code_book(kind, signed=True)
    values = draw(4, 256)
    values[0], values[2, 7] = 0.0, float("nan")
    found = dequantize(*quantize(values, book), book)
    assert torch.equal(found[0], torch.zeros(256))
    assert found[2].isnan().all()
    clean = draw(4, 256)
    expected = dequantize(*quantize(clean, book), book)
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[3], expected[3])


@each_kind
def test_large_tensors_are_done_in_parts(kind, monkeypatch):
    values, book = draw(7, 333), code_book(kind, signed=True)
    whole = quantize(values, book)
    monkeypatch.setattr(codes, "BUCKET", 512)
    assert all(torch.equal(a, b) for a, b in zip(whole, quantize(values, book), strict=True))
    parts = dequantize(*whole, book)
    monkeypatch.undo()
    assert torch.equal(parts, dequantize(*whole, book))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_sign
@each_kind
def test_codes_are_the_same_on_a_gpu(kind, signed):
    values = draw(3000, 701, signed=signed)
    here = quantize(values, code_book(kind, signed=signed))
    book = code_book(kind, signed=signed, device="cuda")
    there = quantize(values.cuda(), book)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))
    assert torch.equal(dequantize(*here, code_book(kind, signed=signed)), dequantize(*there, book).cpu())


@each_base
def test_entries_are_bytes_with_scales_and_the_base_is_the_stock_one(base, options):
    found = optimizers.find(base, options | SMALL, decay=False)
    param = nn.Parameter(draw(20, 30))
    optimizer = found.build([param])
    assert isinstance(optimizer, QuantizedOptimizer)
    assert not type(optimizer.base).__module__.startswith("lingrad")
    for seed in range(3):
        param.grad = draw(20, 30, seed=seed)
        optimizer.step()
    plain = {key: value for key, value in found.quantizer.decode(optimizer.state[param]).items() if torch.is_tensor(value)}
    large = {key for key, value in plain.items() if value.numel() >= 16}
    assert large
    for key in large:
        assert optimizer.state[param][key].dtype == torch.uint8
        assert optimizer.state[param][key + ".scales"].numel() == -(-plain[key].numel() // 256)
    assert set(optimizer.state[param]) == set(plain) | {f"{key}.scales" for key in large} | {
        key for key, value in optimizer.state[param].items() if not torch.is_tensor(value)
    }
    assert not optimizer.base.state


@each_base
def test_a_step_is_that_of_the_stock_base_on_the_decoded_moments(base, options):
    found = optimizers.find(base, options | SMALL, decay=False)
    one, other = nn.Parameter(draw(20, 30)), nn.Parameter(draw(20, 30))
    optimizer, stock = found.build([one]), found.unquantised.build([other])
    for seed in range(4):
        one.grad, other.grad = draw(20, 30, seed=seed), draw(20, 30, seed=seed)
        optimizer.step()
        stock.step()
        assert torch.equal(one, other)
        stock.state[other] = found.quantizer.decode(found.quantizer.encode(stock.state[other]))


@each_base
def test_signs_are_told_by_trying(base, options):
    unsigned = optimizers.find(base, options | SMALL, decay=False).quantizer.unsigned
    squares = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_avg_sq_row", "exp_avg_sq_col"}
    kept = optimizers.find(base, options, decay=False).state_of(torch.zeros(20, 30))
    assert unsigned == {key for key in kept if key in squares}


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("base", "options"), [*WITH_MOMENTS, ("adamw", {"lr": 1e-2, "moments": "8bit_linear"})], ids=str)
def test_training_goes_as_with_moments_as_they_are(base, options):
    batches = text_batches(12, seed=2)[-1:] * 25
    options = options | {"lr": {"lion": 1e-3, "sgd": 0.3}.get(base, 1e-2)}
    ends = []
    for moments in ({}, SMALL | options):
        plain = {key: value for key, value in options.items() if key != "moments"}
        model = llama(torch.float32)
        ends.append(train(model, lingrad.wrap(model, "svd(rank=8, every=7)", base, **(plain | moments)), batches))
    start = float(text_loss(llama(torch.float32), batches[0][0])) / 3
    # measured: 0.1 to 3 % of the way; with squares that may round to zero, the linear book ends at 1e4
    assert abs(ends[1] - ends[0]) < 0.1 * (start - ends[0])


DUAL = cases.covering(
    [
        (text, side, carry, base)
        for text in (
            "svd(rank=4, every=3, side={side})",
            "power(rank=4, every=3, side={side})",
            "random(rank=4, every=3, side={side})",
        )
        for side in ("short", "left", "both")
        for carry in cases.CARRIES
        for base in range(len(WITH_MOMENTS))
        if carry not in MOVES or cases.rotates(*WITH_MOMENTS[base])
    ],
    2,
)


@pytest.mark.parametrize("case", DUAL, ids=lambda case: f"{case[0]}-{case[1]}-{case[2]}-{WITH_MOMENTS[case[3]]}")
def test_both_modes_agree_to_the_rounding_of_codes(case):
    text, side, carry, index = case
    base, options = WITH_MOMENTS[index]
    # as for adamw8bit: rounding that crosses an edge comes back as up to 1 % of an entry's step; lion and the both-sided
    # singular vectors as in tests/support/cases.py
    loose = base == "lion" and side == "both"
    assert_dual(
        text.format(side=side),
        base,
        batches=token_batches(7),
        tolerance=2e-2 if loose else 1e-2,
        carry=carry,
        **(options | SMALL),
    )


@each_kind
def test_rotated_moments_are_decoded_first(kind):
    """carry='rotate' of moments that are exact in codes is that of moments as they are."""
    options = {"lr": 1e-2, "moments": kind, "min_8bit_size": 16}
    assert moment_kinds(optimizers.find("adamw", options)).degrees == {"exp_avg": 1, "exp_avg_sq": 2}
    model = llama(torch.float32)
    optimizer = lingrad.wrap(model, "random(rank=8, every=4)", "adamw", carry="rotate", **options)
    batches = text_batches(4, micro=1)
    train(model, optimizer, batches[:3], schedule=False)
    sub = optimizer.subspaces[0]
    old, quantizer = sub.map(), optimizer.base_of("coords").quantizer
    train(model, optimizer, batches[3:], schedule=False)  # a random basis changes at the end of the step before
    before = quantizer.decode(optimizer.state[sub.coords])
    basis = sub.basis
    drawn = basis.transform.refresh(basis.state, None, basis.when._replace(step=basis.when.step + 4))
    new = basis.transform.map(drawn)
    moments = lingrad.engine.moments.Moments(
        optimizer._run.stepper.state[sub.coords],
        "rotate",
        MomentKinds({"exp_avg": 1, "exp_avg_sq": 2}, "step"),
        dict,
        dict,
        quantizer,
    )
    carried = moments.carried(old, new, sub.name, sub.coords.shape, sub.placed)
    assert torch.equal(carried["exp_avg"], new.transport(old, before["exp_avg"]))
    assert torch.equal(carried["exp_avg_sq"], new.transport_squares(old, before["exp_avg_sq"]))
    moments.replace(carried)
    again = quantizer.decode(quantizer.encode(carried))
    assert torch.equal(quantizer.decode(optimizer._run.stepper.state[sub.coords])["exp_avg"], again["exp_avg"])


@pytest.mark.thinned(3)
@each_mode
@each_base
def test_resuming_is_exact(base, options, mode):
    batches = text_batches(6, micro=1)

    def run():
        model = llama(torch.float32)
        return model, MODES[mode](model, "svd(rank=4, every=4)", base, weight_decay=0.1, **(options | SMALL))

    straight, optimizer = run()
    train(straight, optimizer, batches, schedule=False)
    first, optimizer = run()
    train(first, optimizer, batches[:3], schedule=False)
    buffer = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    resumed, optimizer = run()
    resumed.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(resumed, optimizer, batches[3:], schedule=False)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in straight.state_dict().items())


@pytest.mark.parametrize("layerwise", [False, True])
def test_parts_of_a_step_are_the_whole(layerwise, monkeypatch):
    """A step of one bucket for all parameters, of one for each, and inside the backward, are the same to the bit."""

    def run(layerwise):
        model = llama(torch.float32)
        optimizer = lingrad.wrap(model, "svd(rank=4, every=3)", lr=1e-2, weight_decay=0.1, layerwise=layerwise, **SMALL)
        train(model, optimizer, text_batches(5, micro=1))
        return model.state_dict()

    whole = run(layerwise=False)
    monkeypatch.setattr(eight_bit, "BUCKET", 256)
    parts = run(layerwise)
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_moments_are_decoded_a_bucket_at_a_time(monkeypatch):
    monkeypatch.setattr(eight_bit, "BUCKET", 4096)
    params = [nn.Parameter(draw(40, 50, seed=i)) for i in range(7)] + [nn.Parameter(draw(100, 90))]
    optimizer = optimizers.find("adamw", {"lr": 1e-2} | SMALL).build(params)
    seen = []
    step = optimizer.base.step
    monkeypatch.setattr(optimizer.base, "step", lambda: seen.append(len(optimizer.base.param_groups[0]["params"])) or step())
    for param in params[1:]:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert seen == [2, 2, 2, 1]


@pytest.mark.parametrize(("base", "options"), [*WITH_MOMENTS], ids=str)
@pytest.mark.parametrize("shape", [(64, 96), (7,), (300,), (3, 8, 40), ()])
def test_a_row_of_the_ledger_is_what_a_step_leaves(base, options, shape):
    found = optimizers.find(base, {**options, "moments": "8bit", "min_8bit_size": 256})
    if base == "muon" and len(shape) != 2:
        found = found.fallback
    with memory.kernels.as_on_cuda("flash", set()):
        kept = [t for t in found.state_of(torch.empty(shape, device="meta")).values() if torch.is_tensor(t) and t.is_meta]
    assert sorted(TensorSpec(tuple(t.shape), t.dtype).nbytes for t in kept) == sorted(
        row.nbytes for row in found.moments(shape, torch.float32)
    )


@pytest.mark.parametrize("layerwise", [False, True])
@each_mode
@pytest.mark.parametrize("base", ["adamw", "adafactor", "muon", "lion"])
def test_closed_forms_are_what_a_run_holds(base, mode, layerwise):
    def build():
        return every_kind(torch.float32)

    rules, options = {"head": "none", "*": "svd(rank=4)"}, {"lr": 1e-3, "moments": "8bit", "min_8bit_size": 8}

    def loss(model):
        return token_loss(model, torch.zeros(4, 5, dtype=torch.long, device="meta"))

    simulated = memory.simulate(build, rules, base, mode, loss=loss, layerwise=layerwise, **options)
    with torch.device("meta"):
        model = build()
    ledger = memory.estimate(model, rules, base, mode, layerwise=layerwise, **options)
    assert ledger.totals == simulated.steady_breakdown
    less = memory.estimate(model, rules, base, mode, layerwise=layerwise, lr=1e-3).totals["moments"]
    assert ledger.totals["moments"] < 0.6 * less


def test_a_checkpoint_with_moments_as_they_are_is_refused():
    saved = []
    for options in ({}, SMALL):
        model = llama(torch.float32)
        optimizer = lingrad.wrap(model, "svd(rank=4)", lr=1e-2, **options)
        train(model, optimizer, text_batches(1))
        saved.append((optimizer, optimizer.state_dict()))
    (plain, theirs), (small, ours) = saved
    with pytest.raises(CheckpointError, match=r"'exp_avg' of .* is float32 \(.*\) in the checkpoint, and uint8"):
        small.load_state_dict(theirs)
    with pytest.raises(CheckpointError, match=r"'exp_avg' of .* is uint8 \(.*\) in the checkpoint, and float32"):
        plain.load_state_dict(ours)


def test_a_model_that_is_cast_in_mid_run_goes_on():
    model = llama(torch.float32)
    optimizer = lingrad.wrap(model, "svd(rank=4, every=3)", lr=1e-3, **SMALL)
    train(model, optimizer, text_batches(2, micro=1), schedule=False)
    model.to(torch.bfloat16)
    train(model, optimizer, text_batches(2, micro=1), schedule=False)
    weight = model.model.embed_tokens.weight
    assert optimizer.state[weight]["exp_avg"].dtype == torch.uint8
    assert optimizer.state[weight]["exp_avg.scales"].dtype == torch.bfloat16
    assert all(param.isfinite().all() for param in model.parameters())


def test_a_state_that_is_there_before_the_first_step_is_quantised_too():
    model = llama(torch.float32)
    optimizer = lingrad.wrap(
        model, "svd(rank=4, every=2)", "adagrad", lr=1e-2, initial_accumulator_value=0.5, carry="reset", **SMALL
    )
    optimizer.base  # noqa: B018 - builds it
    coords = optimizer.subspaces[0].coords
    assert optimizer.state[coords]["sum"].dtype == torch.uint8
    assert optimizer.state[coords]["sum.scales"].unique().item() == 0.5
    train(model, optimizer, text_batches(3, micro=1))
    assert optimizer.state[coords]["sum"].dtype == torch.uint8


@pytest.mark.parametrize(
    ("base", "options", "message"),
    [
        ("adamw", {"moments": "4bit"}, r"moments must be one of 8bit, 8bit_linear, not '4bit'; did you mean '8bit'\?"),
        ("adamw", {"moments": "8bit", "min_8bit_size": 0}, "min_8bit_size must be a whole number, 2 or more, not 0"),
        ("adamw", {"min_8bit_size": 64}, "min_8bit_size is an option of moments='8bit', which is not set"),
        ("sgd", {"moments": "8bit"}, "base 'sgd' has no moments with these options; leave moments='8bit' out"),
        ("adamw8bit", {"moments": "8bit"}, "base 'adamw8bit' stores 'state1, state2' in 8 bits already; leave moments out"),
        (torch.optim.LBFGS, {"moments": "8bit"}, r"base 'LBFGS' cannot be used: its step\(\), without a closure, failed with"),
    ],
)
def test_wrong_options(base, options, message):
    with pytest.raises(SpecError, match=message):
        lingrad.wrap(llama(), "svd(rank=4)", base, lr=1e-2, **options)


class Counting(torch.optim.SGD):
    """Keeps a counter for all parameters in its param group."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1
        return super().step(closure)


def test_a_base_that_keeps_something_for_all_parameters_is_refused():
    with pytest.raises(
        SpecError, match="moments='8bit' steps parameters separately, but base 'Counting' has one 'steps' for all"
    ):
        lingrad.wrap(llama(), "svd(rank=4)", Counting, lr=1e-2, momentum=0.9, **SMALL)


def test_carry_rotate_is_still_refused_where_a_moment_cannot_be_rotated():
    with pytest.raises(DualityError, match="cannot rotate the state 'exp_avg_sq_row' of base 'adafactor'"):
        lingrad.wrap(llama(), "svd(rank=4)", "adafactor", carry="rotate", **SMALL)


@pytest.mark.parametrize("base", ["adamw", "muon"])
def test_a_compiled_step_compiles_the_coding(base):
    """Encoding and decoding are one graph each for whole blocks of 256, and one each for others; codes stay the same."""
    from torch._dynamo.utils import counters

    weights, states = [], []
    for compiled in (False, True):
        torch.compiler.reset()
        counters.clear()
        model = llama(torch.float32)
        optimizer = lingrad.wrap(model, "svd(rank=4, every=3)", base, lr=1e-2, moments="8bit", min_8bit_size=64)
        if compiled:
            optimizer.compile_step(backend="aot_eager", fullgraph=True)
        train(model, optimizer, text_batches(5))
        weights.append(optimizer.weights())
        states.append([t for t, kind in optimizer.held() if kind == "moments"])
        assert (0 < counters["stats"]["unique_graphs"] <= 4) == compiled
    assert gap(*weights) == 0
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    assert any(t.dtype == torch.uint8 for t in states[1])


@pytest.mark.slow
@each_sign
@each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_compiled_code_has_the_same_codes(kind, signed, dtype):
    torch.compiler.reset()
    book, coding = code_book(kind, signed=signed), PLAIN.compiled({})
    for size in (64, 256, 257, 4096, 70_001):
        values = draw(1, size, signed=signed, dtype=dtype)
        expected = quantize(values, book)
        assert all(torch.equal(a, b) for a, b in zip(expected, quantize(values, book, coding), strict=True))
        assert torch.equal(dequantize(*expected, book), dequantize(*expected, book, coding))


class TestReport:
    @pytest.mark.parametrize(
        ("base", "options"), [("adamw", {"moments": "8bit"}), ("adamw8bit", {}), ("adamw", {}), ("muon", {"moments": "8bit"})]
    )
    def test_what_is_expected_is_what_comes(self, base, options):
        model = llama(torch.float32, hidden_size=64, intermediate_size=128, num_key_value_heads=4)
        optimizer = lingrad.wrap(model, "svd(rank=64)", base, lr=1e-3, **options)
        expected = memory.moments(optimizer)
        assert expected.expected
        train(model, optimizer, text_batches(1))
        found = memory.moments(optimizer)
        assert not found.expected
        assert [(m.name, m.numbers, m.bits, m.nbytes, m.why) for m in found.moments] == [
            (m.name, m.numbers, m.bits, m.nbytes, m.why) for m in expected.moments
        ]
        held = [t for t, kind in optimizer.held() if kind == "moments" and t.numel() > 1]
        assert found.nbytes == sum({t.data_ptr(): t.nbytes for t in held}.values())

    @pytest.mark.parametrize("base", ["adamw", "adamw8bit"])
    def test_it_says_which_stayed_and_why(self, base):
        model = llama(torch.float32, hidden_size=64, intermediate_size=128, num_key_value_heads=4)
        options = {"moments": "8bit"} if base == "adamw" else {}
        optimizer = lingrad.wrap(model, "svd(rank=64)", base, lr=1e-3, **options)
        train(model, optimizer, text_batches(1))
        report = memory.moments(optimizer)
        names = {name: p.dim() for name, p in llama().named_parameters()}
        # coordinates of rank 64, and the embedding and the head of 64 x 64
        assert {m.name for m in report.quantised} == {name for name, dims in names.items() if dims == 2}
        assert {m.name for m in report.others} == {name for name, dims in names.items() if dims == 1}
        assert {m.why for m in report.others} == {"fewer than 4,096 elements (min_8bit_size)"}
        assert {m.bits for m in report.others} == {32}
        text = str(report).splitlines()
        assert text[0].split() == ["bits", "moments", "elements", "bytes", "why", "not", "8", "bits"]
        assert text[2].endswith("fewer than 4,096 elements (min_8bit_size)")

    def test_a_base_as_it_is(self):
        model = llama(torch.float32)
        report = memory.moments(lingrad.wrap(model, "svd(rank=4)", "adamw", lr=1e-3))
        assert not report.quantised
        assert str(report).startswith("after the first step there will be")
        assert {m.why for m in report.others} == {"base 'adamw' does not quantise its moments"}
