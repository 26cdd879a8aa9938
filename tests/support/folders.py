"""Folders of tiny models before and after a simulated training, shared by the tests of conversions."""

import shutil

import torch
from safetensors.torch import load_file, save_file

from tests.support.models import VOCABULARY, gpt2, llama


def bert(dtype=torch.float32):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        num_labels=3,
    )
    return BertForSequenceClassification(config).to(dtype)


BUILD = {
    "llama": llama,
    "tied llama": lambda dtype: llama(dtype, tie_word_embeddings=True),
    "gpt2": gpt2,
    "bert": bert,
}


def is_wide(name, param):
    """Of the models above: the weights a bare spec transforms."""
    return param.dim() == 2 and any(part in name for part in ("proj", "c_", "query", "key", "value", "dense"))


@torch.no_grad()
def tune(model, rank=5, *, kept=1.0, size=1e-2, others=True, steps=1, wide=is_wide):
    """Add a random matrix of a rank to each wide weight, in steps that are rounded to its dtype, and noise to the others."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    for name, param in model.named_parameters():
        if wide(name, param):
            m, n = param.shape
            change = size * draw(m, rank) @ draw(rank, n) / rank**0.5
            for _ in range(steps):
                param.copy_(param.double() * kept ** (1 / steps) + change / steps)
        elif others:
            param.add_((size * draw(*param.shape)).to(param.dtype))
    return model


def make(folder, kind="llama", dtype=torch.float32, *, sharded=False, **options):
    """Save a model as ``folder/base``, and tuned as ``folder/tuned``; its paths."""
    size = {"max_shard_size": "30kB"} if sharded else {}
    model = BUILD[kind](dtype)
    model.save_pretrained(folder / "base", **size)
    tune(model, **options).save_pretrained(folder / "tuned", **size)
    return folder / "base", folder / "tuned"


def edit(folder, change):
    """Change the tensors of an unsharded folder by a function of their dict."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def copy(source, target):
    shutil.copytree(source, target)
    return target


def contents(folder):
    """Path -> bytes of all files."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def left_over(folder):
    """The hidden entries of a folder."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))
