"""Runs that are exported, and what PEFT makes of them."""

from pathlib import Path

import pytest
import torch

import lingrad
from tests.support.models import llama, text_batches, train
from tests.support.peft_models import CASES

peft = pytest.importorskip("peft")

ROOT = Path(__file__).parents[2]

SIDES = ("svd(rank=4, every=3, side=left)", "svd(rank=4, every=3, side=right)")

SPECS = (
    *SIDES,
    "svd(rank=4, every=3, side=both)",
    "random(rank=4, every=3, kind=rows)",
    "kron(left=svd(rank=3, every=3), right=random(rank=4, every=2))",
)

MODES = ("adapter", "optimizer")

EXACT = 1e-12  # float64: a few roundings of 1e-16 a step


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def run_of(kind, spec, mode="adapter", steps=6, **options):
    case = CASES[kind]
    model = case.build()
    make = lingrad.adapt if mode == "adapter" else lingrad.wrap
    opt = make(model, case.rules(spec), "adamw", **{"lr": 1e-2, "ledger": True} | options)
    train(model, opt, case.batches(steps), case.loss)
    return model, opt


def merged_by_peft(model, path):
    return dict(peft.PeftModel.from_pretrained(model, path).merge_and_unload().named_parameters())


def llama_run(mode="adapter", dtype=torch.float64, steps=4, spec=SIDES[1], **options):
    model = llama(dtype)
    make = lingrad.adapt if mode == "adapter" else lingrad.wrap
    opt = make(model, spec, "adamw", **{"lr": 1e-2, "ledger": True} | options)
    train(model, opt, text_batches(steps, micro=1))
    return model, opt


def left_in(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))
