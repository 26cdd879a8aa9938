"""Products with fused experts: the projected backward gives what the projected gradient of the plain weight is."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lingrad.adapters.experts import ExpertsReader
from lingrad.adapters.grouped import Rows
from lingrad.errors import ModeError
from tests.support.runs import MODES, each_mode

EXPERTS, TOKENS, WIDE, HIGH = 4, 24, 12, 16  # rows of 16 bytes in float32, as grouped products want them
# float64; sums in another order part by 1e-16, and Adam divides what is near zero by its eps, 1e-8, of a step of 1e-2
TOLERANCE = 1e-10


def one_by_one(x, who, weight, turned):
    out = x.new_zeros(len(x), HIGH)
    for expert in who.unique():  # tensors, as transformers has them
        chosen = who == expert
        mine = x[chosen] @ weight[expert] if turned else functional.linear(x[chosen], weight[expert])
        out = out.index_put((chosen.nonzero()[:, 0],), mine)
    return out


def by_iteration(x, who, weight, turned):
    parts = [(x * (who == e)[:, None]) @ (one if turned else one.mT) for e, one in enumerate(weight)]
    return torch.stack(parts).sum(0)


def by_matmul(x, who, weight, turned):
    parts = [
        torch.matmul(x * (who == e % EXPERTS)[:, None], weight[e] if turned else weight[e].t()) for e in range(-EXPERTS, 0)
    ]
    return torch.stack(parts).sum(0)


def in_batches(x, who, weight, turned):
    rows = torch.stack([x * (who == e)[:, None] for e in range(EXPERTS)])
    return torch.bmm(rows, weight if turned else weight.transpose(1, 2)).sum(0)


def grouped(x, who, weight, turned):
    order = who.argsort(stable=True)
    ends = torch.bincount(who, minlength=EXPERTS).cumsum(0).to(torch.int32)
    found = functional.grouped_mm(x[order], weight if turned else weight.transpose(-2, -1), offs=ends)
    return found[order.argsort()]


def gathered(x, who, weight, turned):
    """Not known: the weight itself, one matrix for each token."""
    chosen = weight[who]
    return torch.bmm(x[:, None], chosen if turned else chosen.mT)[:, 0]


KNOWN = {
    "one by one": one_by_one,
    "by iteration": by_iteration,
    "by matmul": by_matmul,
    "in batches": in_batches,
    "grouped": grouped,
}
PRODUCTS = KNOWN | {"gathered": gathered}


class Fused(nn.Module):
    """A layer of experts; the last one gets no token."""

    def __init__(self, how, turned):
        super().__init__()
        torch.manual_seed(0)
        self.num_experts, self.how, self.turned = EXPERTS, how, turned
        self.inner = nn.Linear(WIDE, WIDE)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDE, HIGH) if turned else torch.randn(EXPERTS, HIGH, WIDE))
        self.double()

    def forward(self, x, who):
        return PRODUCTS[self.how](torch.tanh(self.inner(x)), who, self.up, self.turned)


class Two(nn.Module):
    """One after the other."""

    def __init__(self, how):
        super().__init__()
        self.first, self.second = Fused(how, False), Fused(how, False)

    def forward(self, x, who):
        return self.second(self.first(x, who)[:, :WIDE].contiguous(), who)


def batch(step, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(TOKENS, WIDE, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, EXPERTS - 1, (TOKENS,), generator=generator)


def built(how, turned, mode, each="svd(rank=2, every=3)", dtype=torch.float64):
    model = Fused(how, turned).to(dtype)
    return model, MODES[mode](model, each, "adamw", lr=1e-2)


def of_experts(opt):
    return next(sub for sub in opt.subspaces if sub.name == "up")


def train(model, opt, steps=range(7)):
    for step in steps:
        opt.zero_grad()
        model(*batch(step, model.inner.weight.dtype)).square().mean().backward()
        opt.step()
    return opt.weights()


@pytest.fixture
def plain(monkeypatch):
    """Runs something without the projected backward: the oracle."""

    def run(what):
        with monkeypatch.context() as patch:
            patch.setattr(ExpertsReader, "read", ExpertsReader.plain)
            return what()

    return run


def far(one, other):
    return max(float((one[name] - other[name]).abs().max().detach()) for name in other)


class Sizes(TorchDispatchMode):
    """Remembers the shapes of all tensors that operations return, but of views of one."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.shapes = weight.untyped_storage().data_ptr(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.untyped_storage().data_ptr() != self.weight:
            self.shapes.add(tuple(found.shape))
        return found


EACH = (
    "svd(rank=2, every=3, side=left)",
    "svd(rank=2, every=3, side=right)",
    "svd(rank=2, every=3, side=both)",
    "pca(rank=2)",
    "random(rank=2, every=3, store=false)",
    "random(rank=2, every=3, kind=rows)",  # its maps are no dense bases: as by the plain weight
)


@pytest.mark.thinned(4)
@each_mode
@pytest.mark.parametrize("each", EACH)
@pytest.mark.parametrize("turned", [False, True], ids=["x W^T", "x W"])
@pytest.mark.parametrize("how", sorted(PRODUCTS.keys() - {"grouped"}))
def test_trains_as_by_the_plain_weight(plain, how, turned, each, mode):
    expected = plain(lambda: train(*built(how, turned, mode, each)))
    assert far(train(*built(how, turned, mode, each)), expected) < TOLERANCE


@each_mode
@pytest.mark.parametrize("turned", [False, True], ids=["x W^T", "x W"])
def test_grouped_products_train_as_by_the_plain_weight(plain, turned, mode):
    """In float32, the widest that torch's grouped product takes: two steps, before roundings grow."""

    def run():
        model, opt = built("grouped", turned, mode, dtype=torch.float32)
        return train(model, opt, range(2))

    expected = plain(run)
    assert far(run(), expected) < 1e-5  # of steps of 1e-2


@each_mode
@pytest.mark.parametrize("how", sorted(KNOWN))
def test_no_gradient_of_the_weight_exists(how, mode):
    """But in steps that refresh."""
    model, opt = built(how, False, mode, dtype=torch.float32)
    train(model, opt, range(1))
    opt.zero_grad()
    loss = model(*batch(1, torch.float32)).square().mean()
    with Sizes(of_experts(opt).weight.param) as sizes:
        loss.backward()
    assert not {(EXPERTS, HIGH, WIDE), (EXPERTS * HIGH, WIDE), (HIGH, WIDE), (WIDE, HIGH)} & sizes.shapes
    assert of_experts(opt).coords.grad.any()


@each_mode
@pytest.mark.parametrize("how", ["one by one", "grouped"])
def test_a_layer_is_done_in_its_turn_in_every_backward(how, mode):
    """Not when all others are: a layerwise run steps it then, and ranks average in one order."""
    model, turns = Two(how).float(), []
    opt = MODES[mode](model, "svd(rank=2, every=3)", lr=1e-2)
    for sub in opt.subspaces:
        sub.coords.register_post_accumulate_grad_hook(lambda _, name=sub.name: turns.append(name))
    for step in range(3):
        turns.clear()
        opt.zero_grad()
        model(*batch(step, torch.float32)).square().mean().backward()
        opt.step()
        assert turns == ["second.up", "second.inner.weight", "first.up", "first.inner.weight"]


@each_mode
@pytest.mark.parametrize("how", ["one by one", "in batches"])
def test_what_else_meets_the_weight_is_added(plain, how, mode):
    """A penalty on the weight, next to its products; micro-batches; a part of the batch computed again in the backward."""

    def run():
        model, opt = built(how, False, mode)
        for step in range(5):
            opt.zero_grad()
            for part in (2 * step, 2 * step + 1):
                x, who = batch(part)
                loss = checkpoint(model, x, who, use_reentrant=False).square().mean() + model(x, who).sum() * 1e-2
                (loss + 1e-3 * model.up.square().sum()).backward()
            opt.step()
        return opt.weights()

    expected = plain(run)
    assert far(run(), expected) < TOLERANCE


class Product(torch.autograd.Function):
    """What a kernel of another program is: torch asks nobody before it runs."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.mT

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.mT @ x


@torch.jit.script
def scripted(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight.t()


OTHERS = {
    "a kernel, of one": lambda x, w: Product.apply(x, w[1]),
    "a kernel, of all": lambda x, w: Product.apply(x[None].expand(EXPERTS, -1, -1), w).sum(0),
    "a kernel, turned": lambda x, w: Product.apply(x, w[1].mT.contiguous().mT),
    "a script": lambda x, w: scripted(x, w[1]),
    "vmap over experts": lambda x, w: torch.vmap(lambda one: x @ one.t())(w).sum(0),
    "vmap over rows": lambda x, w: torch.vmap(lambda row: w[1] @ row)(x),
    "a reentrant checkpoint": lambda x, w: checkpoint(lambda a: a @ w[1].t(), x, use_reentrant=True),
    "scores without gradients": lambda x, w: (scores(x, w), x @ w[1].t())[1],
    "names": lambda x, w: torch.matmul(input=x, other=torch.transpose(input=w, dim0=1, dim1=2)[0]),
    "names of linear": lambda x, w: functional.linear(input=x, weight=w[2], bias=None),
    "one row": lambda x, w: torch.stack([row @ w[0].t() for row in x]),
    "einsum": lambda x, w: torch.einsum("tn,emn->tm", x, w),
    "a mask": lambda x, w: x @ w[torch.tensor(1, dtype=torch.uint8)][0].sum(0).t(),
}


def scores(x, weight):
    with torch.no_grad():
        return x @ weight[1].t()


@each_mode
@pytest.mark.parametrize("name", OTHERS)
def test_whatever_a_program_does_with_the_weight(plain, monkeypatch, name, mode):
    """Right, whether it is known, asked by torch or not."""
    monkeypatch.setitem(PRODUCTS, "other", lambda x, who, weight, turned: OTHERS[name](x, weight))
    try:
        expected = plain(lambda: train(*built("other", False, mode)))
    except ModeError:
        expected = None  # torch.func over a sum is refused in words
    if expected is None:
        with pytest.raises(ModeError, match="torch.func"):
            train(*built("other", False, mode))
    else:
        assert far(train(*built("other", False, mode)), expected) < TOLERANCE


@each_mode
def test_hooks_and_gradients_of_the_weight(plain, mode):
    """A hook of another program is called, and a gradient that is assigned is stepped, as by the plain weight."""

    def run():
        model, opt = built("one by one", False, mode)
        train(model, opt, range(2))
        if mode == "optimizer":
            model.up.register_hook(lambda grad: grad * 0.5)
        train(model, opt, range(2, 4))
        opt.zero_grad()
        model.up.grad = torch.ones_like(model.up)
        opt.step()
        model.up.data = model.up.detach() * 0.5
        return train(model, opt, range(5, 7))

    expected = plain(run)
    assert far(run(), expected) < TOLERANCE


def test_a_forward_may_keep_what_it_reads():
    model, opt = built("one by one", False, "optimizer")
    count = len(list(model.parameters()))
    model.kept, model.one = model.up, model.up[1]
    assert len(list(model.parameters())) == count
    assert torch.equal(copy.deepcopy(model.up), opt.weights()["up"])
    assert type(copy.deepcopy(model.up)) is nn.Parameter
    with pytest.raises(IndexError):
        model.up.transpose(1, 5)


@each_mode
def test_resumes_to_the_bit(mode):
    whole, opt = built("one by one", False, mode)
    train(whole, opt)
    first, half = built("one by one", False, mode)
    train(first, half, range(4))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": half.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second, rest = built("one by one", False, mode)
    second.load_state_dict(saved["model"])
    rest.load_state_dict(saved["optimizer"])
    train(second, rest, range(4, 7))
    assert far(rest.weights(), opt.weights()) == 0


@each_mode
def test_is_a_parameter_to_other_readers(mode):
    model, opt = built("one by one", False, mode)
    train(model, opt)
    weight, now = model.up, opt.weights()["up"].clone()
    assert isinstance(weight, nn.Parameter) == (mode == "adapter")  # in optimizer mode, an alias of one
    assert weight.shape == now.shape
    assert weight.dtype == now.dtype
    assert weight.size(0) == len(weight) == EXPERTS
    assert weight.requires_grad
    assert torch.equal(weight.detach() + 0, now)
    assert torch.equal(weight[1].detach() + 0, now[1])
    assert torch.equal(weight[:2].detach() + 0, now[:2])
    assert torch.equal(torch.stack([one.sum() for one in weight]).detach(), torch.stack([one.sum() for one in now]))
    assert torch.equal(copy.deepcopy(model).up.detach() + 0, now)
    with torch.no_grad():
        weight.mul_(2)
    assert torch.equal(opt.weights()["up"], 2 * now)
    opt.detach()
    assert type(model.up) is nn.Parameter
    assert type(model) is Fused


@each_mode
def test_a_basis_that_was_refreshed_before_the_backward_is_told(mode):
    model, opt = built("one by one", False, mode, each="svd(rank=2, every=1)")
    late = model(*batch(0)).square().mean()
    train(model, opt, range(2))
    opt.zero_grad()
    with pytest.raises(ModeError, match="refreshed between this forward and its backward"):
        late.backward()


def test_of_one_kernel_as_row_by_row(monkeypatch):
    """What runs on CUDA in bfloat16 is there on the CPU too."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    ends = torch.tensor([5, 5, 16], dtype=torch.int32)
    x, y, sides = drawn(16, 8), drawn(16, 24), drawn(3, 8, 16)
    expected = Rows(ends).times(x, sides), Rows(ends).outer(x, y, 3)
    monkeypatch.setattr(Rows, "_on_device", lambda self, *factors: True)
    found = Rows(ends).times(x, sides), Rows(ends).outer(x, y, 3)
    for one, other in zip(found, expected, strict=True):
        # one rounding of bfloat16, 2**-8, of sums up to 10
        assert torch.allclose(one.float(), other.float(), rtol=2**-7, atol=2**-4)
