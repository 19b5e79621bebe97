"""Published architecture numbers -> transformers configs -> captured graphs, one cache per process.

A row of the shared files names its model in prose (``BERT-large``, ``ViT-base/16``) and gives a
few numbers (``layers``, ``hidden``, ...). The model type is the longest transformers model type
inside the name; the numbers go to whatever attribute the type has for them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from benchmarks.ipu_rows import Row, UnjudgeableRowError
from ipu_pipeline.capture import capture
from ipu_pipeline.capture.from_config import TASKS, from_config, model_builder
from ipu_pipeline.capture.leaves import Granularity
from ipu_pipeline.errors import CaptureError
from ipu_pipeline.ir.graph import BlockGraph

# Spellings of published rows that do not contain the transformers model type.
_ALIASES = {"nanogpt": "gpt2", "mae": "vit_mae", "xlmr": "xlm-roberta"}
# Names whose training is not that of the model they mention, with the reason.
_OTHER_MODELS = {
    "wideresnet": "wide ResNet: no such architecture in transformers",
    "resnext": "ResNeXt: no such architecture in transformers",
    "dino": "DINO trains a student and a teacher on 8-10 crops: not the plain ViT of transformers",
    "dalle": "DALL-E: no such architecture in transformers",
    "gpt3": "GPT-3: no such architecture in transformers",
}
# Number of a row -> attributes that hold it in one config class or another.
_ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers"),
    "decoder_layers": ("num_decoder_layers", "decoder_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
              "decoder_attention_heads"),
    "ffn": ("intermediate_size", "n_inner", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim",
            "hidden_dim"),
    "dim_head": ("d_kv", "head_dim"),
    "vocab": ("vocab_size",),
    "image": ("image_size",),
    "patch": ("patch_size",),
    "num_labels": ("num_labels",),
    "depths": ("depths",),
    "dims": ("hidden_sizes",),
    "embed_dim": ("embed_dim",),
    "window": ("window_size",),
    "l_layers": ("l_layers",),
    "x_layers": ("x_layers",),
    "r_layers": ("r_layers",),
    "visual_feat_dim": ("visual_feat_dim",),
}  # fmt: skip
# Sizes of well-known names, for rows that give a name only. Sources: the models' papers.
_NAMED: Mapping[str, Mapping[str, int]] = {
    "mt5-small": {"layers": 8, "decoder_layers": 8, "hidden": 512, "heads": 6, "dim_head": 64,
                  "ffn": 1024, "vocab": 250112},
    "mt5-base": {"layers": 12, "decoder_layers": 12, "hidden": 768, "heads": 12, "dim_head": 64,
                 "ffn": 2048, "vocab": 250112},
    "t5-small": {"layers": 6, "decoder_layers": 6, "hidden": 512, "heads": 8, "dim_head": 64,
                 "ffn": 2048, "vocab": 32128},
    "t5-base": {"layers": 12, "decoder_layers": 12, "hidden": 768, "heads": 12, "dim_head": 64,
                "ffn": 3072, "vocab": 32128},
    "t5-large": {"layers": 24, "decoder_layers": 24, "hidden": 1024, "heads": 16, "dim_head": 64,
                 "ffn": 4096, "vocab": 32128},
    "bart-base": {"layers": 6, "decoder_layers": 6, "hidden": 768, "heads": 12, "ffn": 3072},
    "bart-large": {"layers": 12, "decoder_layers": 12, "hidden": 1024, "heads": 16, "ffn": 4096},
    "distilbert": {"layers": 6, "hidden": 768, "heads": 12, "ffn": 3072},
    "whisper-tiny": {"layers": 4, "decoder_layers": 4, "hidden": 384, "heads": 6, "ffn": 1536},
    "whisper-base": {"layers": 6, "decoder_layers": 6, "hidden": 512, "heads": 8, "ffn": 2048},
    "whisper-small": {"layers": 12, "decoder_layers": 12, "hidden": 768, "heads": 12, "ffn": 3072},
    "whisper-medium": {"layers": 24, "decoder_layers": 24, "hidden": 1024, "heads": 16,
                       "ffn": 4096},
    "whisper-large": {"layers": 32, "decoder_layers": 32, "hidden": 1280, "heads": 20,
                      "ffn": 5120},
    "gpt2-medium": {"layers": 24, "hidden": 1024, "heads": 16, "ffn": 4096},
    "gpt2-large": {"layers": 36, "hidden": 1280, "heads": 20, "ffn": 5120},
    "gpt2-xl": {"layers": 48, "hidden": 1600, "heads": 25, "ffn": 6400},
}  # fmt: skip
# transformer bodies that published names call base, large, ...: layers, hidden, heads, ffn.
_BODIES = {
    "tiny": (12, 192, 3, 768), "small": (12, 384, 6, 1536), "base": (12, 768, 12, 3072),
    "large": (24, 1024, 16, 4096),
}  # fmt: skip
# mT5's output projection is not its embedding (Xue et al., mT5, NAACL 2021, section 3.1: T5 1.1).
# DeBERTa's published models attend to relative positions (He et al., ICLR 2021, section 3.1).
_FIXED: Mapping[str, Mapping[str, Any]] = {
    "mt5": {"tie_word_embeddings": False},
    "deberta": {
        "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False,
    },
}  # fmt: skip
# Choices drawn outside the graph (a numpy mask, a skipped layer), which capture refuses.
_STILL: Mapping[str, Any] = {
    "apply_spec_augment": False, "layerdrop": 0.0, "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
}  # fmt: skip
_ANY_TASK = (
    "question-answering", "seq2seq-lm", "causal-lm", "image-classification",
    "visual-question-answering", "speech-seq2seq", "audio-classification", "ctc", "masked-lm",
)  # fmt: skip
_TASK_WORDS = (
    ("vqa", "visual-question-answering"), ("gqa", "visual-question-answering"),
    ("squad", "question-answering"), ("question", "question-answering"), ("mlm", "masked-lm"),
    ("masked", "masked-lm"), ("causal", "causal-lm"), ("image classification",
    "image-classification"), ("imagenet", "image-classification"), ("translation", "seq2seq-lm"),
    ("summari", "seq2seq-lm"), ("seq2seq", "seq2seq-lm"), ("asr", "ctc"), ("ctc", "ctc"),
    ("pretraining", "masked-lm"), ("classification", "sequence-classification"),
    ("token", "token-classification"), ("swag", "multiple-choice"),
)  # fmt: skip
# graphcore/examples trains ViT with these (vision/vit/pytorch/configs.yml), and its feed-forward
# has a dropout after the activation, too (models/modules.py, class Mlp). transformers' default is
# 0, which the optimum-graphcore runs use.
_EXAMPLES_DROPOUT: Mapping[str, Mapping[str, float]] = {
    "vit": {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
}
DEFAULT_SEQ_LENGTH = 128


@dataclass(frozen=True)
class Architecture:
    """What is captured for a row.

    Attributes:
        model_type: transformers model type.
        task: One of ``capture.from_config.TASKS``.
        numbers: Config attributes, sorted.
        batch_size: Micro batch.
        seq_length: Tokens of a sequence.
        head_tokens: Tokens of a sequence that reach the output head; 0 for all of them.
        granularity: ``layer``, or ``sublayer`` where attention and feed-forward are placed alone.
    """

    model_type: str
    task: str
    numbers: tuple[tuple[str, Any], ...]
    batch_size: int
    seq_length: int
    head_tokens: int = 0
    granularity: Granularity = "layer"


def architecture(row: Row) -> Architecture:
    """Return what to capture for ``row``.

    Raises:
        UnjudgeableRowError: transformers has no such model, or the row is too incomplete.
    """
    model_type = _model_type(row.model)
    config = AutoConfig.for_model(model_type)
    numbers = _numbers(config, {**_named(row.model, model_type), **row.arch})
    numbers.update({key: value for key, value in _STILL.items() if hasattr(config, key)})
    if row.framework.startswith("PyTorch"):
        numbers.update(_EXAMPLES_DROPOUT.get(model_type, {}))
    config = AutoConfig.for_model(model_type, **numbers)
    task = _task(row, config)
    seq_length = int(row.arch.get("seq_len") or row.seq_length or DEFAULT_SEQ_LENGTH)
    return Architecture(
        model_type=model_type,
        task=task,
        numbers=tuple(sorted((key, _frozen(value)) for key, value in numbers.items())),
        batch_size=row.micro_batch,
        seq_length=seq_length,
        head_tokens=_head_tokens(row, task, seq_length),
        granularity="sublayer" if row.att_ffn_placement else "layer",
    )


@cache
def capture_architecture(wanted: Architecture) -> BlockGraph:
    """Return the block graph, on the meta device.

    Published BERT pretraining applies its output head to the masked tokens only
    (``mask_tokens``): head and loss then come from a capture of that many tokens.

    Raises:
        UnjudgeableRowError: The model cannot be built or captured.
    """
    graph = _capture(wanted)
    if not wanted.head_tokens:
        return graph
    short = _capture(replace(wanted, seq_length=wanted.head_tokens, head_tokens=0))
    return with_head_of(graph, short)


def with_head_of(graph: BlockGraph, other: BlockGraph) -> BlockGraph:
    """Return ``graph`` with the head and loss blocks of ``other`` and what these produce."""
    heads = {block.name for block in other.blocks if block.kind in ("head", "loss")}
    blocks = tuple(other[b.name] if b.name in heads else b for b in graph.blocks)
    tensors = tuple(
        other.tensor_by_name[t.name]
        if t.producer in heads and t.name in other.tensor_by_name
        else t
        for t in graph.tensors
    )
    return replace(graph, blocks=blocks, tensors=tensors)


@cache
def _capture(wanted: Architecture) -> BlockGraph:
    try:
        config = _build_config(wanted)
        model, batch = from_config(
            config, wanted.task, batch_size=wanted.batch_size, seq_length=wanted.seq_length
        )
        if getattr(config, "hidden_dropout_prob", 0.0) and wanted.model_type in _EXAMPLES_DROPOUT:
            _drop_activations(model, config.hidden_dropout_prob)
        if wanted.model_type in _FIXED and config.is_encoder_decoder:
            _share_embeddings(model)
        return capture(model, batch, granularity=wanted.granularity).graph
    except (CaptureError, ValueError) as error:
        raise UnjudgeableRowError(f"{wanted.model_type} cannot be captured: {error}") from error


def _drop_activations(model: nn.Module, probability: float) -> None:
    for module in list(model.modules()):
        activation = dict(module.named_children()).get("activation_fn")
        if activation is not None:
            module.activation_fn = nn.Sequential(activation, nn.Dropout(probability))


def _share_embeddings(model: Any) -> None:
    """Let encoder and decoder look up one table; untying in transformers 5 unties this, too."""
    table = model.get_input_embeddings().weight
    for part in (model.get_encoder(), model.get_decoder()):
        part.embed_tokens.weight = table


def _build_config(wanted: Architecture) -> PretrainedConfig:
    numbers = {k: list(v) if isinstance(v, tuple) else v for k, v in wanted.numbers}
    config = AutoConfig.for_model(wanted.model_type, **numbers)
    for name, value in _FIXED.get(wanted.model_type, {}).items():
        setattr(config, name, value)  # transformers 5 ignores it as an argument
    config.architectures = config.architectures or []  # several classes for a task: the first
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    for name in ("max_position_embeddings", "n_positions"):
        limit = getattr(config, name, None)
        if isinstance(limit, int) and limit < wanted.seq_length + 2:
            setattr(config, name, wanted.seq_length + 2)
    return config


def _squeeze(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _model_type(name: str) -> str:
    squeezed = _squeeze(name)
    for word, reason in _OTHER_MODELS.items():
        if word in squeezed:
            raise UnjudgeableRowError(reason)
    for word, model_type in _ALIASES.items():
        if squeezed.startswith(word):
            return model_type
    known = {_squeeze(model_type): model_type for model_type in CONFIG_MAPPING}
    found = [key for key in known if key in squeezed]
    if not found:
        raise UnjudgeableRowError(f"no transformers model type in the name {name!r}")
    return known[max(found, key=len)]


def _named(name: str, model_type: str) -> dict[str, int]:
    lowered = name.lower().strip()
    for known, numbers in _NAMED.items():
        if lowered.startswith(known):
            return dict(numbers)
    match = re.search(r"(\d+)\s*l\s*(\d+)\s*h", lowered)
    if match is not None:
        layers, hidden = int(match[1]), int(match[2])
        return {"layers": layers, "hidden": hidden, "heads": max(1, hidden // 64),
                "ffn": 4 * hidden}  # fmt: skip
    body = next((word for word in _BODIES if word in lowered), None)
    if body is None or model_type in ("swin", "convnext", "clip"):
        return {}
    return dict(zip(("layers", "hidden", "heads", "ffn"), _BODIES[body], strict=True))


def _numbers(config: PretrainedConfig, arch: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, attributes in _ATTRIBUTES.items():
        value = arch.get(key)
        if value is None:
            continue
        for attribute in attributes:
            if hasattr(config, attribute) and attribute not in config.attribute_map:
                found[attribute] = value
    if "layers" in arch and "decoder_layers" not in arch:
        for attribute in _ATTRIBUTES["decoder_layers"]:
            if config.is_encoder_decoder and hasattr(config, attribute):
                found[attribute] = arch["layers"]
    if isinstance(arch.get("heads"), (list, tuple)):
        found["num_heads"] = list(arch["heads"])
        found.pop("num_attention_heads", None)
    return found


def _task(row: Row, config: PretrainedConfig) -> str:
    words = row.task.lower()
    named = [task for word, task in _TASK_WORDS if word in words]
    for task in [*named, *_usual_tasks(config)]:
        if task in TASKS and _has_class(config, task):
            return task
    raise UnjudgeableRowError(f"transformers trains no {config.model_type} for {row.task!r}")


def _usual_tasks(config: PretrainedConfig) -> tuple[str, ...]:
    """What a model without a named task is for: a decoder writes, an encoder answers."""
    if config.is_encoder_decoder:
        return ("seq2seq-lm", "speech-seq2seq", *_ANY_TASK)
    if _has_class(config, "causal-lm") and not _has_class(config, "masked-lm"):
        return ("causal-lm", *_ANY_TASK)
    return _ANY_TASK


def _has_class(config: PretrainedConfig, task: str) -> bool:
    try:
        model_builder(config, task)
    except CaptureError:
        return False
    return True


def _head_tokens(row: Row, task: str, seq_length: int) -> int:
    """Masked tokens that reach the head: published, else the usual 15 % of a sequence."""
    if task != "masked-lm" or "pretraining" not in row.task.lower():
        return 0
    return row.mask_tokens or -(-seq_length * 15 // 100)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
