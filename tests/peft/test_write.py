"""The folder of an adapter: names as PEFT matches them, forms as PEFT has them, and files that are not what they should be."""

import json
import pickle
import re

import pytest
import torch
from torch import nn

from lingrad.errors import CheckpointError, DataError, ExportError
from lingrad.maps.factors import Factors
from lingrad.peft import names, patterns, read_adapter, write_adapter
from lingrad.peft.slots import slots, why_not
from lingrad.weights.layout import layout_of
from tests.support.models import llama
from tests.support.peft_models import CASES

peft = pytest.importorskip("peft")

from peft.tuners.tuners_utils import check_target_module_exists  # noqa: E402
from peft.utils.other import get_pattern_key  # noqa: E402

NAMES = [
    "proj",
    "a.proj",
    "b.proj",
    "b.a.proj",
    "my_proj",
    "layers.1.q",
    "layers.11.q",
    "enc.layers.1.q",
    "norm",
    "post_norm",
    "norm.x",
]


def random_changes(model, rank=2):
    """A random change for every weight that PEFT has a low-rank form for, and random values for the rest."""
    generator = torch.Generator().manual_seed(5)
    named = dict(model.named_parameters())
    matrices = [name for name, p in named.items() if p.dim() >= 2]
    refused = why_not(model, matrices)
    low_rank = {}
    for i, name in enumerate(name for name in matrices if name not in refused):
        m, n = layout_of(named[name], model.get_submodule(name.rpartition(".")[0]), name).shape
        left, right = (
            torch.randn(*shape, generator=generator).double() / 10 for shape in ((m, rank + i % 3), (rank + i % 3, n))
        )
        low_rank[name] = Factors(left, right)
    full = {name: torch.randn(p.shape, generator=generator).double() for name, p in named.items() if name not in low_rank}
    return low_rank, full


class TestNames:
    @pytest.mark.parametrize(
        "chosen", [NAMES[:1], NAMES[1:3], ["layers.1.q"], ["my_proj"], NAMES[5:8], ["proj", "b.proj", "norm.x"]]
    )
    def test_targets_are_found_by_peft_and_nothing_else(self, chosen):
        config = peft.LoraConfig(target_modules=names.target_modules(chosen, NAMES))
        assert [name for name in NAMES if check_target_module_exists(config, name)] == chosen

    @pytest.mark.parametrize(
        "ranks", [dict.fromkeys(NAMES, 4), {n: i % 3 + 1 for i, n in enumerate(NAMES)}, dict.fromkeys(NAMES, 4) | {"proj": 2}]
    )
    def test_ranks_are_found_by_peft(self, ranks):
        default, special = names.rank_pattern(ranks)
        for name, rank in ranks.items():
            assert special.get(get_pattern_key(special.keys(), name), default) == rank
            assert patterns.values(special, default)(name) == rank
        assert default in ranks.values()
        if len(set(ranks.values())) == 1:
            assert special == {}

    def test_saved_modules(self):
        assert names.modules_to_save(["norm", "post_norm"], NAMES, []) == ["norm", "post_norm"]
        assert names.modules_to_save(["post_norm"], NAMES, ["proj"]) == ["post_norm"]
        with pytest.raises(ExportError, match="'norm' must be saved in full.*'post_norm'"):
            names.modules_to_save(["norm"], NAMES, [])
        with pytest.raises(ExportError, match="would take 'norm.x' for it"):
            names.modules_to_save(["norm", "post_norm"], NAMES, ["norm.x"])

    def test_parameters_that_cannot_be_told_apart(self):
        assert names.target_parameters(["a.w", "b.w"], ["a.w", "b.w", "b.v"]) == ["w"]
        with pytest.raises(ExportError, match="cannot distinguish"):
            names.target_parameters(["a.w"], ["a.w", "b.a.w"])


class TestForms:
    @pytest.mark.parametrize("kind", CASES)
    def test_what_is_written_is_read(self, kind, tmp_path):
        model = CASES[kind].build()
        low_rank, full = random_changes(model)
        written = write_adapter(tmp_path, model, low_rank, full, start="here")
        assert written.nbytes == (tmp_path / "adapter_model.safetensors").stat().st_size
        found = read_adapter(tmp_path, CASES[kind].build())
        assert found.low_rank.keys() == low_rank.keys()
        for name, factors in low_rank.items():
            assert torch.equal(found.low_rank[name].factors.left, factors.left)
            assert torch.equal(found.low_rank[name].factors.right, factors.right)
            assert found.low_rank[name].rank == factors.rank == written.ranks[name]
        assert all(torch.equal(found.full[name], value) for name, value in full.items())

    @pytest.mark.parametrize("kind", CASES)
    def test_it_is_applied_as_peft_merges_it(self, kind, tmp_path):
        model = CASES[kind].build()
        write_adapter(tmp_path, model, *random_changes(model))
        merged = dict(peft.PeftModel.from_pretrained(CASES[kind].build(), tmp_path).merge_and_unload().named_parameters())
        found = read_adapter(tmp_path, model)
        for name, weight in model.named_parameters():
            # bit for bit, but for the order of sums in a convolution
            assert torch.allclose(found.apply(name, weight), merged[name], rtol=0, atol=1e-15), name
            assert not torch.equal(merged[name], weight)

    def test_of_a_model_without_weights(self, tmp_path):
        model = llama()
        low_rank, full = random_changes(model)
        with torch.device("meta"):
            empty = llama()
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        write_adapter(tmp_path / "a", model, low_rank, full)
        write_adapter(tmp_path / "b", empty, low_rank, full)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        assert read_adapter(tmp_path / "a", empty).low_rank.keys() == low_rank.keys()

    def test_of_a_module_that_is_saved_whole_all_must_be_there(self, tmp_path):
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        change = {"0.weight": Factors(torch.ones(4, 1), torch.ones(1, 4))}
        with pytest.raises(ExportError, match="'1.bias' is in a module that is saved in full; its value must be given"):
            write_adapter(tmp_path, model, change, {"1.weight": torch.ones(4)})
        with pytest.raises(ExportError, match=r"'1.weight' is \(5,\); expected \(4,\)"):
            write_adapter(tmp_path, model, change, {"1.weight": torch.ones(5), "1.bias": torch.ones(4)})
        with pytest.raises(ExportError, match=r"the change of '0.weight' is \(4, 5\); expected \(4, 4\)"):
            write_adapter(tmp_path, model, {"0.weight": Factors(torch.ones(4, 1), torch.ones(1, 5))}, {})
        with pytest.raises(ExportError, match="the model has no parameter '2.weight'"):
            write_adapter(tmp_path, model, {"2.weight": Factors(torch.ones(4, 1), torch.ones(1, 4))}, {})
        with pytest.raises(ExportError, match="nothing has a low-rank change"):
            write_adapter(tmp_path, model, {}, {})

    def test_experts_that_share_no_factor(self):
        model = CASES["mixtral"].build()
        name = "model.layers.0.mlp.experts.down_proj"
        (slot,) = slots(model, [name]).values()
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(shape, generator=generator).double() for shape in slot.shapes(3))
        found = slot.decode(a, b)
        assert found.rank == 3 * 4
        each_a, each_b = a.view(4, 3, 24), b.view(32, 3, 4)
        expected = torch.stack([each_b[:, :, e] @ each_a[e] for e in range(4)])
        assert torch.allclose(slot.delta(found), expected, rtol=0, atol=1e-14)

    def test_wide_experts_have_no_shared_factor(self):
        model = nn.Module()
        model.inner = nn.Module()
        model.inner.weight = nn.Parameter(torch.zeros(50, 4, 5))  # cut between experts and the rest: 50 x 20
        assert "do not share" in why_not(model, ["inner.weight"])["inner.weight"]


def adapter_of(tmp_path, **config):
    torch.manual_seed(0)
    model = peft.get_peft_model(llama(), peft.LoraConfig(**{"target_modules": ["q_proj", "down_proj"], "r": 4} | config))
    model.save_pretrained(tmp_path / "a")
    return tmp_path / "a"


def edit(path, **changes):
    file = path / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | changes))


class TestFoldersThatAreNotWhatTheyShouldBe:
    def test_cut_off_and_tampered(self, tmp_path):
        path = adapter_of(tmp_path)
        file = path / "adapter_model.safetensors"
        whole = file.read_bytes()
        for broken in (whole[:-1], whole[:100], whole[:4], b"", whole + b"x", whole[:20] + b"\xff" + whole[21:]):
            file.write_bytes(broken)
            with pytest.raises(DataError, match="truncated, damaged"):
                read_adapter(path, llama())

    def test_a_pickle_is_not_opened(self, tmp_path):
        path = adapter_of(tmp_path)
        (path / "adapter_model.safetensors").unlink()

        class Bomb:
            def __reduce__(self):
                return (open, (str(tmp_path / "exploded"), "w"))

        (path / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(DataError, match="adapter_model.bin, a pickle, which may hold code and is not opened"):
            read_adapter(path, llama())
        assert not (tmp_path / "exploded").exists()
        (path / "adapter_model.bin").unlink()
        with pytest.raises(DataError, match="has no adapter_model.safetensors"):
            read_adapter(path, llama())

    def test_no_folder_of_an_adapter(self, tmp_path):
        with pytest.raises(DataError, match="cannot read .*No such file"):
            read_adapter(tmp_path / "none", llama())
        path = adapter_of(tmp_path)
        for text, message in (("{", "is not JSON"), ("[]", "type None"), ('{"peft_type": "IA3"}', "type 'IA3'; only LORA")):
            (path / "adapter_config.json").write_text(text)
            with pytest.raises(DataError, match=re.escape(message)):
                read_adapter(path, llama())

    @pytest.mark.parametrize(
        ("option", "value", "message"),
        [
            ("use_dora", True, "use_dora=True, with which it is more than W"),
            ("lora_bias", True, "lora_bias=True"),
            ("layer_replication", [[0, 1]], "layer_replication"),
            ("trainable_token_indices", [1], "trainable_token_indices"),
            ("init_lora_weights", "pissa", "changes the base weights"),
            ("init_lora_weights", "olora", "changes the base weights"),
            ("rank_pattern", {"q_proj": "many"}, "rank_pattern must map regular expressions to numbers"),
            ("rank_pattern", {"(q_proj": 2}, "rank_pattern must map regular expressions"),
            ("alpha_pattern", [1], "alpha_pattern must map"),
            ("r", 0, "r must be a number above 0"),
            ("lora_alpha", float("inf"), "lora_alpha must be a number above 0"),
        ],
    )
    def test_configs_that_mean_more_or_nothing(self, option, value, message, tmp_path):
        path = adapter_of(tmp_path)
        edit(path, **{option: value})
        with pytest.raises(DataError, match=message):
            read_adapter(path, llama())

    def test_adapters_of_other_models(self, tmp_path):
        path = adapter_of(tmp_path, modules_to_save=["norm"])
        with pytest.raises(CheckpointError, match="factors for 'model.layers.1.*for another model"):
            read_adapter(path, llama(num_hidden_layers=1))
        with pytest.raises(CheckpointError, match=r"the factors of 'model.layers.0.mlp.down_proj.weight' are \(4, 88\)"):
            read_adapter(path, llama(intermediate_size=80))
        with pytest.raises(CheckpointError, match="factors for 'model.layers.0.mlp.down_proj', which the model does not have"):
            read_adapter(path, CASES["gpt2"].build())
        edit(path, r=8)
        with pytest.raises(CheckpointError, match="for this model and rank 8"):
            read_adapter(path, llama())

    def test_a_factor_that_is_missing(self, tmp_path):
        from safetensors.torch import load_file, save_file

        path = adapter_of(tmp_path)
        tensors = load_file(path / "adapter_model.safetensors")
        key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        save_file({k: t for k, t in tensors.items() if k != key}, path / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=f"the adapter has no '{key}'"):
            read_adapter(path, llama())
        save_file(tensors | {key: torch.full_like(tensors[key], float("nan"))}, path / "adapter_model.safetensors")
        with pytest.raises(DataError, match="not finite"):
            read_adapter(path, llama())
        save_file(tensors | {"base_model.model.extra.weight": torch.ones(2)}, path / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match="no 'extra.weight': it is for another model"):
            read_adapter(path, llama())

    @pytest.mark.parametrize("text", ["[]", "{", '{"x": "C"}'])
    def test_metadata_that_say_nothing(self, text, tmp_path):
        from safetensors.torch import load_file, save_file

        path = adapter_of(tmp_path)
        file = path / "adapter_model.safetensors"
        save_file(load_file(file), file, metadata={"lingrad.frozen": text})
        with pytest.raises(DataError, match="must map parameters to A or B"):
            read_adapter(path, llama())

    def test_scalings(self, tmp_path):
        for config, scaling in (
            ({"lora_alpha": 6}, 1.5),
            ({"lora_alpha": 6, "use_rslora": True}, 3.0),
            ({"alpha_pattern": {"q_proj": 2}}, 0.5),
        ):
            (tmp_path / f"{scaling}").mkdir()
            path = adapter_of(tmp_path / f"{scaling}", **config)
            assert read_adapter(path, llama()).low_rank["model.layers.1.self_attn.q_proj.weight"].scaling == scaling

    @pytest.mark.parametrize("bias", ["lora_only", "all"])
    def test_biases_are_read_as_peft_reads_them(self, bias, tmp_path):
        """Those of a classifier that is saved in full are in the file three times; PEFT before 0.21 wrote none of lora_only."""
        from safetensors.torch import load_file, save_file

        from tests.support.folders import bert

        options = {"r": 2, "target_modules": ["query", "dense"], "task_type": "SEQ_CLS", "bias": bias}
        trained = peft.get_peft_model(bert(), peft.LoraConfig(**options))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for param in trained.parameters():
                param.add_(torch.randn(param.shape, generator=generator), alpha=0.1 if param.requires_grad else 0.0)
        trained.save_pretrained(tmp_path)
        expected = peft.PeftModel.from_pretrained(bert(), tmp_path).merge_and_unload().state_dict()
        adapter = read_adapter(tmp_path, bert())
        for name, weight in bert().state_dict().items():
            assert torch.allclose(adapter.apply(name, weight), expected[name], rtol=0, atol=1e-6), name  # both add in float32
        file = tmp_path / "adapter_model.safetensors"
        kept = {key: value for key, value in load_file(file).items() if not key.endswith("base_layer.bias")}
        save_file(kept, file)
        if bias == "lora_only":
            with pytest.raises(CheckpointError, match=r"no 'bert.*\.bias', nor any other bias: PEFT before 0\.21 leaves them"):
                read_adapter(tmp_path, bert())
