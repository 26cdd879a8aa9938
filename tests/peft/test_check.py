"""`check_adapter` and the targets of an export: the rules of loaders, each against what the loader's own formula gives."""

import ast
import json
import re
import shlex

import pytest
import torch
from safetensors.torch import load_file, save_file

import lingrad
from lingrad import peft as bridge
from lingrad.errors import DataError, ExportError, SpecError
from lingrad.peft.loaders import LOADERS, VLLM_RANKS
from tests.support.models import gap, llama, text_batches, train
from tests.support.peft_runs import EXACT, merged_by_peft

MIXED = {"*.0.self_attn.*": "svd(rank=2, every=2)", "*_proj": "svd(rank=4, every=0)", "*": "frozen"}
SERVED = ("vllm", "llama.cpp", "diffusers")


def mixed_run(**options):
    """A run whose adapters have ranks 2, 4 and 6, and nothing else that trained."""
    model = llama()
    opt = lingrad.adapt(model, options.pop("rules", MIXED), "adamw", lr=1e-2, ledger=True, **options)
    train(model, opt, text_batches(6, micro=1))
    return model, opt


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The run, and its adapter for each target."""
    _, opt = mixed_run()
    root = tmp_path_factory.mktemp("runs")
    for target in ("peft", *SERVED):
        bridge.export(opt, root / target, target=target, quiet=target != "peft")
    return opt, root


def merged(opt, folder, scale):
    """The run's starting weights with B A added, by a loader's own formula of the scale."""
    config, file = json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")
    found = dict(llama().named_parameters())
    for key in [key for key in file if key.endswith("lora_B.weight")]:
        a, b = file[key.replace("lora_B", "lora_A")], file[key]
        name = key.removeprefix("base_model.model.").replace("lora_B.", "")
        found[name] = found[name] + scale(config, b) * (b @ a)
    return {name: found[name].detach() for name in opt.weights()}


def judged(folder, target):
    """The command by which a target loads an adapter."""
    return bridge.check_adapter(folder, target).findings[0].command.replace(str(folder), "DIR")


FORMULAS = {
    "llama.cpp": lambda config, b: config["lora_alpha"] / b.shape[1],  # get_scale of src/llama-adapter.h
    "vllm": lambda config, b: config["lora_alpha"] / config["r"],  # vllm_lora_scaling_factor of vllm/lora/peft_helper.py
    "diffusers": lambda config, b: 1.0,  # alpha is the rank, of each tensor or of the first: here they are equal
}


class TestTargets:
    @pytest.mark.parametrize("target", SERVED)
    def test_a_loader_by_its_own_formula_has_the_weights_of_the_run(self, runs, target):
        opt, root = runs
        assert gap(merged(opt, root / target, FORMULAS[target]), opt.weights()) <= EXACT
        assert (
            gap({n: p for n, p in merged_by_peft(llama(), root / target).items() if n in opt.weights()}, opt.weights()) <= EXACT
        )
        config = json.loads((root / target / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (6, 6, {}, {})
        assert config["modules_to_save"] is None
        assert bridge.check_adapter(root / target, target).findings[0].verdict == "loads"

    def test_llama_cpp_would_make_other_weights_of_the_adapter_for_peft(self, runs):
        opt, root = runs
        assert gap(merged(opt, root / "peft", FORMULAS["llama.cpp"]), opt.weights()) > 1e-4
        vllm, finding, *_ = bridge.check_adapter(root / "peft").findings
        assert vllm.verdict == "loads"  # one r and one alpha come to 1 as each module's own do
        assert finding.verdict == "loads another change"
        config, file = (
            json.loads((root / "peft/adapter_config.json").read_text()),
            load_file(root / "peft/adapter_model.safetensors"),
        )
        scales = [config["lora_alpha"] / file[key].shape[1] for key in file if key.endswith("lora_B.weight")]
        wrong = sorted(scale for scale in scales if scale != 1)
        assert finding.changed == (f"multiplies the change by {wrong[0]:.3g} in {len(wrong)} of 14 modules",)

    def test_the_export_for_peft_says_so_printed_or_as_a_warning(self, runs, tmp_path, capsys):
        opt, _ = runs
        says = "llama.cpp would multiply the change by 0.667 in 4 of 14 modules, without an error. target='llama.cpp' writes"
        report = bridge.export(opt, tmp_path / "a")
        assert f"note: {says}" in capsys.readouterr().out
        assert [note for note in report.notes if note.startswith(says)]
        with pytest.warns(UserWarning, match=re.escape(says)):
            bridge.export(opt, tmp_path / "b", quiet=True)

    def test_ranks_that_are_equal_are_worth_no_warning(self, tmp_path, recwarn):
        _, opt = mixed_run(rules={"*_proj": "svd(rank=4, every=0)", "*": "frozen"})
        report = bridge.export(opt, tmp_path / "a", base_model="org/model", quiet=True)
        assert not report.notes
        assert not [w for w in recwarn if "multiply" in str(w.message)]
        assert {found.verdict for found in bridge.check_adapter(tmp_path / "a").findings} == {"loads"}

    @pytest.mark.parametrize("target", SERVED)
    def test_an_export_that_its_target_loads_is_worth_no_warning(self, runs, tmp_path, recwarn, target):
        report = bridge.export(runs[0], tmp_path / "a", target=target, base_model="org/model", quiet=True)
        assert not [str(w.message) for w in recwarn if issubclass(w.category, UserWarning)]
        assert report.notes == (f"for {LOADERS[target].title}: {judged(tmp_path / 'a', target)}",)

    @pytest.mark.parametrize("target", SERVED)
    def test_what_trained_in_full_is_refused_with_the_way_round(self, target, tmp_path):
        _, opt = mixed_run(rules="svd(rank=4, every=0)")
        title = LOADERS[target].title
        with pytest.raises(
            ExportError, match=rf"{title} loads nothing but factors, and '.*' and \d+ more would be saved in full"
        ):
            bridge.export(opt, tmp_path / "a", target=target, quiet=True)
        assert not list(tmp_path.iterdir())

    def test_a_rank_is_cut_with_its_residual(self, runs, tmp_path):
        opt, _ = runs
        with pytest.raises(
            ExportError, match=r"the largest rank is 2, and its change has up to [46]\. allow_residual=0\.\d+ accepts"
        ):
            bridge.export(opt, tmp_path / "a", target="vllm", rank=2, quiet=True)
        report = bridge.export(opt, tmp_path / "a", target="vllm", rank=2, allow_residual=1.0, quiet=True)
        assert {row.rank for row in report.low_rank} == {2}
        assert 1e-3 < report.largest_residual < 1

    def test_vllm_has_room_for_512(self, tmp_path):
        """A change of rank 520: cut to 512 for vLLM, which takes no more, and in full for llama.cpp."""
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(520, 520, bias=False)).requires_grad_(False)
        change = lingrad.maps.factors.Factors(torch.randn(520, 520), torch.eye(520))
        trained = torch.nn.Sequential(torch.nn.Linear(520, 520, bias=False)).requires_grad_(False)
        trained[0].weight.copy_(model[0].weight + change.dense())
        what = (trained, {"0.weight": change})
        with pytest.raises(ExportError, match=r"the largest rank is 512, and its change has up to 520\. allow_residual="):
            bridge.export(what, tmp_path / "a", target="vllm", quiet=True)
        report = bridge.export(what, tmp_path / "a", target="vllm", allow_residual=0.1, quiet=True)
        assert report.rows[0].rank == VLLM_RANKS[-1]
        assert any("--max-lora-rank 512" in note for note in report.notes)
        assert bridge.export(what, tmp_path / "b", target="llama.cpp", quiet=True).rows[0].rank == 520

    def test_an_unknown_target(self, runs, tmp_path):
        with pytest.raises(
            SpecError, match="target must be one of peft, vllm, llama.cpp, diffusers, not 'vlm'; did you mean 'vllm'"
        ):
            bridge.export(runs[0], tmp_path / "a", target="vlm")


def adapter(folder, changes=(), tensors=(), rank=4, modules=("q_proj", "v_proj"), depth=2):
    """An adapter as another program would write it."""
    folder.mkdir()
    paths = [f"base_model.model.model.layers.{i}.self_attn.{name}" for i in range(depth) for name in modules]
    file = {f"{path}.lora_A.weight": torch.zeros(rank, 8) for path in paths}
    file |= {f"{path}.lora_B.weight": torch.zeros(8, rank) for path in paths}
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(modules)}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/model"} | dict(changes)))
    save_file(file | dict(tensors), folder / "adapter_model.safetensors")
    return folder


NORM = {"base_model.model.model.norm.weight": torch.ones(8)}
HEAD = {"base_model.model.lm_head.weight": torch.ones(8, 8)}
THIRD = {f"base_model.model.model.layers.2.self_attn.q_proj.lora_{s}.weight": torch.zeros(4, 4) for s in "AB"}
WIDE = {
    "base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight": torch.zeros(8, 8),
    "base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight": torch.zeros(8, 8),
}


@pytest.mark.parametrize(
    ("changes", "tensors", "loader", "verdict", "why"),
    [
        ({}, {}, "vllm", "loads", ""),
        ({}, {}, "llama.cpp", "loads", ""),
        ({}, {}, "tgi", "loads", ""),
        ({}, {}, "diffusers", "loads another change", "multiplies the change by 0.5 in 4 of 4 modules"),
        ({"lora_alpha": 4}, {}, "diffusers", "loads", ""),
        ({"use_rslora": True}, {}, "vllm", "loads", ""),
        ({"use_rslora": True}, {}, "llama.cpp", "loads another change", "multiplies the change by 0.5 in 4 of 4 modules"),
        ({"modules_to_save": ["lm_head"]}, HEAD, "vllm", "refused", "modules_to_save=['lm_head']"),
        ({"modules_to_save": ["lm_head"]}, HEAD, "llama.cpp", "refused", "'base_model.model.lm_head.weight'"),
        ({"modules_to_save": ["norm"]}, NORM, "llama.cpp", "loads another change", "leaves out 1 norms, such as"),
        ({"modules_to_save": ["norm"]}, NORM, "tgi", "loads another change", "leaves out tensors that are no factors"),
        ({"bias": "lora_only"}, {}, "vllm", "refused", "bias='lora_only'"),
        ({"use_dora": True}, {}, "vllm", "refused", "use_dora=True"),
        ({"init_lora_weights": "pissa"}, {}, "vllm", "refused", "init_lora_weights='pissa'"),
        ({"init_lora_weights": "pissa"}, {}, "tgi", "loads another change", "init_lora_weights='pissa', which changes the"),
        ({"init_lora_weights": "olora"}, {}, "llama.cpp", "loads another change", "leaves out init_lora_weights='olora'"),
        ({"init_lora_weights": "gaussian"}, {}, "llama.cpp", "loads", ""),
        ({"use_dora": True}, {}, "diffusers", "loads another change", "leaves out use_dora=True"),
        ({"arrow_config": {"a": 1}}, {}, "vllm", "refused", "arrow_config"),
        ({"r": 600}, {}, "vllm", "refused", "rank 600, over 512"),
        ({"fan_in_fan_out": True}, {}, "llama.cpp", "refused", "fan_in_fan_out"),
        (
            {"rank_pattern": {"0.self_attn.v_proj": 8}},
            WIDE,
            "llama.cpp",
            "loads",
            "",
        ),  # alpha is 8 for all: 8/8 in PEFT as well
        ({"rank_pattern": {"0.self_attn.v_proj": 8}}, WIDE, "vllm", "loads another change", "by 2 in 1 of 4 modules"),
        ({"rank_pattern": {"0.self_attn.v_proj": 8}}, WIDE, "tgi", "refused", "4 and 8 for 'model.layers.*.self_attn.v_proj'"),
        ({"alpha_pattern": {"v_proj": 4}}, {}, "llama.cpp", "loads another change", "by 2 in 2 of 4 modules"),
        ({"alpha_pattern": {"v_proj": 4}}, {}, "vllm", "loads another change", "by 2 in 2 of 4 modules"),
        (
            {},
            THIRD,
            "tgi",
            "loads another change",
            "leaves out all of 'model.layers.*.self_attn.v_proj', of which 1 layers have no",
        ),
        ({"target_parameters": ["self_attn.v_proj"]}, {}, "llama.cpp", "loads", ""),
    ],
)
def test_adapters_of_other_programs(tmp_path, changes, tensors, loader, verdict, why):
    folder = adapter(tmp_path / "a", changes, tensors)
    finding = next(found for found in bridge.check_adapter(folder).findings if found.loader == loader)
    assert finding.verdict == verdict
    assert why in "; ".join(finding.refused or finding.changed)
    if verdict == "loads":
        assert bridge.check_adapter(folder, loader).findings == (finding,)
        assert "org/model" in finding.command or loader == "diffusers"
    else:
        with pytest.raises(ExportError, match=re.escape(why)):
            bridge.check_adapter(folder, loader)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
            "a pickle, which may hold code",
        ),
        (lambda folder: save_file(HEAD, folder / "adapter_model.safetensors"), "the adapter has no low-rank factors"),
        (
            lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}'),
            "describes an adapter of type 'IA3'",
        ),
        (
            lambda folder: save_file({"a.lora_A.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors"),
            "the adapter has one factor only for 'a'",
        ),
    ],
)
def test_what_is_no_adapter(tmp_path, spoil, message):
    folder = adapter(tmp_path / "a")
    spoil(folder)
    with pytest.raises(DataError, match=message):
        bridge.check_adapter(folder)


@pytest.mark.parametrize("name", ["two words", "it's $HOME", "plain"])
def test_names_of_folders_are_quoted_in_the_commands(tmp_path, name):
    folder, start = tmp_path / name, f"./{name}"
    adapter(folder, {"base_model_name_or_path": start, "lora_alpha": 4})  # its rank, so that every loader loads it
    commands = {found.loader: found.command for found in bridge.check_adapter(folder).findings if found.verdict == "loads"}
    assert commands.keys() == LOADERS.keys()
    assert shlex.split(commands["vllm"]) == [
        *("vllm", "serve", start, "--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"NAME={folder}"),
    ]
    assert {str(folder), start} <= {*shlex.split(commands["llama.cpp"])}
    assert {f"NAME={folder}", start} <= {*shlex.split(commands["tgi"])}
    call = ast.parse(commands["diffusers"], mode="eval").body
    assert ast.literal_eval(call.args[0]) == str(folder)


def test_the_command(lingrad, tmp_path):
    folder = adapter(tmp_path / "a", {"modules_to_save": ["norm"]}, NORM)
    status, out, _ = lingrad("check-adapter", folder)
    assert (status, out.strip()) == (0, str(bridge.check_adapter(folder)))
    assert [line.split()[0] for line in out.splitlines() if "refused" in line] == ["vllm", "diffusers"]
    status, out, errors = lingrad("check-adapter", folder, "--for", "vllm")
    assert (status, out) == (2, "")
    assert errors.startswith("lingrad: vLLM refuses ")
    status, _, errors = lingrad("check-adapter", folder, "--for", "ollama")
    assert (status, errors) == (
        2,
        "lingrad: loader must be one of vllm, llama.cpp, tgi, diffusers, not 'ollama'; did you mean 'llama.cpp'?\n",
    )
    status, out, _ = lingrad("check-adapter", adapter(tmp_path / "b"), "--for", "llama.cpp")
    assert status == 0
    assert f"convert_lora_to_gguf.py {tmp_path / 'b'} --base org/model" in out
