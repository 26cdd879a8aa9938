"""Layers of torch, wrapped and plain, on the inputs of torch's own tests: whatever a caller can see of a forward is the same.

Before a step a wrapped layer is compared with itself unwrapped; after three steps with a plain layer that holds its effective
weights. Not compared: ``output._version`` and whether an output is a view of a buffer that no one else holds, which differ by
how a layer computes; that an operation in place on the output works is a test of its own.
"""

import contextlib
import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import lingrad
from lingrad.errors import LingradError, ModeError
from tests.support.runs import MODES, each_mode
from tests.support.torch_inputs import MODULES

RULES = {"*": "svd(rank=2, every=2, clip=true)"}
# W + S z summed once, or as two products: in float64 they part by rounding, 1e-16 times the length of a sum.
TOLERANCE = 1e-12
# bfloat16 under autocast rounds to 2**-8, S z and W x each; values are of the order of 1 to 4.
AUTOCAST = 2**-8 * 8

# Layers whose parameters are vectors only, or that have none: nothing of them is transformed.
NOTHING_TO_TRANSFORM = ("BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm", "PReLU", "LinearCrossEntropyLoss")
TRANSFORMED = {
    *("Linear", "Bilinear", "Embedding", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"),
    *("MultiheadAttention", "Transformer", "TransformerEncoder", "TransformerEncoderLayer", "TransformerDecoderLayer"),
    *("RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"),
}
DEFAULT = {"Linear", "Embedding", "Conv1d", "MultiheadAttention", "LSTMCell"}
LAZY = {f"LazyConv{transposed}{n}d" for transposed in ("", "Transpose") for n in (1, 2, 3)}

INPUTS = (
    "as given",
    "not contiguous",
    "expanded",
    "empty",
    "too wide",
    "float32",
    "a number",
    "a vector",
    "without a gradient",
)
CONTEXTS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}
CALLS = ("twice", "checkpoint", "checkpoint, reentrant", "functional_call")


def given(info, training=True):
    torch.manual_seed(0)
    inputs = info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=True, training=training)
    return [each for each in inputs if each.forward_input is not None]


def cases():
    """By default the first input of one layer of each kind, in training."""
    for info in MODULES:
        name = info.module_cls.__name__
        if name in TRANSFORMED:
            for training in (True, False):
                every = given(info, training)
                for i, each in list(enumerate(every))[:: max(1, len(every) // 3)]:
                    default = i == 0 and training and name in DEFAULT
                    marks = () if default else pytest.mark.slow
                    words = f"{name}-{'train' if training else 'eval'}-{i}"
                    yield pytest.param(info.module_cls, each, training, id=words, marks=marks)


def changed(arguments, kind):
    """The arguments of a forward as leaves of their own, changed in one way."""

    def change(x):
        if not isinstance(x, torch.Tensor):
            return x
        found = x.detach().clone()
        if kind == "empty" and x.dim() >= 2:
            found = found[:0]
        if not x.is_floating_point():
            return found
        if kind == "not contiguous" and x.dim() >= 2:
            found = found.transpose(0, -1).contiguous().transpose(0, -1)
        elif kind == "expanded" and x.dim() >= 2 and len(x):
            found = found[:1].expand_as(found)
        elif kind == "too wide" and x.dim():
            found = torch.ones(*x.shape[:-1], x.shape[-1] + 1, dtype=x.dtype)
        elif kind == "float32":
            found = found.float()
        elif kind == "a number":
            found = found.new_zeros(())
        elif kind == "a vector" and x.dim():
            found = found.reshape(-1)[: x.shape[-1]].clone()
        return found if kind == "without a gradient" else found.requires_grad_()

    return pytree.tree_map(change, arguments)


def called(module, how, args, kwargs):
    def call(*args):
        return module(*args, **kwargs)

    if how == "functional_call":
        return torch.func.functional_call(module, dict(module.named_parameters()), args, kwargs)
    if how.startswith("checkpoint"):
        return checkpoint(call, *args, use_reentrant="reentrant" in how)
    if how == "twice":
        call(*args)
    return call(*args)


def tensors(tree):
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def facts(x, inputs):
    """What can be seen of a tensor besides its values."""
    shared = [
        i
        for i, other in enumerate(inputs)
        if x.numel() and x.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    ]
    plain = (type(x), x.dtype, tuple(x.shape), x.stride(), x.storage_offset(), x.is_inference())
    return (*plain, x.requires_grad, x.is_leaf, shared)


def observed(module, given, exclude, *, kind="as given", context=contextlib.nullcontext, how="once"):
    """What a caller sees of one forward and its backward: facts, and values."""
    args, kwargs = changed((given.forward_input.args, given.forward_input.kwargs), kind)
    inputs = tensors((args, kwargs))
    torch.manual_seed(1)  # dropout
    module.zero_grad()
    try:
        with context():
            out = called(module, how, args, kwargs)
    except Exception as error:  # whatever torch raises is to be raised
        return {"error": type(error)}, {}
    outputs = tensors(out)
    seen = {"structure": pytree.tree_structure(out), "outputs": [facts(x, inputs) for x in outputs]}
    values = {f"output {i}": x.detach().clone() for i, x in enumerate(outputs)}
    total = [(x * torch.linspace(1, 2, x.numel(), dtype=x.dtype).view(x.shape)).sum() for x in outputs if x.requires_grad]
    if total:
        sum(total).backward()
        grads = {f"input {i}": x.grad for i, x in enumerate(inputs) if x.is_leaf}
        params = module.named_parameters()
        grads |= {name: p.grad for name, p in params if name not in exclude and not name.endswith((".coords", ".original"))}
        seen["grads"] = {name: None if x is None else facts(x, ()) for name, x in grads.items()}
        values |= {f"grad of {name}": x for name, x in grads.items() if x is not None}
    seen["versions"] = [None if x.is_inference() else x._version for x in inputs]
    return seen, values


def assert_alike(plain, wrapped, given, exclude, *, bits, tolerance=TOLERANCE, **how):
    expected, values = observed(plain, given, exclude, **how)
    seen, found = observed(wrapped, given, exclude, **how)
    assert seen == expected, how
    assert found.keys() == values.keys()
    for name, value in values.items():
        if bits and name.startswith("output"):
            assert torch.equal(found[name].nan_to_num(), value.nan_to_num()), (name, how)
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, equal_nan=True, msg=f"{name} {how}")


def made(layer, given, training=True):
    torch.manual_seed(0)
    return layer(*given.constructor_input.args, **given.constructor_input.kwargs).double().train(training)


def compared(layer, given, training, mode):
    """The plain layer, the wrapped one and its transformed weights; before a step, then after three."""
    plain, wrapped = made(layer, given, training), made(layer, given, training)
    optimizer = MODES[mode](wrapped, RULES, "sgd", lr=1e-2)
    transformed = {sub.name for sub in optimizer.subspaces}
    assert transformed
    yield plain, wrapped, transformed
    for _ in range(3):
        assert "error" not in observed(wrapped, given, transformed)[0]
        optimizer.step()
    optimizer.zero_grad()
    plain.load_state_dict({**plain.state_dict(), **optimizer.weights()})
    assert mode == "optimizer" or any(sub.coords.any() for sub in optimizer.subspaces)
    yield plain, wrapped, transformed


@pytest.mark.rare(4)
@pytest.mark.parametrize(("layer", "given", "training"), list(cases()))
@each_mode
@pytest.mark.filterwarnings("ignore")  # of torch, about its inputs
def test_a_wrapped_layer_is_to_its_caller_the_plain_one(layer, given, training, mode):
    for plain, wrapped, transformed in compared(layer, given, training, mode):
        same = {"bits": mode == "optimizer"}
        for kind in INPUTS:
            assert_alike(plain, wrapped, given, transformed, kind=kind, **same)
        for name, context in CONTEXTS.items():
            wider = {"bits": False, "tolerance": AUTOCAST} if name == "autocast" and mode == "adapter" else same
            assert_alike(plain, wrapped, given, transformed, context=context, **wider)
        for how in CALLS:
            assert_alike(plain, wrapped, given, transformed, how=how, **same)


def test_every_layer_with_a_matrix_has_a_case():
    found = set()
    for info in MODULES:
        name = info.module_cls.__name__
        if name.startswith(NOTHING_TO_TRANSFORM) or name in TRANSFORMED | LAZY:
            continue
        for each in given(info)[:1]:
            if any(p.dim() >= 2 for p in made(info.module_cls, each).parameters()):
                found.add(name)
    assert found == set()


@each_mode
def test_lazy_layers_are_refused_before_they_have_a_shape(mode):
    for lazy in (nn.LazyLinear(3), nn.LazyConv1d(3, 1), nn.LazyConvTranspose2d(3, 1)):
        with pytest.raises(LingradError):
            MODES[mode](nn.Sequential(nn.Linear(2, 2), lazy), RULES)


def bag(options, ids, *rest):
    torch.manual_seed(0)
    return nn.EmbeddingBag(7, 4, **options).double(), (ids, *rest)


@pytest.mark.parametrize("options", [{}, {"mode": "sum"}, {"mode": "max"}, {"padding_idx": 1}], ids=str)
@each_mode
def test_bags_of_embeddings(options, mode):
    ids, offsets = torch.tensor([0, 1, 2, 6, 1, 1]), torch.tensor([0, 2, 2])
    plain, arguments = bag(options, ids, offsets)
    wrapped, _ = bag(options, ids, offsets)
    optimizer = MODES[mode](wrapped, RULES, "sgd", lr=1e-2)
    assert torch.equal(wrapped(*arguments), plain(*arguments))
    for _ in range(3):
        wrapped(*arguments).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    plain.load_state_dict(optimizer.weights())
    torch.testing.assert_close(wrapped(*arguments), plain(*arguments), rtol=0, atol=TOLERANCE)
    assert facts(wrapped(*arguments), arguments) == facts(plain(*arguments), arguments)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.conv, self.last = nn.Linear(4, 6), nn.Conv1d(3, 3, 1), nn.Linear(6, 2, bias=False)

    def forward(self, x):
        return self.last(self.conv(self.first(x)).tanh())


def net(mode, rules=RULES):
    plain, wrapped = Net().double(), Net().double()
    return plain, wrapped, MODES[mode](wrapped, rules, lr=1e-2), torch.randn(2, 3, 4, dtype=torch.float64)


@each_mode
@pytest.mark.parametrize("shape", [(4,), (5, 4), (2, 3, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_an_output_may_be_changed_in_place(shape, bias, mode):
    grads = []
    for wrap in (lambda m: None, lambda m: MODES[mode](m, RULES)):
        torch.manual_seed(0)
        layer = nn.Linear(4, 6, bias=bias).double()
        kept = wrap(layer)
        x = torch.ones(shape, dtype=torch.float64, requires_grad=True)
        out = layer(x)
        out.mul_(2)[..., 0].add_(1)
        out.square().sum().backward()
        grads.append((out.detach(), x.grad, kept))
    for one, other in zip(grads[0][:2], grads[1][:2], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE)


@each_mode
def test_hooks_of_modules_are_called_as_in_torch(mode):
    calls = []
    for model in net(mode)[:2]:
        own = []
        for name, module in ((n, m) for n, m in model.named_modules() if "lingrad" not in n and "parametrizations" not in n):
            shapes = lambda given: [tuple(x.shape) for x in tensors(given)]  # noqa: E731
            module.register_forward_pre_hook(lambda _, a, n=name, s=shapes, o=own: o.append((n, "pre", s(a))))
            module.register_forward_hook(lambda _, a, out, n=name, s=shapes, o=own: o.append((n, "post", s(a), s(out))))
            module.register_full_backward_pre_hook(lambda _, g, n=name, s=shapes, o=own: o.append((n, "back", s(g))))
            module.register_full_backward_hook(lambda _, a, g, n=name, s=shapes, o=own: o.append((n, "done", s(a), s(g))))
        model(torch.ones(2, 3, 4, dtype=torch.float64, requires_grad=True)).sum().backward()
        calls.append(own)
    assert calls[0] == calls[1]
    assert {call[1] for call in calls[0]} == {"pre", "post", "back", "done"}


TRANSFORMS = {
    "vmap": lambda m, x: torch.func.vmap(m)(x),
    "grad": lambda m, x: torch.func.grad(lambda x: m(x).sum())(x),
    "jacrev": lambda m, x: torch.func.jacrev(m)(x),
    "jvp": lambda m, x: torch.func.jvp(m, (x,), (x,))[1],
    "hessian": lambda m, x: torch.func.hessian(lambda x: m(x).sum())(x),
}


@each_mode
@pytest.mark.parametrize("rules", [RULES, {"conv": "svd(rank=2)", "*": "none"}], ids=["linear", "others"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_torch_func_are_right_or_refused_in_words(name, rules, mode):
    plain, model, optimizer, x = net(mode, rules)
    try:
        found = TRANSFORMS[name](model, x)
    except ModeError as error:
        assert "torch.func" in str(error)  # noqa: PT017 - or right
        optimizer.detach()
        found = TRANSFORMS[name](model, x)
    else:
        assert mode == "optimizer"
        assert rules is not RULES
    torch.testing.assert_close(found, TRANSFORMS[name](plain, x), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("rules", ["svd(rank=2)", {"*": "svd(rank=2, side=left)"}], ids=str)
@each_mode
def test_jit_trace_is_right_or_refused_in_words(rules, mode):
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Conv1d(4, 4, 2), nn.Linear(4, 3)).double()
    MODES[mode](model, rules, lr=1e-2)
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    with pytest.raises(ModeError, match=r"torch.jit.trace cannot go .* opt.detach\(\)"):
        torch.jit.trace(model, x)
    if mode == "optimizer":
        with torch.no_grad():
            assert torch.equal(torch.jit.trace(model, x)(x), model(x))


def test_in_optimizer_mode_vmap_is_right_without_gradients():
    plain, model, _, x = net("optimizer")
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(model)(x), torch.func.vmap(plain)(x), rtol=0, atol=TOLERANCE)


@each_mode
@pytest.mark.slow
def test_what_is_compiled_is_the_plain_model(mode):
    plain, model, _, x = net(mode)
    torch.compiler.reset()
    assert torch.equal(torch.compile(model, backend="eager")(x), plain(x))


@each_mode
@pytest.mark.slow
def test_an_exported_program_is_the_plain_one(mode):
    plain, model, _, x = net(mode)
    exported = torch.export.export(model.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), plain.eval()(x), rtol=0, atol=TOLERANCE)


@each_mode
def test_a_copy_of_a_model_is_for_evaluation_and_a_pickle_is_one_or_refused(mode):
    plain, model, _, x = net(mode)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(x), plain(x))
        try:
            again = pickle.loads(pickle.dumps(model))  # noqa: S301 - our own bytes
        except RuntimeError as error:
            assert "parametrized" in str(error)  # noqa: PT017 - torch's words on parametrizations
        else:
            assert torch.equal(again(x), plain(x))
    with pytest.raises(ModeError, match="copy of a wrapped model"):
        lingrad.wrap(copy.deepcopy(model), RULES)
