"""Dispatch modes that look over an operation's shoulder."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lingrad.tensors import storage


class NoTensorOfShape(TorchDispatchMode):
    """Notes any operation that makes a tensor of one of some shapes."""

    def __init__(self, shapes):
        super().__init__()
        self.shapes = {tuple(s) for s in shapes} | {tuple(s)[::-1] for s in shapes}
        self.found = []
        self.most_alive = self._alive = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in out if isinstance(out, tuple | list) else (out,):
            # a view of an existing tensor, such as weight.t(), makes nothing
            if not isinstance(tensor, torch.Tensor) or storage(tensor) in given:
                continue
            if tuple(tensor.shape) in self.shapes and func.namespace == "aten":
                self.found.append((func._schema.name, tuple(tensor.shape)))
                self._alive += 1
                self.most_alive = max(self.most_alive, self._alive)
                weakref.finalize(tensor.untyped_storage(), self._freed)
        return out

    def _freed(self):
        self._alive -= 1


class Launches(TorchDispatchMode):
    """Notes the operators that launch a kernel on a GPU: all but views."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.names.append(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


# What makes the host wait for a device: a number read back, a shape that depends on numbers, a copy from device to host.
WAITS = {"_local_scalar_dense", "item", "equal", "nonzero", "is_nonzero", "unique", "masked_select", "_unique2"}


class NoWaiting(TorchDispatchMode):
    """Fails on an operation that would make the host wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        assert name not in WAITS, f"{name} waits for the device"
        assert name != "_to_copy" or "device" not in (kwargs or {}), "a copy between devices waits for the device"
        return func(*args, **(kwargs or {}))
