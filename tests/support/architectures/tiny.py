"""Tiny configs: every integer of a default config that is a size, made small by rules on its name."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

VOCABULARY, WIDTH, HEADS, HEAD = 128, 32, 4, 8
LEVELS = ("tiny", "divided", "shallow")  # by names; all widths by one factor; only depth, vocabulary, experts and lengths

MAIN = re.compile(r"(\w*_)?(hidden_size|d_model|n_embd|embed_dim|dim|hidden_dim|embedding_size)$")
TOKEN = re.compile(r"(\w*_)?(token_id|token_ids|token_index|_tok_id)$|(eos|bos|pad|mask|sep|unk|cls)_index$")
KEEP = re.compile(
    r"chunk_size_feed_forward|pretraining_tp|\w*(coefficient|cost|theta|temperature|ignore_index|ignore_value|sampling_rate|"
    r"sample_rate|kernel_size|stride|conv_kernel|conv_dim$|d_conv|ratio|factor|dilation|padding|_loss\w*|multiplier|scale|"
    r"type_vocab_size|num_labels|num_channels|in_channels|in_chans|audio_channels|input_channels|max_distance|num_groups|\w*conv_groups|"
    r"num_mel_bins|_dtype|version|seed|feature_layer|expand|num_encoder_blocks|num_stages|id2label|label2id|merge_size|temporal_patch_size)"
)

Rule = tuple[str, Callable[[int], int]]


def _most(limit: int) -> Callable[[int], int]:
    return lambda value: min(value, limit)


# The first name that matches decides; all levels.
DEPTHS: tuple[Rule, ...] = (
    (r"\w*_group_vocab|\w*vocab_size(_per_layer_input)?|unpadded_vocab_size|additional_vocab_size", _most(VOCABULARY)),
    (r"\w*(num_position_embeddings|pos_emb_height|pos_emb_width|posemb_grid_size)", _most(64)),
    (r"max_(source|target)_positions|(left_|right_)?max_position_embeddings|n_positions|n_ctx|context_length"
     r"|max_seq(uence)?_len(gth)?|max_seq_length|max_length|max_text_len|max_pos_emb"
     r"|max_2d_position_embeddings|max_vit_seq_len", _most(64)),
    (r"\w*(period|interval|every_n|sparse_step|layer_step|frequency|pattern|n_layers_per\w*)", _most(2)),
    (r"attn_layer_offset|expert_layer_offset|first_k_dense_replace|num_dense_layers|max_window_layers", _most(1)),
    (r"num_kv_shared_layers|num_nextn_predict_layers|num_mtp_layers|mtp_num_hidden_layers", lambda value: 0),
    (r"\w*_index(es)?|\w*_idx", lambda value: value),
    (r"\w*(layers?|depths?|blocks?|n_block)$", _most(2)),
    (r"(moe_)?(num|n)_(local_|routed_|total_|linear_)?experts|moe_num_experts|\w*num_experts", _most(4)),
    (r"num_experts_per_tok(en)?|moe_(topk|top_k|k)|top_k|experts_per_token|num_selected_experts|expert_capacity", _most(2)),
    (r"(mamba_|ssm_)?n_groups|mamba_ngroups|n_group|topk_group|num_expert_group\w*", lambda value: 1),
    (r"(n|num|moe_num)_shared_experts?|num_zero_experts\w*|zero_expert_num", _most(1)),
    (r"num_queries|num_object_queries|num_denoising|\w*query_tokens|num_latents|resampler_n_latents|num_proposals"
     r"|latent_query_num", _most(8)),
    (r"sliding_window(_size)?|attention_window|attention_chunk_size|local_attention\w*|index_topk\w*|\w*block_size|chunk_size"
     r"|mamba_chunk_size|context_size|window_length", _most(8)),
    (r"codebook_size|codevectors?_\w*|num_codevectors_per_group", _most(32)),
)  # fmt: skip
# Widths, at the level "tiny" only.
WIDTHS: tuple[Rule, ...] = (
    (r"(\w*_)?(patch_size|patch_length)", _most(8)),
    (r"(\w*_)?(image_size|img_size|input_resolution|max_img_size|max_image_size)", _most(32)),
    (r"\w*window_size", _most(2)),
    (r"num_conv_pos_embeddings", _most(16)),
    (r"num_frames", _most(4)),
    (r"(\w*_)?(kv_heads|num_key_value_heads|num_kv_heads|multi_query_group_num|num_key_value_groups"
     r"|num_global_key_value_heads)", _most(2)),
    (r"\w*(attention_heads|num_heads|n_heads?|num_attn_heads|num_head|_heads)$|attention_heads|heads", _most(HEADS)),
    (r"\w*(head_dim|head_size|d_kv|dim_head|d_head|dim_per_head)|key_length", _most(HEAD)),
    (r"rotary_dim", _most(HEAD // 2)),
    (r"\w*(state_size|d_state|ssm_state)", _most(16)),
    (r"\w*lora_rank|\w*(time_step_rank|dt_rank)", _most(8)),
)  # fmt: skip
WIDE = re.compile(
    r"\w*(hidden|embed|dim|size|channels|width|units|inner|ffn|d_ff|d_model|n_embd|proj|intermediate|filters|state|latent|"
    r"features|planes|rank|feedforward|scalar|out|length|num_positions|embds?)\w*"
)
LISTS = re.compile(
    r"\w*(sizes|repeats|dims?|channels|embed_dims?|widths?|num_heads|heads|depths|layers|blocks|filters|units|planes)\w*"
)

# What no rule on names can know: sizes that one type's other sizes must agree with, and what a default config lacks. By type
# of config or by class of model.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2},
    "esm": {"vocab_size": 64, "mask_token_id": 60, "pad_token_id": 1},
    "beit": {"num_hidden_layers": 4, "out_indices": [0, 1, 2, 3]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "data2vec-vision": {"num_hidden_layers": 4, "out_indices": [0, 1, 2, 3]},
    "falcon_h1": {"mamba_d_ssm": WIDTH, "mamba_n_heads": HEADS, "mamba_d_head": HEAD},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 8},
    "hunyuan_v1_dense": {"head_dim": HEAD},
    "hunyuan_v1_moe": {"head_dim": HEAD},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": HEAD},
    "mobilebert": {"embedding_size": 16},
    "nemotron": {"head_dim": HEAD},
    "perceiver": {"num_self_attention_heads": 1, "num_cross_attention_heads": 1},
    "reformer": {"axial_pos_embds_dim": (8, 24), "axial_pos_shape": (4, 4), "attn_layers": ["local", "lsh"], "num_buckets": 2},
    "ReformerModelWithLMHead": {"is_decoder": True},
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layer_types": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"n_mamba_heads": 8},
}
# Types whose code splits the positions of pictures by sections that its default config does not name: of 8 / 2 frequencies.
_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
for _name in ("qwen2_vl_text", "qwen2_5_vl_text", "glm4v_text", "glm_image_text", "glm_ocr_text"):
    EXCEPTIONS[_name] = _SECTIONS
for _name in ("qwen2_5_vl_vision", "qwen2_5_vl", "qwen2_5_omni_vision_encoder"):
    EXCEPTIONS[_name] = {"window_size": 2 * WIDTH}
_TIMM = {"detr", "conditional_detr", "dab-detr", "deformable_detr", "table-transformer", "maskformer", "omdet-turbo"}


class Shrinker:
    """Makes configs small; values that are equal somewhere in a config and in those within it stay equal.

    Args:
        level: How; see `LEVELS`.
        name: The class of the model.
    """

    def __init__(self, level: str, name: str = "") -> None:
        self.level, self.name = level, name
        self._main: set[int] = set()
        self._tokens: dict[int, int] = {}

    def shrink(self, config: Any) -> Any:
        """A config of the same class, tiny."""
        self._collect(config)
        return self._config(config)

    def _collect(self, config: Any) -> None:
        for name, value in _values(config).items():
            if _is_config(value):
                self._collect(value)
            elif type(value) is int and value >= WIDTH and MAIN.fullmatch(name):
                self._main.add(value)

    def _config(self, config: Any) -> Any:
        values, changed = _values(config), {}
        defaults = {field.name: field.default for field in dataclasses.fields(config)}
        base = next((v for n in ("hidden_size", "d_model", "n_embd", "embed_dim", "dim") if type(v := values.get(n)) is int), 0)
        depth, kinds = _layers(values)
        for name, value in values.items():
            if _is_config(value):
                changed[name] = self._config(value)
            elif name in kinds:
                changed[name] = kinds[name]
            elif type(value) is int and defaults[name] is not None:
                changed[name] = self._integer(name, value, base)
            elif isinstance(value, list | tuple) and value and defaults[name] is not None:
                changed[name] = self._list(name, value)
            elif TOKEN.search(name):
                changed[name] = self._token(value)
            elif defaults[name] is not None and not isinstance(value, dict):
                changed[name] = value
            elif isinstance(value, dict) and "mrope_section" in value and self.level == "tiny":
                changed[name] = value | {"mrope_section": [2, 1, 1]}
        if "out_indices" in kinds:
            changed["out_indices"] = kinds["out_indices"]
        if depth and "num_hidden_layers" in changed:
            changed["num_hidden_layers"] = depth
        if "window_size" in changed and "image_size" in changed and self.level == "tiny":
            changed["image_size"] = 2 * WIDTH  # a window in the last stage too
        if getattr(config, "_out_indices", None) and "out_indices" not in changed:
            changed["out_indices"] = list(config.out_indices)
        heads = values.get("num_attention_heads")
        if heads is not None and heads == values.get("num_key_value_heads") and "num_key_value_heads" in changed:
            changed["num_key_value_heads"] = changed["num_attention_heads"]
        for key in (type(config).model_type, self.name):
            changed |= {name: value for name, value in EXCEPTIONS.get(key, {}).items() if name in defaults}
        if type(config).model_type in _TIMM:
            changed |= {
                "use_timm_backbone": False,
                "use_pretrained_backbone": False,
                "backbone": None,
                "backbone_config": _resnet(),
            }
        return type(config)(**changed)

    def _integer(self, name: str, value: int, base: int) -> int:
        if TOKEN.search(name):
            return self._token(value)
        for pattern, small in DEPTHS:
            if re.fullmatch(pattern, name) and not KEEP.fullmatch(name):
                return small(value)
        if self.level == "shallow" or KEEP.match(name):
            return value
        if self.level == "divided":
            return (
                value // 8 if WIDE.fullmatch(name) and value >= 128 and not re.search("image|img|patch|length", name) else value
            )
        for pattern, small in WIDTHS:
            if re.fullmatch(pattern, name):
                return small(value)
        if value < WIDTH or not WIDE.fullmatch(name):
            return value
        if MAIN.fullmatch(name) or value in self._main:
            return WIDTH
        return max(8, min(4 * WIDTH, round(value * WIDTH / max(base, value / 4) / 8) * 8))

    def _list(self, name: str, value: Any) -> Any:
        if TOKEN.search(name):
            return [self._token(one) for one in value]
        if not all(type(one) is int for one in value) or not LISTS.fullmatch(name) or KEEP.match(name.replace("conv_dim", "")):
            return value
        if re.search("depths|layers|blocks|repeats", name):
            return type(value)(min(one, 1) for one in value)
        if self.level == "shallow":
            return value
        if self.level == "divided":
            return type(value)(one // 4 if one >= 64 else one for one in value)
        if "heads" in name:
            return type(value)(min(one, 2) for one in value)
        least = min(value)
        return value if least < 8 else type(value)(min(128, one * 16 // least) // 8 * 8 for one in value)

    def _token(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [self._token(one) for one in value]
        if type(value) is not int or value < VOCABULARY // 2:
            return value
        return self._tokens.setdefault(value, VOCABULARY - 1 - len(self._tokens))


def tiny(config_class: Any, level: str, name: str = "") -> Any:
    """A tiny config of a class, for a class of model."""
    return Shrinker(level, name).shrink(config_class())


def _layers(values: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """How many layers there should be, and the new values of lists with an item for each: one layer of every kind."""
    depth = values.get("num_hidden_layers")
    if type(depth) is not int or depth <= 2:
        return 0, {}
    lists = {name: value for name, value in values.items() if isinstance(value, list | tuple) and len(value) == depth}
    kinds = {name: list(dict.fromkeys(map(str, value))) for name, value in lists.items() if isinstance(value[0], str)}
    wanted = max([2, *map(len, kinds.values())])
    places: list[int] = []
    if kinds:
        longest = max(kinds, key=lambda name: len(kinds[name]))
        places = [list(lists[longest]).index(kind) for kind in kinds[longest]]
    places += [i for i in range(depth) if i not in places][: wanted - len(places)]
    found = {name: type(value)(value[i] for i in places) for name, value in lists.items()}
    name = next((n for n in ("out_indices", "_out_indices", "backbone_out_indices") if values.get(n)), "")
    indices = values.get(name)
    if isinstance(indices, list | tuple) and max(indices) > 4:
        first = int(name.startswith("_"))  # a backbone counts its stem
        wanted = max(wanted, len(indices))
        found[name.removeprefix("_")] = [wanted] if first and len(indices) == 1 else [i + first for i in range(len(indices))]
    return wanted, found


def _resnet() -> Any:
    """A tiny backbone in place of those of timm."""
    from transformers import ResNetConfig

    shape: dict[str, Any] = {"embedding_size": 16, "hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1]}
    return ResNetConfig(**shape, out_features=["stage2", "stage3", "stage4"])


def _is_config(value: Any) -> bool:
    from transformers import PreTrainedConfig

    return isinstance(value, PreTrainedConfig)


def _values(config: Any) -> dict[str, Any]:
    found = {}
    for field in dataclasses.fields(config):
        if field.name in config.__dict__ and field.name not in ("transformers_version", "dtype", "architectures"):
            found[field.name] = config.__dict__[field.name]
    return found
