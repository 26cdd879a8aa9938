"""What lingrad does, tried on one tiny model: a check works, is refused in words, raises an error, or finds a wrong value."""

import copy
import io
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lingrad
from lingrad.errors import LingradError
from lingrad.memory import commands
from lingrad.models import open_model
from lingrad.peft import export
from lingrad.peft.outputs import make_inputs
from tests.support.architectures.build import NotBuiltError, Ready, prepare, seeded
from tests.support.architectures.catalog import Architecture
from tests.support.architectures.inputs import tensors

RULES, STEPS, LR = "svd(rank=2, every=4)", 10, 1e-3
MODES = {"wrap": lingrad.wrap, "adapt": lingrad.adapt}
# Roundings of 1e-16, grown over ten steps of Adam; in float32 the modes round every merge differently.
BOUNDS = {torch.float64: 1e-9, torch.float32: 2e-2}
# A run whose weights started one rounding away; where its end is far from the run's, no two computations agree further.
NUDGE, NUDGES, ROOM = 1e-15, 5, 10
# Outputs of W + B A and of W0 x + B (A x), of the largest; norms and routers of transformers round to float32 in any dtype.
OUTPUTS = 100 * torch.finfo(torch.float32).eps

CHECKS = ("wrap", "adapt", "equal", "resume", "export", "memory", "explain")
Outcome = tuple[str, str]  # works, refused, error, wrong or skipped; and why
Weights = dict[str, Tensor]


class SkippedError(Exception):
    """A check says nothing about lingrad on this model; the message says why."""


class WrongValueError(Exception):
    """A value differs from what it must be."""


def check(architecture: Architecture) -> dict[str, Any]:
    """Try everything on an architecture.

    Returns:
        For JSON: what was run, and under ``checks`` the outcome of each; under ``reason`` why no tiny model runs here.
    """
    row: dict[str, Any] = architecture._asdict()
    dtype = torch.get_default_dtype()
    try:
        return row | _checked(architecture)
    except NotBuiltError as error:
        return row | {"reason": str(error)}
    finally:
        torch.set_default_dtype(dtype)


def _checked(architecture: Architecture) -> dict[str, Any]:
    ready = prepare(architecture)
    row: dict[str, Any] = {
        "dtype": str(ready.dtype).removeprefix("torch."),
        "train_mode": ready.training,
        "inputs": list(ready.inputs),
    }
    row |= {"level": ready.level, "elements": sum(param.numel() for param in ready.model.parameters())}
    checks = Checks(ready)
    found = checks.run()
    return row | {"checks": found, "inputs_made": checks.made}


class Checks:
    """The checks of one model.

    Args:
        ready: The model.
    """

    def __init__(self, ready: Ready) -> None:
        self.ready = ready
        self.start = {name: param.detach().clone() for name, param in ready.model.named_parameters()}
        self.ends: dict[str, Weights] = {}
        self.halfway: dict[str, Any] = {}
        self.adapted: Any = None
        self.made: bool | None = None  # whether lingrad makes inputs to compare an export by

    def run(self) -> dict[str, Outcome]:
        """The outcome of every check by its name."""
        found: dict[str, Outcome] = {}
        for name in CHECKS:
            if name in ("equal", "resume") and len(self.ends) < len(MODES):
                found[name] = ("skipped", "it does not train in both modes")
            elif name == "export" and "adapt" not in self.ends:
                found[name] = ("skipped", "it does not train in adapter mode")
            else:
                found[name] = outcome(getattr(self, name))
        return found

    def wrap(self) -> None:
        """Ten steps in optimizer mode; whatever has a gradient moves, and by its whole gradient."""
        self._trains("wrap")

    def adapt(self) -> None:
        """The same in adapter mode."""
        self._trains("adapt")

    def equal(self) -> None:
        """Both modes end with the same weights."""
        worst, name = largest_gap(*self.ends.values())
        if worst <= BOUNDS[self.ready.dtype]:
            return
        nudged = max(map(self._nudged, range(NUDGES)))
        if not worst <= ROOM * nudged:
            raise WrongValueError(
                f"the modes differ by {worst:.0e} at '{name}', and a rounding at the start makes {nudged:.0e}"
            )
        raise SkippedError(f"a rounding at the start makes {nudged:.0e}, and the modes differ by {worst:.0e}")

    def resume(self) -> None:
        """A run saved after half of its steps and resumed ends with the same weights, to the bit."""
        for mode, saved in self.halfway.items():
            model = self.ready.copy()
            opt = MODES[mode](model, RULES, "adamw", lr=LR, ledger=mode == "adapt")
            saved = through_a_file(saved)
            model.load_state_dict(saved["model"])
            opt.load_state_dict(saved["optimizer"])
            self._steps(model, opt, range(STEPS // 2, STEPS))
            for name, weight in opt.weights().items():
                if not torch.equal(weight, self.ends[mode][name]):
                    self._plain_resumes()
                    raise WrongValueError(f"{mode}: '{name}' is not resumed to the bit")

    def export(self) -> None:
        """A run in adapter mode as an adapter; PEFT alone loads it onto the initial model, and the outputs are equal."""
        from peft import PeftModel

        ready = self._as_users_run_it()
        model, opt = self.adapted if ready is self.ready else self._run(ready, "adapt")
        with tempfile.TemporaryDirectory() as folder:
            self.made = make_inputs(None, model) is not None
            inputs = None if self.made else dict(ready.inputs)  # as users call it, where lingrad knows what the model reads
            report = export(opt, Path(folder) / "adapter", inputs=inputs, quiet=True)
            adapted = PeftModel.from_pretrained(ready.copy(), str(Path(folder) / "adapter"))
        before = outputs(ready.copy(), ready)
        opt.detach()
        for one, expected, initial in zip(outputs(adapted, ready), outputs(model, ready), before, strict=True):
            change, difference = (float((expected - value).abs().max()) for value in (initial, one))
            if not difference <= OUTPUTS * float(expected.abs().max()) + 1e-3 * change:
                raise WrongValueError(
                    f"through PEFT the outputs differ by {difference:.0e}, and training changed them by {change:.0e}"
                )
        if report.outputs is None:
            raise WrongValueError("the export was not compared")

    def memory(self) -> None:
        """`lingrad memory simulate`, from the model's config in a folder."""
        with self._config() as folder:
            commands.simulate(commands.Question(model=folder, rules=RULES, batch=2, length=16))

    def explain(self) -> None:
        """`lingrad explain`, from the model's config in a folder; it names every parameter."""
        with self._config() as folder:
            found = lingrad.explain(open_model(folder), RULES, every_parameter=True)
        trainable = {name for name, param in self.ready.model.named_parameters() if param.requires_grad}
        missing = trainable ^ {line.name for line in found.lines}
        if missing:
            raise WrongValueError(f"it does not name {sorted(missing)[0]}")

    def _trains(self, mode: str) -> None:
        grads = self._gradients()
        model, opt = self._run(self.ready, mode, halfway=self.halfway)
        if mode == "adapt":
            self.adapted = model, opt
        end = {name: weight.detach().clone() for name, weight in opt.weights().items()}
        self.ends[mode] = end
        for name, grad in grads.items():
            if grad.numel() and grad.abs().max() > 1e-12 and name in end and torch.equal(end[name], self.start[name]):
                raise WrongValueError(f"'{name}' has a gradient and stands still")
        model = self.ready.copy()
        opt = MODES[mode](model, "full()", "sgd", lr=1.0)
        self._steps(model, opt, range(1))
        for name, weight in opt.weights().items():
            wanted = self.start[name] - grads.get(name, torch.zeros(()))
            if not gap(weight, wanted) <= BOUNDS[self.ready.dtype]:
                if any(not torch.equal(grad, grads[one]) for one, grad in self._gradients().items()):
                    raise SkippedError("plain torch gives another gradient each time")
                raise WrongValueError(f"the gradient of '{name}' is not that of plain torch: off by {gap(weight, wanted):.0e}")

    def _nudged(self, seed: int) -> float:
        """How far from the run in optimizer mode one ends whose weights started a rounding away."""
        ready = copy.copy(self.ready)
        ready.model = self.ready.copy()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for param in ready.model.parameters():
                if param.is_floating_point():
                    noise = torch.randn(param.shape, generator=generator, dtype=torch.float64)
                    size = NUDGE if param.dtype == torch.float64 else torch.finfo(param.dtype).eps
                    param.mul_((1 + size * noise).to(param.dtype))
        _, opt = self._run(ready, "wrap")
        return largest_gap(opt.weights(), self.ends["wrap"])[0]

    def _plain_resumes(self) -> None:
        """Raise where torch's own optimizer is not resumed to the bit either: the model keeps a state of its own."""
        model, ends = self.ready.copy(), []
        opt = torch.optim.AdamW(model.parameters(), lr=LR)
        self._steps(model, opt, range(STEPS // 2))
        saved = through_a_file({"model": model.state_dict(), "optimizer": opt.state_dict()})
        for fresh in (False, True):
            if fresh:
                model = self.ready.copy()
                opt = torch.optim.AdamW(model.parameters(), lr=LR)
                model.load_state_dict(saved["model"])
                opt.load_state_dict(saved["optimizer"])
            self._steps(model, opt, range(STEPS // 2, STEPS))
            ends.append([param.detach() for param in model.parameters()])
        if not all(map(torch.equal, *ends)):
            raise SkippedError("torch's own AdamW does not resume this model to the bit")

    def _gradients(self) -> Weights:
        model = self.ready.copy()
        self.ready.backward(model, 0)
        return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}

    def _run(self, ready: Ready, mode: str, halfway: dict[str, Any] | None = None) -> tuple[Any, Any]:
        model = ready.copy()
        opt = MODES[mode](model, RULES, "adamw", lr=LR, ledger=mode == "adapt")
        self._steps(model, opt, range(STEPS // 2), ready)
        if halfway is not None:
            halfway[mode] = copy.deepcopy({"model": model.state_dict(), "optimizer": opt.state_dict()})
        self._steps(model, opt, range(STEPS // 2, STEPS), ready)
        return model, opt

    def _steps(self, model: nn.Module, opt: Any, steps: range, ready: Ready | None = None) -> None:
        for step in steps:
            opt.zero_grad()
            (ready or self.ready).backward(model, step)
            opt.step()

    def _as_users_run_it(self) -> Ready:
        """In float32 where the model's code runs in float64 only with the help of `Float64`, which export does not have.

        Without it such a model fails, or gives NaN.
        """
        ready = self.ready
        try:
            if not any(bool(one.isnan().any()) for one in outputs(ready.copy(), ready)):
                return ready
        except Exception:  # noqa: S110 - a model may raise any exception
            pass
        torch.set_default_dtype(torch.float32)
        inputs = {k: v.float() if v.is_floating_point() else v for k, v in ready.inputs.items()}
        return Ready(ready.copy().float(), inputs, torch.float32, ready.training, ready.level)

    @contextmanager
    def _config(self) -> Iterator[str]:
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            with tempfile.TemporaryDirectory() as folder:
                self.ready.model.config.save_pretrained(folder)
                yield folder
        finally:
            torch.set_default_dtype(dtype)


def outcome(run: Callable[[], None]) -> Outcome:
    """What came of a check."""
    try:
        run()
    except SkippedError as error:
        return "skipped", str(error)
    except WrongValueError as error:
        return "wrong", str(error)
    except LingradError as error:
        return "refused", f"{type(error).__name__}: {' '.join(str(error).split())}"
    except Exception as error:  # a fault, whatever it is
        return "error", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return "works", ""


def gap(one: Tensor, other: Tensor) -> float:
    """The distance of two weights, as a share of the second, or of one step of Adam where that is more."""
    least = LR * math.sqrt(max(other.numel(), 1))
    return float((one - other).norm()) / max(float(other.norm()), least) if other.is_floating_point() else 0.0


def largest_gap(one: Weights, other: Weights) -> tuple[float, str]:
    """The largest gap of any weight, and the weight's name."""
    return max((gap(one[name], other[name]), name) for name in other)


def outputs(model: nn.Module, ready: Ready) -> list[Tensor]:
    """All outputs of a model in eval mode."""
    with torch.no_grad(), seeded(0):
        found = model.eval()(**ready.inputs)
    return tensors(found)


def through_a_file(state: Any) -> Any:
    """Saved and loaded."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)
