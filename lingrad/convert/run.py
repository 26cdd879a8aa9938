"""A checkpoint of a run with ``ledger=True`` turned into an adapter: the factors it merged, stacked and compressed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lingrad.config.sharing import GroupedTarget, group_targets
from lingrad.config.targets import resolve_model
from lingrad.console import Tick
from lingrad.convert.lowrank import MOST_ROUNDINGS, Goal
from lingrad.convert.models import DTYPES, finishing, refuse_places
from lingrad.convert.report import Report
from lingrad.convert.tensors import Pair, pairs, require_place, tied_names
from lingrad.convert.work import Record
from lingrad.convert.writing import Job
from lingrad.engine.saved import FORMAT, PREFIX, read_ledger, upgrade
from lingrad.errors import CheckpointError, LingradError, optional, require
from lingrad.files.atomic import publish
from lingrad.files.model_folder import ModelFolder, refuse_other_model
from lingrad.files.optimizer_file import FILE, load_state
from lingrad.maps.factors import Factors, compress
from lingrad.models import open_model
from lingrad.subspaces import trees as trees
from lingrad.subspaces.ledger import total
from lingrad.tensors import wide


def convert_run(
    run: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    rank: int | None = None,
    dtype: str | None = None,
    uniform_rank: bool = False,
    logits: bool = False,
    decayed_base: str | Path | None = None,
    tick: Tick | None = None,
) -> Report:
    """Turn a checkpoint of a lingrad run with ``ledger=True`` into an adapter that PEFT loads, exact to rounding.

    Nothing is searched for: the bases and coordinates of every merge are in the checkpoint. Weights that trained in full are
    saved whole.

    Args:
        run: The checkpoint's folder: the model as ``save_pretrained`` writes it, and ``optimizer.pt``, what
            ``torch.save(opt.state_dict())`` wrote; in adapter mode of a run with ``self_contained=True``.
        out: The adapter's folder; must not exist.
        base: The folder of the model that the run started from, where the adapter shall be compared with what became of it.
        rank: At most so many columns for each weight.
        dtype: Of the factors: ``fp32`` (``fp64`` for a float64 model) by default, ``bf16`` or ``fp16``.
        uniform_rank: Give all weights the largest rank that one needs, by columns of zeros.
        logits: Load both models whole, and compare their logits through PEFT; needs ``base``.
        decayed_base: Where to write ``base`` with its weights multiplied by what decoupled decay kept of them, for which the
            adapter then is.
        tick: Called after each tensor: how many are done, of how many, its name.

    Returns:
        What was found; also in ``lingrad_report.json`` in the folder.

    Raises:
        CheckpointError: The checkpoint is not of such a run.
        DataError: A folder cannot be used, or ``out`` exists or cannot be written.
        SpecError: An option is wrong.
        ExportError: PEFT has no form for the change; nothing was written.
    """
    goal, out = Goal(rank), Path(out)
    require(dtype is None or dtype in DTYPES, "dtype", f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    for option, asked in (("logits", logits), ("decayed_base", decayed_base is not None)):
        require(
            not asked or base is not None, option, f"{option} needs the model that the run started from; give its folder too"
        )
    refuse_places(out, decayed_base)
    tuned = ModelFolder(Path(run))
    was = None if base is None else ModelFolder(Path(base))
    optional("peft", "checking an adapter", "hf")
    model = open_model(str(Path(run).absolute()))  # a name alone may be that of a model known by name
    saved = _Run(upgrade(load_state(Path(run))), model, tuned)
    if was is not None:
        refuse_other_model(was, tuned, tied_names(model, was) | tied_names(model, tuned))
    stat = (Path(run) / FILE).stat()
    identity: dict[str, Any] = {
        "run": {**tuned.fingerprint(), FILE: [stat.st_size, stat.st_mtime_ns]},
        "base": None if was is None else [str(base), was.fingerprint()],
        "options": {"rank": rank, "dtype": dtype},
        "torch": torch.__version__,
    }
    with finishing(out, identity) as work:
        found = pairs(model, was or tuned, tuned, list(saved.places))
        saved.require_all(found)
        job = Job(was, tuned, model, found, work)

        def find(pair: Pair) -> tuple[Record, Factors | None]:
            return saved.find(pair, was, rank, None if dtype is None else DTYPES[dtype])

        job.find(find, tick)
        with job.base_for(None if decayed_base is None else Path(decayed_base), tick) as for_base:
            report = job.write(goal, for_base, uniform_rank, logits)
            publish(work.finished, out)
    return report


@dataclass(frozen=True)
class _Entry:
    """What the checkpoint holds of one transformed weight: its place among those that share its basis, and flat entries."""

    place: GroupedTarget
    entries: Mapping[str, Any]
    leader: Mapping[str, Any]


class _Run:
    """A checkpoint's optimizer state, read as ledgers.

    Args:
        saved: The state dict.
        model: The model, on the meta device.
        tuned: The folder with its weights.

    Attributes:
        places: Parameter -> what is held of it.
        full: Names of the parameters that trained in full.

    Raises:
        CheckpointError: It is not of a lingrad run with a ledger, or of another model.
    """

    def __init__(self, saved: Mapping[str, Any], model: nn.Module, tuned: ModelFolder) -> None:
        groups = saved["param_groups"]
        if not groups or any("kind" not in group or "param_names" not in group for group in groups):
            raise CheckpointError(
                f"the {FILE} of '{tuned.path}' was not written by lingrad's optimizer; compare the weights with those they "
                "started from: lingrad convert BASE TUNED"
            )
        for group in groups:
            if group.get("format") != FORMAT:
                raise CheckpointError(
                    f"the {FILE} of '{tuned.path}' has format {group.get('format')!r}; expected {FORMAT!r}, of this version"
                )
        self._folder, self._model = tuned, model
        coords = [group for group in groups if group["kind"] == "coords"]
        for group in groups:
            named = [group["param_names"], *([group.get("specs")] if group["kind"] == "coords" else [])]
            if any(not isinstance(texts, list) or len(texts) != len(group["params"]) for texts in named):
                raise CheckpointError(f"the {FILE} of '{tuned.path}' is damaged: a param group does not name each parameter")
        self.full = {name for group in groups if group["kind"] != "coords" for name in group["param_names"]}
        trained = [
            (name, text, index)
            for group in coords
            for name, text, index in zip(group["param_names"], group["specs"], group["params"], strict=True)
        ]
        entries = {name: saved["state"].get(index, {}) for name, _, index in trained}
        for name, held in entries.items():
            if f"{PREFIX}ledger.decay" not in held:
                raise CheckpointError(
                    f"the {FILE} of '{tuned.path}' has no ledger for '{name}': the run was made without ledger=True; "
                    "compare its weights with those it started from: lingrad convert BASE TUNED"
                )
            if groups[0].get("mode") == "adapter" and f"{PREFIX}stored.coords" not in held:
                raise CheckpointError(
                    f"'{name}' has coordinates that are not in {FILE}; save the run in optimizer mode, after "
                    "opt.switch('optimizer'), or make it with self_contained=True"
                )
        try:
            plan = resolve_model(model, {name: text for name, text, _ in trained})
        except LingradError as error:
            raise CheckpointError(f"the {FILE} of '{tuned.path}' is of another model: {error}") from error
        placed = group_targets(plan.targets, groups[0].get("share"))
        self.places = {
            place.target.name: _Entry(place, entries[place.target.name], entries[place.group[0].name]) for place in placed
        }

    def require_all(self, found: Sequence[Pair]) -> None:
        """Make sure that every weight the run changed is in the model's files, so that no change is left out.

        Args:
            found: What the files hold.

        Raises:
            CheckpointError: One is not.
        """
        lost = sorted({*self.places} - {pair.param for pair in found})
        if lost:
            raise CheckpointError(
                f"the run changed '{lost[0]}'{f' and {len(lost) - 1} more' if lost[1:] else ''}, and the files of "
                f"'{self._folder.path}' do not hold it under this name; save the run's model under the names of its "
                "parameters: safetensors.torch.save_model(model, 'model.safetensors')"
            )

    def find(
        self, pair: Pair, base: ModelFolder | None, rank: int | None, dtype: torch.dtype | None
    ) -> tuple[Record, Factors | None]:
        """The change of one tensor.

        Args:
            pair: The tensor.
            base: The folder it started from, where it is known.
            rank: The most columns that may stay.
            dtype: Of the factors.

        Returns:
            Its record and its factors, in the order it is stored in.

        Raises:
            CheckpointError: It is of another shape than in the run.
        """
        shape = self._folder.entry(pair.name).shape
        if pair.param not in self.places:
            same = pair.param not in self.full if base is None else pair.equal(base, self._folder)
            if not same:
                require_place(self._model, pair)
            return Record(pair.name, "equal" if same else "full", shape), None
        own = self._folder.entry(pair.name).dtype
        factors, kept = self._change(pair.param, own)
        if factors is None and kept == 1.0:
            return Record(pair.name, "equal", shape), None
        if factors is None:  # it has only decayed
            m, n = self.places[pair.param].place.target.layout.shape
            factors = Factors(torch.zeros(m, 1), torch.zeros(1, n))
        if factors.shape != self.places[pair.param].place.target.layout.shape:
            raise CheckpointError(f"'{pair.name}' is {shape} in the model, and its ledger is of {factors.shape}")
        factors = factors.to(dtype=torch.float64)
        norm, floor = _norm(factors), 0.0
        factors, rest = compress(factors, rank=rank)
        if base is not None:
            norm, rest, floor = self._measured(pair, base, factors, kept, rest * norm)
        wanted = dtype or (torch.float64 if own == torch.float64 else torch.float32)
        record = Record(pair.name, "low_rank", shape, factors.rank, kept, norm, rest, floor)
        return record, factors.to(dtype=wanted)

    def _measured(
        self, pair: Pair, base: ModelFolder, factors: Factors, kept: float, dropped: float
    ) -> tuple[float, float, float]:
        """|TUNED - BASE|_F, and as shares of it what the factors leave and what one rounding does."""
        change, stored = pair.difference(base, self._folder), pair.turned(factors)
        m, n = change.shape
        start = change.rest(torch.zeros(m, 0, dtype=torch.float64), torch.zeros(0, n, dtype=torch.float64))
        change.kept = kept
        rest = change.rest(stored.left, stored.right).energy ** 0.5
        if rest > dropped + MOST_ROUNDINGS * start.rounding**0.5:
            raise CheckpointError(
                f"'{pair.name}' of '{self._folder.path}' is not that of '{base.path}' and what the run added, which leaves "
                f"{rest / start.energy**0.5:.1e} of the difference: it is not the model that the run started from"
            )
        norm = start.energy**0.5 or 1.0
        return norm, rest / norm, start.rounding**0.5 / norm

    def _change(self, name: str, dtype: torch.dtype) -> tuple[Factors | None, float]:
        """The factors of a weight's change, and what decay has left of what it was added to."""
        found = self.places[name]
        transform, cpu = found.place.target.transform, torch.device("cpu")
        like = transform.init(found.place.shape, seed=0, device=cpu, dtype=dtype)
        coords = torch.zeros(found.place.coords, dtype=wide(dtype))
        ledger = read_ledger(transform, found.entries, like, coords, name)
        if f"{PREFIX}stored.coords" in found.entries:
            coords = trees.checked(coords, found.entries, f"{PREFIX}stored.coords", name)
        open_ = ledger.open(coords)
        last = None
        if open_.any():
            last = transform.map(trees.restore(like, found.leader, f"{PREFIX}state", name)).factors(open_)
        return total(ledger.closed(), last), ledger.decay


def _norm(factors: Factors) -> float:
    """|left @ right|_F without forming it."""
    left, right = factors.left.double(), factors.right.double()
    return float(((left.t() @ left) * (right @ right.t())).sum().clamp(min=0).sqrt())
