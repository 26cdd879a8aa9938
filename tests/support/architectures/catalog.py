"""The architectures: from transformers' own mappings, a class once."""

from typing import NamedTuple


class Architecture(NamedTuple):
    """A model class of transformers.

    Args:
        kind: What it reads: causal, encoder, seq2seq, vision, audio, multimodal or other.
        model_type: The type of its config.
        name: The class.
    """

    kind: str
    model_type: str
    name: str


# kind -> the tasks of which every class is taken, and those taken for types of config that have none of these
TASKS = {
    "causal": (["FOR_CAUSAL_LM"], []),
    "encoder": (["FOR_MASKED_LM"], []),
    "seq2seq": (["FOR_SEQ_TO_SEQ_CAUSAL_LM"], []),
    "vision": (
        ["FOR_IMAGE_CLASSIFICATION", "FOR_VIDEO_CLASSIFICATION", "FOR_SEMANTIC_SEGMENTATION", "FOR_OBJECT_DETECTION"],
        ["FOR_UNIVERSAL_SEGMENTATION", "FOR_DEPTH_ESTIMATION", "FOR_IMAGE_TO_IMAGE", "FOR_ZERO_SHOT_IMAGE_CLASSIFICATION",
         "FOR_ZERO_SHOT_OBJECT_DETECTION", "FOR_MASK_GENERATION", "FOR_KEYPOINT_DETECTION", "FOR_KEYPOINT_MATCHING",
         "FOR_POSE_ESTIMATION", "FOR_IMAGE"],
    ),
    "audio": (
        ["FOR_AUDIO_CLASSIFICATION", "FOR_CTC", "FOR_SPEECH_SEQ_2_SEQ"],
        ["FOR_AUDIO_XVECTOR", "FOR_RNNT", "FOR_TDT", "FOR_TEXT_TO_SPECTROGRAM", "FOR_TEXT_TO_WAVEFORM"],
    ),
    "multimodal": (["FOR_IMAGE_TEXT_TO_TEXT"], ["FOR_MULTIMODAL_LM", "FOR_VISUAL_QUESTION_ANSWERING"]),
    "other": ([], ["FOR_SEQUENCE_CLASSIFICATION", "FOR_TEXT_ENCODING", "FOR_TIME_SERIES_PREDICTION", ""]),
}  # fmt: skip


def catalog() -> list[Architecture]:
    """All of them, in transformers' order; those of a pipeline that has a task for its type come before plain bases."""
    from transformers.models.auto import modeling_auto

    found: list[Architecture] = []
    names: set[str] = set()
    types: set[str] = set()
    for which in (0, 1):
        for kind, tasks in TASKS.items():
            for task in tasks[which]:
                mapping = getattr(modeling_auto, f"MODEL_{task}_MAPPING_NAMES" if task else "MODEL_MAPPING_NAMES", {})
                fresh = {model_type: classes for model_type, classes in mapping.items() if not which or model_type not in types}
                for model_type, classes in fresh.items():
                    for name in (classes,) if isinstance(classes, str) else classes:
                        if name not in names:
                            found.append(Architecture(kind, model_type, name))
                            names.add(name)
                types |= set(mapping)
    return found
