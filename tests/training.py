"""Small models, small data and one training loop, shared by the tests."""

import torch
from torch import nn

import lingrad
from lingrad.research.models import next_token_loss, norm_in_own_dtype
from lingrad.research.runner import weight_gap

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


class Experts(nn.Module):
    """Fused experts, one 3-D weight [experts, in, out]; every token goes to all."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 12, 10) / 4)

    def forward(self, x):
        return torch.einsum("bi,eio->bo", x, self.gate_up_proj).tanh()


class Zoo(nn.Module):
    """One layer of every kind of weight: embedding, convolution, experts, Linear with and without bias."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.conv = nn.Conv2d(1, 6, (3, 3), padding=1)
        self.shrink = nn.Conv1d(6, 1, 1)
        self.experts = Experts()
        self.biased = nn.Linear(10, 14)
        self.head = nn.Linear(14, 20, bias=False)

    def forward(self, ids):
        x = self.embed(ids)  # [batch, length, 12]
        x = self.conv(x[:, None]).tanh().flatten(2)  # [batch, 6, length * 12]
        x = self.shrink(x).view(ids.shape[0], -1, 12).mean(1)
        return self.head(nn.functional.relu(self.biased(self.experts(x)), inplace=True))


def zoo(dtype=torch.float64):
    torch.manual_seed(0)
    return Zoo().to(dtype)


def text_batches(steps, micro=3, rows=2, length=12, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randint(0, VOCABULARY, (rows, length), generator=generator) for _ in range(micro)] for _ in range(steps)]


text_loss = next_token_loss


def zoo_batches(steps, micro=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randint(0, 20, (4, 5), generator=generator) for _ in range(micro)] for _ in range(steps)]


def zoo_loss(model, ids):
    return nn.functional.cross_entropy(model(ids), ids[:, 0])


def train(model, optimizer, batches, loss=text_loss, switches=(), clip=None, schedule=True):
    """Train with a cosine schedule, switching modes before the steps named; returns the last loss."""
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches)) if schedule else None
    last = None
    for step, micro_batches in enumerate(batches):
        if step in switches:
            optimizer.switch("adapter" if optimizer.mode == "optimizer" else "optimizer")
        optimizer.zero_grad()
        for batch in micro_batches:
            last = loss(model, batch) / len(micro_batches)
            last.backward()
        if clip is not None:
            optimizer.clip_grad_norm_(clip)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return float(last.detach())


def three_ways(build, spec, base, batches, loss=text_loss, switches=(10, 23), clip=None, **options):
    """The weights after an optimizer-mode run, an adapter-mode run and one that switches twice."""
    weights = []
    for make, when in ((lingrad.wrap, ()), (lingrad.adapt, ()), (lingrad.wrap, switches)):
        model = build()
        optimizer = make(model, spec, base, **options)
        train(model, optimizer, batches, loss, when, clip)
        optimizer.detach()
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return weights


def gap(a, b):
    """The largest relative difference of any weight, |A - B|_F / |B|_F."""
    assert a.keys() == b.keys()
    return weight_gap(a, b)[1]
