"""Small files of other programs, whole, to be damaged."""

import io
import zipfile

import torch
from torch import nn

from lingrad.files.tensorfile import in_memory, write_tensors


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)


def an_adapter(folder):
    model = nn.Sequential(*(Block() for _ in range(2)))
    ranks = {"0.q_proj": 2, "0.v_proj": 1, "1.q_proj": 2, "1.v_proj": 3}
    tensors = {}
    for module, rank in ranks.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.ones(rank, 4)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.ones(4, rank)
    write_tensors(folder / "adapter_model.safetensors", in_memory(tensors), {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "rank_pattern": {"0.v_proj": 1, r"1\.v_[a-z]+": 3},
        "alpha_pattern": {".*v_proj": 8},
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": None,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "target_parameters": None,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "init_lora_weights": True,
    }
    return model, config


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 8,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "vocab_size": 16,
    "torch_dtype": "float32",
    "rope_theta": 10000.0,
}


STATE = {
    "state": {
        0: {"step": torch.tensor(3.0), "exp_avg": torch.arange(6.0).view(2, 3), "odd": torch.zeros(0, 3)},
        1: {"exp_avg": torch.ones(3, 2).t(), "half": torch.ones(2, dtype=torch.bfloat16), "n": 5, "codes": torch.arange(4) > 1},
    },
    "param_groups": [
        {"params": [0], "lr": 0.1, "betas": (0.9, 0.99), "names": ["a"]},
        {"params": [1], "lr": torch.tensor(0.1)},
    ],
}


def packed(data, records=None):
    """A file as torch.save makes it, with another pickle in it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
        for name, content in (records or {}).items():
            archive.writestr(f"archive/data/{name}", content)
    return file.getvalue()


def contents():
    file = io.BytesIO()
    torch.save(STATE, file)
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        return archive.read(names[0]), {n.rpartition("/")[2]: archive.read(n) for n in names if "/data/" in n}
