"""Against Fira's own program, fira 1.0.2: ``residual="scaled"`` reproduces it.

Tolerance 1e-6: it adds 1e-8 to the norm that the growth is limited by, and lingrad does not. Its Adam runs without bias
correction, which it leaves out of that norm; lingrad limits the whole step, as the paper has it. Its SVD is taken in float64:
a basis rounded to float32 is orthonormal to 1e-7 only, and lingrad's residual is orthogonal to its columns in any case.
"""

import warnings

import pytest
import torch

import lingrad
from tests.support.models import gap, llama, text_batches, train

fira = pytest.importorskip("fira", reason="make test installs it (extra: peers)", exc_type=ImportError)
pytestmark = pytest.mark.peers


class UncorrectedAdam(torch.optim.Optimizer):
    """Adam without bias correction."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state.update(mean=torch.zeros_like(param), square=torch.zeros_like(param))
                state["mean"].lerp_(param.grad, 1 - group["betas"][0])
                state["square"].mul_(group["betas"][1]).addcmul_(param.grad, param.grad, value=1 - group["betas"][1])
                param.addcdiv_(state["mean"], state["square"].sqrt() + group["eps"], value=-group["lr"])


def leading(self, matrix, rank, type):  # noqa: A002 - its own name
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return vh[:rank] if type == "right" else u[:, :rank]


@pytest.mark.parametrize(("projection", "side"), [("std", "short"), ("left", "left"), ("right", "right")])
def test_same_trajectory(projection, side, monkeypatch):
    """30 steps, refresh every 7, micro-batches, cosine schedule."""
    monkeypatch.setattr(fira.gradient_projection.GradientProjector, "get_orthogonal_matrix", leading)
    batches = text_batches(30)
    model = llama()
    chosen = [param for name, param in model.named_parameters() if "proj" in name]
    rest = [param for name, param in model.named_parameters() if "proj" not in name]
    own = {"rank": 4, "update_proj_gap": 7, "alpha": 1.0, "proj_type": projection}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its AdamW announces its own deprecation
        theirs = fira.FiraAdamW([{"params": rest}, {"params": chosen, **own}], lr=1e-2, correct_bias=False)
    train(model, theirs, batches)
    expected = dict(model.named_parameters())
    found = {}
    for rule in ("scaled", None):
        model = llama()
        rules = {"*proj*": f"svd(rank=4, every=7, side={side}, align=false)", "*": "none"}
        optimizer = lingrad.wrap(model, rules, UncorrectedAdam, lr=1e-2, residual=rule)
        train(model, optimizer, batches)
        found[rule] = gap(optimizer.weights(), expected)
    assert found["scaled"] <= 1e-6
    assert found[None] > 1e-3
