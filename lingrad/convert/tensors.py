"""Each tensor of two model folders: which parameter it is, how it is read as a matrix, and in what form its change is saved."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lingrad.config.targets import resolve_model
from lingrad.convert.difference import Difference
from lingrad.errors import DataError, ExportError, SpecError
from lingrad.files.model_folder import ModelFolder
from lingrad.maps.factors import Factors
from lingrad.peft.slots import aliases, why_not
from lingrad.weights.layout import is_conv1d, layout_of

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class TensorPair:
    """One tensor, in both folders.

    Args:
        name: Its name in the files.
        param: Its name in the model.
        shape: (m, n) of the matrix it is in row-major order; None where its value is saved in full.
        transposed: Whether that matrix is [in, out].
    """

    name: str
    param: str
    shape: tuple[int, int] | None = None
    transposed: bool = False

    def difference(self, start: ModelFolder, tuned: ModelFolder) -> Difference:
        """TUNED - START as a matrix.

        Args:
            start: The one folder.
            tuned: The other.

        Returns:
            The difference; nothing is read yet.

        Raises:
            DataError: The dtype is not one of weights, as in a quantised model.
        """
        shape = self.shape or _flat(start.entry(self.name).shape)
        for folder in (start, tuned):
            dtype = folder.entry(self.name).dtype
            if dtype not in _FLOATS:
                raise DataError(
                    f"'{self.name}' is {dtype} in '{folder.path}': its change cannot be computed, as for quantised weights; "
                    "give folders with weights in float32, bfloat16, float16 or float64"
                )
        n = shape[1]

        def rows(first: int, stop: int) -> tuple[Tensor, Tensor]:
            return tuned.rows(self.name, n, first, stop), start.rows(self.name, n, first, stop)

        return Difference(shape, tuned.entry(self.name).dtype, rows, name=f"'{self.name}'")

    def reorient(self, factors: Factors) -> Factors:
        """Factors of the matrix as it is stored <-> factors of the layout's matrix, [out, in]."""
        return factors.T if self.transposed else factors

    def equal(self, start: ModelFolder, tuned: ModelFolder) -> bool:
        """Whether it has the same values in both."""
        if 0 in start.entry(self.name).shape:  # without elements, however many rows
            return True
        dtypes = {folder.entry(self.name).dtype for folder in (start, tuned)}
        if len(dtypes) == 2 and not dtypes <= {*_FLOATS}:
            return False
        m, n = _flat(start.entry(self.name).shape)
        step = max(1, (1 << 20) // max(1, n))
        return all(
            bool((tuned.rows(self.name, n, i, min(m, i + step)) == start.rows(self.name, n, i, min(m, i + step))).all())
            for i in range(0, m, step)
        )


def pairs(model: nn.Module, start: ModelFolder, tuned: ModelFolder, chosen: Collection[str] | None = None) -> list[TensorPair]:
    """Match the tensors of both folders with the model's parameters.

    Args:
        model: The model of their config, on the meta device.
        start: The one folder.
        tuned: The other.
        chosen: The parameters whose change is of low rank; None for those that a config string without rules transforms,
            convolutions and experts.

    Returns:
        A pair for each tensor that both have, sorted by name.

    Raises:
        DataError: A tensor does not have the shape in the config.
    """
    every, own = dict(model.named_parameters()), model.state_dict()
    wide = _low_rank(model) if chosen is None else {name: every[name] for name in chosen}
    found = []
    for name, param in params_of(model, sorted({*start.names} & {*tuned.names})).items():
        weights = tuned.entry(name).dtype in _FLOATS  # shapes of codes are others; they are refused where they differ
        if param and weights and tuned.entry(name).shape != tuple(own[param].shape):
            raise DataError(
                f"'{name}' is {list(tuned.entry(name).shape)} in '{tuned.path}', and {list(own[param].shape)} by its config; "
                "the folder has the weights of one model and the config of another"
            )
        if param not in wide:
            found.append(TensorPair(name, param))
            continue
        module = model.get_submodule(param.rpartition(".")[0])
        layout = layout_of(wide[param], module, param)
        transposed = is_conv1d(module)
        found.append(TensorPair(name, param, layout.shape[::-1] if transposed else layout.shape, transposed))
    return found


def params_of(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """The model's names for tensors in a file, which may have been saved with or without the name of the inner model.

    Args:
        model: The model.
        names: The tensors' names.

    Returns:
        Name in the file -> name in the model; empty where the model has no such parameter or buffer.
    """
    known = model.state_dict().keys()
    prefix = getattr(model, "base_model_prefix", "")

    def own(name: str) -> str:
        tried = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        return next((candidate for candidate in tried if candidate in known), "")

    return {name: own(name) for name in names}


def tied_names(model: nn.Module, folder: ModelFolder) -> set[str]:
    """The names in a folder that are tied to each other in the model."""
    seen: dict[str, str] = {}
    again = set()
    params = dict(model.named_parameters(remove_duplicate=False))
    for name, param in params_of(model, folder.names).items():
        first = aliases(model, param)[0] if param in params else name
        if first in seen:
            again |= {name, seen[first]}
        seen[first] = name
    return again


def require_parameter(model: nn.Module, pair: TensorPair) -> None:
    """Make sure that the model has a parameter for a tensor that changed.

    Args:
        model: The model.
        pair: The tensor.

    Raises:
        ExportError: It has none.
    """
    if not pair.param:
        raise ExportError(
            f"'{pair.name}' changed, and {type(model).__name__}, the model of this config, has no such parameter; no "
            "adapter can have the change. If transformers writes this model's files under other names, save both folders under "
            "the names of the parameters: safetensors.torch.save_model(model, 'model.safetensors'), with the config.json"
        )


def smaller_in_full(model: nn.Module, pair: TensorPair, rank: int) -> bool:
    """Whether a change is of full rank, so that its factors are larger than the weight, and PEFT can save its layer instead.

    Args:
        model: The model.
        pair: The tensor.
        rank: The rank of its change.

    Returns:
        Whether to save it in full.
    """
    owner = pair.param.rpartition(".")[0]
    if pair.shape is None or rank < min(pair.shape) or not owner:
        return False
    own = {name for name, _ in model.get_submodule(owner).named_parameters()}
    alone = not any(name != owner and name.endswith(owner) for name, _ in model.named_modules(remove_duplicate=False))
    return own <= {"weight", "bias"} and alone  # as PEFT matches the modules that it saves


def _low_rank(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters to find low-rank changes of: those a config string transforms, convolutions and fused experts."""
    params = dict(model.named_parameters())
    try:
        plan = resolve_model(model, "svd(rank=1, clip=true)")
        chosen = {target.name: target.param for target in plan.targets}
        chosen |= {name: param for name, param in plan.full if param.dim() > 2}
    except SpecError:  # the model has nothing but a head
        chosen = {name: param for name, param in params.items() if param.dim() > 2}
    refused = why_not(model, list(chosen))
    return {name: param for name, param in chosen.items() if name not in refused}


def _flat(shape: tuple[int, ...]) -> tuple[int, int]:
    """(m, n) of a tensor read as rows of its last dimension."""
    n = shape[-1] if shape else 1
    m = 1
    for size in shape[:-1]:
        m *= size
    return (m, n)


@dataclass(frozen=True)
class Models:
    """The two models of a conversion.

    Args:
        start: The folder of one; None where the change is known without it.
        tuned: The folder of the other.
        model: Their model, on the meta device.
        pairs: Its tensors.
        ignored: Entries of their configs that differ and do not matter.
    """

    start: ModelFolder | None
    tuned: ModelFolder
    model: nn.Module
    pairs: list[TensorPair]
    ignored: tuple[str, ...] = ()
