"""Inputs of models of every modality, made from their configs; the list of models is that of transformers itself."""

import warnings

import pytest
import torch
from torch import nn

from lingrad.errors import DataError
from lingrad.models import loss_of, make_inputs

transformers = pytest.importorskip("transformers", reason="make test installs it (extra: hf)")

# What cannot be run on inputs made by shape alone, or on tensors without values: each was looked at.
WITHOUT = {
    "ImageGPTForImageClassification": "it makes a tensor on the CPU",
    "PerceiverForImageClassificationLearned": "its input is called inputs, whatever it is",
    "Siglip2ForImageClassification": "it reads patches of a size that its config does not have",
}
SMALL = {"num_hidden_layers": 1, "n_layer": 1, "num_layers": 1, "encoder_layers": 1, "decoder_layers": 1}


def shrunk(config):
    for name, value in SMALL.items():
        if isinstance(vars(config).get(name), int):
            setattr(config, name, value)
    for name in getattr(config, "sub_configs", None) or {}:
        if getattr(config, name, None) is not None:
            shrunk(getattr(config, name))
    return config


def built(kind, cls, device="meta", **options):
    with torch.device(device):
        return getattr(transformers, cls)(shrunk(transformers.AutoConfig.for_model(kind, **options)))


@pytest.mark.parametrize(
    ("kind", "cls", "reads"),
    [
        ("vit", "ViTForImageClassification", {"pixel_values": (2, 3, 224, 224), "labels": (2,)}),
        ("whisper", "WhisperForConditionalGeneration", {"input_features": (2, 80, 3000), "labels": (2, 12)}),
        (
            "clip",
            "CLIPModel",
            {"input_ids": (2, 12), "pixel_values": (2, 3, 224, 224), "return_loss": True},
        ),
        ("bert", "BertForSequenceClassification", {"input_ids": (2, 12), "labels": (2,)}),
        ("llama", "LlamaForCausalLM", {"input_ids": (2, 12), "labels": (2, 12)}),
        ("bert", "BertModel", {"input_ids": (2, 12)}),
        ("musicgen_decoder", "MusicgenForCausalLM", {"input_ids": (8, 12)}),  # four codes of sound
    ],
)
def test_what_a_model_reads(kind, cls, reads):
    model = built(kind, cls).train()
    inputs = make_inputs(model, rows=2, length=12, loss=True)
    assert {name: value if value is True else tuple(value.shape) for name, value in inputs.items()} == reads
    assert model.training
    loss = loss_of(model(**inputs))
    assert loss.dim() == 0
    assert loss.requires_grad


def test_values_are_of_the_model_and_the_same_at_every_call():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    model = built("vit", "ViTForImageClassification", "cpu", **sizes).double()
    state = torch.random.get_rng_state()
    one, other = (make_inputs(model, rows=3, length=4, loss=True) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert one["pixel_values"].dtype == torch.float64
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["pixel_values"], make_inputs(model, rows=3, length=4, seed=1)["pixel_values"])
    assert float(loss_of(model(**one)).detach()) > 0


def test_what_is_no_model_of_transformers_is_refused():
    with pytest.raises(DataError, match="Linear is no model of transformers, and what it reads is not known"):
        make_inputs(nn.Linear(3, 3), rows=1, length=4)
    with pytest.raises(DataError, match="no inputs are known on which Siglip2ForImageClassification runs, of"):
        make_inputs(built("siglip2", "Siglip2ForImageClassification"), rows=1, length=4)
    with pytest.raises(DataError, match="which CanineModel runs: their shapes follow neither from their names nor"):
        make_inputs(built("canine", "CanineModel"), rows=1, length=4)
    with pytest.raises(DataError, match="holds no floating-point tensor"):
        loss_of((torch.zeros(3, dtype=torch.int64),))


def listed(*mappings):
    from transformers.models.auto import modeling_auto

    for mapping in mappings:
        for kind, cls in getattr(modeling_auto, mapping).items():
            yield kind, cls if isinstance(cls, str) else cls[0]


@pytest.mark.slow
def test_every_model_of_images_and_videos():
    ran, failed = 0, {}
    for kind, cls in listed("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                model = built(kind, cls)
            except Exception:  # noqa: S112 - its default config builds no model
                continue
        try:
            make_inputs(model, rows=2, length=16, loss=True)
            ran += 1
        except DataError as error:
            failed[cls] = str(error)
    assert failed.keys() == WITHOUT.keys(), failed
    assert ran >= 40
