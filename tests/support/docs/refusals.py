"""What users do that is refused, or fails: the cases of docs/faq.md, each as a function that raises."""

import sys
from unittest import mock

import torch
from torch import nn

import lingrad


def small(**options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))


def loss(model):
    return model(torch.ones(4, 16)).square().mean()


def step(model, opt):
    opt.zero_grad()
    loss(model).backward()
    opt.step()


def misspelt():
    lingrad.wrap(small(), "svd(rnak=8, every=200)", lr=1e-3)


def rank_too_large():
    lingrad.wrap(small(), "svd(rank=128)", lr=1e-3)


def rule_without_a_match():
    lingrad.wrap(small(), {"*.self_attn.*": "svd(rank=8)"}, lr=1e-3)


def base_that_reads_weights():
    class Scaled(torch.optim.SGD):
        """As LARS: the step is as long as the weight."""

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for param in group["params"]:
                    if param.grad is not None:
                        param.add_(param.grad * param.norm() / (param.grad.norm() + 1e-8), alpha=-group["lr"])

    lingrad.wrap(small(), "svd(rank=8)", Scaled, lr=1e-3)


def missing_package():
    with mock.patch.dict(sys.modules, {"lion_pytorch": None}):
        lingrad.wrap(small(), "svd(rank=8)", "lion", lr=1e-3)


def accumulation_with_layerwise():
    model = small()
    opt = lingrad.wrap(model, "svd(rank=8)", lr=1e-3, layerwise=True)
    loss(model).backward()
    loss(model).backward()
    opt.step()


def clipping_with_layerwise():
    model = small()
    opt = lingrad.wrap(model, "svd(rank=8)", lr=1e-3, layerwise=True)
    loss(model).backward()
    opt.clip_grad_norm_(1.0)


def residual_in_adapter_mode():
    model = small()
    opt = lingrad.wrap(model, "svd(rank=8)", lr=1e-3, residual="scaled")
    opt.switch("adapter")


def four_bits_in_optimizer_mode():
    import bitsandbytes as bnb

    model = nn.Sequential(bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)).to("cpu")
    lingrad.wrap(model, "svd(rank=8)", lr=1e-3)


def checkpoint_of_another_run():
    saved = lingrad.wrap(small(), "svd(rank=8, every=200)", lr=1e-3).state_dict()
    lingrad.wrap(small(), "svd(rank=4, every=200)", lr=1e-3).load_state_dict(saved)


def export_without_a_ledger():
    model = small()
    opt = lingrad.wrap(model, "svd(rank=8, every=1)", lr=1e-3)
    step(model, opt)
    opt.changes()


def gradient_from_before_a_refresh():
    model = small()
    opt = lingrad.wrap(model, "random(rank=8, every=1)", lr=1e-3)
    loss(model).backward()
    opt.step()
    loss(model).backward()
    opt.step()


def copied():
    import copy

    copy.deepcopy(lingrad.wrap(small(), "svd(rank=8)", lr=1e-3))


def galore_of_the_trainer():
    from transformers import TrainingArguments

    args = TrainingArguments("run", optim="galore_adamw", optim_target_modules=["attn"], report_to="none", use_cpu=True)
    lingrad.hf.trainer_kwargs("svd(rank=8)", args)


def not_projected():
    lingrad.adapt(small().named_parameters(), "svd(rank=8)", lr=1e-3)


CASES = {name: case for name, case in list(globals().items()) if callable(case) and getattr(case, "__module__", "") == __name__}
for helper in ("small", "loss", "step"):
    del CASES[helper]
