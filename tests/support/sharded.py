"""Runs of a small Llama that fully_shard has cut, and of the same one in one process."""

from torch.distributed.fsdp import fully_shard

from tests.support.models import llama, text_batches, text_loss
from tests.support.runs import MODES

STEPS, EVERY = 9, 3


def shard(model, **options):
    for layer in model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def weights_of(optimizer):
    return {name: full(weight.detach()).clone() for name, weight in optimizer.weights().items()}


def train(spec, mode, options, clipped, rank=0, world=1, *, model=None, steps=STEPS, switches=True, base="adamw"):
    """Micro-batches, a schedule, a decay, a clip and a switch; the weights and the norms."""
    if model is None:
        model = llama()
        if world > 1:
            shard(model)
    # eps: S^T G of both-sided singular vectors is diagonal but for rounding, which Adam divides by rounding plus eps
    given = {"lr": 1e-2, "weight_decay": 0.1, **({"eps": 1e-4} if base == "adamw" else {}), **options}
    rules = spec.replace("every=7", f"every={EVERY}") if isinstance(spec, str) else spec
    optimizer = MODES[mode](model, rules, base, **given)
    norms = []
    for step, micro_batches in enumerate(text_batches(steps, micro=2, rows=6)):
        if switches and step == steps - 4:
            optimizer.switch("adapter" if optimizer.mode == "optimizer" else "optimizer")
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / (2 * steps))
        optimizer.zero_grad()
        for batch in micro_batches:
            (text_loss(model, batch.chunk(world)[rank]) / 2).backward()
        if clipped:
            norms.append(full(optimizer.clip_grad_norm_(0.5)))
        optimizer.step()
    return weights_of(optimizer), norms
