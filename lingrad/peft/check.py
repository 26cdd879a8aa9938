"""Which program loads an adapter as PEFT does, by its files alone: anybody's adapter, without its model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lingrad.console import columns, span
from lingrad.errors import DataError, ExportError, require_one_of
from lingrad.peft import names, patterns
from lingrad.peft.config import open_config
from lingrad.peft.loaders import LOADERS, TARGETS, VLLM_RANKS, AdapterFile, Loader, LoaderName, more_than_factors
from lingrad.peft.read import open_weights
from lingrad.peft.slots import PREFIX

_FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(\.weight)?")
_EXACT = 1e-6  # of a scale: alphas and ranks are small whole numbers, and their quotients are rounded once


@dataclass(frozen=True)
class LoaderFinding:
    """What one loader does with an adapter.

    Args:
        loader: Its name.
        refused: Why it stops with an error; empty where it loads the adapter.
        changed: What it makes another model of, without an error.
        command: How to load the adapter with it.
    """

    loader: LoaderName
    refused: tuple[str, ...]
    changed: tuple[str, ...]
    command: str

    @property
    def verdict(self) -> str:
        """In a word or two."""
        return "refused" if self.refused else "loads another change" if self.changed else "loads"


@dataclass(frozen=True)
class AdapterCheck:
    """Which programs load an adapter.

    Args:
        folder: Its folder.
        findings: One for each loader.
    """

    folder: str
    findings: tuple[LoaderFinding, ...]

    def __str__(self) -> str:
        """A table: loader, verdict, reasons; then the commands of those that load it."""
        rows = [("loader", "verdict", "why")]
        for found in self.findings:
            reasons = found.refused or found.changed or ("",)
            rows += [(found.loader, found.verdict, reasons[0]), *(("", "", reason) for reason in reasons[1:])]
        lines = columns(rows, [False, False, False])
        return "\n".join([*lines, *(f"{f.loader}: {f.command}" for f in self.findings if f.verdict == "loads")])


def check_adapter(folder: str | Path, loader: str | None = None) -> AdapterCheck:
    """Find out which programs load a LoRA of PEFT as PEFT does, which refuse it, and which change it without an error.

    Only the config and the header of the weights are read; no model and no loader is needed. What depends on the model, such as
    the layers that a server has adapters for, is not known here.

    Args:
        folder: The adapter's folder, of any program.
        loader: ``vllm``, ``llama.cpp``, ``tgi`` or ``diffusers`` to ask about one; None for all.

    Returns:
        What each does.

    Raises:
        DataError: The folder is no LoRA's, is damaged, or has its weights in a pickle.
        ExportError: A loader was named, and it refuses the adapter or changes it.
        SpecError: The loader is unknown.
    """
    if loader is not None:
        require_one_of(loader, tuple(LOADERS), "loader")
    adapter = open_adapter_file(Path(folder))
    chosen = [found for name, found in LOADERS.items() if loader in (None, name)]
    findings = tuple(judge(each, adapter, str(folder)) for each in chosen)
    if loader is not None:
        target = loader if loader in TARGETS else "vllm"  # one rank, nothing but factors
        again = (
            f"Export it again with target='{target}' where lingrad wrote it, or merge it (lingrad merge) and serve the model"
        )
        require_loads(findings[0], f"'{folder}'", again)
    return AdapterCheck(str(folder), findings)


def require_loads(found: LoaderFinding, what: str, remedy: str) -> None:
    """Make sure that a loader takes an adapter as PEFT does.

    Args:
        found: What the loader does with it.
        what: The adapter, for the message.
        remedy: What to do; ends the message.

    Raises:
        ExportError: It refuses or changes it; the message says why, and what to do.
    """
    if found.verdict == "loads":
        return
    title = LOADERS[found.loader].title
    reasons = "; ".join(found.refused or found.changed)
    word = "refuses" if found.refused else "loads, but not as PEFT does,"
    raise ExportError(f"{title} {word} {what}: {reasons}. {remedy}")


def scale_faults(adapter: AdapterFile) -> dict[LoaderName, str]:
    """Which loaders would multiply the factors of an adapter by other numbers than PEFT does, and say nothing.

    Args:
        adapter: The adapter.

    Returns:
        Loader -> a sentence without its full stop; those that refuse the adapter are left out.
    """
    found: dict[LoaderName, str] = {}
    for name, loader in LOADERS.items():
        wrong = _wrong_scales(loader, adapter)
        if wrong and not any(loader.refuses(adapter)):
            found[name] = f"{loader.title} would multiply the change by {wrong}, without an error"
    return found


def open_adapter_file(folder: Path) -> AdapterFile:
    """What there is to see in an adapter's folder without its model.

    Args:
        folder: The folder.

    Returns:
        Config, ranks, scales and other tensors.

    Raises:
        DataError: It is no LoRA's, is damaged, or has its weights in a pickle.
    """
    config = open_config(folder)
    return describe(config, {key: entry.shape for key, entry in open_weights(folder).entries.items()})


def describe(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> AdapterFile:
    """What there is to see of an adapter.

    Args:
        config: Its config.
        shapes: Key -> shape of its tensors.

    Returns:
        The description.

    Raises:
        DataError: A module has one factor only, or there are none.
    """
    ranks: dict[str, int] = {}
    sides: dict[str, set[str]] = {}
    convolutions, embeddings, others = [], [], []
    for key, shape in shapes.items():
        found = _FACTOR.fullmatch(key)
        if found is None or len(shape) < 2:
            others.append(key)
            continue
        path, embedding, side = found[1].removeprefix(PREFIX), found[2], found[3]
        sides.setdefault(path, set()).add(side)
        if side == "B":
            ranks[path] = shape[1]
            convolutions += [path] if len(shape) > 2 else []
            embeddings += [path] if embedding else []
    odd = next((path for path, found in sides.items() if found != {"A", "B"}), None)
    if odd is not None or not ranks:
        raise DataError(
            f"the adapter has {'one factor only' if odd else 'no low-rank factors'}{f' for {odd!r}' if odd else ''}"
        )
    scales = _scales(config, list(ranks))
    return AdapterFile(config, ranks, scales, tuple(convolutions), tuple(embeddings), tuple(others))


def _scales(config: Mapping[str, Any], paths: list[str]) -> dict[str, float]:
    """What PEFT multiplies by: it matches patterns with the name of a module, or of a parameter."""
    rank, alpha = (
        patterns.values(config.get(f"{kind}_pattern") or {}, config[option])
        for kind, option in (("rank", "r"), ("alpha", "lora_alpha"))
    )
    targets = [str(target) for target in config.get("target_parameters") or ()]
    found = {}
    for path in paths:
        module = re.sub(r"(\.base_layer)+$", "", path)
        own = [f"{module}.{target.rpartition('.')[2]}" for target in targets]
        name = next((name for name, target in zip(own, targets, strict=True) if names.targeted(name, target)), module)
        found[path] = float(alpha(name) / (math.sqrt(rank(name)) if config.get("use_rslora") else rank(name)))
    return found


def _wrong_scales(loader: Loader, adapter: AdapterFile) -> str:
    """By what a loader multiplies relative to PEFT, where it is not 1."""
    parameters = adapter.parameters()
    shares = [loader.scale(adapter, path) / scale for path, scale in adapter.scales.items() if path not in parameters and scale]
    wrong = [share for share in shares if abs(share - 1) > _EXACT]
    return f"{span(wrong, '{:.3g}')} in {len(wrong)} of {len(adapter.scales)} modules" if wrong else ""


def judge(loader: Loader, adapter: AdapterFile, folder: str) -> LoaderFinding:
    """What a loader does with an adapter.

    Args:
        loader: The loader.
        adapter: What there is to see of the adapter.
        folder: Where it is, for the command.

    Returns:
        What it does.
    """
    wrong = _wrong_scales(loader, adapter)
    changed = [f"multiplies the change by {wrong}"] if wrong else []
    changed += [f"leaves out {what}" for what in (*loader.loses(adapter), *more_than_factors(adapter))]
    needed = next((rank for rank in VLLM_RANKS if rank >= max(adapter.r, *adapter.ranks.values())), VLLM_RANKS[-1])
    start = str(adapter.config.get("base_model_name_or_path") or "START")
    words = {"START": start, "DIR": folder, "RANK": str(needed)}
    command = re.sub(rf"\b({'|'.join(words)})\b", lambda found: loader.quote(words[found[0]]), loader.command)
    return LoaderFinding(loader.name, tuple(loader.refuses(adapter)), tuple(changed), command)
