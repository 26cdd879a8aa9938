"""Whether two model folders hold one architecture, so that the difference of their weights means something."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lingrad.errors import DataError, did_you_mean, optional
from lingrad.files.model_folder import ModelFolder
from lingrad.models import read_config

# Keys in which two configs of one architecture may differ: names, how a model is run, how it was trained. An adapter changes
# none of them, and they do not change the function that the weights compute.
_HARMLESS = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "_attn_implementation",
    "attn_implementation",
    "_attn_implementation_internal",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "initializer_range",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
}

# Keys about the task, which the Trainer and others write into a config; the weights compute the same without them.
_NOTES = {"problem_type", "id2label", "label2id", "finetuning_task", "task_specific_params"}


def refuse_other_model(start: ModelFolder, tuned: ModelFolder, tied: Collection[str] = ()) -> tuple[str, ...]:
    """Make sure that two folders hold the same architecture, tensor by tensor.

    Args:
        start: The one folder.
        tuned: The other.
        tied: Names of tensors that are tied to another one in the model, so that a folder may lack them.

    Returns:
        Config entries that differ, and do not change what the weights compute: about the task, or unknown to the model's class.

    Raises:
        DataError: They are the same folder, or differ in a config entry that matters, or in a tensor's name or shape.
    """
    if start.path.resolve() == tuned.path.resolve():
        raise DataError(f"START and TUNED are the same folder, '{start.path}'")
    (was, of_start), (now, of_tuned) = (_config(folder.path) for folder in (start, tuned))
    known, read = of_start | of_tuned, _tokens_read(now)
    ignored = []
    for key in sorted({*was, *now}, key=lambda key: (key not in ("model_type", "architectures"), key)):
        harmless = (key in _HARMLESS and key not in read) or key.endswith(("dropout", "drop", "pdrop"))
        if harmless or was.get(key) == now.get(key):
            continue
        if key in _NOTES or key not in known or (key in read and None in (was.get(key), now.get(key))):
            ignored.append(key)
        else:
            raise DataError(
                f"the configs differ in '{key}': {_short(was.get(key))} in '{start.path}', {_short(now.get(key))} in "
                f"'{tuned.path}'; expected the model that the training started from and the trained one"
            )
    for first, second, wanted in ((start, tuned, "extra"), (tuned, start, "missing")):
        odd = sorted({*second.names} - {*first.names} - {*tied})
        if odd:
            holder = f"only '{second.path}' has '{odd[0]}' ({wanted}{f', and {len(odd) - 1} more' if odd[1:] else ''})"
            near = did_you_mean(odd[0], {*first.names} - {*second.names})
            raise DataError(f"the two do not have the same tensors: {holder}{near} Save both from one class of model")
    for name in sorted({*start.names} & {*tuned.names}):
        if start.entry(name).shape != tuned.entry(name).shape:
            shapes = [list(folder.entry(name).shape) for folder in (start, tuned)]
            raise DataError(f"'{name}' is {shapes[0]} in '{start.path}' and {shapes[1]} in '{tuned.path}'")
    return tuple(ignored)


def _config(path: Path) -> tuple[dict[str, Any], set[str]]:
    """The config as transformers reads it, so that those of two versions can be compared, and the keys its class knows."""
    try:
        found = read_config(path)
    except Exception as error:  # transformers may raise any exception on a wrong config
        raise DataError(f"'{path}' has no config that transformers knows: {error}") from error
    entries: Mapping[str, Any] = found.to_dict()
    try:
        known = {*type(found)().to_dict(), *type(found).attribute_map}
    except Exception:  # a class that cannot be made without arguments: all of its entries may matter
        known = {*entries}
    known |= {"model_type", "architectures", "quantization_config"}
    unknown = {*entries} - known - _NOTES
    source = _source(found) if unknown else ""
    return dict(entries), known | {key for key in unknown if source is None or key in source}


def _tokens_read(entries: Mapping[str, Any]) -> set[str]:
    # ids of special tokens that change what a model computes: a classifier pools at one, and RoBERTa counts positions from one;
    # where one of two configs has none, they agree on all that both can compute
    transformers = optional("transformers", "comparing two models", "hf")
    cls = getattr(transformers, (entries.get("architectures") or [""])[0], None)
    if cls is None:
        return set()
    module = vars(sys.modules[cls.__module__])
    embeddings = [vars(found) for name, found in module.items() if name.endswith("Embeddings")]
    counted = any("create_position_ids_from_input_ids" in names for names in (module, *embeddings))
    read = {"pad_token_id"} if counted else set()
    if "SequenceClassification" in cls.__name__:
        forward = inspect.getsource(cls.forward)
        read |= {key for key in ("pad_token_id", "bos_token_id", "eos_token_id") if key in forward}
    return read


def _source(config: Any) -> str | None:
    # an entry that the config's class does not declare may be read by the model all the same, such as is_causal: what counts
    # is the code of the model's class, and that which all models share; None where transformers has no such class
    transformers = optional("transformers", "comparing two models", "hf")
    cls = getattr(transformers, (config.architectures or [""])[0], None)
    if cls is None:
        return None
    shared = Path(transformers.__file__).parent
    files = [Path(sys.modules[cls.__module__].__file__ or ""), *shared.glob("model*_utils.py"), *shared.glob("mask*_utils.py")]
    files += [*shared.glob("modeling_*.py"), *shared.glob("integrations/*attention*.py")]
    return "\n".join(file.read_text(encoding="utf-8") for file in files if file.is_file())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."
