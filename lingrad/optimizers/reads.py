"""Who reads a parameter: its values are followed through the operators of an optimizer's steps.

The duality allows a step one thing: p becomes p plus what is made of gradients. Each tensor that holds values of a parameter is
known by what it holds: a factor times the parameter plus anything made of gradients, or any other function of it. After a step
the parameter must be itself plus an update, and nothing else may have kept its values.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from lingrad.optimizers.operators import Read, Terms, elementwise, tensors, terms
from lingrad.tensors import storage

# Operators that read shapes, dtypes and devices only
_NO_DATA = {
    *(
        "zeros_like",
        "ones_like",
        "empty_like",
        "full_like",
        "rand_like",
        "randn_like",
        "randint_like",
        "is_same_size",
        "is_pinned",
    ),
    *("new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided", "result_type", "can_cast", "record_stream"),
    *("_has_same_storage_numel", "_has_compatible_shallow_copy_type"),
}
_READING_OPTIONS = ("weight_decay", "max_unorm")  # of kernels of a whole step: without them these only add to the parameter
_FOREACH = "_foreach_"
_CALLED = {"_local_scalar_dense": "item", "_to_copy": "to", "linalg_vector_norm": "norm"}  # as users write them
_NEAR = 1e-12  # factors come of a few products and sums in float64


class ParameterReads(TorchDispatchMode):
    """Follows parameters through the operators that run in this context, in which an optimizer is built, and in `step`.

    It sees torch's operators and custom ones. It does not see a parameter that is read past torch, as by ``numpy()`` or by a
    kernel that is launched with its address. Of custom operators and fused kernels it believes that they add to the parameters
    they write to, if their weight decay is 0.

    Args:
        params: The parameters, each with a storage of its own.

    Attributes:
        found: What reads a parameter, as the end of a sentence about the optimizer; empty if nothing does.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = ""
        self._params = params
        self._known: dict[int, tuple[StorageWeakRef, Read]] = {}
        self._indices: list[Tensor] = []
        self._kept: set[int] = set()  # what of it was alive when the last step ended
        self._start()

    def _start(self) -> None:
        self._indices.clear()
        for i, param in enumerate(self._params):
            self._set(param, Read(i, 1.0))

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step: what becomes of the parameters, whatever they are before it, and who keeps values of them?

        Yields:
            Nothing.
        """
        self._start()
        with self:
            yield
        for i, param in enumerate(self._params):
            self._judge(self._of(param), i)
        if not self.found and self._judge_kept():
            gc.collect(1)  # what the step has left in cycles, such as the frames of an exception
            self.found = self._judge_kept()
        self._kept = set(self._known)

    def _judge(self, read: Read | None, param: int) -> None:
        if read is None or read.param != param or read.at:
            self._report("it sets the parameter to values that are not the parameter plus an update")
        elif read.factor is None:
            self._report(f"its update is computed from the parameter (by {read.by})")
        elif abs(read.factor - 1) > _NEAR:
            self._report(f"it multiplies the parameter by {read.factor:g}")

    def _judge_kept(self) -> str:
        own = {storage(param) for param in self._params}
        self._known = {key: known for key, known in self._known.items() if not known[0].expired()}
        for key, (_, read) in self._known.items():
            if key in own:
                continue
            if read.factor is not None:
                what = "a copy of the parameter" if abs(read.factor - 1) < _NEAR else "values that contain the parameter"
                return f"it keeps {what} (by {read.by})"
            if key in self._kept:  # one that each step replaces, and nothing has used, is a record only
                return f"it keeps values computed from the parameter (by {read.by})"
        return ""

    def _report(self, what: str) -> None:
        self.found = self.found or what

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._touched(args) or (kwargs and self._touched(kwargs.values())):
            self._follow(func, args, kwargs, result)
        return result

    def _touched(self, values: Iterable[Any]) -> bool:
        for value in values:
            if isinstance(value, list | tuple):
                if self._touched(value):
                    return True
            elif self._of(value) is not None:
                return True
        return False

    def _follow(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        schema = func._schema
        given = {arg.name: arg.default_value for arg in schema.arguments if arg.has_default_value()}
        given |= dict(zip((arg.name for arg in schema.arguments), args, strict=False)) | dict(kwargs)
        written = [arg.name for arg in schema.arguments if arg.alias_info is not None and arg.alias_info.is_write]
        name = schema.name.partition("::")[2].removesuffix("_")
        if name in _NO_DATA:
            return
        if name.startswith(_FOREACH):
            name = name.removeprefix(_FOREACH)
            for each, returned in elementwise(name, given, result):
                self._store(name, each, written, returned)
        elif func.namespace != "aten" or name.startswith("_fused_"):
            self._store_kernel(name, given, written, result)
        else:
            self._store(name, given, written, result)

    def _store(self, name: str, given: Mapping[str, Any], written: Sequence[str], returned: Any) -> None:
        """Record what an operator's results hold."""
        inputs = list(tensors(given.values()))
        if not any(self._of(tensor) is not None for tensor in inputs):
            return
        parts = self._indexed(name, given) or terms(name, given, self._of)
        read = self._any(name, inputs) if parts is None else self._sum(name, parts)
        if name == "index" and parts is not None and read is not None:
            read = read._replace(at=(*read.at, self._place(given["indices"])))
        if written:
            targets = list(tensors(given[key] for key in written))
        else:
            shared = {
                storage(tensor) for tensor in inputs if tensor.layout is torch.strided
            }  # views are known by their storage
            targets = [t for t in tensors([returned]) if t.layout is not torch.strided or storage(t) not in shared]
            if read is not None and isinstance(returned, bool | int | float | complex):
                self._report(f"it reads values of the parameter in Python (by {read.by})")
        for target in targets:
            self._assign(target, read, name)

    def _store_kernel(self, name: str, given: Mapping[str, Any], written: Sequence[str], returned: Any) -> None:
        """The same for one that makes a whole step, or is no operator of torch."""
        targets = list(tensors(given[key] for key in written))
        stepped = {storage(target) for target in targets}
        inputs = list(tensors(given.values()))
        steps = all(read.factor == 1.0 and storage(t) in stepped for t in inputs if (read := self._of(t)) is not None)
        if not steps or any(given.get(option) for option in _READING_OPTIONS):
            for target in [*targets, *tensors([returned])]:
                self._assign(target, self._any(name, inputs), name)

    def _indexed(self, name: str, given: Mapping[str, Any]) -> Terms | None:
        """As `terms`, for ``x[indices]`` and for what is written back to where it was read, as by ``x[indices] += update``."""
        this, values = self._of(given.get("self")), self._of(given.get("values"))
        if name not in ("index", "index_put", "_index_put_impl") or this is None or self._touched(given["indices"]):
            return None
        if name == "index":
            return [(given["self"], 1.0)]
        there = this._replace(at=(*this.at, self._place(given["indices"])))
        return [(given["self"], 1.0)] if not given["accumulate"] and there.like(values) else None

    def _place(self, indices: Sequence[Tensor | None]) -> Any:
        self._indices += [index for index in indices if index is not None]  # alive, so that others have other storages
        return tuple(
            None if index is None else (storage(index), index.storage_offset(), index.shape, index.stride(), index._version)
            for index in indices
        )

    def _assign(self, target: Tensor, read: Read | None, by: str) -> None:
        if target.layout is not torch.strided:
            if read is not None:
                self._report(f"it keeps values computed from the parameter (by {by})")
            return
        old = self._of(target)
        covered = target.numel() * target.element_size() >= target.untyped_storage().nbytes()
        if read is not None and read.factor is not None and not (target.is_floating_point() or target.is_complex()):
            read = read._replace(factor=None)
        if old is not None and old.like(read):
            return
        if covered:
            self._set(target, read)
        elif old is not None or read is not None:
            either = old if read is None else read  # part of the storage holds one thing, and the rest another
            self._set(target, either._replace(factor=None, by=either.by or by))  # type: ignore[union-attr]

    def _set(self, tensor: Tensor, read: Read | None) -> None:
        if read is None:
            self._known.pop(storage(tensor), None)
            self._kept.discard(storage(tensor))
        else:
            self._known[storage(tensor)] = StorageWeakRef(tensor.untyped_storage()), read

    def _of(self, value: Any) -> Read | None:
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            return None
        known = self._known.get(storage(value))  # a storage that is weakly referred to leaves its key to no other
        return None if known is None else known[1]

    def _any(self, name: str, inputs: Iterable[Tensor]) -> Read:
        reads = [read for tensor in inputs if (read := self._of(tensor)) is not None]
        first = next((read for read in reads if read.factor is None), reads[0])
        return Read(first.param, None, by=first.by if first.factor is None else _CALLED.get(name, name))

    def _sum(self, name: str, parts: Terms) -> Read | None:
        """What a sum of multiples of tensors holds."""
        reads = [(read, factor) for value, factor in parts if (read := self._of(value)) is not None and factor != 0]
        if not reads:
            return None
        param, _, at, by = reads[0][0]
        if any(read.factor is None or read.param != param or read.at != at for read, _ in reads):
            return self._any(name, (value for value, factor in parts if isinstance(value, Tensor) and factor != 0))
        total = sum(read.factor * factor for read, factor in reads if read.factor is not None)
        return None if abs(total) < _NEAR else Read(param, total, at, by or _CALLED.get(name, name))
