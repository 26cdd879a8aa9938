"""Files of others, damaged at random: the right content, or an error of lingrad's, in 2 s and 200 MB. Each has an oracle."""

import io
import json
import pickle
import re
import warnings

import pytest
import torch
from torch import nn

from lingrad.config import spec
from lingrad.config.rules import format_rule, parse_rules
from lingrad.files.model_folder import ModelFolder
from lingrad.files.optimizer_file import load_state
from lingrad.files.tensorfile import in_memory, write_tensors
from lingrad.models import open_model
from lingrad.peft.read import read_adapter
from lingrad.subspaces.ledger import Ledger
from lingrad.transforms.base import Transform
from lingrad.transforms.options import kinds
from tests.support.cases import SPECS
from tests.support.foreign import LLAMA, STATE, an_adapter, contents, packed
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

QUICK, SLOW, EXHAUSTIVE = range(120), range(1_000, 1_600), range(1_600, 4_000)


def both(name):
    """A check of some seeds as three tests: a few examples by default, hundreds are slow, thousands exhaustive."""

    def add(check):
        def quick(tmp_path):
            with little_memory():
                check(tmp_path, QUICK)

        def slow(tmp_path):
            with little_memory():
                check(tmp_path, SLOW)

        def exhaustive(tmp_path):
            with little_memory():
                check(tmp_path, EXHAUSTIVE)

        globals()[f"test_{name}"] = quick
        globals()[f"test_{name}_hundreds"] = pytest.mark.slow(slow)
        globals()[f"test_{name}_thousands"] = pytest.mark.slow(pytest.mark.exhaustive(exhaustive))
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
        listed = json.loads(path.read_bytes())["weight_map"]
        assert found.names == sorted(listed)
        assert all(files[name] == file and torch.equal(found.read(name), tensors[name]) for name, file in listed.items())
    assert count


# ---- an adapter's config


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


@both("model_config")
def _(folder, seeds):
    transformers = pytest.importorskip("transformers", reason="make test installs it (extra: hf)", exc_type=ImportError)
    count, path = 0, folder / "config.json"
    write_json(path, LLAMA)
    open_model(str(path))  # transformers imports a model's code when it is first built
    for seed in seeds[: 30 if seeds is QUICK else None]:  # a model takes its time
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
    assert equal(ours, {key: expected[key] for key in ours}) or equal(ours, STATE)  # torch reads on where a header is damaged
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
        ledger.close(template, mapped.factors, torch.device("cpu"))
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
                assert equal(factors.dense(), (flat[f"{i}.left"] * ratio) @ flat[f"{i}.right"])
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
        text = "; ".join(f"*.{glob}.*: {rng.choice([*SPECS, 'none', 'frozen'])}" for glob in rng.sample("abcdef", 3))
        found = read(parse_rules, damaged_text(text, rng, [*WORDS, "*:", ";", ": none", ": frozen"]))
        if isinstance(found, Transform):
            check_stable(found)
        elif found is not None:
            count += 1
            again = "\n".join(f"{glob}: {format_rule(rule)}" for glob, rule in found.items())
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
