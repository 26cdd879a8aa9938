"""A recipe in plain torch: pretrain a small Llama on Moby-Dick's bytes, and resume after a kill with the same weights.

    python examples/plugins/recipe.py --out runs/recipe --steps 200 --bf16

Started again, it continues from ``checkpoint.pt``. For your own model, change
``build`` and ``batch``.
"""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import lingrad
from lingrad.errors import DataError
from lingrad.files.atomic import new_file
from lingrad.models import LlamaShape, build_llama, next_token_loss
from lingrad.research.corpus import moby_dick


@dataclass
class Settings:
    """What a run is; a checkpoint of other settings is refused."""

    rules: str = "svd(rank=32, every=50)"
    mode: str = "optimizer"
    lr: float = 5e-3
    steps: int = 200
    rows: int = 4
    length: int = 64
    accumulate: int = 2
    clip: float = 1.0
    save_every: int = 50
    hidden: int = 128
    bf16: bool = False


def build(s, device):
    """Make the model, the optimizer and the schedule of a run that begins."""
    shape = LlamaShape(hidden=s.hidden, intermediate=2 * s.hidden, layers=2, length=s.length)
    model = build_llama(shape, seed=0, dtype=torch.bfloat16 if s.bf16 else torch.float32).to(device)
    opt = (lingrad.adapt if s.mode == "adapter" else lingrad.wrap)(model, s.rules, "adamw", lr=s.lr, seed=0)
    return model, opt, torch.optim.lr_scheduler.LambdaLR(opt, lambda step: min((step + 1) / 10, 1 - step / s.steps))


def batch(text, s, step, part):
    """Token ids, int64 [rows, length], which depend on nothing but their place in the run."""
    generator = torch.Generator().manual_seed(step * s.accumulate + part)
    starts = torch.randint(len(text) - s.length, (s.rows, 1), generator=generator)
    return text[starts + torch.arange(s.length)].long()


def train(s, out, device="cpu", on_step=lambda step, loss: None):
    """Train from the checkpoint in ``out``, or from the start; returns the plain model."""
    Path(out).mkdir(parents=True, exist_ok=True)
    model, opt, schedule = build(s, device)
    parts = {"model": model, "optimizer": opt, "schedule": schedule}  # in the order in which they are loaded
    text = torch.frombuffer(bytearray(moby_dick().encode()), dtype=torch.uint8)
    begin, path = 0, Path(out) / "checkpoint.pt"
    if path.exists():
        saved = torch.load(path, map_location=device, weights_only=True)
        if saved["settings"] != asdict(s):
            raise DataError(f"'{path}' belongs to a run with other settings; repeat those, or name another folder")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        begin = saved["step"]
    for step in range(begin, s.steps):
        opt.zero_grad()
        for number in range(s.accumulate):
            loss = next_token_loss(model, batch(text, s, step, number).to(device))
            (loss / s.accumulate).backward()
        opt.clip_grad_norm_(s.clip)
        opt.step()
        schedule.step()
        if (step + 1) % s.save_every == 0 or step + 1 == s.steps:
            state = {name: part.state_dict() for name, part in parts.items()}
            with new_file(path) as file:  # in full, or the one before stays
                torch.save({**state, "settings": asdict(s), "step": step + 1}, file)
        on_step(step + 1, float(loss.detach()))
    opt.detach()  # merges the coordinates; the model is plain again
    return model


def main():
    """Read the command line, train, and write the model to ``model/``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/recipe")
    for name, value in asdict(Settings()).items():
        kind = {"action": "store_true"} if value is False else {"type": type(value), "default": value}
        parser.add_argument("--" + name.replace("_", "-"), **kind)
    given = vars(parser.parse_args())
    out, device = Path(given.pop("out")), "cuda" if torch.cuda.is_available() else "cpu"
    model = train(Settings(**given), out, device, lambda step, loss: print(f"step {step}: loss {loss:.3f}"))
    model.save_pretrained(out / "model")


if __name__ == "__main__":
    main()
