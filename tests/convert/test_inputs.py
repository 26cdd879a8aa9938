"""Folders that change while they are converted, unfinished work that says what is not so, and layers that are saved in full."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from lingrad import convert
from lingrad.errors import DataError
from lingrad.files.tensorfile import TensorFile, in_memory, write_tensors
from tests.support.folders import contents, edit, make
from tests.support.models import VOCABULARY

pytest.importorskip("peft", reason="make test installs it (extra: hf)", exc_type=ImportError)

NORM = "model.norm.weight"


class Stop(Exception):
    pass


def at_end(action):
    def tick(done, total, name):
        if done == total:
            action()

    return tick


def stop():
    raise Stop


def shift(folder):
    edit(folder, lambda tensors: tensors[NORM].add_(1))


SLOW_PLANTS = [pytest.param(what, marks=pytest.mark.slow) for what in ("another residual", "another's")]


def rows(report):
    return {row.name for row in report.rows}


@pytest.fixture
def pair(tmp_path):
    return make(tmp_path, others=False)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("what", ["weights", "config"])
def test_an_input_that_changes_while_it_is_converted(pair, tmp_path, which, what):
    folder = pair[which]

    def change():
        if what == "weights":
            shift(folder)
        else:
            path = folder / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-3}))

    with pytest.raises(DataError, match="changed while it was (read|converted)"):
        convert.convert(*pair, tmp_path / "out", tick=at_end(change))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("back", [False, True], ids=["a new time", "the time set back"])
def test_an_input_that_changed_over_a_kill(pair, tmp_path, back):
    """Where size and times are those of before, each tensor is found to be another by its checksum."""
    file = pair[1] / "model.safetensors"
    with pytest.raises(Stop):
        convert.convert(*pair, tmp_path / "out", tick=at_end(stop))
    stat = file.stat()
    edit(pair[1], lambda tensors: (tensors[NORM].add_(1), tensors["model.layers.0.mlp.up_proj.weight"].mul_(1.5)))
    if not back:
        with pytest.raises(DataError, match="differs in 'tuned files'"):
            convert.convert(*pair, tmp_path / "out")
        return
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    report = convert.convert(*pair, tmp_path / "out", allow_residual=1)  # half of that weight is in its change now
    assert NORM in rows(report)
    assert contents(tmp_path / "out") == _fresh(pair, tmp_path)


def _fresh(pair, tmp_path):
    (tmp_path / "out").rename(tmp_path / "first")
    convert.convert(*pair, tmp_path / "out", allow_residual=1)
    return contents(tmp_path / "out")


@pytest.mark.parametrize("plant", ["equal", "other factors", *SLOW_PLANTS])
def test_unfinished_work_that_says_what_is_not_so(pair, tmp_path, plant):
    with pytest.raises(Stop):
        convert.convert(*pair, tmp_path / "out", tick=at_end(stop))
    changed = []
    for path in sorted((tmp_path / ".out.partial").glob("0*.safetensors")):
        file = TensorFile(path)
        record = json.loads(file.metadata["record"])
        if "up_proj" not in record["name"]:
            continue
        tensors = load_file(path)
        if plant == "equal":
            record, tensors = record | {"kind": "equal", "rank": 0}, {}
        elif plant == "another residual":
            record["residual"] = 0.5
        elif plant == "another's":
            record["name"] = record["name"].replace("up_proj", "gate_proj")
        else:
            tensors["left"] = tensors["left"] * 2
        write_tensors(path, in_memory(tensors), file.metadata | {"record": json.dumps(record, sort_keys=True)})
        changed.append(path)
    report = convert.convert(*pair, tmp_path / "out")
    assert len(changed) == 2
    assert sum("up_proj" in name for name in rows(report)) == 2
    assert report.residual < 1e-5
    assert contents(tmp_path / "out") == _fresh(pair, tmp_path)


def classifier(folder, name, **entries):
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    common = {"vocab_size": VOCABULARY, "num_labels": 3, "max_position_embeddings": 64}
    if "GPT2" in name:
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **common, **entries)
    elif "Bart" in name:
        sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4}
        sizes |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
        config = transformers.BartConfig(**sizes, **common, **entries)
    else:
        config = getattr(transformers, name.partition("For")[0] + "Config")(**sizes, **common, **entries)
    model = getattr(transformers, name)(config)
    model.save_pretrained(folder / "start")
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() == 2 and min(param.shape) >= 32 and len(param) != VOCABULARY:
                param.add_(0.01 * torch.randn(len(param), 2) @ torch.randn(2, param.shape[1]))
    model.save_pretrained(folder / "tuned")
    return folder / "start", folder / "tuned"


@pytest.mark.parametrize(
    ("name", "key", "values", "refused"),
    [
        ("GPT2ForSequenceClassification", "pad_token_id", (1, 2), True),
        ("LlamaForSequenceClassification", "pad_token_id", (1, 2), True),
        ("LlamaForSequenceClassification", "pad_token_id", (None, 2), False),  # one reads no padded batches at all
        ("LlamaForSequenceClassification", "eos_token_id", (1, 2), False),
        ("LlamaForCausalLM", "pad_token_id", (1, 2), False),
        ("BartForSequenceClassification", "eos_token_id", (1, 2), True),
        ("RobertaForMaskedLM", "pad_token_id", (1, 2), True),
        ("BertForSequenceClassification", "pad_token_id", (1, 2), False),
    ],
)
def test_ids_of_special_tokens_that_a_model_computes_with(tmp_path, name, key, values, refused):
    pair = classifier(tmp_path, name)
    for folder, value in zip(pair, values, strict=True):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    if refused:
        with pytest.raises(DataError, match=f"the configs differ in '{key}': 1 in .*, 2 in"):
            convert.convert(*pair, tmp_path / "out")
        return
    report = convert.convert(*pair, tmp_path / "out")
    assert any(key in note for note in report.notes) == (None in values)


@pytest.mark.parametrize("kind", ["llama", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("gpt2", "bert"))])
def test_a_layer_whose_change_is_of_full_rank_is_saved_in_full(tmp_path, kind):
    """Exactly, and in half the bytes; PEFT needs one change of low rank besides, and where there is none all are factors."""
    start, tuned = make(tmp_path, kind, others=False)
    fresh = {
        "llama": "model.layers.1.self_attn.q_proj.weight",
        "gpt2": "transformer.h.1.attn.c_proj.weight",
        "bert": "bert.pooler.dense.weight",
    }[kind]
    names = [*load_file(tuned / "model.safetensors")]
    key = fresh if fresh in names else fresh.partition(".")[2]
    edit(tuned, lambda tensors: tensors[key].copy_(torch.randn(tensors[key].shape, generator=torch.Generator().manual_seed(3))))
    report = convert.convert(start, tuned, tmp_path / "out")
    row = next(row for row in report.rows if row.name == fresh)
    assert row.kind == "full"
    assert row.nbytes == 4 * row.shape[0] * row.shape[1]
    assert sum(row.kind == "low_rank" for row in report.rows) > 5
    assert report.residual <= 1e-5
    merged = load_file(convert.merge(start, tmp_path / "out", tmp_path / "merged") / "model.safetensors")
    assert torch.equal(merged[key], load_file(tuned / "model.safetensors")[key])


def test_a_tensor_with_countless_rows_of_nothing(tmp_path):
    pair = make(tmp_path)
    for folder in pair:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        end = len(data) - 8 - size
        header["odd"] = {"dtype": "F32", "shape": [2**32, 2**32, 0], "data_offsets": [end, end]}
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    assert "odd" not in rows(convert.convert(*pair, tmp_path / "out"))
