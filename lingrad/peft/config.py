"""The config of an adapter that is about to be read: of a kind that is W + B A, with values that PEFT can use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lingrad.errors import DataError, shown
from lingrad.files.reading import read_json
from lingrad.peft import names, patterns
from lingrad.peft.write import CONFIG

# Options of a LoRA that make it more than W + B A, or change W itself when PEFT loads it.
_MORE = (
    "use_dora",
    "lora_bias",
    "layer_replication",
    "megatron_config",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "monteclora_config",
    "velora_config",
    "kasa_config",
    "arrow_config",
)
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # some of the others subtract the initial B A from W


def open_config(folder: Path) -> dict[str, Any]:
    """The config of a LoRA, of whatever it is besides W + B A.

    Args:
        folder: The adapter's folder.

    Returns:
        Option -> value; ranks, alphas and what chooses modules are checked.

    Raises:
        DataError: It cannot be read, is of another kind of adapter, or an option has a value that PEFT cannot use.
    """
    path = folder / CONFIG
    try:
        config = read_json(path, foreign=True)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; expected the folder of a PEFT adapter") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise DataError(f"{path} describes an adapter of type {shown(kind)}; only LORA is W + B A")
    targets = config.get("target_parameters") or []
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise DataError(f"{path}: target_parameters must be a list of names, not {shown(targets)}")
    for option in ("rank_pattern", "alpha_pattern"):
        value = config.get(option) or {}
        if not isinstance(value, dict) or not all(names.positive(v) for v in value.values()) or not patterns.are_bounded(value):
            raise DataError(
                f"{path}: {option} must map regular expressions to numbers above 0, and simple ones (no repeated groups), not "
                f"{shown(value)}"
            )
    for option in names.OF_MODULES:
        if not names.readable(option, config.get(option)):
            raise DataError(
                f"{path}: {option} must be names or regular expressions, simple ones (no repeated groups), not "
                f"{shown(config.get(option))}"
            )
    for option in ("r", "lora_alpha"):
        if not names.positive(config.get(option)):
            raise DataError(f"{path}: {option} must be a number above 0, not {shown(config.get(option))}")
    return config


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a LoRA that is W + B A and nothing more.

    Args:
        folder: The adapter's folder.

    Returns:
        Option -> value, those that lingrad reads checked.

    Raises:
        DataError: It cannot be read, is of another kind of adapter, or an option has a value that PEFT cannot use.
    """
    config, path = open_config(folder), folder / CONFIG
    for option in _MORE:
        if config.get(option):
            raise DataError(
                f"the adapter in '{folder}' has {option}={shown(config[option])}, with which it is more than W + B A"
            )
    dropout = config.get("lora_dropout") or 0.0
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise DataError(f"{path}: lora_dropout must be a number from 0 to 1, not {shown(dropout)}")
    start = config.get("init_lora_weights", True)
    if start not in _STARTS:
        raise DataError(
            f"the adapter in '{folder}' has init_lora_weights={shown(start)}, with which PEFT changes the base weights as it "
            "loads; convert it to a plain LoRA with PEFT (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    return config
