"""Models on the meta device in a dtype by name, also with linear layers in 8 bits as bitsandbytes makes them."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from lingrad.errors import ModeError, optional
from lingrad.models.build import open_model

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "int8": torch.bfloat16}


def open_in(name: str, dtype: str) -> nn.Module:
    """A model without numbers, on the meta device, in a dtype.

    Args:
        name: See `open_model`.
        dtype: A key of `DTYPES`; ``int8`` holds linear layers but the head in 8 bits, and the rest in bfloat16.

    Returns:
        The model. Raises the errors of `open_model`.
    """
    model = open_model(name).to(DTYPES[dtype])
    return in_int8(model) if dtype == "int8" else model


def in_int8(model: nn.Module) -> nn.Module:
    """Have every linear layer of a model on the meta device, but the output head, hold its weight in int8.

    Args:
        model: The model, on the meta device; changed in place.

    Returns:
        The same model: its layers are ``bitsandbytes.nn.Linear8bitLt`` that are quantised already, with a scale for each row.

    Raises:
        ModeError: It is on another device, where bitsandbytes itself quantises numbers.
        DependencyError: bitsandbytes is not installed.
    """
    bnb = optional("bitsandbytes", "a model in 8 bits", "bnb")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of a cast, at each product
    given: Any = model
    head = given.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is not nn.Linear or child is head:
                continue
            if not child.weight.is_meta:
                raise ModeError("in_int8 is for models on the meta device; elsewhere load them by a BitsAndBytesConfig")
            m, n = child.weight.shape
            with torch.device("meta"):
                made = bnb.nn.Linear8bitLt(n, m, bias=child.bias is not None, has_fp16_weights=False)
                codes, scales = torch.empty(m, n, dtype=torch.int8), torch.empty(m)
            made.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False)
            made.weight.CB = made.state.CB = made.weight.data
            made.weight.SCB = made.state.SCB = scales
            made.bias = child.bias
            setattr(module, name, made)
    return model
