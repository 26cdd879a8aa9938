"""What is said where most of a model's matrices are stepped in full and nobody asked for it."""

import re
import warnings

import pytest
import torch
from torch import nn

import lingrad
from tests.support.models import llama, zoo


class Net(nn.Module):
    def __init__(self, rows=40):
        super().__init__()
        self.embed = nn.Embedding(1000, 4)
        self.linear = nn.Linear(4, 4)
        self.layers = nn.ModuleList([nn.Conv1d(4, rows, 3) for _ in range(2)])
        self.head = nn.Linear(4, 1000)


def said(model, rules, make=lingrad.wrap):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make(model, rules, lr=1e-3)
    return [warning for warning in caught if "no rule asks for it" in str(warning.message)]


@pytest.mark.parametrize("make", [lingrad.wrap, lingrad.adapt])
def test_one_line_has_the_numbers_the_largest_and_the_rule(make):
    (warning,) = said(Net(), "svd(rank=2)", make)
    assert warning.category is UserWarning
    assert warning.filename == __file__
    text = str(warning.message)
    assert text.startswith("960 of the 976 elements of the model's matrices (98.4%; ")
    assert "'layers.*.weight' (960)" in text
    (rule,) = re.findall(r"\{'(.*?)': 'svd\(rank=2\)', ...\}", text)
    assert not said(Net(), {rule: "svd(rank=2)", "linear": "svd(rank=2)"})


def test_explain_prints_it_too():
    text = str(lingrad.explain(Net(), "svd(rank=2)"))
    assert text.endswith("trains them in full without this line")
    assert lingrad.explain(llama(), "svd(rank=2)").remark == ""


@pytest.mark.parametrize(
    ("model", "rules"),
    [
        (Net(rows=1), {"linear": "svd(rank=2)", "layers": "none", "*": "none"}),
        (Net(), {"linear": "svd(rank=2)", "*": "none"}),  # asked for
        (Net(), {"linear": "svd(rank=2)", "layers.*": "none"}),
        (llama(), "svd(rank=2)"),  # embeddings and the head are most of it
        (zoo(), "svd(rank=2)"),
    ],
)
def test_nothing_is_said_where_it_was_asked_for(model, rules):
    rules = {k: v for k, v in rules.items() if k != "layers"} if isinstance(rules, dict) else rules
    assert not said(model, rules)


def test_half_is_not_more_than_half():
    model = nn.Sequential(nn.Linear(4, 6), nn.Conv1d(2, 4, 3, bias=False))  # 24 each
    assert not said(model, {"0": "svd(rank=2)"})
    assert said(nn.Sequential(nn.Linear(4, 6), nn.Conv1d(2, 5, 3, bias=False)), {"0": "svd(rank=2)"})


def test_experts_left_out_by_rules():
    (warning,) = said(zoo(), {"biased": "svd(rank=2)"})
    assert "{'experts.gate_up_proj': 'experts(each=svd(rank=2))', ...}" in str(warning.message)


def test_param_groups_are_one_model():
    def groups():
        model = Net()
        first = {"params": [("linear.weight", model.linear.weight)], "rules": {"*": "svd(rank=2)"}}
        others = [(n, p) for n, p in model.named_parameters() if n != "linear.weight"]
        return [first, {"params": others, "rules": {"layers.0.*": "svd(rank=2)"}}]

    assert not said(groups(), "svd(rank=2)")  # 480 of 976
    torch.manual_seed(0)
    named = list(Net().named_parameters())
    assert said(named, {"linear.weight": "svd(rank=2)"})
