"""examples/plugins/lightning_lingrad.py with the real Lightning: it resumes bit for bit, and leaves a plain module."""

import warnings

import pytest
import torch

from tests.plugins.loading import load

lightning = pytest.importorskip("lightning")
LingradCallback = load("lightning_lingrad").LingradCallback
DATA = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 6))

    def training_step(self, rows):
        return (self.model(rows) - rows).square().mean()

    def configure_optimizers(self):
        raise AssertionError("the callback takes its place")


def fit(folder, epochs, resume=None):
    save = lightning.pytorch.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    callback = LingradCallback(
        "svd(rank=2, every=3)", mode="adapter", of="model", lr=1e-2,
        schedule=lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 - step / 20),
    )  # fmt: skip
    module = Module()
    trainer = lightning.Trainer(
        max_epochs=epochs, gradient_clip_val=0.1, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback, save],
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's own, about workers
        trainer.fit(module, torch.utils.data.DataLoader(DATA, batch_size=2), ckpt_path=resume)
    return module


def test_a_resumed_run_ends_with_the_same_plain_module(tmp_path):
    straight = fit(tmp_path / "straight", 2)
    fit(tmp_path / "run", 1)
    resumed = fit(tmp_path / "run", 2, resume=tmp_path / "run/epoch=0.ckpt")
    fresh = Module()
    assert [name for name, _ in resumed.named_parameters()] == [name for name, _ in fresh.named_parameters()]
    for found, expected, start in zip(resumed.parameters(), straight.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(found, expected)
        assert not torch.equal(found, start)
    assert "configure_optimizers" not in vars(resumed)
