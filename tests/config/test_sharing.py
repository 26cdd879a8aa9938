"""share="input": layers that read one input have one right basis, chosen for all their gradients, and save one x @ Q."""

import copy

import pytest
import torch
from torch import nn

import lingrad
from lingrad import memory
from lingrad.config.explain import explain
from lingrad.config.sharing import FAMILIES, group_targets
from lingrad.config.targets import resolve_model
from lingrad.errors import CheckpointError, SpecError
from lingrad.gradients.local import DenseGradient
from lingrad.testing.oracles import assert_dual
from tests.support.models import gap, llama, text_batches, text_loss, train
from tests.support.runs import MODES, each_mode

SPECS = (
    "svd(rank=4, every=3)",
    "svd(rank=4, every=3, solver=gram, side=right)",
    "svd(rank=4, every=3, solver=randomized)",
    "power(rank=4, every=3)",
    "pca(rank=4)",
    "random(rank=4, every=3)",
    "random(rank=4, every=3, kind=rows)",
    "random(rank=4, every=3, store=false)",
    "svd(rank=4, every=3, choice=sigma)",
    "rows(rank=4, every=3)",
    "dct(rank=4, every=3, store=false)",
    "switch(rank=4, every=3, after=4)",
    "weight(rank=4, every=3)",
)
LAYERS = 2


class Attention(nn.Module):
    """Three layers on one input, or the first on another, as in cross-attention."""

    def __init__(self, crossed=False):
        super().__init__()
        torch.manual_seed(0)
        self.crossed = crossed
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(12, 9), nn.Linear(12, 5), nn.Linear(12, 7)
        self.double()

    def forward(self, x):
        q = self.q_proj(x.flip(0) if self.crossed else x)
        return q.sum(1) + self.k_proj(x).square().sum(1) + self.v_proj(x).tanh().sum(1)


def inputs(seed=1, rows=50):
    return torch.randn(rows, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.thinned(6)
@pytest.mark.parametrize("base", ["adamw", "sgd"])
@pytest.mark.parametrize("carry", ["keep", "reset", "rotate"])
@pytest.mark.parametrize("text", SPECS)
def test_the_modes_agree(text, carry, base):
    if base == "sgd" and carry != "keep":
        text = text.replace("every=3", "every=2")
    assert_dual(
        {"*_proj": text},
        base,
        build=llama,
        batches=text_batches(7),
        loss=text_loss,
        share="input",
        carry=carry,
        stagger=base == "sgd",
    )


@each_mode
@pytest.mark.parametrize("crossed", [False, True])
@pytest.mark.parametrize("text", SPECS[:3])
def test_the_basis_is_that_of_the_stacked_gradient(mode, text, crossed):
    """As if the three weights were one [21, 12]: also where one of them reads another input."""
    model = Attention(crossed)
    optimizer = MODES[mode](model, {"*_proj": text}, "sgd", lr=0.1, share="input")
    lead, *others = optimizer.subspaces
    assert all(sub.map() is lead.map() for sub in others)
    assert lead.map().left is None
    for step in range(4):
        optimizer.zero_grad()
        plain = Attention(crossed)
        plain.load_state_dict(optimizer.weights())
        for seed in range(2):
            model(inputs(10 * step + seed)).sum().backward()
            plain(inputs(10 * step + seed)).sum().backward()
        grads = [plain.get_parameter(sub.name).grad for sub in optimizer.subspaces]
        before, due, when = lead.basis.state, lead.basis.due, lead.basis.when
        optimizer.step()
        assert due == (step % 3 == 0)
        if due:
            assert when.shape == (21, 12)
            expected = lead.basis.transform.refresh(before, DenseGradient(torch.cat(grads)), when)
            torch.testing.assert_close(lead.basis.state.right, expected.right, rtol=0, atol=1e-9)
        if lead.basis.transform.reads == "gradient" or not due:
            for sub, grad in zip(optimizer.subspaces, grads, strict=True):
                torch.testing.assert_close(sub.coords.grad, grad @ lead.basis.state.right, rtol=0, atol=1e-9)
    assert {sub.basis.refreshes for sub in optimizer.subspaces} == {2}


@each_mode
def test_one_reduced_input_is_saved_for_all_and_none_is_kept_beyond(mode):
    model = llama()
    optimizer = MODES[mode](model, "svd(rank=4)", lr=1e-2, share="input")
    ids = text_batches(1, micro=1)[0][0]
    text_loss(model, ids).backward()
    optimizer.step()
    optimizer.zero_grad()
    saved = {}

    def pack(tensor):
        if tensor.dim() and tensor.shape[-1] == 4 and tensor.numel() == 4 * ids.numel():
            saved.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        text_loss(model, ids)
    # q, k, v save one; gate and up one; o one; down has a left basis and saves its input
    assert sorted(len(tensors) for tensors in saved.values()) == [1, 1, 2, 2, 3, 3]
    shared = [attachment.layer.shared for attachment in optimizer.attachments]
    assert any(one is not None for one in shared)
    assert all(one._last is None for one in shared if one is not None)


@each_mode
def test_an_input_changed_in_place_or_used_again_is_reduced_again(mode):
    """Buffers that their owner fills again, a layer used twice, evaluation without gradients in between."""
    model, plain = Attention(), Attention()
    optimizer = MODES[mode](model, {"*_proj": "random(rank=4)"}, "sgd", lr=0.1, share="input")
    x = inputs()
    for seed in range(3):
        optimizer.zero_grad()
        plain.load_state_dict(optimizer.weights())
        plain.zero_grad()
        with torch.no_grad():
            model(x)
        with torch.inference_mode():
            model(x)
        model.q_proj(x)  # k and v never ask for this one
        x.copy_(inputs(seed))
        for net in (model, plain):
            (net.k_proj(x).sum(1) + net(x)).sum().backward()
        for sub in optimizer.subspaces:
            expected = plain.get_parameter(sub.name).grad @ sub.map().right
            torch.testing.assert_close(sub.coords.grad, expected, rtol=1e-12, atol=1e-12)
        optimizer.step()


@each_mode
@pytest.mark.parametrize("missing", ["q_proj", "v_proj"])
@pytest.mark.parametrize("text", ["svd(rank=4, every=2)", "power(rank=4, every=2)"])
def test_a_layer_left_out_of_a_step_counts_as_zero(mode, missing, text):
    model = Attention()
    optimizer = MODES[mode](model, {"*_proj": text}, "sgd", lr=0.1, share="input", weight_decay=0.5)
    used = [getattr(model, name) for name in ("q_proj", "k_proj", "v_proj") if name != missing]
    still = optimizer.weights()[f"{missing}.weight"].clone()
    sum(layer(inputs()).square().sum() for layer in used).backward()
    optimizer.step()
    assert torch.equal(optimizer.weights()[f"{missing}.weight"], still)
    assert {sub.basis.refreshes for sub in optimizer.subspaces} == {1}
    optimizer.zero_grad()
    model(inputs()).sum().backward()
    optimizer.step()
    assert not torch.equal(optimizer.weights()[f"{missing}.weight"], still)


@each_mode
@pytest.mark.parametrize("text", ["svd(rank=4, every=3)", "power(rank=4, every=3)", "random(rank=4, every=3)"])
def test_it_resumes_to_the_bit_with_one_basis_in_the_file(mode, text):
    batches = text_batches(7)
    make = MODES[mode]

    def fresh():
        model = llama()
        return model, make(model, text, lr=1e-2, share="input")

    model, optimizer = fresh()
    train(model, optimizer, batches[:4], schedule=False)
    saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, batches[4:], schedule=False)
    holders = [entry for entry in saved["optimizer"]["state"].values() if any(".state." in key for key in entry)]
    assert len(holders) == 4 * LAYERS  # q, o, gate, down
    again, resumed = fresh()
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    lead, follower = resumed.subspaces[:2]
    assert follower.map() is lead.map()
    train(again, resumed, batches[4:], schedule=False)
    assert gap(resumed.weights(), optimizer.weights()) == 0
    with pytest.raises(CheckpointError, match="the checkpoint has share 'input', this run has None"):
        make(llama(), text, lr=1e-2).load_state_dict(saved["optimizer"])


@each_mode
def test_casts_copies_and_the_way_back(mode):
    model = llama(torch.float32)
    plain = copy.deepcopy(model)
    names = list(plain.state_dict())
    optimizer = MODES[mode](model, "svd(rank=4)", lr=1e-2, share="input")
    train(model, optimizer, text_batches(2))
    ids = text_batches(1)[0][0]
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(ids).logits, model(ids).logits)
    model.double()
    train(model, optimizer, text_batches(2))
    optimizer.switch("adapter" if mode == "optimizer" else "optimizer")
    train(model, optimizer, text_batches(2))
    optimizer.detach()
    assert list(model.state_dict()) == names


def test_estimated_and_simulated_memory_are_equal():
    ids = torch.zeros(3, 20, dtype=torch.int64)

    def build():
        return llama(torch.float32)

    def loss(model):
        return text_loss(model, ids.to(next(model.parameters()).device))

    for mode in MODES:
        for text in ("svd(rank=4)", "power(rank=4)", "pca(rank=4)", "random(rank=4)"):
            simulated = memory.simulate(build, text, "adamw", mode, loss=loss, share="input", device="cpu", dtype=torch.float32)
            with torch.device("meta"):
                shared = memory.estimate(build(), text, "adamw", mode, share="input")
            assert shared.totals == simulated.steady_breakdown
            apart = memory.estimate(build(), text, "adamw", mode)
            assert shared.totals["basis"] < apart.totals["basis"]


class TestGroups:
    def test_of_a_llama(self):
        found = group_targets(resolve_model(llama(), "svd(rank=4)").targets, "input")
        names = [[target.name.split(".")[-2] for target in place.group] for place in found if place.is_first]
        assert names == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]] * LAYERS
        assert all(len(place.group) == 1 for place in group_targets([place.target for place in found], None))

    def test_rules_that_differ_and_sides_that_cannot_share_stay_apart(self):
        rules = {"*.q_proj": "svd(rank=4)", "*.k_proj": "svd(rank=4)", "*.v_proj": "svd(rank=3)", "*": "svd(rank=4, side=left)"}
        linear = {key: value for key, value in rules.items() if key != "*"} | {"*_proj": rules["*"]}
        found = group_targets(resolve_model(llama(), linear).targets, "input")
        assert [len(place.group) for place in found if place.is_first] == [2, 1, 1, 1, 1, 1] * LAYERS

    def test_a_short_side_is_that_of_the_tall_weight(self):
        """k alone is 16 x 32, whose short side is the left; under q it is the right one."""
        apart = lingrad.wrap(llama(), "svd(rank=4)", lr=1e-2)
        together = lingrad.wrap(llama(), "svd(rank=4)", lr=1e-2, share="input")
        k = "model.layers.0.self_attn.k_proj.weight"
        shapes = [{s.name: tuple(s.coords.shape) for s in optimizer.subspaces}[k] for optimizer in (apart, together)]
        assert shapes == [(4, 32), (16, 4)]

    def test_explain_shows_it(self):
        text = str(explain(llama(), "svd(rank=4)", share="input"))
        assert text.count("that of q_proj") == 2
        assert text.count("that of gate_proj") == 1
        trained = sum(
            p.numel() for g in lingrad.wrap(llama(), "svd(rank=4)", lr=1e-2, share="input").param_groups for p in g["params"]
        )
        assert explain(llama(), "svd(rank=4)", share="input").trained == trained

    def test_every_family_is_of_distinct_names(self):
        names = [name for family in FAMILIES for name in family]
        assert len(names) == len(set(names))

    @pytest.mark.parametrize(
        "text", ["svd(rank=4, side=left)", "svd(rank=4, side=both)", "full()", "kron(left=svd(rank=4), right=svd(rank=4))"]
    )
    def test_nothing_to_share_is_an_error(self, text):
        with pytest.raises(SpecError, match="share='input' finds nothing to share"):
            lingrad.wrap(llama(), text, lr=1e-2, share="input")

    def test_options_that_cannot_be_meant(self):
        with pytest.raises(SpecError, match="share must be 'input' or None, not True"):
            lingrad.wrap(llama(), "svd(rank=4)", lr=1e-2, share=True)
        with pytest.raises(SpecError, match="layerwise=True takes one after the other"):
            lingrad.wrap(llama(), "svd(rank=4)", lr=1e-2, share="input", layerwise=True)
