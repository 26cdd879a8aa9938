"""Adapters of which each row of a batch takes its own: K sets of coordinates on one shared, frozen basis.

A layer computes y_i = W x_i + S z_k(i) applied to x_i for all rows i at once: with a basis on the right side
W x_i + Z_k (Q^T x_i), with one on the left W x_i + P (Z_k x_i), where Z_k is read from one tensor [K, p, q] for the whole batch
and the product is a single batched one. A batch with one adapter for each example is that of FLoRA (Wen and Chaudhuri, ICLR
2024, arXiv 2312.05677). There, an adapter multiplies W elementwise and both its factors train; here it is added, and
one factor is the basis, so that its product with x is the same for all adapters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor, nn

from lingrad.adapters.base import _MARK, refuse_attached
from lingrad.config import spec
from lingrad.config.names import held_parameters
from lingrad.config.rules import Rules
from lingrad.config.targets import Plan, Target, resolve_model
from lingrad.errors import ModeError, ShapeError, SpecError, require, shown
from lingrad.maps.factors import Factors
from lingrad.parallel import refuse_wrapped
from lingrad.subspaces.fixed import fixed_basis
from lingrad.tensors import cast, is_sharded, wide
from lingrad.weights.dense import DenseWeight


class _Chosen(NamedTuple):
    """Which adapters a batch takes.

    Args:
        batch: Rows of the batch.
        rows: The rows that take one, int64 [b]; None where all do.
        ids: Their adapters, int64 [b].
    """

    batch: int
    rows: Tensor | None
    ids: Tensor


class _Layer:
    """One linear layer with K sets of coordinates.

    Args:
        target: Its weight.
        count: K.
        seed: Of the run.
    """

    def __init__(self, target: Target, count: int, seed: int) -> None:
        self.name = target.name
        self.module = target.owners[0][0]
        self.weight = DenseWeight(target.layout, target.param, target.owners)
        self.basis = fixed_basis(target.name, target.transform, self.weight, seed)
        self.coords = nn.Parameter(
            torch.zeros((count, *self.basis.coords_shape), device=target.param.device, dtype=wide(target.param.dtype))
        )
        self.basis.map().expand(self.coords.detach().new_zeros(0, self.basis.coords_shape[0]))  # raises where it cannot

    def add(self, x: Tensor, out: Tensor, chosen: _Chosen) -> Tensor:
        """``out`` [B, ..., m] with S z_k applied to ``x`` [B, ..., n]."""
        if x.dim() < 2 or x.shape[0] != chosen.batch:
            raise ShapeError(
                f"the layer of {self.name} gets an input of shape {tuple(x.shape)}, and adapters were chosen for a batch of "
                f"{chosen.batch}; its first dimension must be that of the batch: pass choose() one id for each row, and leave "
                "layers that see all rows as one (routers, experts) out by a rule: 'none'"
            )
        if not len(chosen.ids):
            return out
        rows, current, shape = chosen.rows, self.basis.map(), out.shape
        x, out = _three(cast(x, out.dtype)), _three(out)
        coords = cast(self.coords.index_select(0, chosen.ids), out.dtype)
        reduced = current.reduce(x if rows is None else x.index_select(0, rows))
        if rows is None and current.aligned:
            return torch.baddbmm(out, reduced, coords.mT).view(shape)
        added = current.expand(torch.bmm(reduced, coords.mT))
        return (out + added if rows is None else out.index_add(0, rows, cast(added, out.dtype))).view(shape)


class PerExample:
    """K adapters on one model, of which each row of a batch takes one; made by `per_example`.

    The coordinates of all K adapters of a weight are one parameter, float32 unless the weight is float64. An optimizer of torch
    steps them all: an adapter without a row in a batch has the gradient zero, not None. Plain SGD leaves it as it is; momentum,
    Adam's moments and weight decay still move it, and count the step.

    Args:
        model: The model.
        plan: What the rules say of it.
        count: K.
        seed: Seed of the bases.
    """

    def __init__(self, model: nn.Module, plan: Plan, count: int, seed: int) -> None:
        self.count = count
        self._layers = [_Layer(target, count, seed) for target in plan.targets]
        self._basis = crc32(repr([seed, *((target.name, spec.format(target.transform)) for target in plan.targets)]).encode())
        self._chosen: _Chosen | None = None
        self._trained = [param for param in model.parameters() if param.requires_grad]
        self._hooks: list[Any] = []
        for layer in self._layers:
            hook = partial(self._forward, layer)
            self._hooks.append(layer.module.register_forward_hook(hook, with_kwargs=True))
            setattr(layer.weight.param, _MARK, id(layer.weight.param))
        model.requires_grad_(False)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What trains.

        Yields:
            (name of the weight, coordinates [K, p, q]).
        """
        for layer in self._layers:
            yield layer.name, layer.coords

    def parameters(self) -> Iterator[nn.Parameter]:
        """The coordinates [K, p, q] of every weight, for an optimizer."""
        return (coords for _, coords in self.named_parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """The coordinates by the names of their weights, not copied, and ``basis``, a number that rules and seed decide."""
        return {"basis": torch.tensor(self._basis), **{name: coords.detach() for name, coords in self.named_parameters()}}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over coordinates; nothing is changed unless all of them fit.

        Args:
            state: What `state_dict` gave, for the same rules, seed, count and weights.

        Raises:
            ShapeError: Names or shapes are others.
            ModeError: The coordinates belong to other bases.
        """
        own = self.state_dict()
        for name in {**own, **state}:
            given, expected = (tuple(one[name].shape) if name in one else "missing" for one in (state, own))
            if given != expected:
                raise ShapeError(f"the coordinates of '{name}' are {given} in the state; expected {expected}")
        if int(state["basis"]) != self._basis:
            raise ModeError(
                "the coordinates belong to bases of other rules or of another seed; make the adapters with those first"
            )
        for name, coords in self.named_parameters():
            coords.copy_(state[name])

    @contextmanager
    def choose(self, ids: Tensor) -> Iterator[None]:
        """Say which adapter each row of a batch takes, for forwards inside the ``with``; backwards that recompute too.

        Args:
            ids: int64 [batch], from 0 to K - 1; -1 for a row without an adapter, which has the plain model's output. On the CPU
                or the model's device.

        Yields:
            Nothing.

        Raises:
            SpecError: They are not of this type or range.
            ModeError: The adapters were merged or detached.
        """
        self._require_attached()
        given = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else shown(ids)
        fits = isinstance(ids, Tensor) and ids.dtype == torch.int64 and ids.dim() == 1
        require(fits, "ids", f"ids must be a tensor, int64 [batch], with one adapter for each row of the batch, not {given}")
        low, high = (int(ids.min()), int(ids.max())) if len(ids) else (0, 0)
        known = f"expected 0 to {self.count - 1}, or -1 for a row without an adapter"
        require(low >= -1 and high < self.count, "ids", f"ids are from {low} to {high}; {known}")
        ids = ids.to(self._layers[0].coords.device)
        rows = (ids >= 0).nonzero().flatten() if low < 0 else None
        before, self._chosen = self._chosen, _Chosen(len(ids), rows, ids if rows is None else ids[rows])
        try:
            yield
        finally:
            self._chosen = before

    @torch.no_grad()
    def weights(self, k: int) -> dict[str, Tensor]:
        """The weights of one adapter's model, W + S z_k.

        Args:
            k: The adapter.

        Returns:
            Parameter name -> a new tensor in its shape and dtype; only weights that have coordinates.
        """
        self._require(k)
        return {one.name: one.weight.sum(one.basis.map(), one.coords[k], one.weight.dense()) for one in self._layers}

    @torch.no_grad()
    def factors(self, k: int) -> dict[str, Factors]:
        """One adapter as thin factors, for ``lingrad.peft.write_adapter(folder, model, adapters.factors(k), {})``.

        Args:
            k: The adapter.

        Returns:
            Parameter name -> the change S z_k [m, n], in the dtype of the coordinates.
        """
        self._require(k)
        return {layer.name: layer.basis.map().factors(layer.coords[k].detach()) for layer in self._layers}

    @torch.no_grad()
    def merge(self, k: int) -> None:
        """Add one adapter to the weights, W <- W + S z_k, and leave the model plain.

        Args:
            k: The adapter.
        """
        self._require(k)
        self._require_attached()
        for layer in self._layers:
            layer.weight.add_(layer.basis.map(), layer.coords[k].detach())
        self.detach()

    def detach(self) -> None:
        """Give the model back as it was found; detaching twice does nothing."""
        while self._hooks:
            self._hooks.pop().remove()
        for layer in self._layers:
            vars(layer.weight.param).pop(_MARK, None)
        for param in self._trained:
            param.requires_grad_(True)
        self._trained.clear()

    def _forward(self, layer: _Layer, module: nn.Module, args: Any, kwargs: dict[str, Any], out: Tensor) -> Tensor:
        if self._chosen is None:
            raise ModeError(
                f"the layer of {layer.name} has {self.count} adapters, and none is chosen: call the model inside "
                "'with adapters.choose(ids):', its backward too where layers are recomputed in it; or call detach()"
            )
        return layer.add(args[0] if args else next(iter(kwargs.values())), out, self._chosen)

    def _require_attached(self) -> None:
        if not self._hooks:
            raise ModeError("these adapters were merged into their model or detached from it; call per_example again")

    def _require(self, k: int) -> None:
        known = type(k) is int and 0 <= k < self.count
        require(known, "k", f"k must be a whole number from 0 to {self.count - 1}, the number of an adapter, not {shown(k)}")


def per_example(model: nn.Module, rules: Rules, *, count: int, seed: int = 0) -> PerExample:
    """Give a model several adapters, of which each row of a batch takes its own.

    All parameters of the model are frozen until `PerExample.detach`; the coordinates train, by any optimizer of torch.

    Args:
        model: The model, on its device. Its weights are not changed.
        rules: As for `lingrad.adapt`, for nn.Linear and transformers' Conv1D, with bases that read no gradient and stay:
            ``random(rank=8, every=0)``, ``weight(rank=8)``. ``none`` and ``frozen`` both mean a weight without adapters.
        count: K, how many adapters.
        seed: Seed of the bases, which are those of ``lingrad.adapt(model, rules, seed=seed)``.

    Returns:
        The adapters, all zero.

    Raises:
        SpecError: A rule or an option is wrong, is for another kind of layer, or asks for a basis that changes.
        ModeError: The model is wrapped already, or sharded.
    """
    require(isinstance(model, nn.Module), "model", f"expected a model, not a {type(model).__name__}")
    require(type(count) is int and count > 0, "count", f"count must be a whole number from 1, not {shown(count)}")
    require(type(seed) is int and seed >= 0, "seed", f"seed must be a whole number, 0 or more, not {shown(seed)}")
    refuse_wrapped(model)
    for name, param, module, _ in held_parameters(model):
        refuse_attached(name, param, module)
        if is_sharded(param):
            raise ModeError(f"'{name}' is sharded, and per-example adapters are for models that each process holds in full")
    frozen = [param for param in model.parameters() if param.is_floating_point() and not param.requires_grad]
    try:
        for param in frozen:  # a model that is to be served is often frozen; rules are about what trains
            param.requires_grad_(True)
        plan = resolve_model(model, rules)
    finally:
        for param in frozen:
            param.requires_grad_(False)
    for target in plan.targets:
        if target.route != "projected":
            raise SpecError(
                f"{target.name} is no weight of one nn.Linear or Conv1D in full precision, whose rows could have adapters of "
                "their own; leave it out by a rule: 'none'"
            )
    require(bool(plan.targets), "rules", "no weight is to have adapters; give a linear layer a config string")
    return PerExample(model, plan, count, seed)


def _three(x: Tensor) -> Tensor:
    """[B, ..., n] -> [B, T, n]."""
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)
