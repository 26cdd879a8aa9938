"""Adapters of which each row of a batch takes its own: what a layer computes, what trains, what is refused."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import lingrad
from lingrad.adapters import per_example
from lingrad.errors import ModeError, ShapeError, SpecError
from tests.support.models import gpt2, llama, text_loss
from tests.support.watch import Launches

ROOT = Path(__file__).parents[2]

# float64; each element is a sum of at most some hundred products, computed in two orders
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}

BASES = {
    "right": "random(rank=3, every=0, side=right)",
    "left": "random(rank=3, every=0, side=left)",
    "both": "weight(rank=3, side=both)",
    "columns": "random(rank=3, every=0, side=right, kind=rows)",
    "rows": "random(rank=3, every=0, side=left, kind=rows)",
    "entries": "random(rank=3, every=0, side=both, kind=rows)",
    "rows x right": "kron(left=random(rank=3, every=0, kind=rows), right=weight(rank=2))",
    "drawn at each use": "random(rank=3, every=0, store=false)",
    "none": "full()",
}

RULES = {  # of weights alone: of a run that trains alone, biases are frozen too
    "llama": {"*.q_proj.weight": BASES["right"], "*.down_proj.weight": BASES["left"], "*": "frozen"},
    "gpt2": {"*.c_attn.weight": BASES["left"], "*.c_fc.weight": BASES["both"], "*": "frozen"},
}
MODELS = {"llama": llama, "gpt2": gpt2}


def filled(adapters, seed=3):
    """The adapters with random coordinates."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for coords in adapters.parameters():
            coords.copy_(torch.randn(coords.shape, generator=generator, dtype=coords.dtype))
    return adapters


def drawn(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=dtype)


def layer(kind=nn.Linear):
    torch.manual_seed(1)
    return nn.ModuleDict({"fc": nn.Linear(7, 5) if kind is nn.Linear else kind(5, 7)}).double()


class TestALayer:
    @pytest.mark.parametrize("middle", [(), (4,), (2, 3)], ids=["rows", "tokens", "windows"])
    @pytest.mark.parametrize("basis", BASES.values(), ids=BASES)
    @pytest.mark.thinned(3)
    def test_each_row_has_the_output_of_its_own_weight(self, basis, middle):
        model = layer()
        plain = copy.deepcopy(model["fc"])
        adapters = filled(per_example(model, {"*": basis}, count=3))
        ids, x = torch.tensor([2, 0, -1, 2, 1]), drawn(5, *middle, 7)
        with adapters.choose(ids):
            out = model["fc"](x)
        (one,) = adapters._layers
        for i, k in enumerate(ids.tolist()):
            change = one.basis.map().lift(one.coords[k]) if k >= 0 else 0.0
            expected = x[i] @ (plain.weight + change).t() + plain.bias
            torch.testing.assert_close(out[i], expected, **TOLERANCE)
        assert torch.equal(out[2], plain(x)[2])  # a row without an adapter is the plain layer's to the bit

    def test_of_a_conv1d(self):
        from transformers.pytorch_utils import Conv1D

        model = layer(Conv1D)
        adapters = filled(per_example(model, {"*": BASES["both"]}, count=2))
        x = drawn(2, 3, 7)
        with adapters.choose(torch.tensor([1, 0])):
            out = model["fc"](x)
        for i, k in enumerate((1, 0)):
            weight = adapters.weights(k)["fc.weight"]  # [in, out]
            torch.testing.assert_close(out[i], x[i] @ weight + model["fc"].bias, **TOLERANCE)

    def test_in_bfloat16_coordinates_stay_wide(self):
        model = layer().to(torch.bfloat16)
        adapters = filled(per_example(model, {"*": BASES["right"]}, count=2))
        assert {coords.dtype for coords in adapters.parameters()} == {torch.float32}
        with adapters.choose(torch.tensor([0, -1])):
            out = model["fc"](drawn(2, 3, 7, dtype=torch.bfloat16))
        out.float().sum().backward()
        assert out.dtype == torch.bfloat16
        (coords,) = adapters.parameters()
        assert coords.grad.dtype == torch.float32
        assert bool(coords.grad[0].any())
        assert not bool(coords.grad[1].any())

    def test_under_autocast(self):
        model = layer().float()
        adapters = filled(per_example(model, {"*": BASES["left"]}, count=2))
        with adapters.choose(torch.tensor([0, 1])), torch.autocast("cpu", dtype=torch.bfloat16):
            assert model["fc"](drawn(2, 7, dtype=torch.float32)).dtype == torch.bfloat16

    @pytest.mark.parametrize("basis", [BASES["right"], BASES["left"]], ids=["right", "left"])
    def test_a_forward_is_one_batched_product_however_many_rows_and_adapters(self, basis):
        def launched(count, batch):
            model = layer()
            adapters = per_example(model, {"*": basis}, count=count)
            with adapters.choose(torch.arange(batch) % count), Launches() as launches:
                model["fc"](drawn(batch, 3, 7))
            return launches.names

        few, many = launched(2, 3), launched(64, 40)
        assert few == many
        assert sum(name in ("bmm", "baddbmm") for name in many) == 1


class TestAModel:
    @pytest.mark.parametrize("kind", MODELS)
    def test_a_mixed_batch_is_each_merged_model_on_its_rows(self, kind):
        model = MODELS[kind]()
        tokens = torch.randint(64, (5, 6), generator=torch.Generator().manual_seed(0))
        ids = torch.tensor([1, 0, 2, 1, 0])
        adapters = filled(per_example(model, RULES[kind], count=3))
        with adapters.choose(ids), torch.no_grad():
            mixed = model(tokens).logits
        for k in range(3):
            alone = MODELS[kind]()
            own = filled(per_example(alone, RULES[kind], count=3))
            expected = own.weights(k)
            own.merge(k)
            for name, weight in expected.items():
                torch.testing.assert_close(alone.get_parameter(name), weight, **TOLERANCE)
            with torch.no_grad():  # through two layers whose outputs are of the order of 1 to 10
                torch.testing.assert_close(mixed[ids == k], alone(tokens[ids == k]).logits, rtol=1e-11, atol=1e-11)

    @pytest.mark.parametrize("kind", MODELS)
    def test_training_in_mixed_batches_is_training_each_alone_with_sgd(self, kind):
        """A loss that is summed over rows, with plain SGD; each alone is a run of lingrad.adapt of the same rules and seed."""
        generator = torch.Generator().manual_seed(0)
        batches = [torch.randint(64, (6, 8), generator=generator) for _ in range(3)]
        # adapter 2 has no row in the second batch
        every = [torch.tensor(ids) for ids in ([0, 1, 2, 1, 0, -1], [1, 0, 0, 1, -1, 1], [2, 2, 0, 1, 0, 1])]
        model = MODELS[kind]()
        adapters = per_example(model, RULES[kind], count=3, seed=7)
        optimizer = torch.optim.SGD(adapters.parameters(), lr=0.3)
        for tokens, ids in zip(batches, every, strict=True):
            optimizer.zero_grad()
            with adapters.choose(ids):
                (text_loss(model, tokens) * len(tokens)).backward()
            optimizer.step()
        for k in range(3):
            alone = MODELS[kind]()
            run = lingrad.adapt(alone, RULES[kind], "sgd", lr=0.3, seed=7)
            for tokens, ids in zip(batches, every, strict=True):
                own = tokens[ids == k]
                if len(own):
                    run.zero_grad()
                    (text_loss(alone, own) * len(own)).backward()
                    run.step()
            found = dict(adapters.named_parameters())
            assert sorted(found) == sorted(sub.name for sub in run.subspaces)
            for sub in run.subspaces:
                assert float(sub.coords.detach().abs().max()) > 1e-4  # it has moved
                torch.testing.assert_close(found[sub.name][k], sub.coords, rtol=0, atol=1e-12)

    @pytest.mark.parametrize(("base", "moves"), [("SGD", False), ("Adam", True)])
    def test_an_adapter_without_rows_has_a_zero_gradient_that_moments_do_not_ignore(self, base, moves):
        model = layer()
        adapters = filled(per_example(model, {"*": BASES["right"]}, count=2))
        optimizer = getattr(torch.optim, base)(adapters.parameters(), lr=0.1)
        (coords,) = adapters.parameters()
        for ids in ([0, 1], [0, 0]):
            optimizer.zero_grad()
            before = coords.detach().clone()
            with adapters.choose(torch.tensor(ids)):
                model["fc"](drawn(2, 7)).square().sum().backward()
            optimizer.step()
            assert bool(coords.grad[1].any()) == (1 in ids)
        assert torch.equal(coords[1], before[1]) != moves

    def test_peft_loads_one_of_them(self, tmp_path):
        from peft import PeftModel

        adapters = filled(per_example(gpt2(), RULES["gpt2"], count=2))
        lingrad.peft.write_adapter(tmp_path, gpt2(), adapters.factors(1), {})
        merged = PeftModel.from_pretrained(gpt2(), tmp_path).merge_and_unload()
        for name, weight in adapters.weights(1).items():
            torch.testing.assert_close(merged.get_parameter(name), weight, **TOLERANCE)

    def test_the_state_is_loaded_whole_or_not_at_all(self):
        adapters = filled(per_example(gpt2(), RULES["gpt2"], count=2))
        state = {name: coords.clone() for name, coords in adapters.state_dict().items()}
        other = per_example(gpt2(), RULES["gpt2"], count=2)
        last = list(state)[-1]
        for wrong in ({**state, last: state[last][:1]}, {**state, "more": state[last]}, dict(list(state.items())[1:])):
            with pytest.raises(ShapeError, match="the coordinates of '.*' are .* in the state; expected "):
                other.load_state_dict(wrong)
        assert not any(coords.any() for coords in other.parameters())
        for rules, seed in ((RULES["gpt2"], 5), ("random(rank=2, every=0, kind=rademacher)", 0)):
            same_shapes = per_example(gpt2(), rules, count=2, seed=seed)
            with pytest.raises((ModeError, ShapeError), match="bases of other rules or of another seed|the coordinates of"):
                same_shapes.load_state_dict(state)
        other.load_state_dict(state)
        assert all(torch.equal(coords, state[name]) for name, coords in other.named_parameters())

    def test_the_model_is_given_back_as_it_was_found(self):
        model = gpt2()
        model.transformer.wte.requires_grad_(False)
        trained = [param.requires_grad for param in model.parameters()]
        values = {name: value.clone() for name, value in model.state_dict().items()}
        adapters = filled(per_example(model, RULES["gpt2"], count=2))
        assert not any(param.requires_grad for param in model.parameters())
        assert model.state_dict().keys() == values.keys()
        adapters.detach()
        adapters.detach()
        assert [param.requires_grad for param in model.parameters()] == trained
        assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
        assert not any(module._forward_hooks for module in model.modules())
        lingrad.wrap(model, "random(rank=2)", lr=1e-3).detach()
        for call in (lambda: adapters.merge(0), adapters.choose(torch.tensor([0])).__enter__):
            with pytest.raises(ModeError, match="merged into their model or detached from it; call per_example again"):
                call()

    def test_the_example_of_the_docs(self):
        section = (ROOT / "docs/peft.md").read_text().split("## An adapter for each row of a batch")[1]
        names = {}
        exec(compile(section.split("```python\n")[1].split("```")[0], "docs/peft.md", "exec"), names)  # noqa: S102 - our own text
        moved = [bool(coords.any()) for coords in names["adapters"].parameters()]
        assert moved == [True, True]

    def test_a_frozen_model_may_be_served(self):
        model = layer().requires_grad_(False)
        adapters = filled(per_example(model, BASES["right"], count=2))
        adapters.merge(1)
        assert not any(param.requires_grad for param in model.parameters())


class TestRefusals:
    @pytest.mark.parametrize(
        ("rules", "message"),
        [
            ("svd(rank=2, every=0)", "svd chooses the basis of fc.weight from a gradient, and a basis that several adapters"),
            ("power(rank=2)", "power chooses the basis of fc.weight from a gradient"),
            ("dct(rank=2)", "dct chooses the basis of fc.weight from a gradient"),
            ("random(rank=2, every=9)", "random changes the basis of fc.weight every 9 steps, and one that .* write every=0"),
            ({"*": "none"}, "no weight is to have adapters"),
            ({"nothing": "full()"}, "nothing"),
        ],
    )
    def test_bases_that_change_or_read_a_gradient(self, rules, message):
        model = layer()
        with pytest.raises(SpecError, match=message):
            per_example(model, rules, count=2)
        assert not model["fc"]._forward_hooks
        assert all(param.requires_grad for param in model.parameters())

    @pytest.mark.parametrize(
        "model",
        [nn.Sequential(nn.Conv1d(4, 4, 3)), nn.Sequential(nn.Embedding(9, 4)), nn.Sequential(nn.MultiheadAttention(4, 2))],
        ids=["convolution", "embedding", "attention"],
    )
    def test_other_layers(self, model):
        with pytest.raises(SpecError, match=r"is no weight of one nn.Linear or Conv1D .* leave it out by a rule: 'none'"):
            per_example(model, {"*": "random(rank=2, every=0)"}, count=2)

    @pytest.mark.parametrize("count", [0, -1, 1.0, True, None])
    def test_no_number_of_adapters(self, count):
        with pytest.raises(SpecError, match="count must be a whole number from 1, not "):
            per_example(layer(), BASES["right"], count=count)

    def test_no_model(self):
        with pytest.raises(SpecError, match="expected a model, not a list"):
            per_example([], BASES["right"], count=1)

    def test_a_model_that_is_wrapped(self):
        model = layer()
        opt = lingrad.wrap(model, "random(rank=2)", lr=1e-3)
        with pytest.raises(ModeError, match=r"'fc.weight' is wrapped already"):
            per_example(model, BASES["right"], count=1)
        opt.detach()
        per_example(model, BASES["right"], count=1)
        for again in (lambda: per_example(model, BASES["right"], count=1), lambda: lingrad.wrap(model, "svd(rank=2)", lr=1e-3)):
            with pytest.raises(ModeError, match=r"'fc.weight' is wrapped already"):
                again()

    def test_a_model_that_is_sharded(self, monkeypatch):
        from lingrad.adapters import batched

        monkeypatch.setattr(batched, "is_sharded", lambda param: param.dim() == 2)
        with pytest.raises(ModeError, match=r"'fc.weight' is sharded, and per-example adapters are for models that each"):
            per_example(layer(), BASES["right"], count=1)

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            ([0, 1], r"ids must be a tensor, int64 \[batch\], .* not \[0, 1\]"),
            (torch.tensor([0, 1], dtype=torch.int32), r"not torch.int32 \(2,\)"),
            (torch.tensor([[0], [1]]), r"not torch.int64 \(2, 1\)"),
            (torch.tensor([0, 2]), "ids are from 0 to 2; expected 0 to 1, or -1 for a row without an adapter"),
            (torch.tensor([-2, 1]), "ids are from -2 to 1"),
        ],
        ids=["list", "int32", "matrix", "high", "low"],
    )
    def test_wrong_ids(self, ids, message):
        adapters = per_example(layer(), BASES["right"], count=2)
        with pytest.raises(SpecError, match=message), adapters.choose(ids):
            raise AssertionError("not reached")

    def test_ids_of_another_length(self):
        model = layer()
        adapters = per_example(model, BASES["right"], count=2)
        message = r"fc.weight gets an input of shape \(3, 7\), and adapters were chosen for a batch of 2;"
        with pytest.raises(ShapeError, match=message), adapters.choose(torch.tensor([0, 1])):
            model["fc"](drawn(3, 7))

    def test_nothing_chosen(self):
        model = layer()
        adapters = per_example(model, BASES["right"], count=2)
        inner, outer = torch.tensor([0]), torch.tensor([1, 1])
        with adapters.choose(outer):
            with adapters.choose(inner):
                model["fc"](drawn(1, 7))
            model["fc"](drawn(2, 7))  # the outer choice again
        with pytest.raises(ModeError, match=r"fc.weight has 2 adapters, and none is chosen: call the model inside 'with "):
            model["fc"](drawn(2, 7))

    @pytest.mark.parametrize("k", [2, -1, 0.0, True])
    def test_no_such_adapter(self, k):
        adapters = per_example(layer(), BASES["right"], count=2)
        for ask in (adapters.weights, adapters.factors, adapters.merge):
            with pytest.raises(SpecError, match="k must be a whole number from 0 to 1, the number of an adapter, not "):
                ask(k)
