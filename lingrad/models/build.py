"""Models to train or to inspect: Llamas of several sizes, and any transformers config on the meta device."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lingrad.errors import DataError, did_you_mean, optional, shown

_LARGEST_CONFIG = 16 * 2**20  # bytes; labels of a classifier are in it
_MOST_OF_ALL = 2**40
_MOST = (  # modules that are built one by one
    (re.compile(r"layers?$|depths?$|blocks$|stages$"), 2_000),
    (re.compile(r"experts?$|heads$|codebooks$|languages$"), 100_000),
    (re.compile(r"labels$"), 2**20),
)


@dataclass(frozen=True)
class LlamaShape:
    """A small Llama.

    Args:
        vocabulary: Number of token ids.
        hidden: Width.
        intermediate: Width of the MLP.
        layers: Number of layers.
        heads: Attention heads.
        length: Longest sequence, in tokens.
        groups: Key and value heads, if they are fewer; 0 means as many as ``heads``.
    """

    vocabulary: int = 256
    hidden: int = 256
    intermediate: int = 688
    layers: int = 3
    heads: int = 4
    length: int = 64
    groups: int = 0


# Those of the GaLore paper (arXiv 2403.03507, table 11) up to 7B, and Llama 2 above; vocabulary 32,000.
LLAMAS = {
    "llama-60m": LlamaShape(32000, 512, 1376, 8, 8, 2048),
    "llama-130m": LlamaShape(32000, 768, 2048, 12, 12, 2048),
    "llama-350m": LlamaShape(32000, 1024, 2736, 24, 16, 2048),
    "llama-1b": LlamaShape(32000, 2048, 5461, 24, 32, 2048),
    "llama-7b": LlamaShape(32000, 4096, 11008, 32, 32, 4096),
    "llama-13b": LlamaShape(32000, 5120, 13824, 40, 40, 4096),
    "llama-70b": LlamaShape(32000, 8192, 28672, 80, 64, 4096, groups=8),
}


def build_llama(shape: LlamaShape, *, seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A transformers ``LlamaForCausalLM`` with random weights.

    Args:
        shape: Its size.
        seed: Seed of the weights; the global generator is left as it was.
        dtype: Of the weights, whose values are the same in every dtype up to rounding.

    Returns:
        The model.
    """
    transformers = _transformers()
    config = transformers.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups or shape.heads,
        max_position_embeddings=shape.length,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = transformers.LlamaForCausalLM(config)
    if dtype == torch.float64:
        norm_in_own_dtype(model)
    return model.to(dtype)


def norm_in_own_dtype(model: nn.Module) -> None:
    """Replace transformers' RMSNorm, which rounds its input to float32 whatever the model's dtype, by torch's.

    Comparisons in float64 need it: where values that agree to 1e-16 round to different float32, the runs then differ by 1e-8.

    Args:
        model: A Llama of transformers, changed in place.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "LlamaRMSNorm":
                old: Any = child
                norm = nn.RMSNorm(old.weight.shape, eps=old.variance_epsilon)
                norm.weight = old.weight
                setattr(module, name, norm)


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, in the dtype of the logits (transformers' own loss rounds them to float32).

    Args:
        model: A causal language model of transformers.
        ids: Token ids, int64 [rows, length].

    Returns:
        Nats per token, 0-d.
    """
    logits = model(input_ids=ids).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def open_model(name: str) -> nn.Module:
    """A model without weights, on the meta device.

    Args:
        name: ``demo``, a name from `LLAMAS`, a local ``config.json`` of transformers, or the folder that holds one.

    Returns:
        The model; nothing is downloaded and no weight is read.

    Raises:
        DataError: There is no such config, or transformers cannot build a model from it.
    """
    with torch.device("meta"):
        known = {"demo": LlamaShape(), **LLAMAS}
        if name in known:
            return build_llama(known[name], seed=0)
        path = Path(name)
        if not path.exists():
            raise DataError(
                f"no model '{name}'{did_you_mean(name, known)} Expected {', '.join(known)}, a config.json of transformers, or "
                "a folder that holds one (models are read from disk only)"
            )
        transformers = _transformers()
        try:  # a model may raise any exception on an invalid config
            config = read_config(path)
            cls = getattr(transformers, (config.architectures or [""])[0], None)
            model: nn.Module
            model = cls(config) if cls is not None else transformers.AutoModel.from_config(config, trust_remote_code=False)
        except Exception as error:
            raise DataError(f"'{name}' holds no config that transformers can build a model from: {error}") from error
        return _without_weights(model)


def _without_weights(model: nn.Module) -> nn.Module:
    """The model with all parameters on the meta device: some models make a few on the CPU, whatever the default device."""
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None and not param.is_meta:
                module._parameters[name] = nn.Parameter(torch.empty_like(param, device="meta"), param.requires_grad)
    return model


def load_model(path: Path) -> Any:
    """The model of a folder, in the dtype it was saved in; nothing is downloaded, and no code of the folder's is run."""
    transformers = _transformers()
    config = read_config(path)
    cls = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModel)
    options = {"dtype": "auto", "local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
    return cls.from_pretrained(path, config=config, **options)


def read_config(path: Path) -> Any:
    """A config of transformers, read from disk. No code of its folder is run, nor asked about, now or by a model made of it.

    Args:
        path: The ``config.json``, or the folder that holds it.

    Returns:
        The config, without ``auto_map`` (Python files of the folder) and without attention kernels of a hub, at any depth.
        Raises whatever transformers does where it cannot read the config.

    Raises:
        DataError: It is no file, or has a number that no model has.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file() or file.stat().st_size > _LARGEST_CONFIG:
        raise DataError(f"'{file}' is not a config: expected a JSON file of at most {_LARGEST_CONFIG:,} bytes")
    _refuse_huge(json.loads(file.read_bytes()), file)
    config = _transformers().AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    _drop_code(config, set())
    return config


def _refuse_huge(entries: Any, file: Path) -> None:
    """Refuse numbers of a config that no model has, and whose model would take hours or all memory to build."""
    if isinstance(entries, list):
        entries = dict(enumerate(entries))
    if not isinstance(entries, dict):
        return
    for key, value in entries.items():
        most = next((limit for pattern, limit in _MOST if pattern.search(str(key))), _MOST_OF_ALL)
        counts = value if isinstance(value, list) and most != _MOST_OF_ALL else [value]
        found = [count for count in counts if isinstance(count, int) and abs(count) > most]
        if found:
            raise DataError(f"'{file}' has {key} {shown(found[0])}; expected at most {most:,}")
        _refuse_huge(value, file)


def _drop_code(config: Any, seen: set[int]) -> None:
    """Take out of a config, and of those in it, what would have transformers run or fetch code."""
    entries = config if isinstance(config, dict) else getattr(config, "__dict__", None)
    if entries is None or id(config) in seen:
        return
    seen.add(id(config))
    entries.pop("auto_map", None)
    for key, value in list(entries.items()):
        if isinstance(value, str) and "attn_implementation" in str(key) and "/" in value:
            entries[key] = None
        for inner in value if isinstance(value, (list, tuple)) else (value,):
            _drop_code(inner, seen)


def _transformers() -> Any:
    return optional("transformers", "building a model", "hf")
