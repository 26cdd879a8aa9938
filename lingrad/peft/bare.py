"""A copy of a model as PEFT needs it: without hooks and replaced forwards, sharing the memory of its weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from lingrad.adapters import Attachment
from lingrad.config.settings import Mode
from lingrad.errors import ExportError
from lingrad.weights.bitsandbytes import packed_of
from lingrad.weights.layout import is_packed

# Attributes by which transformers knows that it has put hooks in a model; a copy has none.
_HOOKED = ("_output_capturing_hooks_installed",)
# Attributes by which accelerate and lingrad replace a forward; a copy of one would run the original's.
_FORWARDS = ("forward", "_old_forward", "_hf_hook")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOK_FLAGS = ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")


def refuse_peft(model: nn.Module, what: str) -> None:
    """Make sure that a model has no layers of PEFT.

    Args:
        model: The model.
        what: What it was given for; begins the message.

    Raises:
        ExportError: It has layers of PEFT in it.
    """
    found = next((n for n, m in model.named_modules() if type(m).__module__.partition(".")[0] == "peft"), None)
    if found is not None:
        raise ExportError(
            f"{what} needs the plain model, and this one has PEFT's layers in it (at '{found}'). Call model.merge_and_unload() "
            "or model.unload() of PEFT, and use lingrad on the result"
        )


def bare_copy(model: nn.Module, attachments: Sequence[Attachment] = (), mode: Mode | None = None) -> nn.Module:
    """Copy a model's structure, in eval mode, without hooks and replaced forwards.

    Args:
        model: The model; unchanged afterwards.
        attachments: lingrad's attachments to it.
        mode: Their mode.

    Returns:
        The copy. Parameters are new, frozen, and share the memory of the original's, so nothing may be written into them;
        buffers are copies.
    """
    with ExitStack() as stack:
        stack.enter_context(_detached(attachments, mode))
        stack.enter_context(_hidden_hooks(model))
        memo: dict[int, Any] = {}
        for param in model.parameters():
            if type(param) is nn.Parameter:  # packed weights define their own copies
                # with a version of its own: PEFT's wrappers give the copy's parameters their own memory again
                memo[id(param)] = nn.Parameter(param.data, requires_grad=False)
        for module in model.modules():  # states that a forward has left, of which torch cannot copy those with a gradient
            for value in vars(module).values():
                if isinstance(value, torch.Tensor) and not value.is_leaf:
                    memo[id(value)] = value.detach().clone()
        copied = copy.deepcopy(model, memo)
    for name, module in copied.named_modules():
        if is_packed(module):  # bitsandbytes may have repacked the codes for a faster, less exact evaluation
            packed_of(module, name).open()
    copied.requires_grad_(False)
    return copied.eval()


@contextmanager
def _detached(attachments: Sequence[Attachment], mode: Mode | None) -> Iterator[None]:
    """Detach, and attach again afterwards; weights, coordinates and gradients stay."""
    done: list[Attachment] = []
    try:
        for attachment in attachments:
            attachment.detach()
            done.append(attachment)
        yield
    finally:
        for attachment in done:
            if mode is not None:
                attachment.attach(mode)


@contextmanager
def _hidden_hooks(model: nn.Module) -> Iterator[None]:
    """Hide the hooks and replaced forwards of all modules."""
    hidden: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module in model.modules():
            own = vars(module)
            hidden += [(own, name, own.pop(name)) for name in _HOOKED if name in own]
            for name in _FORWARDS:
                if name in own:
                    hidden.append((own, name, own.pop(name)))
            for name in (*_HOOKS, *_HOOK_FLAGS):
                hooks = own.get(name)
                if hooks:
                    hidden.append((own, name, hooks))
                    own[name] = type(hooks)((k, hook) for k, hook in hooks.items() if name in _HOOK_FLAGS or _of_torch(hook))
        yield
    finally:
        for own, name, value in reversed(hidden):
            own[name] = value


def _of_torch(hook: Any) -> bool:
    """Whether a hook is part of a layer's computation, such as that of the older weight_norm."""
    return type(hook).__module__.startswith("torch.nn.utils")


def devices_of(model: nn.Module) -> list[torch.device]:
    """The CUDA devices that a model is on, whose generators a computation may use."""
    return sorted({p.device for p in model.parameters() if p.is_cuda}, key=str)
