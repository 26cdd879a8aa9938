"""Base optimizers of a few lines: those that read the parameter, each in another way, and those that only seem to."""

import torch
from torch.optim import SGD, Adam, RAdam


def params(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def of_each(step, base=SGD, name="base", **attributes):
    """A class whose step is that of another, after ``step(optimizer, parameter, its state)`` for every parameter."""

    @torch.no_grad()
    def both(self, closure=None):
        for p in params(self):
            step(self, p, self.state[p])
        return base.step(self, closure)

    def each(self, closure=None):
        return both(self, closure)

    return type(name, (base,), {"step": each, **attributes})


def instead(step, name="base"):
    """A class whose step is ``step(parameter, its state)`` for every parameter."""

    class Stepped(SGD):
        @torch.no_grad()
        def step(self, closure=None):
            for p in params(self):
                step(p, self.state[p])

    Stepped.__name__ = name
    return Stepped


def lookahead(every, base=Adam):
    """Every few steps it goes half of the way back to where it was then; with RAdam it is Ranger."""

    class Lookahead(base):
        def __init__(self, params, lr=1e-3):
            super().__init__(params, lr=lr)
            self.count, self.slow = 0, {}

        @torch.no_grad()
        def step(self, closure=None):
            for p in params(self):
                self.slow.setdefault(p, p.detach().clone())
            super().step(closure)
            self.count += 1
            if self.count % every == 0:
                for p in params(self):
                    self.slow[p].lerp_(p, 0.5)
                    p.copy_(self.slow[p])

    return Lookahead


class Slow(SGD):
    """A copy that is made when the optimizer is, and used after a thousand steps."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, lr=lr)
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]


def schedule_free(p, state):
    """The Road Less Scheduled: z is stepped, and the parameter is between z and the mean of what z was."""
    z = state.setdefault("z", torch.clone(p))
    state["count"] = state.get("count", 0) + 1
    p.lerp_(z, 1 / state["count"])
    p.add_(p.grad, alpha=-0.1)
    z.sub_(p.grad)


def silent_schedule_free(p, state):
    """As RAdamScheduleFree: the parameter is not moved in the first five steps."""
    state["count"] = state.get("count", 0) + 1
    if state["count"] > 5:
        schedule_free(p, state)


def prodigy(p, state):
    """The step size grows with the distance from the start."""
    start = state.setdefault("start", p.flatten().clone())
    p.sub_(p.grad * (1e-6 + (p.flatten() - start).norm()))


def lamb(p, state):
    ratio = torch.where(p.norm() > 0, p.norm() / p.grad.norm(), 1.0)
    p.add_(p.grad * ratio, alpha=-1)


def lars_now_and_then(p, state):
    state["count"] = state.get("count", 0) + 1
    p.sub_(p.grad * (p.norm() if state["count"] % 7 == 0 else 1))


def past_torch(p, state):
    p.sub_(p.grad * float(abs(p.numpy()).sum()))


def vectors_decay(p, state):
    if p.dim() < 2:
        p.mul_(0.9)
    p.sub_(p.grad)


def large_ones_decay(p, state):
    p.mul_(0.9 if p.numel() >= 4096 else 1.0).sub_(p.grad)


def small_ones_decay(p, state):
    p.mul_(0.9 if p.numel() < 4096 else 1.0).sub_(p.grad)


def norm_of_the_start(p, state):
    state.setdefault("norm", p.norm())
    p.sub_(p.grad)


def coupled_decay(p, state):
    buffer = state.setdefault("buffer", torch.zeros_like(p))
    buffer.mul_(0.9).add_(p.grad.add(p, alpha=1e-3))
    p.sub_(buffer)


def in_python(p, state):
    p.sub_(p.grad, alpha=max(1e-3, p.abs().max().item()))


def branches(p, state):
    if (p > 1e9).any():
        p.sub_(p.grad)
    p.sub_(p.grad)


def average(p, state):
    p.sub_(p.grad)
    state.setdefault("mean", torch.zeros_like(p)).lerp_(p, 0.1)


def listed_decay(p, state):
    torch._foreach_mul_([p], 0.99)
    torch._foreach_sub_([p], [p.grad])


def fused_decay(p, state):
    for key in ("mean", "square"):
        state.setdefault(key, torch.zeros_like(p))
    count = state.setdefault("count", torch.zeros((), dtype=torch.float32)).add_(1)
    torch._fused_adamw_(
        [p],
        [p.grad],
        [state["mean"]],
        [state["square"]],
        [],
        [count],
        lr=0.1,
        beta1=0.9,
        beta2=0.9,
        weight_decay=0.1,
        eps=1e-8,
        amsgrad=False,
        maximize=False,
    )


COPY, KEPT, COMPUTED, DECAY = (
    "it keeps a copy of the parameter",
    "it keeps values",
    "its update is computed from",
    "it multiplies",
)
SETS, PYTHON, DIFFERS = "it sets the parameter", "it reads values of the parameter in Python", "with equal gradients it differs"


# (name, class, what the message says)
def after_100(p, state):
    """A trust ratio once the warm-up is over."""
    state["step"] = state.get("step", 0) + 1
    ratio = p.norm() if state["step"] > 100 else 1.0
    p.sub_(p.grad * ratio)


def every_50(optimizer, p, state):
    optimizer.count = getattr(optimizer, "count", 0) + 1
    if optimizer.count % 50 == 0:
        p.mul_(0.99)


def counted_by_a_tensor(p, state):
    """As torch counts; the counter is read before it is raised."""
    step = state.setdefault("step", torch.zeros(()))
    if float(step) == 60:
        state["slow"] = p.clone()
    step += 1
    p.sub_(p.grad)


def counted_by_its_group(optimizer, p, state):
    group = optimizer.param_groups[0]
    group["k"] = group.get("k", 0) + 1
    if group["k"] % 20 == 0:
        p.clamp_(-1, 1)


def history(p, state):
    """A list with one entry for each step, which a counter that was moved forward does not fit."""
    state["step"] = state.get("step", 0) + 1
    state.setdefault("norms", []).append(p.grad.norm())
    p.sub_(p.grad / state["norms"][state["step"] - 1])


READERS = [
    ("after 100 steps", instead(after_100), COMPUTED + " the parameter (by norm)"),
    ("every 50 steps", of_each(every_50), DECAY + " the parameter by 0.99|" + COMPUTED),
    ("a copy at step 60", instead(counted_by_a_tensor), COPY + " (by clone)"),
    ("counted by its group", of_each(counted_by_its_group), COMPUTED + " the parameter (by clamp)"),
    *((f"lookahead {k}", lookahead(k), COPY + " (by clone)") for k in (2, 6, 50)),
    ("ranger", lookahead(6, RAdam), COPY + " (by clone)"),
    ("a copy for later", Slow, COPY + " (by clone)"),
    ("schedule-free", instead(schedule_free), COPY + " (by clone)|" + COMPUTED),
    ("silent schedule-free", instead(silent_schedule_free), DIFFERS + "|" + COPY),
    ("prodigy", instead(prodigy), COPY + "|" + COMPUTED),
    ("lamb", instead(lamb), COMPUTED + " the parameter (by norm)"),
    ("lars every 7 steps", instead(lars_now_and_then), DIFFERS + "|" + COMPUTED),
    ("numpy", instead(past_torch), DIFFERS),
    ("decay of vectors", instead(vectors_decay), DECAY + " the parameter by 0.9"),
    ("decay of the large", instead(large_ones_decay), DECAY),
    ("decay of the small", instead(small_ones_decay), DECAY),
    ("norm of the start", instead(norm_of_the_start), KEPT + " computed from the parameter (by norm)"),
    ("coupled decay", instead(coupled_decay), KEPT + " that contain the parameter (by add)|" + DECAY),
    ("item", instead(in_python), PYTHON + " (by abs)"),
    ("a branch", instead(branches), PYTHON),
    ("average of parameters", instead(average), KEPT + " that contain the parameter (by lerp)"),
    ("decay in a list", instead(listed_decay), DECAY + " the parameter by 0.99"),
    ("decay in a kernel", instead(fused_decay), COMPUTED),
    ("decay by data", instead(lambda p, s: setattr(p, "data", p.data * 0.9 - p.grad)), DECAY + " the parameter by 0.9"),
    ("set to the update", instead(lambda p, s: p.copy_(-p.grad)), SETS),
    ("set in part", instead(lambda p, s: p[:2].copy_(-p.grad[:2])), COMPUTED),
    ("permuted", instead(lambda p, s: p.copy_(p[torch.arange(len(p)).flip(0)])), SETS),
    ("clamped", instead(lambda p, s: p.sub_(p.grad).clamp_(-5, 5)), COMPUTED + " the parameter (by clamp)"),
    ("another's copy", of_each(lambda o, p, s: s.update(was=p + 1)), COPY + " (by add)"),
]


def written_back(p, state):
    copy = p.float() if p.dtype == torch.float32 else p.clone()
    copy.sub_(p.grad)
    p.copy_(copy)


def masked(p, state):
    mask = p.grad > 0
    p[mask] -= p.grad[mask]
    p.copy_(torch.where(mask, p * (1 - 0 * 0.1), p))


def in_rows(p, state):
    for row, gradient in zip(p, p.grad, strict=True):
        row.sub_(gradient)


def by_index(p, state):
    p.index_add_(0, torch.arange(len(p)), p.grad, alpha=-1)


def product(p, state):
    if p.dim() == 2:
        p.addmm_(p.grad @ p.grad.T, p.grad, alpha=-1e-3)
    else:
        p.sub_(p.grad)


def no_decay(p, state):
    p.mul_(1 - 0.1 * 0).sub_(p.grad.add(p, alpha=0.0)).lerp_(p.grad, 0.0).div_(1.0)


def difference(p, state):
    before = p.clone()
    p.sub_(p.grad)
    state["moved"] = p - before


def recorded(p, state):
    state["norm"] = p.norm()
    p.sub_(p.grad)


def lists(p, state):
    square = state.setdefault("square", torch.zeros_like(p))
    torch._foreach_mul_([square], 0.9)
    torch._foreach_addcmul_([square], [p.grad], [p.grad], 0.1)
    torch._foreach_mul_([p], torch.tensor(1.0, dtype=p.dtype))
    torch._foreach_addcdiv_([p], [p.grad], torch._foreach_sqrt([square]), [-0.1])
    torch._foreach_add_([p], torch._foreach_mul([p.grad], -1))
    torch._foreach_copy_([p], torch._foreach_add([p], [p.grad]))


def shapes(p, state):
    if "mean" not in state:
        state.update(
            mean=torch.zeros_like(p), noise=torch.empty_like(p).zero_(), one=p.new_ones(()), full=torch.full_like(p, 2.0)
        )
    assert [p.is_complex(), p.is_sparse, p.requires_grad] == [False, False, True]
    assert p.stride() == p.contiguous().stride()
    if torch.isnan(p.grad).any():
        return
    state["mean"].mul_(0.9).add_(p.grad)
    p.data.view(-1).add_(state["mean"].view(-1), alpha=-1)


# (name, class) of what touches the parameter in an allowed way
ADDERS = [
    ("a list of its steps", instead(history)),
    ("functional", instead(lambda p, s: setattr(p, "data", p.data - p.grad))),
    ("from the right", instead(lambda p, s: p.copy_(-(p.grad - p)))),
    *((step.__name__, instead(step)) for step in (written_back, masked, in_rows, by_index, product)),
    *((step.__name__, instead(step)) for step in (no_decay, difference, recorded, lists, shapes)),
]
