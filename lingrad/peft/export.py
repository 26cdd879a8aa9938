"""A run handed out as a LoRA of PEFT: written, loaded by PEFT, compared, and only then given its name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lingrad.errors import ExportError, optional, require
from lingrad.files.atomic import new_folder
from lingrad.maps.factors import Factors, compress
from lingrad.peft.report import Report, Row
from lingrad.peft.slots import places, slots, why_not
from lingrad.peft.source import Exported, Source, dense, open_base, open_source
from lingrad.peft.verify import Inputs, Loaded, compare_weights, make_inputs
from lingrad.peft.write import Written, value_of, write_adapter

EXACT = 1e-3  # a relative residual that needs no permission
ROUNDINGS = 100  # of a weight, each of half an epsilon, that may add up to more than that where little has changed
OUTPUTS = 100  # epsilons by which outputs of two ways to compute the same differ, as a share of the largest


def export(
    what: Exported,
    path: str | Path,
    *,
    inputs: Any = None,
    base: str | Path | nn.Module | None = None,
    dtype: torch.dtype | None = None,
    rank: int | None = None,
    whole: bool = False,
    allow_residual: float | None = None,
    quiet: bool = False,
) -> Report:
    """Write what a run has made of its model as an adapter that PEFT loads alone.

    The adapter is loaded by PEFT before the folder gets its name, and its weights and outputs are compared with those of the
    run, which goes on undisturbed. Where several processes share a run, one of them calls it.

    Args:
        what: The run, ``opt`` of `lingrad.wrap` (with ``ledger=True``) or `lingrad.adapt` (without, as long as nothing was
            merged); or the trained model, plain, and the changes of its weights as a pair ``(model, changes)``.
        path: The folder to write; must not exist.
        inputs: What to run both models on: a tensor, a tuple, or a mapping of named arguments. Random token ids by default,
            for a model with a vocabulary; for others nothing but weights is compared.
        base: The model the run started from, its folder or itself, to compare with. By default the run's own frozen weights,
            or what remains of the weights when their change is taken off.
        dtype: Of the factors; by default that of the coordinates.
        rank: The largest rank of any adapter; what that drops is in the residual. By default all columns of all bases are kept,
            and recompressed without loss where they are more than the weight has rows or columns.
        whole: Save weights that PEFT has no low-rank form for with the whole of their module, instead of refusing them. Tied
            weights always are.
        allow_residual: The largest relative residual |W - (W_base + B A)| / |W - W_base| of any weight to put up with. By
            default 1e-3, or what rounding explains in float32 and wider.
        quiet: Do not print the report.

    Returns:
        The report, which is also beside the adapter as ``lingrad_report.json``.

    Raises:
        ExportError: PEFT cannot express it, or does not reproduce it; nothing is left.
        DataError: There is something at the path, or the base cannot be read.
        ModeError: The run was detached, or has merged without ``ledger=True``.
        DependencyError: PEFT is not installed.
    """
    optional("peft", "exporting to PEFT", "hf")
    require(rank is None or (type(rank) is int and rank > 0), "rank", f"rank must be a whole number from 1, not {rank!r}")
    floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    require(
        dtype is None or floating, "dtype", f"dtype must be a floating-point torch.dtype, such as torch.bfloat16, not {dtype!r}"
    )
    bounded = type(allow_residual) in (int, float) and allow_residual >= 0  # type: ignore[operator]
    require(
        allow_residual is None or bounded, "allow_residual", f"allow_residual must be a number from 0, not {allow_residual!r}"
    )
    path = Path(path)
    with new_folder(path) as folder:
        source = open_source(what)
        start = None if base is None else open_base(base, source.plain)
        low_rank, full, notes = _divide(source, start, whole=whole)
        if start is None:
            _refuse_unknown_start(source, low_rank, allowed=allow_residual is not None)
        changes = {name: _thin(source.changes[name], rank) for name in low_rank}
        bases = {
            name: slot.side(source.bases[name])
            for name, slot in slots(source.plain, low_rank).items()
            if name in source.bases and changes[name] is source.changes[name]
        }
        written = write_adapter(
            folder,
            source.plain,
            changes,
            full,
            base=str(base) if isinstance(base, str | Path) else _name(start or source.plain),
            dtype=dtype,
            frozen=bases,
        )
        if written.beside:
            notes.append("PEFT puts what is saved beside adapters into the base: disable_adapter() leaves it there")
        lost = {name: why for name in low_rank if (why := _narrowed(changes[name], source.changes[name], rank, dtype))}
        report = _compare(source, start, folder, written, full, inputs, allow_residual, str(path), base, notes, lost)
        report.write(folder)
    if not quiet:
        sys.stdout.write(f"{report}\n")
    return report


def _divide(source: Source, start: nn.Module | None, *, whole: bool) -> tuple[list[str], dict[str, Tensor], list[str]]:
    """What is written as factors, what as it is, and what there is to say about it."""
    plain, notes = source.plain, []
    names = dict(plain.named_parameters())
    unknown = next((name for name in source.changes if name not in names), None)
    if unknown is not None:
        raise ExportError(f"the model has no parameter '{unknown}', which was changed")
    refused = why_not(plain, source.changes)
    full: dict[str, Tensor] = {}
    for name, reason in refused.items():
        if not whole and len(places(plain, name)) == 1:
            raise ExportError(f"PEFT has no low-rank form for '{name}': {reason}. With whole=True it is saved at its full size")
        notes.append(f"'{name}' is saved whole: {reason}")
        full[name] = source.rounded(name)
    full |= source.trained
    for name, buffer in plain.named_buffers():
        statistic = isinstance(plain.get_submodule(name.rpartition(".")[0]), nn.modules.batchnorm._NormBase)
        if statistic and (start is None or not torch.equal(buffer, start.get_buffer(name))):
            full[name] = buffer
    if start is not None:
        same = {name: torch.equal(value, _tensor(start, name).to(value)) for name, value in full.items()}
        full = {name: value for name, value in full.items() if not same[name]}
        for name, param in names.items():
            touched = name in source.changes or name in source.trained
            if not touched and param.dtype.is_floating_point and not torch.equal(start.get_parameter(name).to(param), param):
                raise ExportError(f"the base is not what the run started from: '{name}' was not trained, and differs")
    return [name for name in source.changes if name not in refused], full, notes


def _thin(factors: Factors, rank: int | None) -> Factors:
    """A change with no more columns than it needs."""
    most = min(*factors.shape, *([] if rank is None else [rank]))
    return factors if factors.rank <= most else compress(factors, rank=rank)[0]


def _narrowed(written: Factors, change: Factors, rank: int | None, dtype: torch.dtype | None) -> str:
    """What the rank or the dtype that was asked for may have lost of a change, in words; nothing where neither can have."""
    if rank is not None and written.rank == rank < min(change.rank, *change.shape):
        return f"rank={rank} was asked for, and its change has up to {min(change.rank, *change.shape)}"
    if dtype is not None and torch.finfo(dtype).eps > torch.finfo(change.left.dtype).eps:
        return f"factors in {str(dtype).removeprefix('torch.')} were asked for, and are rounded"
    return ""


def _refuse_unknown_start(source: Source, low_rank: list[str], *, allowed: bool) -> None:
    """Make sure that the weights the run started from can be had as they were."""
    for name in low_rank:
        dtype = source.plain.get_parameter(name).dtype
        if source.start(name) is not None or _many_digits(dtype):
            continue
        merged = f"'{name}' is {str(dtype).removeprefix('torch.')} and was merged into: every merge was rounded"
        if not dtype.is_floating_point:
            raise ExportError(
                f"{merged}, and what the run started from is gone. Pass it: base=folder or model, quantised alike"
            )
        if not allowed:
            raise ExportError(
                f"{merged}, and how far that is from low rank can be told beside the start weights only. Pass them, "
                "base=folder or model, or allow_residual=1.0 to write what the run meant to add"
            )


def _compare(
    source: Source,
    start: nn.Module | None,
    folder: Path,
    written: Written,
    full: dict[str, Tensor],
    inputs: Any,
    allow: float | None,
    path: str,
    given: Any,
    notes: list[str],
    lost: dict[str, str],
) -> Report:
    asked = make_inputs(inputs, source.model)
    expected = None if asked is None else asked.run(source.model)
    bare = source.plain if start is None else start
    described = f"the base given, {given}" if isinstance(given, str | Path) else "the base given"
    if start is None:
        exact = [name for name in written.ranks if source.start(name) is not None]
        for name in set(written.ranks) - set(exact):
            bare.get_parameter(name).data = source.rebuilt(name)
        described = (
            "the run's frozen weights"
            if len(exact) == len(written.ranks)
            else ("the run's weights less their change: whether that is what the run started from, base= would tell")
        )
    as_is = {name: value_of(source.plain, full, name) for name in written.plan.tensors(source.plain)}
    dtypes = {name: bare.get_parameter(name).dtype for name in written.ranks}
    starts = {name: dense(bare, name) for name in written.ranks}
    for name in written.beside:  # PEFT writes into these
        bare.get_parameter(name).data = bare.get_parameter(name).detach().clone()
    loaded = Loaded(bare, folder, written.plan)
    rows = compare_weights(loaded, written, source.now, starts.__getitem__, source.kept)
    for row in rows:
        _check_residual(row, source, dtype=dtypes[row.name], allow=allow, given=start is not None, lost=lost.get(row.name, ""))
    for name, value in as_is.items():
        if not torch.equal(loaded.tensor(name).to(value), value):
            raise ExportError(f"'{name}', saved as it is, came back from PEFT with another value")
    found = change = None
    if asked is not None and expected is not None:
        found, change = _check_outputs(asked, loaded, expected, rows, source)
    what = asked.what if asked is not None and expected is not None else "pass inputs= to have them compared"
    return Report(
        path,
        described,
        what,
        tuple(rows),
        tuple(written.whole),
        tuple(written.beside),
        found,
        change,
        written.nbytes,
        tuple(notes),
    )


def _check_residual(row: Row, source: Source, *, dtype: torch.dtype, allow: float | None, given: bool, lost: str) -> None:
    explained = ROUNDINGS * torch.finfo(dtype).eps / row.change if _many_digits(dtype) and row.change else 0.0
    limit = allow if allow is not None else max(EXACT, explained)
    if row.residual <= limit:
        return
    if row.kept != 1.0:
        why = (
            f"weight decay has left {row.kept:.6g} of what the weight was, and that part of the change, {abs(1 - row.kept):.1e}"
            " of the weight, has no low rank. Train with weight_decay=0 what shall become an adapter, or save the model"
        )
    elif lost:
        why = lost
    elif not _many_digits(dtype) and source.start(row.name) is None:
        why = "merges into weights of so few digits were rounded. Train in adapter mode, or in float32"
    elif given:
        why = "the base is not what the run started from, or other programs changed the weight"
        if not dtype.is_floating_point:
            why += (
                " (on some CPUs bitsandbytes repacks 4-bit layers for good, scales rounded, when a model in eval mode runs "
                "before lingrad.adapt: generate and evaluate with another copy of it)"
            )
    else:
        why = "another program changed the weight, or PEFT reads the adapter in another way than meant"
    raise ExportError(
        f"the adapter does not reproduce '{row.name}': the residual is {row.residual:.1e} of its change, over {limit:.1e}, "
        f"because {why}. allow_residual={row.residual:.2g} accepts it"
    )


def _check_outputs(asked: Inputs, loaded: Loaded, expected: Tensor, rows: list[Row], source: Source) -> tuple[float, float]:
    got = asked.run(loaded.model)
    with loaded.without():
        before = asked.run(loaded.model)
    if got is None or before is None or got.shape != expected.shape:
        raise ExportError("PEFT's model does not give outputs like the run's")
    found, change = (float((value - expected).abs().max()) for value in (got, before))
    eps = max(torch.finfo(p.dtype).eps for p in source.model.parameters() if p.is_floating_point())
    eps = max(eps, torch.finfo(torch.float32).eps)  # to which norms round, whatever the dtype
    share = max(10 * max((row.residual for row in rows), default=0.0), EXACT)
    limit = OUTPUTS * eps * float(expected.abs().max()) + share * change
    if not found <= limit:
        raise ExportError(
            f"PEFT's model answers otherwise than the run: outputs on {asked.what} differ by {found:.1e}, more than {limit:.1e}"
            ", although the weights agree; some layer does not act through PEFT's wrapper. Leave it out by a rule: 'none'"
        )
    return found, change


def _many_digits(dtype: torch.dtype) -> bool:
    """Whether what merges round away does not matter: float32 and wider, no halves and no codes of quantised weights."""
    return dtype.is_floating_point and torch.finfo(dtype).bits >= 32


def _tensor(model: nn.Module, name: str) -> Tensor:
    found: Tensor = model.state_dict()[name]
    return found


def _name(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
