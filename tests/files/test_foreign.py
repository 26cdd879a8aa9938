"""Single files and texts that took hours, ended in an error of another library, or were read wrongly."""

import json
import re
import shutil

import pytest
import torch
from safetensors import safe_open

from lingrad.config.rules import parse_rules
from lingrad.files.model_folder import ModelFolder
from lingrad.files.optimizer_file import load_state
from lingrad.files.tensorfile import in_memory, write_tensors
from lingrad.models import open_model
from lingrad.peft.read import read_adapter
from tests.support.foreign import LLAMA, STATE, an_adapter, contents, packed
from tests.support.mutations import (
    little_memory,
    read,
    write_json,
)


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
