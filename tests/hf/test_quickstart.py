"""docs/quickstart.md: the run as printed, and its table of names against the installed packages."""

import inspect
import re
from dataclasses import fields

import pytest
import torch

from tests.support.docs.pages import DOCS, assert_learned, blocks, run

pytest.importorskip("trl")
bitsandbytes = pytest.importorskip("bitsandbytes")
PAGE = "quickstart.md"


def test_the_page_runs_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    made, trained, saved, loaded = blocks(PAGE)
    names = run(trained, run(made, {}, PAGE), PAGE)
    assert_learned(names["trainer"].state.log_history)
    assert names["rules"].spec == "svd(rank=1024, clip=true)"
    assert names["options"] == {"base": "adamw8bit", "scale": 2.0, "layerwise": True}
    run(saved, names, PAGE)
    capsys.readouterr()
    run(loaded, names, PAGE)
    assert " plus " in capsys.readouterr().out  # an answer of the kind it was trained on
    from transformers import AutoModelForCausalLM

    prompt = names["prompt"]
    with torch.no_grad():
        plain, adapted = (m(**prompt).logits for m in (AutoModelForCausalLM.from_pretrained("tuned"), names["tuned"]))
    torch.testing.assert_close(adapted, plain, rtol=0, atol=1e-4)  # float32 rounding of W + B A against the merged weight


def accepted(kind):
    if kind == "TrainingArguments":
        from transformers import TrainingArguments as cls
    else:
        import trl

        cls = getattr(trl, kind)
    names = {one.name for one in fields(cls)} if kind != "SFTTrainer" else set(inspect.signature(cls.__init__).parameters)
    return names - {"kwargs"}


def test_its_table_of_names_is_that_of_the_installed_packages():
    import trl

    text = (DOCS / PAGE).read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) >= 13
    checked = 0
    for old, new in rows:
        old, new = old.strip("`"), new.strip("`")
        if match := re.fullmatch(r"(SFTTrainer)\((\w+)=\.\.\.\)", old):
            owner, name = re.fullmatch(r"(\w+)\((\w+)=\.\.\.\)", new).groups()
            assert match[2] not in accepted("SFTTrainer"), old
            assert name in accepted(owner), new
        elif re.fullmatch(r"\w+", old) and re.fullmatch(r"[a-z_]+", new) and old.islower() and old != "setup_chat_format":
            assert old not in accepted("SFTConfig"), old
            assert new in accepted("SFTConfig"), new
        elif old in ("DataCollatorForCompletionOnlyLM", "setup_chat_format"):
            assert not hasattr(trl, old)
            assert hasattr(trl, new) or "assistant_only_loss" in new
        else:
            continue
        checked += 1
    assert checked >= 9
