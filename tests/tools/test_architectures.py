"""Architectures of transformers, found, made tiny and tried; ``make architectures`` makes the table of all."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from tests.support.architectures.catalog import catalog
from tests.support.architectures.checks import CHECKS, WrongValueError, check, outcome
from tools import architectures

ROOT = Path(__file__).parents[2]
FEW = ("BertForMaskedLM", "ViTForImageClassification")
SAMPLE = (
    "GPT2LMHeadModel", "MixtralForCausalLM", "DeepseekV3ForCausalLM", "BambaForCausalLM", "DebertaV2ForMaskedLM",
    "T5ForConditionalGeneration", "SwinForImageClassification", "DetrForObjectDetection", "Wav2Vec2ForCTC",
    "WhisperForConditionalGeneration", "LlavaForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration",
)  # fmt: skip


def found(name):
    (architecture,) = [one for one in catalog() if one.name == name]
    return check(architecture)


def test_a_class_is_listed_once():
    names = [one.name for one in catalog()]
    assert len(names) == len(set(names)) > 600
    assert {*FEW, *SAMPLE} <= set(names)


@pytest.mark.parametrize("name", [*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in SAMPLE)])
def test_it_works_or_is_refused_in_words(name):
    row = found(name)
    assert "reason" not in row
    faults = {what: (state, why) for what, (state, why) in row["checks"].items() if state in ("error", "wrong")}
    assert faults == {}
    works = {what for what, (state, _) in row["checks"].items() if state == "works"}
    assert works >= {"wrap", "adapt", "equal", "resume", "explain"}
    assert "export" in works or "PEFT" in row["checks"]["export"][1]
    assert torch.get_default_dtype() == torch.float32


def test_the_outcome_of_a_check():
    from lingrad.errors import ExportError

    def failing(error):
        def run():
            raise error

        return outcome(run)

    assert failing(WrongValueError("differs")) == ("wrong", "differs")
    assert failing(ExportError("cannot\n be")) == ("refused", "ExportError: cannot be")
    assert failing(KeyError("bias")) == ("error", "KeyError: 'bias'")
    assert outcome(lambda: None) == ("works", "")


def test_the_page_holds_the_recorded_results():
    rows = json.loads((ROOT / "docs" / "architectures.json").read_text())
    assert all("reason" in row or set(row["checks"]) == set(CHECKS) for row in rows)
    text = (ROOT / "docs" / "architectures.md").read_text()
    shown = text.partition("<!-- architectures:begin -->\n")[2].partition("<!-- architectures:end -->")[0]
    versions = shown.partition("\n")[0]  # those of the recorded run
    assert architectures.page(rows).partition("\n")[2] == shown.partition("\n")[2]
    assert versions.startswith("transformers ")
