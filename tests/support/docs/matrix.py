"""Which transforms, bases and options work together, asked of the library itself, for docs/support.md.

Each cell of a table is a run of three steps on a model of a few layers. What it raises is the reason under the table.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

import lingrad
from lingrad import optimizers
from lingrad.errors import LingradError
from lingrad.models import LlamaShape, build_llama
from lingrad.transforms import registry

SHAPE = LlamaShape(16, 8, 16, 1, 2, 8)
STEPS = 3
HERE = "lingrad.transforms"  # a transform of an installed package is not the library's

# what a transform needs besides its rank, at a size that fits every layer of the model
SPECS = {
    "coded": "coded(each=svd(rank=2, every=2), bits=4)",
    "experts": "experts(each=svd(rank=2, every=2), count=1)",
    "full": "full()",
    "kron": "kron(left=svd(rank=2, every=2), right=random(rank=2, every=2))",
    "switch": "switch(rank=2, every=2, after=2)",
    "slice": "slice(rank=2, workers=2)",
    "svd": "svd(rank=2, every=2)",
}
LR = {"sgd": 1e-2}

Options = Mapping[str, Any]
Ask = Callable[[str, str, Options], str]

# column -> the options that it adds to the run of a row; a function makes another kind of run
COLUMNS: dict[str, Options | str] = {
    "adapter mode": {"mode": "adapter"},
    "`layerwise=True`": {"layerwise": True},
    '`layerwise="coordinates"`': {"layerwise": "coordinates"},
    '`carry="rotate"`': {"carry": "rotate"},
    '`carry="transport"`': {"carry": "transport"},
    '`share="input"`': {"share": "input"},
    '`residual="scaled"`': {"residual": "scaled"},
    '`moments="8bit"`': {"moments": "8bit"},
    '`offload="bases"`': {"offload": "bases"},
    "NF4 weights": "nf4",
    "INT8 weights": "int8",
    "`fully_shard`": "sharded",
    "`compile_step()`": "compiled",
}
# options with each other, all of optimizer mode unless one of the two is adapter mode
PAIRED: dict[str, Options | str] = {
    name: options
    for name, options in COLUMNS.items()
    if isinstance(options, Mapping) or options in ("sharded", "compiled")
} | {
    "`ledger=True`": {"ledger": True},
    "`stagger=True`": {"stagger": True},
    '`compat="galore"`': {"compat": "galore"},
    '`rounding="stochastic"`': {"rounding": "stochastic"},
}  # fmt: skip


def transforms() -> list[str]:
    """A config string of each transform of the library."""
    names = [n for n in registry.transform_names() if registry.find_transform(n).__module__.startswith(HERE)]
    return [SPECS.get(name, f"{name}(rank=2, every=2)" if name != "pca" else "pca(rank=2)") for name in names]


class _Packed(nn.Module):
    """Two linear layers in 4 or 8 bits, of a size that bitsandbytes accepts, and a plain head."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        import bitsandbytes as bnb

        make: Any = (
            partial(bnb.nn.Linear8bitLt, has_fp16_weights=False)
            if kind == "int8"
            else partial(bnb.nn.Linear4bit, quant_type="nf4", compute_dtype=torch.float32)
        )
        self.one, self.two, self.head = make(64, 64), make(64, 64), nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))


def ask(rules: str, base: str, options: Options, kind: str = "") -> str:
    """Make a run and take its steps.

    Args:
        rules: A config string.
        base: The name of a base optimizer.
        options: Of `lingrad.wrap` or `lingrad.adapt`, and ``mode``.
        kind: ``nf4`` or ``int8`` weights, ``sharded`` over two processes, a ``compiled`` step; else a plain run.

    Returns:
        Why it is refused; empty if it works.
    """
    given = dict(options)
    mode = given.pop("mode", "adapter" if kind in ("nf4", "int8") else "optimizer")
    given["lr"] = LR.get(base, 1e-3)
    try:
        world = two_processes() if kind == "sharded" else contextlib.nullcontext()
        with warnings.catch_warnings(), contextlib.redirect_stdout(None), world:
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            model = _Packed(kind).to("cpu") if kind in ("nf4", "int8") else build_llama(SHAPE, seed=0)
            if given.get("rounding", "nearest") != "nearest":
                model = model.to(torch.bfloat16)
            if kind == "sharded":
                for layer in [*model.model.layers, model]:
                    fully_shard(layer)
            if kind == "compiled":
                given["lr"] = torch.tensor(given["lr"])
            rules = f"head: none; *: {rules}" if kind in ("nf4", "int8") else rules
            opt = (lingrad.adapt if mode == "adapter" else lingrad.wrap)(model, rules, base, **given)
            if kind == "compiled":
                opt.compile_step()
                return ""
            for step in range(STEPS):
                opt.zero_grad()
                _loss(model, step).backward()
                opt.step()
    except LingradError as error:
        return " ".join(str(error).split())
    return ""


@contextlib.contextmanager
def two_processes() -> Iterator[None]:
    """Be the first of two processes, of which the other sends nothing: enough for what is refused, not for numbers."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def _loss(model: nn.Module, step: int) -> torch.Tensor:
    if isinstance(model, _Packed):
        return model(torch.randn(8, 64, generator=torch.Generator().manual_seed(step))).square().mean()
    ids = torch.randint(0, 16, (2, 8), generator=torch.Generator().manual_seed(step))
    found = model(input_ids=ids, labels=ids)
    return found.loss if hasattr(found, "loss") else found


class Reasons:
    """The refusals of a page, numbered; those that differ only in a number or a name in quotes are one."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def mark(self, text: str) -> str:
        """``yes``, or the number of the reason."""
        if not text:
            return "yes"
        key = re.sub(r"'[^']*'|\S*\.weight|\d+|\([^()]*\)", "#", text)
        self.texts.setdefault(key, text)
        return f"no ({list(self.texts).index(key) + 1})"

    def listed(self) -> str:
        """The reasons, one a line."""
        return "".join(f"{i}. {text.replace('|', chr(92) + '|')}\n" for i, text in enumerate(self.texts.values(), 1))


def _cell(rules: str, base: str, options: Options | str, more: Options | str = MappingProxyType({})) -> str:
    kinds = [one for one in (options, more) if isinstance(one, str)]
    if len(kinds) > 1:
        return ""
    merged = {k: v for one in (options, more) if isinstance(one, Mapping) for k, v in one.items()}
    return ask(rules, base, merged, *kinds)


def _sided(rules: str, options: Options | str) -> str:
    """Sharing is of right bases, and so is what a sharded weight takes as it is."""
    right = options == {"share": "input"} and "rank=2, every=2" in rules and rules.count("(") == 1
    return rules.replace("every=2", "every=2, side=right", 1) if right else rules


def table(rows: Mapping[str, tuple[str, str]], reasons: Reasons) -> str:
    """One row for each transform or base, one column for each option.

    Args:
        rows: Label -> config string and base.
        reasons: Receives the refusals.

    Returns:
        The table.
    """
    lines = ["| |" + "|".join(COLUMNS) + "|", "|---|" + "---|" * len(COLUMNS)]
    for label, (rules, base) in rows.items():
        cells = [reasons.mark(_cell(_sided(rules, options), base, options)) for options in COLUMNS.values()]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def pairs(reasons: Reasons) -> str:
    """Options with each other, with ``svd`` and ``adamw``; the lower half, since the order does not matter."""
    names = list(PAIRED)
    lines = ["| |" + "|".join(names[:-1]) + "|", "|---|" + "---|" * (len(names) - 1)]
    for i, one in enumerate(names[1:], 1):
        cells = []
        for j, other in enumerate(names[:-1]):
            if j >= i or _same(PAIRED[one], PAIRED[other]):
                cells.append("")
                continue
            rules = next((r for o in (one, other) if (r := _sided(SPECS["svd"], PAIRED[o])) != SPECS["svd"]), SPECS["svd"])
            cells.append(reasons.mark(_cell(rules, "adamw", PAIRED[one], PAIRED[other])))
        lines.append(f"| {one} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _same(one: Options | str, other: Options | str) -> bool:
    """Two values of one option, or two kinds of a run, which no run has both."""
    if isinstance(one, str) or isinstance(other, str):
        return isinstance(one, str) and isinstance(other, str)
    return not one.keys().isdisjoint(other)


def sections() -> dict[str, str]:
    """The text between each pair of marks of the page."""
    torch.set_num_threads(1)
    found = {}
    rows = {
        "transforms": {f"`{rules}`": (rules, "adamw") for rules in transforms()},
        "bases": {f"`{base}`": (SPECS["svd"], base) for base in optimizers.names()},
    }
    for name, of in rows.items():
        reasons = Reasons()
        found[name] = f"\n{table(of, reasons)}\n{reasons.listed()}\n"
    reasons = Reasons()
    found["options"] = f"\n{pairs(reasons)}\n{reasons.listed()}\n"
    return found
