"""Inputs for a model of any modality, from what its forward is called with, and a loss of whatever comes out."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

ROWS, LENGTH, WAVE, FRAMES = 2, 16, 2000, 64
LARGEST = 100.0  # outputs beyond are scores of what was masked


class Float64(TorchFunctionMode):
    """Computes in float64 where a model asks for float32, as transformers' norms and attention do.

    Rounded to float32 on the way, values that agree to 1e-16 would part by 1e-8.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = {} if kwargs is None else kwargs
        if func is Tensor.float:
            return Tensor.double(*args, **kwargs)
        args = tuple(torch.float64 if one is torch.float32 else one for one in args)
        kwargs = {name: torch.float64 if one is torch.float32 else one for name, one in kwargs.items()}
        return func(*args, **kwargs)


def lookup(config: Any, *names: str) -> Any:
    """The first of several options that a config, or one within it, has as a number or a list of them."""
    nested = [value for value in vars(config).values() if hasattr(value, "to_dict")]
    for name in names:
        value = getattr(config, name, None)
        if value is not None and not isinstance(value, bool | str):
            return value
    for one in nested:
        found = lookup(one, *names)
        if found is not None:
            return found
    return None


class Inputs:
    """Makes inputs.

    Args:
        model: The model.
        dtype: Of pictures and sounds.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.model, self.config, self.dtype = model, model.config, dtype
        self.generator = torch.Generator().manual_seed(0)
        self.parameters = inspect.signature(model.forward).parameters

    def candidates(self) -> Iterator[dict[str, Tensor]]:
        """Arguments by name, richest first."""
        main = getattr(self.model, "main_input_name", "input_ids")
        reads_text = "input_ids" in self.parameters
        for other in ("pixel_values", "input_features", "input_values"):
            if other in self.parameters:
                for more in self._media(other):
                    if reads_text:
                        yield from self._with_text(other, more)
                    yield self._completed(more)
        if reads_text:
            yield self._completed({"input_ids": self.ids()})
            yield self._completed({"input_ids": self.ids(), "bbox": self._boxes()})
            books = lookup(self.config, "num_codebooks")
            if isinstance(books, int):
                yield self._completed({"input_ids": torch.cat([self.ids()] * books)})
                yield self._completed({"input_ids": torch.stack([self.ids()] * books, -1)})
        if main not in ("input_ids", "pixel_values", "input_features", "input_values"):
            for more in self._media(main):
                yield self._completed(more)

    def ids(self, length: int = LENGTH) -> Tensor:
        """Token ids that mean nothing special."""
        vocabulary = lookup(self.config, "vocab_size", "text_vocab_size") or 32
        low = min(8, vocabulary // 4)
        return torch.randint(low, max(vocabulary // 2, low + 2), (ROWS, length), generator=self.generator)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def _boxes(self) -> Tensor:
        corner = torch.randint(0, 20, (ROWS, LENGTH, 2), generator=self.generator)
        return torch.cat([corner, corner + torch.randint(1, 10, (ROWS, LENGTH, 2), generator=self.generator)], -1)

    def _media(self, name: str) -> Iterator[dict[str, Tensor]]:
        if name in ("pixel_values", "pixel_values_videos"):
            yield from self._pictures(name)
        elif name == "input_features":
            mel = lookup(self.config, "num_mel_bins", "feature_size", "input_feat_per_channel", "n_mels", "input_dim") or 80
            source = lookup(self.config, "max_source_positions")
            for frames in (2 * source if isinstance(source, int) else FRAMES, FRAMES):
                yield {name: self._random(ROWS, mel, frames)}
                yield {name: self._random(ROWS, frames, mel)}
        elif name == "input_values":
            mel, length = lookup(self.config, "num_mel_bins"), lookup(self.config, "max_length")
            if mel and length and hasattr(self.config, "frequency_stride"):
                yield {name: self._random(ROWS, length, mel)}
            channels = lookup(self.config, "audio_channels") or 1
            yield {name: self._random(ROWS, WAVE)}
            yield {name: self._random(ROWS, channels, WAVE)}
        else:
            width = lookup(self.config, "hidden_size", "d_model") or 32
            for shape in ((ROWS, FRAMES), (ROWS, FRAMES, width), (ROWS, width, FRAMES)):
                yield {name: self._random(*shape)}

    def _pictures(self, name: str) -> Iterator[dict[str, Tensor]]:
        channels = lookup(self.config, "num_channels", "in_channels", "in_chans", "num_image_channels") or 3
        size = lookup(self.config, "image_size", "img_size", "input_resolution", "crop_size")
        sizes = [size] if size else [32, 64, 128]
        frames = lookup(self.config, "num_frames", "frames_per_clip")
        patch = lookup(self.config, "patch_size")
        channels = channels if isinstance(channels, int) else 3
        for one in sizes:
            height, width = (one, one) if isinstance(one, int) else tuple(one)[-2:]
            if "image_grid_thw" in self.parameters or "grid_thw" in self.parameters:
                side, time = 4, lookup(self.config, "temporal_patch_size") or 1
                grid = torch.tensor([[1, side, side]] * ROWS)
                key = "image_grid_thw" if "image_grid_thw" in self.parameters else "grid_thw"
                pixels = self._random(ROWS * side * side, channels * time * patch * patch)
                yield {name: pixels, key: grid}
            if "spatial_shapes" in self.parameters:
                mask, shapes = torch.ones(ROWS, 16, dtype=torch.long), torch.tensor([[4, 4]] * ROWS)
                pixels = self._random(ROWS, 16, channels * patch * patch)
                yield {name: pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}
            if frames:
                yield {name: self._random(ROWS, frames, channels, height, width)}
            yield {name: self._random(ROWS, channels, height, width)}
            if "image_sizes" in self.parameters:
                yield {
                    name: self._random(ROWS, 3, channels, height, width),
                    "image_sizes": torch.tensor([[height, width]] * ROWS),
                }
            yield {name: self._random(ROWS, 1, channels, height, width)}

    def _with_text(self, name: str, more: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Together with text, in which each picture or sound has as many tokens as it has features."""
        kind = "image" if name == "pixel_values" else "audio"
        token = lookup(self.config, f"{kind}_token_id", f"{kind}_token_index")
        features = getattr(self.model, f"get_{kind}_features", None)
        text = self.ids()
        if features is not None and isinstance(token, int):
            try:
                with torch.no_grad():
                    count = _rows(features(**more))
            except Exception:  # a model may raise any exception
                count = 0
            if count:
                each = max(1, count // ROWS)
                marked = torch.cat([text[:, :2], torch.full((ROWS, each), token), text[:, 2:]], 1)
                kinds = {"mm_token_type_ids": (marked == token).long()} if "mm_token_type_ids" in self.parameters else {}
                yield self._completed({"input_ids": marked, **more, **kinds})
        yield self._completed({"input_ids": text, **more})

    def _completed(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """With a decoder's tokens where there is a decoder, and what has no default."""
        decodes = getattr(self.config, "is_encoder_decoder", False) or "input_ids" not in self.parameters
        if decodes and "decoder_input_ids" in self.parameters and "decoder_input_ids" not in found:
            found = found | {"decoder_input_ids": self.ids()}
        for name, parameter in self.parameters.items():
            if parameter.default is inspect.Parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
                if name not in found and name.endswith("_ids"):
                    found = found | {name: self.ids()}
                elif name not in found and name.endswith("mask"):
                    found = found | {name: torch.ones(next(iter(found.values())).shape[:2], dtype=torch.long)}
        return found


def _rows(features: Any) -> int:
    """How many tokens features of pictures stand for, over all rows."""
    found = getattr(features, "pooler_output", None) if not isinstance(features, Tensor | list | tuple) else features
    found = getattr(features, "last_hidden_state", None) if found is None else found
    parts = list(found) if isinstance(found, list | tuple) else [found]
    return sum(part.shape[:-1].numel() for part in parts if isinstance(part, Tensor))


def tensors(output: Any) -> list[Tensor]:
    """Every floating-point tensor of an output, each once; not what is cached for generation."""
    found: dict[int, Tensor] = {}

    def walk(value: Any, depth: int) -> None:
        if isinstance(value, Tensor):
            if value.is_floating_point() and value.numel():
                found.setdefault(id(value), value)
        elif isinstance(value, Mapping):
            for name, one in value.items():
                if "past" not in str(name) and "cache" not in str(name):
                    walk(one, depth + 1)
        elif isinstance(value, list | tuple) and depth < 4:
            for one in value:
                walk(one, depth + 1)

    walk(output, 0)
    return list(found.values())


def loss_of(output: Any) -> Tensor:
    """The squared distance of all outputs to fixed random targets."""
    outputs = [one for one in tensors(output) if one.requires_grad]
    if not outputs:
        raise ValueError("the model's output has no tensor with a gradient")
    total = torch.zeros((), dtype=outputs[0].dtype)
    for i, one in enumerate(outputs):
        target = torch.randn(one.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64).to(one.dtype)
        total = total + (one.clamp(-LARGEST, LARGEST) - target).square().mean().to(total.dtype)
    return total
