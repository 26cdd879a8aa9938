"""Runs of transformers' Trainer on tiny models, for tests: everything is local, small and seeded."""

import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch

import lingrad.hf
from tests.support.models import VOCABULARY, llama

SPECS = {
    "svd": "svd(rank=4, every=3)",
    "power": "power(rank=4, every=3)",
    "random": "random(rank=4, every=3)",
    "pca": "pca(rank=4)",
}


def examples(count=40, length=10, seed=7):
    """Sentences of random tokens, as the Trainer takes them."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, VOCABULARY, (count, length), generator=generator)
    return [{"input_ids": row, "labels": row.clone()} for row in rows]


def arguments(folder, cls=None, **options):
    from transformers import TrainingArguments

    defaults = {
        "output_dir": str(folder),
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return (cls or TrainingArguments)(**defaults | options)


def make(folder, spec="svd(rank=4, every=3)", model=None, cls=None, args=None, data=None, trainer=None, **options):
    """A trainer of lingrad's, or of ``cls``, on a tiny Llama; ``args`` for TrainingArguments, options for trainer_kwargs."""
    model = llama(torch.float32) if model is None else model
    arguments_ = arguments(folder, **args or {})
    chosen = lingrad.hf.LingradTrainer if cls is None else cls
    return chosen(
        model,
        arguments_,
        train_dataset=examples() if data is None else data,
        **lingrad.hf.trainer_kwargs(spec, arguments_, **options),
        **trainer or {},
    )


def weights(trainer):
    """All weights of the forward, by name."""
    return {name: weight.detach().clone() for name, weight in lingrad.hf.optimizer_of(trainer).weights().items()}


def logs(trainer):
    """What was logged, without times."""
    timed = ("runtime", "per_second")
    return [{k: v for k, v in entry.items() if not k.endswith(timed)} for entry in trainer.state.log_history]


def flat(tree, prefix=""):
    """The leaves of a state dict, by path."""
    if isinstance(tree, dict):
        return {key: leaf for name, part in tree.items() for key, leaf in flat(part, f"{prefix}/{name}").items()}
    if isinstance(tree, list | tuple):
        return {key: leaf for i, part in enumerate(tree) for key, leaf in flat(part, f"{prefix}/{i}").items()}
    return {prefix: tree}


def assert_equal(found, expected):
    """The same bits everywhere: weights, or the leaves of states."""
    found, expected = flat(found), flat(expected)
    assert found.keys() == expected.keys()
    for key, leaf in expected.items():
        if isinstance(leaf, torch.Tensor):
            assert leaf.dtype == found[key].dtype, key
            assert torch.equal(leaf, found[key]), key
        else:
            assert leaf == found[key], key


def quietly(call, *args, **kwargs):
    """A call whose warnings are of no interest."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **kwargs)
