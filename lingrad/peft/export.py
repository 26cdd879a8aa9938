"""A run exported as a LoRA of PEFT: written, loaded by PEFT, compared with the run, and only then given its name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lingrad.deprecated import renamed_keywords
from lingrad.errors import ExportError, optional, require, warn_caller
from lingrad.files.atomic import new_folder
from lingrad.maps.factors import Factors
from lingrad.peft.card import add_tokenizer, check_base_model, unnamed, write_card
from lingrad.peft.comparison import Comparison, is_wide
from lingrad.peft.fit import check_allowed, check_target, check_written, fitted, largest_rank, limited, refuse_full
from lingrad.peft.hub import check_repository, require_named
from lingrad.peft.hub import push_to_hub as push_to_hub_
from lingrad.peft.loaders import Target
from lingrad.peft.report import AdapterReport, ChangedTensor
from lingrad.peft.slots import aliases, slots, why_not
from lingrad.peft.source import Exported, ExportSource, open_source, open_start
from lingrad.peft.write import write_adapter

Start = str | Path | nn.Module


@renamed_keywords("lingrad.peft.export", base="start")
def export(
    what: Exported,
    path: str | Path,
    *,
    inputs: Any = None,
    start: Start | None = None,
    dtype: torch.dtype | None = None,
    rank: int | None = None,
    whole: bool = False,
    allow_residual: float | None = None,
    target: Target = "peft",
    base_model: str | None = None,
    tokenizer: Any = None,
    push_to_hub: str | None = None,
    quiet: bool = False,
) -> AdapterReport:
    """Write the change that a run has made to its model as an adapter that PEFT loads by itself.

    PEFT loads the adapter before the folder gets its name, and its weights and outputs are compared with those of the run. The
    run itself is not changed. Where several processes share a run, one of them calls this.

    Args:
        what: The run, ``opt`` of `lingrad.wrap` (with ``ledger=True``) or `lingrad.adapt` (without, as long as nothing was
            merged); or the trained plain model and the changes of its weights as a pair ``(model, changes)``.
        path: The folder to write; must not exist.
        inputs: What to run both models on: a tensor, a tuple, or a mapping of named arguments. By default random ones of
            what a model of transformers reads; they are needed where it runs on none that are tried. For a model of another
            library only weights are compared without them.
        start: The model the run started from, as a folder or a module, to compare with. By default the run's own frozen
            weights, or the weights minus their change.
        dtype: Of the factors; by default that of the coordinates.
        rank: The largest rank of any weight's adapter; what it drops is part of the residual. By default nothing is dropped;
            where a weight has fewer rows or columns than all bases have columns, they are recompressed without loss.
        whole: Save weights that PEFT has no low-rank form for in full, with their module, instead of refusing them. Tied
            weights are always saved so.
        allow_residual: The largest relative residual |W - (W_start + B A)| / |W - W_start| of any weight to accept. By default
            1e-3, or what rounding explains in float32 and wider.
        target: What is to load the adapter: ``peft``, with which every module may have its own rank, and tensors may be saved
            in full; or ``vllm``, ``llama.cpp`` or ``diffusers``, which read less of an adapter: it then has one rank (by
            columns of zeros, for vLLM at most 512) and nothing but factors.
        base_model: What others know the starting model by, such as ``owner/name``: PEFT's ``base_model_name_or_path``, by which
            programs find it. By default the folder given as ``start``, or the name that the model was loaded by.
        tokenizer: The tokenizer to put into the folder, with its chat template: one of transformers, or a folder with one; by
            default that of ``start`` where it is a folder that has one.
        push_to_hub: A repository of the Hugging Face hub, ``owner/name``, to upload the finished folder to; None uses no
            network.
        quiet: Do not print the report.

    Returns:
        The report, which is also in the folder, as ``lingrad_report.json``.

    Raises:
        ExportError: PEFT or the target cannot express the change, or PEFT does not reproduce it; nothing is left.
        DataError: The path exists, or the starting model cannot be read.
        ModeError: The run was detached, or has merged without ``ledger=True``.
        SpecError: An option is wrong.
        DependencyError: PEFT is not installed.
    """
    _check_options(start, dtype, rank, whole, allow_residual)
    check_target(target)
    check_base_model(base_model)
    if push_to_hub is not None:
        check_repository(push_to_hub)
    most = largest_rank(target, rank)
    optional("peft", "exporting to PEFT", "hf")
    with new_folder(Path(path)) as folder:
        source = open_source(what)
        starting = None if start is None else open_start(start, source.bare)
        low_rank, full, notes = _divide(source, starting, whole=whole)
        if starting is None:
            _require_start(source, low_rank, allowed=allow_residual is not None)
        refuse_full(target, full)
        changes = fitted(target, {name: limited(source.changes[name], most) for name in low_rank})
        frozen = {
            name: slot.factor_on(source.bases[name])
            for name, slot in slots(source.bare, low_rank).items()
            if name in source.bases and changes[name] is source.changes[name]
        }
        name = base_model or (str(start) if isinstance(start, str | Path) else _name(starting or source.bare))
        if push_to_hub is not None:
            require_named(name)
        written = write_adapter(folder, source.bare, changes, full, start=name, dtype=dtype, frozen=frozen)
        if written.alongside:
            notes.append("PEFT loads what is saved alongside the adapters into the model: disable_adapter() does not remove it")
        faults, commands = check_written(folder, target)
        notes += [*(faults := [*faults, *unnamed(name)]), *commands]
        lost = {name: why for name in low_rank if (why := _narrowed(changes[name], source.changes[name], most, dtype))}
        comparison = Comparison(source, starting, written, full, folder)
        rows, residual = comparison.weights(allow_residual, lost)
        report = AdapterReport(
            "run",
            (*rows, *(ChangedTensor(name, "full", tuple(t.shape), t.nbytes) for name, t in full.items())),
            residual,
            written.nbytes,
            tuple(written.saved_modules),
            tuple(written.alongside),
            start=_in_words(comparison, start),
            outputs=comparison.outputs(inputs, max((row.residual for row in rows), default=0.0)),
            notes=tuple(notes),
            path=str(path),
        )
        report.write(folder)
        add_tokenizer(folder, tokenizer, Path(start) if isinstance(start, str | Path) else None)
        write_card(folder, report, written.config, source.transforms)
    if push_to_hub is not None:
        push_to_hub_(path, push_to_hub)
    if not quiet:
        sys.stdout.write(f"{report}\n")
    for fault in faults if quiet else ():
        warn_caller(fault, UserWarning)
    return report


def _check_options(start: Any, dtype: Any, rank: Any, whole: Any, allow_residual: Any) -> None:
    known = start is None or isinstance(start, str | Path | nn.Module)
    require(known, "start", f"start must be a folder or a model, not {start!r}")
    require(rank is None or (type(rank) is int and rank > 0), "rank", f"rank must be a whole number from 1, not {rank!r}")
    floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    require(
        dtype is None or floating, "dtype", f"dtype must be a floating-point torch.dtype, such as torch.bfloat16, not {dtype!r}"
    )
    require(isinstance(whole, bool), "whole", f"whole must be True or False, not {whole!r}")
    check_allowed(allow_residual)


def _divide(source: ExportSource, start: nn.Module | None, *, whole: bool) -> tuple[list[str], dict[str, Tensor], list[str]]:
    """The names of the changes written as factors, the tensors saved in full, and notes."""
    model, notes = source.bare, []
    names = dict(model.named_parameters())
    unknown = next((name for name in source.changes if name not in names), None)
    if unknown is not None:
        raise ExportError(f"the model has no parameter '{unknown}', which was changed")
    refused = why_not(model, source.changes)
    full: dict[str, Tensor] = {}
    for name, reason in refused.items():
        if not whole and len(aliases(model, name)) == 1:
            raise ExportError(f"PEFT has no low-rank form for '{name}': {reason}. With whole=True it is saved in full")
        notes.append(f"'{name}' is saved in full: {reason}")
        full[name] = source.rounded(name)
    full |= source.trained
    for name, buffer in model.named_buffers():
        statistic = isinstance(model.get_submodule(name.rpartition(".")[0]), nn.modules.batchnorm._NormBase)
        if statistic and (start is None or not torch.equal(buffer, start.get_buffer(name))):
            full[name] = buffer
    if start is not None:
        state = start.state_dict()
        full = {name: value for name, value in full.items() if not torch.equal(value, state[name].to(value))}
        for name, param in names.items():
            untouched = name not in source.changes and name not in source.trained and param.dtype.is_floating_point
            if untouched and not torch.equal(start.get_parameter(name).to(param), param):
                raise ExportError(f"the start given is not what the run started from: '{name}' was not trained, and differs")
    return [name for name in source.changes if name not in refused], full, notes


def _narrowed(written: Factors, change: Factors, rank: int | None, dtype: torch.dtype | None) -> str:
    """Why the rank or the dtype asked for may have lost some of a change; empty where neither can have."""
    if rank is not None and written.rank == rank < min(change.rank, *change.shape):
        return f"the largest rank is {rank}, and its change has up to {min(change.rank, *change.shape)}"
    if dtype is not None and torch.finfo(dtype).eps > torch.finfo(change.left.dtype).eps:
        return f"factors in {str(dtype).removeprefix('torch.')} were asked for, and are rounded"
    return ""


def _require_start(source: ExportSource, low_rank: list[str], *, allowed: bool) -> None:
    """Make sure that the weights the run started from are known, or can be computed."""
    for name in low_rank:
        dtype = source.bare.get_parameter(name).dtype
        if source.start(name) is not None or is_wide(dtype):
            continue
        merged = f"'{name}' is {str(dtype).removeprefix('torch.')} and was merged into: every merge was rounded"
        if not dtype.is_floating_point:
            raise ExportError(
                f"{merged}, and the weights the run started from are gone. Pass them: start=folder or model, quantised alike"
            )
        if not allowed:
            raise ExportError(
                f"{merged}, and what that lost can be measured only against the starting weights. Pass them, start=folder or "
                "model, or pass allow_residual=1.0 to write the updates as they were meant"
            )


def _in_words(comparison: Comparison, start: Start | None) -> str:
    """What the adapter was loaded onto."""
    if start is not None:
        return f"the start given, {start}" if isinstance(start, str | Path) else "the start given"
    if comparison.rebuilt:
        return "the run's weights minus their change; only start= can show whether the run started from these"
    return "the run's frozen weights"


def _name(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
