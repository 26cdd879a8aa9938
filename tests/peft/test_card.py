"""What comes with an exported adapter: its model card, the tokenizer, the name of its starting model, a hub."""

import json
import re
import shlex
import shutil
import socket
import sys

import pytest
import torch

import lingrad
from lingrad import __main__, convert
from lingrad import peft as bridge
from lingrad.errors import DataError, ExportError, SpecError
from lingrad.peft.loaders import LOADERS
from tests.support.docs import pages
from tests.support.folders import contents, make
from tests.support.models import llama, text_batches, train
from tests.support.peft_runs import ROOT, peft
from tests.support.trainers import make as make_trainer

UNKNOWN = "[UNK]"
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def run():
    model = llama(torch.float32)
    opt = lingrad.adapt(model, "svd(rank=4, every=0)", "adamw", lr=1e-2, ledger=True, train_only="transformed")
    train(model, opt, text_batches(2, micro=1))
    return opt


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({UNKNOWN: 0, "a": 1}, unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    found = PreTrainedTokenizerFast(tokenizer_object=words, unk_token=UNKNOWN, pad_token=UNKNOWN)
    found.chat_template = TEMPLATE
    return found


def front(folder):
    """The YAML in front of a card."""
    import yaml

    _, yaml_, _ = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(yaml_)


class TestCard:
    def test_its_metadata_are_those_that_pefts_own_card_has(self, run, tmp_path):
        bridge.export(run, tmp_path / "a", base_model="org/model", quiet=True)
        found = front(tmp_path / "a")
        model = llama(torch.float32)
        model.config._name_or_path = model.name_or_path = "org/model"
        theirs = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
        theirs.create_or_update_model_card(str(tmp_path))
        expected = front(tmp_path)
        assert found.pop("tags") == [*(tag for tag in expected.pop("tags") if tag != "transformers"), "lingrad"]
        assert found == expected

    def test_it_has_spec_ranks_residual_and_commands(self, run, tmp_path):
        report = bridge.export(run, tmp_path / "a", base_model="org/model", target="vllm", quiet=True)
        text = (tmp_path / "a/README.md").read_text()
        assert "An adapter of `org/model`, of rank 4 for 14 weights" in text
        assert "Trained by `svd(rank=4, every=0)`." in text
        assert f"is {report.residual:.1e}." in text
        assert "| vLLM | loads | `vllm serve org/model --enable-lora --max-lora-rank 8 --lora-modules NAME=DIR` |" in text
        assert str(tmp_path) not in text

    def test_its_python_loads_the_adapter(self, run, tmp_path, monkeypatch):
        llama(torch.float32).save_pretrained(tmp_path / "START")
        bridge.export(run, tmp_path / "DIR", start=tmp_path / "START", quiet=True)
        (block,) = re.findall(r"```python\n(.*?)```", (tmp_path / "DIR/README.md").read_text(), flags=re.DOTALL)
        monkeypatch.chdir(tmp_path)
        names = {}
        exec(compile(block, "README.md", "exec"), names)  # noqa: S102 - our own text
        ids = text_batches(1)[0][0]
        with torch.no_grad():  # float32: a few roundings of 6e-8 of logits around 1
            assert (names["model"](ids).logits - run.model(ids).logits).abs().max() <= 1e-5

    def test_a_folder_is_no_name_of_a_model_on_a_hub(self, run, tmp_path):
        llama(torch.float32).save_pretrained(tmp_path / "start")
        bridge.export(run, tmp_path / "a", start=tmp_path / "start", quiet=True)
        assert front(tmp_path / "a") == {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora", "lingrad"]}
        assert str(tmp_path) not in (tmp_path / "a/README.md").read_text()

    def test_a_conversion_has_one(self, tmp_path):
        base, tuned = make(tmp_path)
        convert.convert(base, tuned, tmp_path / "a", base_model="org/model")
        assert front(tmp_path / "a")["base_model"] == "org/model"
        assert json.loads((tmp_path / "a/adapter_config.json").read_text())["base_model_name_or_path"] == "org/model"
        assert "| vLLM | refused | modules saved in full" in (tmp_path / "a/README.md").read_text()


def test_the_serving_page(tmp_path, monkeypatch, capsys):
    """docs/serving.md: its Python and its commands, in their order, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in pages.blocks("serving.md"):
        pages.run(block, names, "serving.md")
    assert bridge.check_adapter("served", "llama.cpp").findings[0].verdict == "loads"
    printed = capsys.readouterr().out.splitlines()[-1]
    assert printed.startswith("tensor([[")
    commands = pages.commands("serving.md")
    assert len(commands) == 4
    for command in commands:
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        with pytest.raises(SystemExit) as caught:
            __main__.main()
        assert not caught.value.code, command + capsys.readouterr().err
    for loader in LOADERS.values():  # every rule that the page tells is one of the file's
        assert loader.title in (ROOT / "docs/serving.md").read_text()


class TestName:
    def test_an_adapter_of_a_model_without_a_name_says_so(self, run, tmp_path):
        with pytest.warns(UserWarning, match="base_model_name_or_path is empty, .* base_model='owner/name' names it"):
            report = bridge.export(run, tmp_path / "a", quiet=True)
        assert "base_model_name_or_path is empty" in report.notes[-1]
        report = bridge.export(run, tmp_path / "b", base_model="org/model", quiet=True)
        assert not report.notes

    def test_so_does_a_run_that_is_converted_without_its_start(self, run, tmp_path):
        run.model.save_pretrained(tmp_path / "run")
        torch.save(run.state_dict(), tmp_path / "run/optimizer.pt")
        assert "base_model_name_or_path is empty" in convert.convert_run(tmp_path / "run", tmp_path / "a").notes[-1]
        assert not convert.convert_run(tmp_path / "run", tmp_path / "b", base_model="org/model").notes

    @pytest.mark.parametrize("wrong", ["", " ", "a\nb", 3])
    def test_what_is_no_name(self, run, tmp_path, wrong):
        with pytest.raises(SpecError, match="base_model must be the name or the folder of a model"):
            bridge.export(run, tmp_path / "a", base_model=wrong)


class TestTokenizer:
    def test_that_of_the_start_comes_along_with_its_template(self, run, tmp_path):
        from transformers import AutoTokenizer

        llama(torch.float32).save_pretrained(tmp_path / "start")
        tokenizer().save_pretrained(tmp_path / "start")
        bridge.export(run, tmp_path / "a", start=tmp_path / "start", quiet=True)
        assert AutoTokenizer.from_pretrained(tmp_path / "a").chat_template == TEMPLATE
        bridge.export(run, tmp_path / "b", tokenizer=tokenizer(), quiet=True)
        bridge.export(run, tmp_path / "c", tokenizer=tmp_path / "start", quiet=True)
        names = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
        assert {name for name in contents(tmp_path / "b") if "token" in name or "template" in name} == names
        assert all((tmp_path / "b" / name).read_text() == (tmp_path / "c" / name).read_text() for name in names)

    def test_that_of_the_tuned_model(self, tmp_path):
        base, tuned = make(tmp_path)
        tokenizer().save_pretrained(tuned)
        convert.convert(base, tuned, tmp_path / "a")
        assert (tmp_path / "a/chat_template.jinja").read_text() == TEMPLATE

    def test_that_of_a_trainer(self, tmp_path):
        trainer = make_trainer(
            tmp_path / "run", mode="adapter", trainer={"processing_class": tokenizer()}, train_only="transformed"
        )
        trainer.train()
        trainer.save_model(tmp_path / "out")
        assert (tmp_path / "out/adapter/chat_template.jinja").read_text() == TEMPLATE
        assert bridge.check_adapter(tmp_path / "out/adapter", "vllm").findings[0].verdict == "loads"

    @pytest.mark.parametrize(("wrong", "message"), [("nowhere", "'nowhere' has no tokenizer"), (3, "not a int")])
    def test_what_is_none(self, run, tmp_path, wrong, message):
        with pytest.raises(DataError, match=message):
            bridge.export(run, tmp_path / "a", tokenizer=wrong, quiet=True)
        assert not list(tmp_path.iterdir())


class TestHub:
    @pytest.fixture
    def hub(self, monkeypatch):
        """A hub that writes down what it is asked; whatever opens a connection fails."""
        import huggingface_hub

        calls = []

        class Api:
            def __init__(self, token=None):
                calls.append(("token", token))

            def create_repo(self, repository, **options):
                calls.append(("create", repository, options))
                return f"https://hub/{repository}"

            def upload_folder(self, **options):
                if options["repo_id"] == "org/full":
                    raise OSError("no space left")
                calls.append(("upload", options))

        def refuse(*_):
            raise AssertionError("a connection was opened")

        monkeypatch.setattr(huggingface_hub, "HfApi", Api)
        monkeypatch.setattr(socket.socket, "connect", refuse)
        return calls

    def test_only_where_it_was_asked_for(self, run, tmp_path, hub):
        bridge.export(run, tmp_path / "a", base_model="org/model", quiet=True)
        assert hub == []
        bridge.export(run, tmp_path / "b", base_model="org/model", push_to_hub="org/adapter", quiet=True)
        assert hub[1][:2] == ("create", "org/adapter")
        assert hub[2][1]["folder_path"] == str(tmp_path / "b")
        assert "lingrad_report.json" in hub[2][1]["ignore_patterns"]  # it names folders
        hub.clear()
        assert bridge.push_to_hub(tmp_path / "a", "org/other", private=True, token=UNKNOWN) == "https://hub/org/other"
        assert hub[:2] == [("token", UNKNOWN), ("create", "org/other", {"private": True, "exist_ok": True})]

    def test_an_adapter_that_others_could_not_load(self, run, tmp_path, hub):
        with pytest.raises(DataError, match="base_model_name_or_path is empty, by which others cannot load"):
            bridge.export(run, tmp_path / "a", push_to_hub="org/adapter", quiet=True)
        assert not list(tmp_path.iterdir())
        llama(torch.float32).save_pretrained(tmp_path / "start")
        bridge.export(run, tmp_path / "a", start=tmp_path / "start", quiet=True)
        with pytest.raises(DataError, match=r"is the folder '.*start', by which others cannot load"):
            bridge.push_to_hub(tmp_path / "a", "org/adapter")
        assert hub == []

    def test_a_failure_leaves_the_folder(self, run, tmp_path, hub):
        with pytest.raises(ExportError, match=r"'.*a' is written, and was not pushed to 'org/full': OSError: no space left"):
            bridge.export(run, tmp_path / "a", base_model="org/model", push_to_hub="org/full", quiet=True)
        assert (tmp_path / "a/README.md").is_file()
        shutil.rmtree(tmp_path / "a")
        with pytest.raises(SpecError, match="push_to_hub must be the name of a repository, 'owner/name', not 'a b'"):
            bridge.export(run, tmp_path / "a", base_model="org/model", push_to_hub="a b", quiet=True)
