"""Small models, small data and one training loop, shared by the tests."""

import torch

from lingrad import testing
from lingrad.models import next_token_loss, norm_in_own_dtype
from lingrad.testing.training import every_kind, token_batches, token_loss, weight_gap

VOCABULARY = 64


def llama(dtype=torch.float64, **overrides):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 88,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**config | overrides)).to(dtype)
    if dtype == torch.float64:
        norm_in_own_dtype(model)
    return model


def gpt2(dtype=torch.float64):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return GPT2LMHeadModel(config).to(dtype)


def zoo(dtype=torch.float64):
    """Every kind of weight there is: those of `EveryKind`, and a Conv1D of GPT-2 in the middle."""
    from transformers.pytorch_utils import Conv1D

    return every_kind(dtype, middle=lambda: Conv1D(14, 10))


def text_batches(steps, micro=3, rows=2, length=12, seed=1):
    return token_batches(steps, micro=micro, rows=rows, length=length, seed=seed, tokens=VOCABULARY)


text_loss = next_token_loss
zoo_batches, zoo_loss = token_batches, token_loss


def train(model, optimizer, batches, loss=text_loss, switches=(), clip=None, schedule=True):
    return testing.train(model, optimizer, batches, loss, switches=switches, clip=clip, schedule=schedule)


def three_ways(build, spec, base, batches, loss=text_loss, switches=(10, 23), clip=None, **options):
    """The weights after an optimizer-mode run, an adapter-mode run and one that switches twice."""
    return testing.trajectories(build, spec, base, batches, loss, switches=switches, clip=clip, **options)


def gap(a, b):
    """The largest relative difference of any weight, |A - B|_F / |B|_F."""
    assert a.keys() == b.keys()
    return weight_gap(a, b)[1]
