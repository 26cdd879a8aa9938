"""Small models of every kind that an adapter can be made for, each with a loss and batches."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tests.support.models import VOCABULARY, gpt2, llama, text_batches, text_loss

_MOE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "experts_implementation": "eager",  # the grouped product does not support float64
}


def tied():
    return llama(tie_word_embeddings=True)


def bert():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertModel(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **shape, **dropout)).double()


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**_MOE, num_local_experts=4)).double()


def qwen():
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(0)
    sizes = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**_MOE, **sizes)).double()


def gpt_oss():
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    sizes = {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    return GptOssForCausalLM(GptOssConfig(**_MOE, **sizes)).double()


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.third = nn.Conv1d(8, 6, 3, stride=2)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.norm(self.second(self.first(x).tanh())).mean(3)
        return self.head(self.third(x).tanh().mean(2))


def conv():
    torch.manual_seed(0)
    return ConvNet().double()


def images(steps):
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(4, 3, 6, 6, generator=generator, dtype=torch.float64)] for _ in range(steps)]


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    rules: Callable[[str], Any] = lambda spec: spec
    batches: Callable[[int], Any] = lambda steps: text_batches(steps, micro=1)
    loss: Callable[[nn.Module, Any], torch.Tensor] = text_loss


CASES = {
    "llama": Case(llama),
    "tied": Case(tied),
    "gpt2": Case(gpt2),
    "bert": Case(bert, loss=lambda model, ids: model(input_ids=ids).last_hidden_state[..., :8].sigmoid().mean()),
    "conv": Case(
        conv,
        lambda spec: {"head": "none", "*": spec},
        images,
        lambda model, x: (model(x) - x.mean((1, 2))[:, :5]).pow(2).mean(),
    ),
    "embedding": Case(llama, lambda spec: {"*.embed_tokens": spec, "lm_head": spec, "*": "none"}),
    "mixtral": Case(mixtral, lambda spec: {"*.experts.*": spec, "*.mlp.gate": spec, "*_proj": spec, "*": "none"}),
    "qwen": Case(qwen, lambda spec: {"*.experts.*": spec, "*.mlp.gate": spec, "*_proj": spec, "*": "none"}),
    "gpt_oss": Case(gpt_oss, lambda spec: {"*.experts.*_proj": spec, "*_proj": spec, "*": "none"}),
}
