"""What `lingrad memory` computes: one simulated run, the largest batch that fits, several methods compared, the closed form."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

from torch import nn

from lingrad import optimizers
from lingrad.config.methods import long_rules
from lingrad.config.offload import parse_offload
from lingrad.config.rules import parse_rules
from lingrad.config.settings import Mode
from lingrad.console import say
from lingrad.errors import DependencyError, MemoryModelError, ModeError, SpecError, require, require_one_of
from lingrad.memory import runs
from lingrad.memory.answers import Fit, MethodComparison
from lingrad.memory.estimate import Estimate
from lingrad.memory.estimate import estimate as estimate_
from lingrad.memory.inputs import OwnLoss
from lingrad.memory.report import MemoryReport
from lingrad.memory.units import CONTEXT, parse_bytes
from lingrad.methods import FullRank, GaloreTorch, Lingrad, Lora, Method
from lingrad.methods.largest import largest
from lingrad.models import DTYPES, open_in

INSTEAD = (
    "lingrad memory estimate gives the memory between steps in closed form and runs nothing; in Python lingrad.memory.simulate "
    "takes a function that computes the loss"
)
NEVER = 2**31  # steps, for galore_torch, which refreshes once in no other way
LARGEST = 2**16  # rows; no larger batch is tried


@dataclass(frozen=True, kw_only=True)
class Question:
    """A run whose memory is to be known.

    Args:
        model: A name, a config, or a folder with one; see `lingrad.models.open_in`.
        rules: A config string or rules.
        base: The base optimizer; None is that of the method that the rules name, or AdamW.
        mode: ``optimizer`` or ``adapter``.
        batch: Rows of a batch.
        length: Tokens of a row.
        dtype: The dtype of the model: bfloat16, float16, float32, or int8 for linear layers in 8 bits.
        checkpointing: Recompute layers in the backward.
        layerwise: Step inside the backward.
        capacity: The device's memory, such as ``24GiB``; None if it does not matter.
        context: What the CUDA context takes of it, besides tensors.
        expandable: Model CUDA's expandable segments.
        share: Share right bases among layers that read the same input.
        stagger: Refresh weights in turns.
        ranks: Processes over which ``fully_shard`` cuts every weight, each with a batch of its own.
        offload: What of the state is in host memory between steps, such as ``moments, bases``.
    """

    model: str
    rules: str = "svd(rank=128)"
    base: str | None = None
    mode: str = "optimizer"
    batch: int = 1
    length: int = 256
    dtype: str = "bfloat16"
    checkpointing: bool = False
    layerwise: bool = False
    capacity: str | None = None
    context: str = CONTEXT
    expandable: bool = False
    share: bool = False
    stagger: bool = False
    ranks: int = 1
    offload: str | None = None

    def __post_init__(self) -> None:
        """Check the values: raise `SpecError` for the first one that is wrong."""
        require_one_of(self.mode, get_args(Mode), "mode")
        require_one_of(self.dtype, tuple(DTYPES), "dtype")
        require(self.batch >= 1, "batch", f"batch must be at least 1, not {self.batch}")
        require(self.length >= 2, "length", f"length must be at least 2 tokens, not {self.length}")
        for size in (self.capacity, self.context):
            parse_bytes("0" if size is None else size)
        parse_rules(long_rules(self.rules))
        if self.base is not None:
            with suppress(DependencyError):  # which a method that needs the package reports
                optimizers.find(self.base, {})
        if self.offload is not None:
            parse_offload(self.offload)

    def open(self) -> nn.Module:
        """The model, on the meta device; raises `DataError` where there is none."""
        return open_in(self.model, self.dtype)

    @property
    def method(self) -> Method:
        """The run as a method of lingrad."""
        options = {"lr": 1e-4, "stagger": self.stagger, "share": "input" if self.share else None, "offload": self.offload}
        return Lingrad(self.rules, self.base, cast("Mode", self.mode), options)


def simulate(question: Question, method: Method | None = None) -> MemoryReport:
    """Simulate one run.

    Args:
        question: The run.
        method: Another method under the same conditions; None is the question's own.

    Returns:
        The report.

    Raises:
        MemoryModelError: It cannot be simulated; the message names the closed form.
    """
    try:
        return runs.simulate(
            question.open,
            question.method if method is None else method,
            batch=question.batch,
            length=question.length,
            loss=OwnLoss(question.batch, question.length, INSTEAD),
            checkpointing=question.checkpointing,
            layerwise=question.layerwise,
            capacity=None if question.capacity is None else parse_bytes(question.capacity),
            context=parse_bytes(question.context),
            expandable=question.expandable,
            ranks=question.ranks,
        )
    except MemoryModelError as error:
        if INSTEAD in str(error):
            raise
        raise MemoryModelError(f"{error}; {INSTEAD}") from error


def estimate(question: Question) -> Estimate:
    """The memory between steps in closed form; nothing is run.

    Args:
        question: The run.

    Returns:
        The estimate.
    """
    return estimate_(
        question.open(),
        question.rules,
        mode=cast("Mode", question.mode),
        tokens=question.batch * question.length,
        layerwise=question.layerwise,
        share="input" if question.share else None,
        ranks=question.ranks,
        offload=question.offload,
        lr=1e-4,
        **({} if question.base is None else {"base": question.base}),
    )


def compare(question: Question) -> MethodComparison:
    """Full-rank AdamW, galore_torch, both modes of lingrad and LoRA under the same conditions.

    Args:
        question: The run; its mode does not matter.

    Returns:
        The reports. A method whose package is missing, which cannot be simulated, or which cannot train the model as
        it is stored, is left out with the reason.
    """
    reports: dict[str, MemoryReport] = {}
    left_out: dict[str, str] = {}
    chosen = methods(question)
    question.open()  # before anything is said of what is computed
    for method in chosen:
        say(f"simulating {method.label}")
        try:
            reports[method.label] = simulate(question, method)
        except (DependencyError, MemoryModelError, ModeError) as error:
            left_out[method.label] = str(error).partition("\n")[0]
    return MethodComparison(reports, left_out)


def methods(question: Question) -> list[Method]:
    """The methods of a comparison.

    Args:
        question: The run.

    Returns:
        Full-rank AdamW, galore_torch, optimizer mode, adapter mode and LoRA.

    Raises:
        SpecError: The rules are not one config string with a rank, which the other methods could use.
    """
    named = parse_rules(long_rules(question.rules))
    named = getattr(named, "each", named)
    rank, every = getattr(named, "rank", None), getattr(named, "every", 200)
    if rank is None:
        raise SpecError(f"a comparison needs one rank for all methods; give svd(rank=128) or the like, not '{question.rules}'")
    galore = cast("Literal['adamw', 'adamw8bit']", question.base if question.base in ("adamw", "adamw8bit") else "adamw")
    modes = [replace(question, mode=mode).method for mode in get_args(Mode)]
    return [FullRank("adamw"), GaloreTorch(rank, every or NEVER, galore), *modes, Lora(rank, question.base or "adamw")]


def fit(question: Question, method: Method | None = None) -> Fit:
    """Find the largest batch that fits, by bisection.

    Args:
        question: The run; needs a capacity, and its batch does not matter.
        method: Another method under the same conditions; None is the question's own.

    Returns:
        The largest batch.

    Raises:
        SpecError: No capacity was given.
    """
    if question.capacity is None:
        raise SpecError("the largest batch that fits depends on the device's memory; give it, such as --capacity 24GiB")
    question.open()  # before anything is said of what is computed
    tried: dict[int, MemoryReport] = {}

    def fits(batch: int) -> bool:
        say(f"simulating a batch of {batch}")
        tried[batch] = simulate(replace(question, batch=batch), method)
        return bool(tried[batch].fits)

    return Fit(
        rows=(rows := largest(fits, LARGEST) if fits(1) else 0),
        method=(method or question.method).label,
        capacity=question.capacity,
        context=question.context,
        length=question.length,
        reserved=tried[max(rows, 1)].reserved or 0,
        at_least=rows == LARGEST,
    )
