"""Files of others, damaged at random: the right content, or an error of lingrad's, in 2 s and 200 MB. Each has an oracle."""

import io
import json
import pickle
import re
import shutil
import warnings
import zipfile

import pytest
import torch
from safetensors import safe_open
from torch import nn

from lingrad.config import spec
from lingrad.config.rules import parse_rules
from lingrad.files.model_folder import ModelFolder
from lingrad.files.optimizer_file import load_state
from lingrad.files.tensorfile import in_memory, write_tensors
from lingrad.models import open_model
from lingrad.peft.read import read_adapter
from lingrad.subspaces.ledger import Ledger
from lingrad.transforms.base import Transform
from lingrad.transforms.options import kinds
from tests.support.cases import SPECS
from tests.support.mutations import (
    ODD,
    damaged,
    damaged_bytes,
    damaged_text,
    equal,
    little_memory,
    read,
    rng_of,
    write_json,
)

QUICK, SLOW = range(200), range(1_000, 4_000)


def both(name):
    """A check of one seed as two tests: a few examples by default, thousands of others that are slow."""

    def add(check):
        def quick(tmp_path):
            with little_memory():
                check(tmp_path, QUICK)

        def slow(tmp_path):
            with little_memory():
                check(tmp_path, SLOW)

        globals()[f"test_{name}"] = quick
        globals()[f"test_{name}_thousands"] = pytest.mark.slow(slow)
        return check

    return add


# ---- the index of a model in several files


@both("index")
def _(folder, seeds):
    tensors = {f"layer.{i}.weight": torch.full((2, 3), float(i)) for i in range(4)}
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        write_tensors(folder / file, in_memory({name: tensors[name] for name in tensors if files[name] == file}))
    write_json(folder / "config.json", {})
    good = {"metadata": {"total_size": 96}, "weight_map": files}
    count = 0
    for seed in seeds:
        rng, path = rng_of(seed), folder / "model.safetensors.index.json"
        if seed % 2:
            path.write_bytes(damaged_bytes(json.dumps(good).encode(), rng))
        else:
            write_json(path, damaged(good, rng))
        found = read(ModelFolder, folder)
        if found is None:
            continue
        count += 1
        assert found.names == sorted(tensors)
        assert json.loads(path.read_bytes())["weight_map"] == files
        assert all(torch.equal(found.read(name), tensor) for name, tensor in tensors.items())
    assert count


# ---- an adapter's config


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)


def an_adapter(folder):
    model = nn.Sequential(*(Block() for _ in range(2)))
    ranks = {"0.q_proj": 2, "0.v_proj": 1, "1.q_proj": 2, "1.v_proj": 3}
    tensors = {}
    for module, rank in ranks.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.ones(rank, 4)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.ones(4, rank)
    write_tensors(folder / "adapter_model.safetensors", in_memory(tensors), {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "rank_pattern": {"0.v_proj": 1, r"1\.v_[a-z]+": 3},
        "alpha_pattern": {".*v_proj": 8},
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": None,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "target_parameters": None,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "init_lora_weights": True,
    }
    return model, config


@both("adapter_config")
def _(folder, seeds):
    model, good = an_adapter(folder)
    count = 0
    for seed in seeds:
        rng, path = rng_of(seed), folder / "adapter_config.json"
        if seed % 4 == 0:
            path.write_bytes(damaged_bytes(json.dumps(good).encode(), rng))
        else:
            write_json(path, damaged(good, rng))
        found = read(read_adapter, folder, model)
        if found is None:
            continue
        count += 1
        config = json.loads(path.read_bytes())
        for name, pair in found.low_rank.items():
            module = name.removesuffix(".weight")

            def value(option, default, module=module, config=config):  # as in PEFT's get_pattern_key
                patterns = config.get(option) or {}
                return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", module)), default)

            rank, alpha = value("rank_pattern", config["r"]), value("alpha_pattern", config["lora_alpha"])
            assert rank == pair.rank
            assert pair.scaling == pytest.approx(alpha / (rank**0.5 if config.get("use_rslora") else rank))
    assert count


# ---- a model's config

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 8,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "vocab_size": 16,
    "torch_dtype": "float32",
    "rope_theta": 10000.0,
}


@both("model_config")
def _(folder, seeds):
    transformers = pytest.importorskip("transformers", reason="make test installs it (extra: hf)", exc_type=ImportError)
    count, path = 0, folder / "config.json"
    write_json(path, LLAMA)
    open_model(str(path))  # transformers imports a model's code when it is first built
    for seed in seeds:
        rng = rng_of(seed)
        write_json(path, damaged(LLAMA, rng))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = read(open_model, str(path))
        if found is None:
            continue
        count += 1
        config = json.loads(path.read_bytes())
        if config.get("architectures") == LLAMA["architectures"]:
            assert type(found) is transformers.LlamaForCausalLM
            shape = (config.get("vocab_size", 32000), config.get("hidden_size", 4096))
            assert tuple(found.get_input_embeddings().weight.shape) == shape
    assert count


# ---- an optimizer's state

STATE = {
    "state": {
        0: {"step": torch.tensor(3.0), "exp_avg": torch.arange(6.0).view(2, 3), "odd": torch.zeros(0, 3)},
        1: {"exp_avg": torch.ones(3, 2).t(), "half": torch.ones(2, dtype=torch.bfloat16), "n": 5, "codes": torch.arange(4) > 1},
    },
    "param_groups": [
        {"params": [0], "lr": 0.1, "betas": (0.9, 0.99), "names": ["a"]},
        {"params": [1], "lr": torch.tensor(0.1)},
    ],
}
SHARED = torch.arange(12.0)
TENSORS = [
    SHARED[2:8].view(2, 3),
    SHARED.view(3, 4).t(),
    torch.zeros(()).expand(10**6, 10**6),
    torch.zeros(1).expand(3, 3),
    torch.ones(2, device="meta"),
    torch.eye(3).to_sparse(),
    torch.ones(2, dtype=torch.float8_e4m3fn),
    torch.tensor(1 + 2j),
    nn.Parameter(torch.ones(2)),
    torch.Size([2, 3]),
    torch.float32,
    (1, (2, [3])),
    torch.ones(2, dtype=torch.uint16),
]


def theirs(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, weights_only=True)


def check_state(path):
    """Whether a file was read; what was read is what torch reads."""
    found = read(load_state, path)
    if found is None:
        return False
    ours = read(lambda: {"state": {k: dict(v) for k, v in found["state"].items()}, "param_groups": found["param_groups"]})
    if ours is None:
        return False
    expected = theirs(path)
    assert equal(ours, {key: expected[key] for key in ours})
    return True


@both("optimizer_state")
def _(folder, seeds):
    count, path = 0, folder / "optimizer.pt"
    for seed in seeds:
        state = damaged(STATE, rng_of(seed), [*ODD, *TENSORS])
        torch.save(state, path)
        count += check_state(path)
    assert count


@both("bytes_of_an_optimizer_state")
def _(folder, seeds):
    count, path = 0, folder / "optimizer.pt"
    good = io.BytesIO()
    torch.save(STATE, good)
    for seed in seeds:
        path.write_bytes(damaged_bytes(good.getvalue(), rng_of(seed)))
        found = read(load_state, path)
        count += check_state(path) if found is not None and accepted(path) else 0
    assert count


# ---- pickles


def packed(data, records=None):
    """A file as torch.save makes it, with another pickle in it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
        for name, content in (records or {}).items():
            archive.writestr(f"archive/data/{name}", content)
    return file.getvalue()


def contents():
    file = io.BytesIO()
    torch.save(STATE, file)
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        return archive.read(names[0]), {n.rpartition("/")[2]: archive.read(n) for n in names if "/data/" in n}


class Call:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        return self.function, self.arguments


@both("pickle")
def _(folder, seeds):
    data, records = contents()
    calls = [
        Call(bytearray, 2**40),
        Call(open, "ran", "w"),
        Call(print),
        Call(torch.zeros, 10**12),
        Call(complex, 1, 2),
        {1, 2},
        b"ab",
    ]
    count, path = 0, folder / "optimizer.pt"
    for seed in seeds:
        rng = rng_of(seed)
        if seed % 3 == 0:
            state = damaged(
                {"state": {0: {"a": 1, "b": [2]}}, "param_groups": [{"params": [0], "x": (1, 2)}]}, rng, [*calls, 1]
            )
            changed = pickle.dumps(state, protocol=rng.choice([2, 2, 4]))
        else:
            changed = damaged_bytes(data, rng)
        path.write_bytes(packed(changed, records))
        count += check_state(path) if read(load_state, path) is not None and accepted(path) else 0
    assert count


def accepted(path):
    """Whether torch reads a file too: it refuses some damage that no tensor or number is touched by."""
    try:
        theirs(path)
    except Exception:
        return False
    return True


def test_hostile_pickles_are_refused_at_once(tmp_path):
    path, start = tmp_path / "optimizer.pt", b"\x80\x02}q\0(X\x05\0\0\0state}X\x0c\0\0\0param_groups]u"
    bombs = {
        "a memo of 4 GB": b"\x80\x02}r\xff\xff\xff\xff.",
        "a text of 4 GB": b"\x80\x02X\xff\xff\xff\xff.",
        "no end": start,
        "deep": b"\x80\x02" + b"(" * 10**5 + b"t" * 10**5 + b".",
        "doubled 60 times": b"\x80\x02]" + b"q\x00h\x00\x86" * 60 + b".",
        "no stack": b"\x80\x02\x86\x86.",
    }
    with little_memory():
        for data in bombs.values():
            path.write_bytes(packed(data))
            assert read(load_state, path) is None
    path.write_bytes(packed(start + b"."))
    assert read(load_state, path) == {"state": {}, "param_groups": []}


def test_lists_that_hold_each_other_twice_are_read_once(tmp_path):
    laughs = ["ha"]
    for _ in range(60):
        laughs = [laughs, laughs]
    torch.save({"state": {0: {"a": laughs}}, "param_groups": [{"params": [0], "b": laughs}]}, tmp_path / "optimizer.pt")
    found = read(load_state, tmp_path)
    assert len(found["param_groups"][0]["b"]) == len(found["state"][0]["a"]) == 2


# ---- a ledger

SVD = spec.parse("svd(rank=2, every=3)")
RANDOM = spec.parse("random(rank=2, every=3)")


def a_ledger(transform):
    shape = (4, 6)
    template = transform.init(shape, seed=0, device=torch.device("cpu"), dtype=torch.float32)
    mapped = transform.map(template)
    coords = torch.ones(mapped.coords_shape) if hasattr(mapped, "coords_shape") else torch.ones(2, 6)
    ledger = Ledger(transform, records=True)
    for _ in range(2):
        ledger.add(coords)
        ledger.decayed(0.5)
        ledger.close(template, mapped.factors)
    ledger.add(coords)
    return ledger.pack(), template, coords


@both("ledger")
def _(folder, seeds):
    del folder
    made = {transform: a_ledger(transform) for transform in (SVD, RANDOM)}
    odd = [*(value for value in ODD if not isinstance(value, str) or len(value) < 100), *TENSORS]
    odd += [torch.full((4, 2), float("nan")), torch.ones(4, 3), torch.ones(2, 6), torch.ones(4, 2).double(), 0.0, 2, 10**12]
    count = 0
    for seed in seeds:
        transform = (SVD, RANDOM)[seed % 2]
        good, template, coords = made[transform]
        flat = damaged(good, rng_of(seed), odd)
        if not isinstance(flat, dict):
            continue
        found = read(Ledger.unpack, transform, flat, template, coords, "w")
        closed = None if found is None else read(found.closed)
        if closed is None:
            continue
        count += 1
        packed_again = found.pack()
        assert all(equal(packed_again[key], flat[key]) for key in packed_again)
        for i, factors in enumerate(closed):
            if f"{i}.left" in flat:
                ratio = flat["decay"] / flat[f"{i}.decay"]
                assert torch.equal(factors.dense(), (flat[f"{i}.left"] * ratio) @ flat[f"{i}.right"])
    assert count


# ---- config strings and rules

WORDS = [
    "svd",
    "random",
    "kron",
    "pca",
    "full()",
    "rank=",
    "every=",
    "side=",
    "none",
    "true",
    "adam",
    "1e400",
    "0x10",
    "1_0",
    "**",
    "lr=1",
]


def check_stable(transform):
    text = spec.format(transform)
    assert spec.parse(text) == transform
    assert spec.format(spec.parse(text)) == text


def another(rng):
    """A config string with one or two of its values replaced."""
    text = rng.choice(SPECS)
    for _ in range(rng.choice([1, 2])):
        text = re.sub("=[a-z0-9.]+", lambda old: rng.choice([old[0]] * 3 + [f"={value}" for value in VALUES]), text)
    return text


@both("config_string")
def _(folder, seeds):
    del folder
    count = 0
    for seed in seeds:
        rng = rng_of(seed)
        found = read(spec.parse, damaged_text(rng.choice(SPECS), rng, WORDS) if seed % 2 else another(rng))
        if found is not None:
            count += 1
            check_stable(found)
    assert count


@both("rules")
def _(folder, seeds):
    del folder
    count = 0
    for seed in seeds:
        rng = rng_of(seed)
        text = "; ".join(f"*.{glob}.*: {rng.choice([*SPECS, 'none'])}" for glob in rng.sample("abcdef", 3))
        found = read(parse_rules, damaged_text(text, rng, [*WORDS, "*:", ";", ": none"]))
        if isinstance(found, Transform):
            check_stable(found)
        elif found is not None:
            count += 1
            again = "\n".join(f"{glob}: {'none' if value is None else spec.format(value)}" for glob, value in found.items())
            assert read(parse_rules, found) == found
            if not any(char in glob for glob in found for char in ":;()\n") and all(
                glob.strip() == glob != "" for glob in found
            ):
                assert parse_rules(again) == found or len(found) == 1
    assert count


VALUES = [0, 1, 2, 3, 7, 10**6, 2**62, 1.0, 0.1, 1e-8, 1e-300, 1e22, 123456789.123, 0.5, -0.0, True, False, None]
VALUES += ["short", "left", "both", "exact", "gram", "true", "none", "1", "a b", "'", "é", "\n", "", "adam"]


@both("values_of_options")
def _(folder, seeds):
    del folder
    base = {name: spec.parse(name) for name in SPECS}
    count = 0
    for seed in seeds:
        rng = rng_of(seed)
        transform = rng.choice([*base.values()])
        options = {name: getattr(transform, name) for name in kinds(type(transform))}
        for name in rng.sample([*options], min(len(options), rng.choice([1, 2]))):
            options[name] = rng.choice(VALUES)
        made = read(lambda: type(transform)(**options))  # noqa: B023 - called at once
        if made is not None:
            count += 1
            check_stable(made)
    assert count


@pytest.mark.parametrize(
    "text",
    [
        "svd(rank=1" + " " * 3_000_000 + ")",
        "*.x: svd(rank=1" + " " * 3_000_000 + ")",
        "".join(f"*.{i}: none;" for i in range(50_000)),
        ";".join(["*.a: none"] * 50_000),
        "-" * 4000,
        "svd(rank=" + "-" * 1500 + "1)",
        "kron(left=" * 300,
        "svd(rank=" + "(" * 4000,
        "svd(rank=" + "9" * 4000 + ")",
        "x" * 10**6,
        "pca(rank=1, optimizer=sgd(momentum=0.9, momentum=0.1))",
    ],
    ids=range(11),
)
def test_texts_that_take_long_or_break_a_parser(text):
    with little_memory():
        found = read(parse_rules, text)
    assert found is None or len(found) == 50_000


# ---- single inputs that took hours, or ended in an error of another library


def an_adapter_with(folder, change, tensors=None, metadata=None):
    model, config = an_adapter(folder)
    write_json(folder / "adapter_config.json", config | change)
    if tensors or metadata:
        found = safe_open(folder / "adapter_model.safetensors", "pt")
        held = {key: found.get_tensor(key) for key in found.keys()} | (tensors or {})  # noqa: SIM118 - it is no dict
        write_tensors(folder / "adapter_model.safetensors", in_memory(held), {"format": "pt", **(metadata or {})})
    return read(read_adapter, folder, model)


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    "pattern",
    [
        r"(([a-z0-9_]+)+\.?)*X",
        "(a|a)" * 30 + "X",
        "a?" * 40 + "a" * 40,
        ".*" * 12 + "X",
        "(?i)q_proj",
        "(" * 5000 + ")" * 5000,
        r"(q)_proj\1",
        "[",
        "(?=.*q)q_proj",
        "x{99999999999}",
    ],
)
def test_patterns_that_backtrack_or_are_none_are_refused(tmp_path, option, pattern):
    assert an_adapter_with(tmp_path, {option: {pattern: 3}}) is None


@pytest.mark.parametrize("option", ["target_modules", "exclude_modules", "modules_to_save", "layers_pattern"])
def test_patterns_of_other_options_are_refused_too(tmp_path, option):
    value = r"(([a-z0-9_]+)+\.?)*X"
    value = value if option in ("target_modules", "exclude_modules") else [value]
    assert an_adapter_with(tmp_path, {option: value, "layers_to_transform": [0, 1]}) is None


def test_a_hundred_thousand_patterns_are_looked_up(tmp_path):
    ranks = {f"layer.{i}.q_proj": 7 for i in range(100_000)} | {"0.v_proj": 1, "1.v_proj": 3}
    found = an_adapter_with(tmp_path, {"rank_pattern": ranks, "alpha_pattern": {}})
    assert {name: pair.rank for name, pair in found.low_rank.items()} == {
        "0.q_proj.weight": 2,
        "0.v_proj.weight": 1,
        "1.q_proj.weight": 2,
        "1.v_proj.weight": 3,
    }


@pytest.mark.parametrize(
    "pattern",
    [
        "0.v_proj",
        r"^0\.v_proj",
        r".*0\.v_proj",
        r"[0-9]\.(v|w)_proj",
        r"(0|2)\.v_proj",
        "0.v.proj",
        r".*\.?0\..*v_proj",
        r"\d+\.v_pro?j",
    ],
)
def test_patterns_that_people_write_are_matched_as_by_peft(tmp_path, pattern):
    ranks = {"1.v_proj": 3, pattern: 1}
    assert re.match(rf"(.*\.)?({pattern})$", "0.v_proj")
    found = an_adapter_with(tmp_path, {"rank_pattern": ranks, "alpha_pattern": {}})
    assert found.low_rank["0.v_proj.weight"].rank == 1


KEY = "base_model.model.0.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "case",
    [
        ({"lora_alpha": 10**400},),
        ({"lora_alpha": 1e40, "alpha_pattern": {}},),
        ({"alpha_pattern": {"q_proj": 10**400}},),
        ({"lora_dropout": "x"},),
        ({"lora_dropout": float("nan")},),
        ({"modules_to_save": 5},),
        ({}, {KEY: torch.ones(2, 4).to(torch.float8_e4m3fn)}),
        ({}, {KEY: torch.ones(2, 4, dtype=torch.int32)}),
        ({}, {"base_model.model.0.norm.weight": torch.full((4,), float("nan"))}),
        ({}, None, {"lingrad.frozen": "[" * 10**5}),
    ],
    ids=range(10),
)
def test_values_that_ended_in_errors_of_others(tmp_path, case):
    assert an_adapter_with(tmp_path, *case) is None


@pytest.mark.parametrize("key", ["num_hidden_layers", "vocab_size", "num_labels", "hidden_size", "num_local_experts"])
@pytest.mark.parametrize("where", ["itself", "inside"])
def test_a_model_that_would_take_hours_to_build_is_refused(tmp_path, key, where):
    config = LLAMA | ({key: 10**13} if where == "itself" else {"text_config": {key: 10**13}})
    write_json(tmp_path / "config.json", config)
    assert read(open_model, str(tmp_path)) is None


def test_half_a_character_as_a_name(tmp_path):
    write_json(tmp_path / "config.json", {})
    text = json.dumps({"\ud800": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    assert read(ModelFolder, tmp_path) is None


# ---- files that change while they are read


def test_a_state_that_is_cut_or_replaced_while_it_is_read(tmp_path):
    for how in ("cut", "written again", "replaced"):
        path = tmp_path / f"{how}.pt"
        torch.save(STATE, path)
        found = load_state(path)
        assert torch.equal(found["state"][0]["exp_avg"], STATE["state"][0]["exp_avg"])
        if how == "cut":
            path.write_bytes(b"")
        elif how == "written again":
            torch.save({**STATE, "more": 1}, path)
        else:
            shutil.copy2(path, tmp_path / "other")
            (tmp_path / "other").replace(path)
        with pytest.raises(ValueError, match=f"cannot read .*{how}.pt.*changed while it was read"):
            found["state"][0]["exp_avg"]


def test_a_record_cut_short_is_not_filled_with_what_follows(tmp_path):
    data, records = contents()
    records["1"] = records["1"][:10]
    (tmp_path / "optimizer.pt").write_bytes(packed(data, records))
    with pytest.raises(ValueError, match="the record data/1 has 10 bytes; expected 24"):
        load_state(tmp_path)


def test_weights_that_change_while_they_are_read(tmp_path):
    write_json(tmp_path / "config.json", {})
    tensors = {"a": torch.ones(4), "b": torch.ones(4)}
    write_tensors(tmp_path / "model.safetensors", in_memory(tensors))
    found = ModelFolder(tmp_path)
    found.read("a")
    write_tensors(tmp_path / "model.safetensors", in_memory(tensors))
    with pytest.raises(ValueError, match=r"cannot read .*model.safetensors: it was changed while it was read"):
        found.read("b")
