"""A copy of a model as PEFT wants it: without what lingrad or anybody else has attached, sharing the weights' memory."""

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
from lingrad.weights.bitsandbytes import is_packed, packed_of

# Attributes by which others (accelerate, lingrad) replace a forward; a copy of one would run the original's.
_FORWARDS = ("forward", "_old_forward", "_hf_hook")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOK_FLAGS = ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")


def refuse_peft(model: nn.Module, what: str) -> None:
    """Make sure that a model is not one of PEFT's.

    Args:
        model: The model.
        what: What it was given for, to begin a sentence.

    Raises:
        ExportError: It has layers of PEFT in it.
    """
    found = next((n for n, m in model.named_modules() if type(m).__module__.partition(".")[0] == "peft"), None)
    if found is not None:
        raise ExportError(
            f"{what} needs the plain model, and this one has PEFT's layers in it (at '{found}'): their weights are those of a "
            "base that PEFT changes. Use model.merge_and_unload() or model.unload() of PEFT, and lingrad on the result"
        )


def plain_copy(model: nn.Module, attachments: Sequence[Attachment] = (), mode: Mode | None = None) -> nn.Module:
    """A copy of a model's structure, in eval mode, with no hook and no foreign forward.

    Args:
        model: The model; unchanged afterwards.
        attachments: lingrad's connections to it.
        mode: Their mode.

    Returns:
        The copy. Parameters are new, frozen, and share the memory of the original's, so nothing may be written into them;
        buffers are copies.
    """
    with ExitStack() as stack:
        stack.enter_context(_detached(attachments, mode))
        stack.enter_context(_bare(model))
        memo: dict[int, Any] = {}
        for param in model.parameters():
            if type(param) is nn.Parameter:  # packed weights know themselves how they are copied
                memo[id(param)] = nn.Parameter(param.detach(), requires_grad=False)
        copied = copy.deepcopy(model, memo)
    for name, module in copied.named_modules():
        if is_packed(module):  # an evaluation may have put the codes in another order, of less exact arithmetic
            packed_of(module, name).open()
    copied.requires_grad_(False)
    return copied.eval()


@contextmanager
def _detached(attachments: Sequence[Attachment], mode: Mode | None) -> Iterator[None]:
    """Take attachments off, and put them back as they were; weights, coordinates and gradients stay."""
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
def _bare(model: nn.Module) -> Iterator[None]:
    """Hide the hooks and replaced forwards of all modules."""
    kept: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module in model.modules():
            own = vars(module)
            for name in _FORWARDS:
                if name in own:
                    kept.append((own, name, own.pop(name)))
            for name in (*_HOOKS, *_HOOK_FLAGS):
                hooks = own.get(name)
                if hooks:
                    kept.append((own, name, hooks))
                    own[name] = type(hooks)((k, hook) for k, hook in hooks.items() if name in _HOOK_FLAGS or _of_torch(hook))
        yield
    finally:
        for own, name, value in reversed(kept):
            own[name] = value


def _of_torch(hook: Any) -> bool:
    """Whether a hook is part of what a layer computes, such as that of the older weight_norm."""
    return type(hook).__module__.startswith("torch.nn.utils")


def devices_of(model: nn.Module) -> list[torch.device]:
    """The CUDA devices that hold some of a model, whose generators a computation may use."""
    return sorted({p.device for p in model.parameters() if p.is_cuda}, key=str)
