"""What programs that load a LoRA read of it: rules as data, each with where the program says so. Nothing of them is imported.

An adapter means W + s B A, module by module, with the s that PEFT computes. A loader may refuse an adapter, which is seen at
once. It may also multiply by another s, or leave tensors out, and say nothing.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lingrad.console import layers
from lingrad.errors import shown

LoaderName = Literal["vllm", "llama.cpp", "tgi", "diffusers"]
Target = Literal["peft", "vllm", "llama.cpp", "diffusers"]  # what an adapter can be written for
TARGETS = get_args(Target)

# vllm-project/vllm, vllm/config/lora.py: the values of --max-lora-rank, 16 by default
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

_FUSED = re.compile(r".*\.experts(\.base_layer)?")
_BASE_ENDS = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")  # that leave the weights of the starting model as they are
_MORE_THAN_LORA = (
    "use_dora",
    "lora_bias",
    "alora_invocation_tokens",
    "layer_replication",
    "use_bdlora",
    "use_qalora",
    "arrow_config",
)


@dataclass(frozen=True)
class AdapterFile:
    """What there is to see in an adapter's folder without its model.

    Args:
        config: The config.
        ranks: Path of a module, as in the keys -> columns of its lora_B; of all experts together where they are fused.
        scales: Path -> what PEFT multiplies B A by.
        convolutions: Paths whose factors have more than two dimensions.
        embeddings: Paths whose factors are an embedding's.
        others: Keys of all other tensors.
    """

    config: Mapping[str, Any]
    ranks: Mapping[str, int]
    scales: Mapping[str, float]
    convolutions: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def r(self) -> float:
        """``r`` of the config."""
        return float(self.config["r"])

    @property
    def alpha(self) -> float:
        """``lora_alpha`` of the config."""
        return float(self.config["lora_alpha"])

    def parameters(self) -> list[str]:
        """Paths whose factors are a parameter's (``target_parameters``), in a module that PEFT has no layer for."""
        owners = [str(name).rpartition(".")[0] for name in self.config.get("target_parameters") or ()]
        bare = {path: path.removesuffix(".base_layer") for path in self.ranks}
        return [path for path, own in bare.items() if any(own == owner or own.endswith(f".{owner}") for owner in owners)]


Scale = Callable[[AdapterFile, str], float]
Faults = Callable[[AdapterFile], Iterator[str]]


@dataclass(frozen=True)
class Loader:
    """A program that loads adapters.

    Args:
        name: What it is called here.
        title: Its own name.
        sources: Repository and file -> what is written there.
        scale: What it multiplies the factors of a module by.
        refuses: Why it stops with an error.
        loses: What it leaves out without an error.
        command: How to load the adapter; ``DIR`` is its folder, ``START`` the starting model, ``RANK`` what vLLM has room for.
        quote: Writes a name so that the command takes it whole.
    """

    name: LoaderName
    title: str
    sources: Mapping[str, str]
    scale: Scale
    refuses: Faults
    loses: Faults
    command: str
    quote: Callable[[str], str] = shlex.quote


def of_one_alpha(adapter: AdapterFile, path: str) -> float:
    """The scale of a program that reads ``r`` and ``lora_alpha``, once for all modules."""
    return adapter.alpha / (math.sqrt(adapter.r) if adapter.config.get("use_rslora") else adapter.r)


def of_own_rank(adapter: AdapterFile, path: str) -> float:
    """The scale of a program that divides one ``lora_alpha`` by the rank of each tensor; where alpha is 0 it takes 1."""
    return adapter.alpha / adapter.ranks[path] if adapter.alpha else 1.0


def of_first_rank(adapter: AdapterFile, path: str) -> float:
    """The scale of a program that takes the first tensor's rank for the alpha of all, and reads no config."""
    return next(iter(adapter.ranks.values())) / adapter.ranks[path]


def more_than_factors(adapter: AdapterFile) -> Iterator[str]:
    """What a config has by which PEFT makes more of a module than W + B A, or changes W as it loads."""
    config = adapter.config
    yield from (f"{option}={shown(config[option])}" for option in _MORE_THAN_LORA if config.get(option))
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in _INITS:
        yield f"init_lora_weights={shown(start)}, which changes the starting model"


def _vllm_refuses(adapter: AdapterFile) -> Iterator[str]:
    config = adapter.config
    if config.get("modules_to_save"):
        yield f"modules saved in full (modules_to_save={shown(list(config['modules_to_save']))})"
    if config.get("bias", "none") != "none":
        yield f"bias={shown(config['bias'])}"
    yield from more_than_factors(adapter)
    yield from _unknown(key for key in adapter.others if not key.endswith(_BASE_ENDS))
    yield from _kinds(adapter, "LoRAs of linear layers and embeddings", lambda path: _FUSED.fullmatch(path) is not None)
    if adapter.ranks and (largest := max(_own_ranks(adapter))) > VLLM_RANKS[-1]:
        yield f"rank {largest:g}, over {VLLM_RANKS[-1]}, the largest --max-lora-rank"


def _llama_refuses(adapter: AdapterFile) -> Iterator[str]:
    norms = set(_norms(adapter))
    yield from _unknown(key for key in adapter.others if key not in norms and ".base_layer.weight" not in key)
    yield from _kinds(adapter, "LoRAs of linear layers and the token embedding", lambda path: False)
    if adapter.config.get("fan_in_fan_out"):
        yield "weights stored as [in, out] (fan_in_fan_out): its converter transposes them, and the factors with them"


def _llama_loses(adapter: AdapterFile) -> Iterator[str]:
    found = _norms(adapter)
    if found:
        yield f"{len(found)} norms, such as '{found[0]}'"


def _tgi_refuses(adapter: AdapterFile) -> Iterator[str]:
    for kind, paths in _by_kind(adapter).items():
        ranks = sorted({adapter.ranks[path] for path in paths})
        if len(ranks) > 1:
            yield f"ranks that differ among layers: {ranks[0]} and {ranks[-1]} for '{kind}', whose factors it stacks"
            return


def _tgi_loses(adapter: AdapterFile) -> Iterator[str]:
    every = max((len(paths) for paths in _by_kind(adapter).values()), default=0)
    for kind, paths in _by_kind(adapter).items():
        if len(paths) < every:
            yield f"all of '{kind}', of which {every - len(paths)} layers have no factors"
    known = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
    odd = [path for path in adapter.ranks if path.rpartition(".")[2] not in known]
    if odd:
        yield f"factors of '{layers(odd[0])}', which is none of {', '.join(known)}"
    if adapter.others:
        yield f"tensors that are no factors, such as '{adapter.others[0]}'"


def _diffusers_refuses(adapter: AdapterFile) -> Iterator[str]:
    yield from _unknown(iter(adapter.others))
    yield from _kinds(adapter, "LoRAs of layers", lambda path: False, convolutions=True)


def _nothing(adapter: AdapterFile) -> Iterator[str]:
    yield from ()


def _unknown(keys: Iterator[str]) -> Iterator[str]:
    found = list(keys)
    if found:
        more = f" and {len(found) - 1} more" if found[1:] else ""
        yield f"tensors that are no factors: '{found[0]}'{more}"


def _kinds(
    adapter: AdapterFile, known: str, takes_parameter: Callable[[str], bool], *, convolutions: bool = False
) -> Iterator[str]:
    """What a loader has no LoRA for: convolutions, and parameters of modules that PEFT has no layer for."""
    odd = [path for path in adapter.parameters() if not takes_parameter(path)]
    if not convolutions:
        odd += adapter.convolutions
    if odd:
        yield f"factors of '{odd[0]}': it has {known} only"


def _norms(adapter: AdapterFile) -> list[str]:
    """Keys that llama.cpp's converter takes for norms."""
    return [key for key in adapter.others if "_layernorm" in key or ".norm" in key]


def _own_ranks(adapter: AdapterFile) -> list[float]:
    parameters = adapter.parameters()
    return [adapter.r, *(adapter.ranks[path] for path in adapter.ranks if path not in parameters)]


def _by_kind(adapter: AdapterFile) -> dict[str, list[str]]:
    """Paths that differ only in the number of their layer, together."""
    found: dict[str, list[str]] = {}
    for path in adapter.ranks:
        if layers(path) != path:
            found.setdefault(layers(path), []).append(path)
    return found


LOADERS: dict[LoaderName, Loader] = {
    loader.name: loader
    for loader in (
        Loader(
            "vllm",
            "vLLM",
            {
                "vllm-project/vllm vllm/lora/peft_helper.py": "one r, one lora_alpha; modules_to_save, bias and DoRA are "
                "refused; newer versions read rank_pattern and alpha_pattern",
                "vllm-project/vllm vllm/lora/lora_model.py": "a tensor that is neither lora_A nor lora_B is refused",
                "vllm-project/vllm vllm/config/lora.py": "the values of max_lora_rank",
            },
            of_one_alpha,
            _vllm_refuses,
            _nothing,
            "vllm serve START --enable-lora --max-lora-rank RANK --lora-modules NAME=DIR",
        ),
        Loader(
            "llama.cpp",
            "llama.cpp",
            {
                "ggml-org/llama.cpp src/llama-adapter.h": "get_scale divides alpha by the rank of the tensor",
                "ggml-org/llama.cpp src/llama-adapter.cpp": "norms in an adapter are passed over",
                "ggml-org/llama.cpp convert_lora_to_gguf.py": "writes lora_alpha of the config, reads no pattern and no "
                "use_rslora; ends at tensors that are neither factors nor norms",
                "ggml-org/llama.cpp conversion/gpt2.py": "transposes the weights of a Conv1D",
            },
            of_own_rank,
            _llama_refuses,
            _llama_loses,
            "python convert_lora_to_gguf.py DIR --base START --outfile lora.gguf; llama-server -m MODEL.gguf --lora lora.gguf",
        ),
        Loader(
            "tgi",
            "TGI",
            {
                "huggingface/text-generation-inference server/text_generation_server/adapters/lora.py": "one r, one "
                "lora_alpha; factors of all layers are stacked; a kind of layer of which one has no factors is left out",
                "huggingface/text-generation-inference server/text_generation_server/utils/adapter.py": "names of layers",
            },
            of_one_alpha,
            _tgi_refuses,
            _tgi_loses,
            "text-generation-launcher --model-id START --lora-adapters NAME=DIR",
        ),
        Loader(
            "diffusers",
            "diffusers",
            {
                "huggingface/diffusers src/diffusers/utils/peft_utils.py": "reads ranks from the tensors and no "
                "adapter_config.json; until August 2026 the first rank was the alpha of all modules, since then the scale is 1",
            },
            of_first_rank,
            _diffusers_refuses,
            _nothing,
            "transformer.load_lora_adapter(DIR, weight_name='adapter_model.safetensors', prefix='base_model.model')",
            repr,
        ),
    )
}
