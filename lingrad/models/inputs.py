"""Random inputs of a model of transformers, whatever it reads: tokens, images, videos, sound, numbers.

The shapes follow from the model's config. Where they do not, the possible ones are tried on one row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from inspect import Parameter, signature
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from lingrad.errors import DataError

Shape = tuple[int, ...]
Tried = dict[str, Shape | bool]  # argument of the model's forward -> its shape, where it is a tensor

TOKENS = ("input_ids", "decoder_input_ids")
# what a model may read next to its main input, where that alone is not enough
_OTHERS = ("decoder_input_ids", "input_ids", "pixel_values", "input_features", "input_values")
# classes whose labels are token ids of the shape of what they read
_OF_TOKENS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration")
_SIDE = 224  # pixels, where a config does not say
_SAMPLES = 320  # of sound, for one position of a model
_FEW = 8  # labels of one row, where they are fewer than positions
_LIMIT = 200  # attempts


def make_inputs(model: nn.Module, *, rows: int, length: int, loss: bool = False, seed: int = 0) -> dict[str, Any]:
    """Random arguments for the forward of a model of transformers.

    Args:
        model: The model, on any device; on the meta device nothing is computed. It is run on one row, in eval mode, unless it
            is a language model that reads token ids; nothing of it changes.
        rows: Rows of the batch.
        length: Positions of a row, for what the config gives no length of: tokens, frames of sound.
        loss: Have the output contain a loss, by labels, where the model computes one; see `loss_of`.
        seed: Seed of the values.

    Returns:
        Name -> tensor on the model's device, or True. Numbers are normally distributed, token ids uniform, classes 0.

    Raises:
        DataError: It is no model of transformers, or it ran on none of the inputs that were tried.
    """
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if config is None or not isinstance(main, str):
        raise DataError(f"{type(model).__name__} is no model of transformers, and what it reads is not known")
    if reads_tokens(model):
        found: Tried = {"input_ids": _tokens(config, length)}
        return _drawn(model, found | ({"labels": found["input_ids"]} if loss else {}), rows, seed)
    tried, last = 0, ""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for inputs in _inputs(model, config, main, length):
            for labels in _labels(model, config, inputs, length) if loss else [{}]:
                tried += 1
                failed = _failed(model, inputs | labels, seed, wants_loss=bool(labels))
                if failed is None:
                    return _drawn(model, inputs | labels, rows, seed)
                last = last or failed
                if tried == _LIMIT:
                    break
    finally:
        for module, mode in modes.items():
            module.training = mode
    which = f"no inputs are known on which {type(model).__name__} runs"
    if not tried:
        raise DataError(f"{which}: their shapes follow neither from their names nor from its config")
    raise DataError(f"{which}, of {tried} that were tried; the first: {last}")


def reads_tokens(model: nn.Module) -> bool:
    """Whether a model reads token ids and computes the loss of predicting tokens, so that nothing needs to be tried."""
    config, takes = getattr(model, "config", None), signature(model.forward).parameters
    if getattr(model, "main_input_name", None) != "input_ids" or getattr(config, "is_encoder_decoder", False):
        return False
    return (
        type(getattr(config, "vocab_size", None)) is int
        and _number(config, "num_codebooks") is None
        and type(model).__name__.endswith(_OF_TOKENS)
        and {"input_ids", "labels"} <= takes.keys()
    )


def loss_of(output: Any) -> Tensor:
    """A loss to train by: the model's own, or else the mean of its first floating-point output.

    Args:
        output: What a model's forward returned.

    Returns:
        A 0-d tensor.

    Raises:
        DataError: There is no floating-point tensor in it.
    """
    own = getattr(output, "loss", None)
    if isinstance(own, Tensor):
        return own.mean()
    found = next((leaf for leaf in _leaves(output) if leaf.is_floating_point()), None)
    if found is None:
        raise DataError(f"the output, a {type(output).__name__}, holds no floating-point tensor to train by")
    return found.float().mean()


def _leaves(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping | tuple | list):
        for item in output.values() if isinstance(output, Mapping) else output:
            yield from _leaves(item)


def _failed(model: nn.Module, inputs: Tried, seed: int, *, wants_loss: bool) -> str | None:
    """Why a model does not run on inputs; None where it does."""
    try:
        # of meta tensors, which cost nothing, some kernels run with gradients only
        with torch.set_grad_enabled(next(model.parameters()).is_meta), torch.random.fork_rng(devices=[]):
            output = model(**_drawn(model, inputs, 1, seed))
            own = getattr(output, "loss", None)
            if wants_loss and not (isinstance(own, Tensor) and own.numel() == 1):
                return "its output has no loss"
            loss_of(output)
    except Exception as error:  # a model may raise any exception on inputs that are not its own
        return str(error).partition("\n")[0].rstrip(".") or type(error).__name__
    return None


def _drawn(model: nn.Module, inputs: Tried, rows: int, seed: int) -> dict[str, Any]:
    """Tensors of these shapes on the model's device; the first dimension is that of rows."""
    like = next(model.parameters())
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    generator = torch.Generator().manual_seed(seed)
    vocabulary = _vocabulary(model)
    found: dict[str, Any] = {}
    ids: dict[Shape, Tensor] = {}  # labels are the token ids of the same shape
    for name, shape in inputs.items():
        if isinstance(shape, bool):
            found[name] = shape
            continue
        size = (rows * shape[0], *shape[1:])
        if like.is_meta:
            is_whole = name in TOKENS or not _is_number(name)
            found[name] = torch.empty(size, dtype=torch.int64 if is_whole else dtype, device="meta")
        elif name in TOKENS or (name == "labels" and size in ids):
            ids.setdefault(size, torch.randint(vocabulary, size, generator=generator, device="cpu"))
            found[name] = _ended(model, ids[size], vocabulary).to(like.device)
        elif _is_number(name):
            found[name] = torch.randn(size, generator=generator, device="cpu").to(like.device, dtype)
        else:
            found[name] = torch.zeros(size, dtype=torch.int64, device=like.device)
    return found


def _ended(model: nn.Module, ids: Tensor, vocabulary: int) -> Tensor:
    """Token ids with one end token in each row, at its end, for the classifiers that pool there (BART, T5)."""
    end = getattr(model.config, "eos_token_id", None)
    pools = getattr(model.config, "is_encoder_decoder", False) and type(model).__name__.endswith("ForSequenceClassification")
    if not pools or type(end) is not int or not 0 <= end < vocabulary:
        return ids
    ids = torch.where(ids == end, (end + 1) % vocabulary, ids)
    ids[:, -1] = end
    return ids


def _is_number(name: str) -> bool:
    """Whether an argument holds numbers, not ids or classes."""
    return "label" not in name and not name.endswith(("_ids", "_positions", "_mask", "_index"))


def _inputs(model: nn.Module, config: Any, main: str, length: int) -> Iterator[Tried]:
    """Shapes of one row to try, the likely ones first."""
    takes = signature(model.forward).parameters
    needed = [n for n, p in takes.items() if p.default is Parameter.empty and p.kind is Parameter.POSITIONAL_OR_KEYWORD]
    others = [name for name in _OTHERS if name in takes and name != main]
    together = [[], *([name] for name in others), [name for name in others if name != "decoder_input_ids"], others]
    seen: set[tuple[str, ...]] = set()
    for more in together:
        names = tuple(dict.fromkeys([main, *needed, *more]))
        if names in seen:
            continue
        seen.add(names)
        shapes = [_shapes(config, name, length) for name in names]
        for chosen in product(*shapes):
            yield dict(zip(names, chosen, strict=True))


def _shapes(config: Any, name: str, length: int) -> list[Shape]:
    """The shapes that an input may have, by its name; none where the name says nothing."""
    if name in TOKENS:
        books, tokens = _number(config, "num_codebooks"), _tokens(config, length)  # of sound, whose codes are one row each
        return [tokens, *([(books, tokens[1]), (*tokens, books)] if books else [])] if _number(config, "vocab_size") else []
    if name in ("pixel_values", "pixel_values_videos"):
        height, width = _sides(config)
        channels = _number(config, "num_channels", "in_channels", "in_chans", "n_channels") or 3
        image, frames = (
            (1, channels, height, width),
            _number(config, "num_frames", "frames_per_clip", "num_image_with_embedding"),
        )
        video = [(1, frames or 16, channels, height, width)] if frames or name.endswith("videos") else []
        return [*video, image] if name.endswith("videos") else [image, *video]
    if name == "input_features":
        bands = _number(config, "num_mel_bins", "input_feat_per_channel", "mel_bins", "feature_size")
        frames = _number(config, "max_source_positions", "max_length_s")
        wide = _number(config, "feature_projection_input_dim", "input_dim")
        found = [(1, bands, 2 * frames), (1, bands, frames)] if bands and frames else []
        found += [(1, 16 * length, size) for size in (wide, bands) if size]
        spectrum = _number(config, "spec_size")
        return [*found, *([(1, 1, spectrum, bands or 64)] if spectrum else [])]
    if name == "input_values":
        samples = length * (_number(config, "inputs_to_logits_ratio") or _SAMPLES) + _SAMPLES
        bands, frames = _number(config, "num_mel_bins"), _number(config, "max_length")
        spectrogram = [(1, frames, bands)] if bands and frames else []
        return [*spectrogram, (1, samples), (1, _number(config, "audio_channels") or 1, samples)]
    if name == "past_values":
        steps, series = (
            _number(config, "context_length", "seq_length", "prediction_length"),
            _number(config, "num_input_channels"),
        )
        return [(1, steps or length, series or 1), (1, steps or length)]
    return []


def _labels(model: nn.Module, config: Any, inputs: Tried, length: int) -> list[Tried]:
    """Labels to try with some inputs, the likely ones first; the last are none, for a loss made of the output."""
    takes = signature(model.forward).parameters
    found: list[Tried] = []
    ids = next((shape for name, shape in reversed(inputs.items()) if name in TOKENS), None)
    if "return_loss" in takes:
        found.append({"return_loss": True})
    if "labels" in takes:
        kinds = [(1,), *([ids] if ids else [_tokens(config, length)] if _number(config, "vocab_size") else []), (1, _FEW)]
        if type(model).__name__.endswith((*_OF_TOKENS, "ForCTC", "ForSpeechSeq2Seq", "ForTokenClassification")):
            kinds.sort(key=len, reverse=True)
        image = inputs.get("pixel_values")
        kinds += [(1, *image[-2:])] if isinstance(image, tuple) else []
        found += [{"labels": shape} for shape in kinds if isinstance(shape, tuple)]
    if {"start_positions", "end_positions"} <= takes.keys():
        found.append({"start_positions": (1,), "end_positions": (1,)})
    return [*found, {}]


def _tokens(config: Any, length: int) -> Shape:
    longest = _number(config, "max_position_embeddings", "n_positions", "max_target_positions")
    return (1, min(length, longest or length))


def _sides(config: Any) -> tuple[int, int]:
    found = next((size for at in _configs(config) if (size := getattr(at, "image_size", None))), _SIDE)
    if isinstance(found, Mapping):
        found = found.get("height", _SIDE), found.get("width", _SIDE)
    pair = tuple(found) if isinstance(found, list | tuple) else (found, found)
    return int(pair[0]), int(pair[-1])


def _vocabulary(model: nn.Module) -> int:
    """How many token ids a model knows: those that it embeds, where its config counts others (PaliGemma) or more."""
    counted = _number(model.config, "vocab_size") or 2
    try:
        embedded = getattr(model.get_input_embeddings(), "num_embeddings", None)  # type: ignore[operator]
    except Exception:  # of a model that embeds no tokens
        return counted
    return min(counted, embedded) if isinstance(embedded, int) and embedded > 0 else counted


def _number(config: Any, *names: str) -> int | None:
    """The first of some entries that a config, or one of those in it, has as a whole number above 0."""
    found = (getattr(at, name, None) for name in names for at in _configs(config))
    return next((value for value in found if type(value) is int and value > 0), None)


def _configs(config: Any) -> list[Any]:
    parts = (getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {})
    return [config, *(inner for part in parts if part is not None for inner in _configs(part))]
