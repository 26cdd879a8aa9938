"""The task of a text: what it reads, by which tokens, and which part is for what."""

import io
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from threading import Barrier

import pytest
import torch

from lingrad.errors import DataError, SpecError
from lingrad.research import addresses, tokens, trial
from lingrad.research.corpus import moby_dick
from lingrad.research.schema import Table
from lingrad.research.tasks import make_task
from lingrad.research.tasks.language import window_loss
from lingrad.research.tokens import train_bpe
from tests.support.language import save_language_model, word_tokenizer, write_rows
from tests.support.models import llama

SMALL = {"hidden": 32, "layers": 1, "length": 8, "rows": 2, "held": 3}
WORDS = "the cat sat on a mat . how many cats are there ? "


def text_task(folder=Path(), **options):
    return make_task("text", Table({**SMALL, **options}, "plan.toml"), folder)


def ids(task, part):
    return task._read[0][part]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.parquet", "folder"])
def test_files_of_every_kind(tmp_path, name):
    texts = [f"{WORDS}{i}" for i in range(8)]
    if name == "a.txt":
        (tmp_path / name).write_text("\n".join(texts))
    elif name == "folder":
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "1.jsonl", [{"text": text} for text in texts[:5]])
        write_rows(tmp_path / name / "2.parquet", [{"text": text} for text in texts[5:]])
    else:
        write_rows(tmp_path / name, [{"text": text} for text in texts])
    task = text_task(tmp_path, data=name)
    whole = "\n".join(texts).encode()
    tenth = len(whole) // 10
    assert bytes(ids(task, "training").tolist()) == whole[: 8 * tenth]
    assert bytes(ids(task, "tuning").tolist()) == whole[8 * tenth : 9 * tenth]
    assert bytes(ids(task, "final").tolist()) == whole[9 * tenth : 10 * tenth]


def test_a_byte_order_mark_is_not_trained_on(tmp_path):
    for name in ("1.txt", "2.txt"):
        (tmp_path / name).write_text(WORDS * 9, encoding="utf-8-sig")
    task = text_task(tmp_path, data=".")
    assert task._text() == f"{WORDS * 9}\n{WORDS * 9}"


def test_another_column(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"content": WORDS * 9, "text": 3}])
    assert len(ids(text_task(tmp_path, data="a.jsonl", column="content"), "tuning")) == len(WORDS * 9) // 10
    with pytest.raises(DataError) as caught:
        ids(text_task(tmp_path, data="a.jsonl"), "final")
    assert str(caught.value) == f"{path}, row 1: 'text' is no text; another key is named by 'column'"


def test_a_bpe_is_trained_on_the_training_part_alone():
    text = moby_dick()[:40_000]
    found = train_bpe(text, 300)
    assert found.vocabulary == 300
    assert torch.equal(found.encode(text), train_bpe(text, 300).encode(text))
    assert len(found.encode(text)) < 0.9 * len(text.encode())
    assert found.encode("a\u00e9\u4e2d\n").tolist()  # bytes that no merge has


class TestCache:
    @pytest.fixture
    def trained(self, monkeypatch):
        """Each text that a BPE was trained on."""
        found, train = [], tokens._train
        monkeypatch.setattr(tokens, "_train", lambda module, text, size: (found.append(text), train(module, text, size))[1])
        return found

    def test_a_bpe_is_trained_once_for_a_text_and_a_size(self, trained, tmp_path):
        text = moby_dick()[:20_000]
        plain = train_bpe(text, 300)
        several = [train_bpe(text, 300, tmp_path / "cache") for _ in range(3)]
        assert len(trained) == 2
        for found in several:
            assert found.vocabulary == plain.vocabulary
            assert torch.equal(found.encode(moby_dick()[:40_000]), plain.encode(moby_dick()[:40_000]))
        assert train_bpe(text, 301, tmp_path / "cache").vocabulary == 301
        train_bpe(text + " ", 300, tmp_path / "cache")
        assert len(trained) == 4
        assert len(list((tmp_path / "cache").iterdir())) == 3

    def test_another_version_of_tokenizers_trains_again(self, trained, tmp_path, monkeypatch):
        import tokenizers

        train_bpe(WORDS, 260, tmp_path)
        monkeypatch.setattr(tokenizers, "__version__", "0.0.1")
        train_bpe(WORDS, 260, tmp_path)
        assert len(trained) == 2

    @pytest.mark.parametrize("spoil", [lambda data: data[:-9], lambda _: b"", lambda data: data.replace(b'"h', b'"j', 1)])
    def test_a_file_that_is_not_as_it_was_written_is_replaced(self, trained, tmp_path, spoil):
        expected = train_bpe(WORDS, 270, tmp_path).encode(WORDS)
        (file,) = tmp_path.iterdir()
        data = file.read_bytes()
        file.write_bytes(spoil(data))
        assert file.read_bytes() != data
        assert torch.equal(train_bpe(WORDS, 270, tmp_path).encode(WORDS), expected)
        assert file.read_bytes() == data
        assert len(trained) == 2

    def test_two_at_once_do_not_disturb_each_other(self, trained, tmp_path, monkeypatch):
        both, train = Barrier(2, timeout=60), tokens._train
        monkeypatch.setattr(tokens, "_train", lambda *given: (both.wait(), train(*given))[1])
        with ThreadPoolExecutor(2) as pool:
            first, second = pool.map(lambda _: train_bpe(WORDS, 270, tmp_path / "cache"), range(2))
        assert len(trained) == 2
        assert torch.equal(first.encode(WORDS), second.encode(WORDS))
        assert torch.equal(train_bpe(WORDS, 270, tmp_path / "cache").encode(WORDS), first.encode(WORDS))
        assert len(trained) == 2
        assert len(list((tmp_path / "cache").iterdir())) == 1

    def test_the_runs_of_a_plan_share_it(self, trained, tmp_path):
        content = {
            "name": "bpe",
            "seeds": [1],
            "task": {**SMALL, "kind": "text", "data": "a.txt", "tokenizer": "bpe", "vocabulary": 260, "steps": 2},
            "search": {"trials": 1, "sampler": "grid", "space": {"lr": [0.01]}},
            "entries": [{"name": "svd", "method": "svd(rank=2)"}],
        }
        (tmp_path / "a.txt").write_text(WORDS * 20)
        job = {"content": content, "where": "plan", "folder": str(tmp_path), "quick": False, "entry": "svd", "threads": 1}
        job |= {"values": {"lr": 0.01}, "seed": 3, "part": "final", "steps": None}
        (tmp_path / "job.json").write_text(json.dumps({**job, "cache": str(tmp_path / "cache")}))
        records = []
        for name in ("first", "second"):
            assert trial.main(str(tmp_path / "job.json"), str(tmp_path / name)) == 0
            records.append(json.loads((tmp_path / name / "result.json").read_text()))
        assert len(trained) == 1
        assert trial.main(str(tmp_path / "first/result.json"), str(tmp_path / "third")) == 0  # from its record, without a cache
        records.append(json.loads((tmp_path / "third/result.json").read_text()))
        assert len(trained) == 2
        assert {record["train_info"]["status"] for record in records} == {"success"}
        assert len({json.dumps(record["train_info"]["metrics"]) for record in records}) == 1
        assert all(record["run_info"]["job"] == job for record in records)


def test_a_long_text_is_cut_where_no_token_reaches_across(monkeypatch):
    text = moby_dick()[:20_000]
    whole = train_bpe(text, 400)
    expected = whole.encode(text)
    monkeypatch.setattr(tokens, "PIECE", 50)
    assert torch.equal(train_bpe(text, 400).encode(text), expected)


@pytest.mark.parametrize("model", ["small", "llama-60m"])
def test_a_models_vocabulary_is_that_of_its_tokens(tmp_path, model):
    training = "ab " * 800
    (tmp_path / "a.txt").write_text(training + "zq " * 200)
    task = text_task(tmp_path, data="a.txt", tokenizer="bpe", vocabulary=259, model=model)
    # of "ab " * 800 the only pairs are (a, b), (space, a) and (space, ab); in what follows nothing is merged
    assert len(ids(task, "training")) <= 801
    assert len(ids(task, "final")) == 300
    with torch.device("meta"):
        count = task.build(0, torch.float32).config.vocab_size
    assert count == (task._read[1] if model == "small" else 32000)


def test_a_given_tokenizer(tmp_path):
    word_tokenizer().save_pretrained(tmp_path / "words")
    (tmp_path / "a.txt").write_text(WORDS * 20)
    task = text_task(tmp_path, data="a.txt", tokenizer="words")
    assert torch.equal(ids(task, "training")[:3], torch.tensor(word_tokenizer()("the cat sat")["input_ids"]))
    model = task.build(0, torch.float64)
    assert model.config.vocab_size == len(word_tokenizer())
    with torch.no_grad():
        assert task.judge(model, "tuning")["loss"] > 0
    save_language_model(tmp_path / "model")
    own = text_task(tmp_path, data="a.txt", model="./model")
    assert torch.equal(ids(own, "final"), ids(task, "final"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": "bpe"}, "task 'text': 'bpe' needs 'vocabulary', more than the 256 bytes, not 0"),
        ({"vocabulary": 300}, "task 'text': 'vocabulary' is for tokenizer = \"bpe\"; leave it out"),
        ({"model": "./m", "tokenizer": "t"}, "task 'text': the model ./m has a tokenizer of its own; leave 'tokenizer' out"),
        ({"hidden": 33}, "task 'text': 'hidden' must be a multiple of 32, not 33"),
        ({"model": "smal"}, "task 'text': there is no model 'smal'; known: small, llama-60m, "),
    ],
)
def test_what_cannot_be(options, message):
    with pytest.raises(SpecError) as caught:
        text_task(**options)
    assert str(caught.value).startswith(message)


def test_what_is_missing(tmp_path):
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "empty").mkdir()
    for options, message in (
        ({"data": "short.txt"}, "short.txt is too short: its shortest part has 0 tokens, and a window 8; expected more"),
        ({"data": "empty"}, f"there is no *.txt, *.jsonl or *.parquet in {tmp_path / 'empty'}"),
        ({"tokenizer": "gone"}, f"there is no folder {tmp_path / 'gone'}; expected one with a tokenizer of transformers"),
        ({"tokenizer": "empty"}, f"{tmp_path / 'empty'} holds no tokenizer that transformers can read: "),
    ):
        with pytest.raises(DataError) as caught:
            ids(text_task(tmp_path, **options), "final")
        assert str(caught.value).startswith(message)


class TestAddresses:
    @pytest.fixture
    def archive(self, tmp_path, monkeypatch):
        path = tmp_path / addresses.ARCHIVE
        path.parent.mkdir(parents=True)
        with tarfile.open(path, "w:gz") as file:
            for year in (1999, 2000, 1790):
                data = json.dumps({"text": f"of {year} " * 20}).encode()
                member = tarfile.TarInfo(f"package/data/{year}_a.json")
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
        monkeypatch.setattr(addresses, "SHA256", sha256(path.read_bytes()).hexdigest())
        return path

    def test_it_trains_to_1999_and_is_judged_by_what_came_after(self, archive, tmp_path):
        plans = tmp_path / "docs" / "plans"
        plans.mkdir(parents=True)
        task = text_task(plans, data="state-of-the-union")  # found in a folder above the plan's
        assert bytes(ids(task, "training").tolist()).decode() == "of 1790 " * 20 + "\n" + "of 1999 " * 20
        later = [bytes(ids(task, part).tolist()).decode() for part in ("tuning", "final")]
        assert later == ["of 2000 " * 10] * 2

    def test_another_file_is_refused(self, archive):
        archive.write_bytes(b"no archive")
        with pytest.raises(DataError, match="is not there, or another file: run `make addresses` in lingrad's repository"):
            addresses.read_addresses(archive)


def test_a_last_batch_that_is_smaller_weighs_less():
    """The loss of nine windows is their mean, whatever is read at once."""
    model, ids = llama(), torch.arange(90) % 64
    found = [window_loss(model, ids, length=10, count=9, rows=rows) for rows in (1, 4, 8, 9)]
    assert found == pytest.approx(found[:1] * 4, rel=1e-6)  # transformers computes it in float32
