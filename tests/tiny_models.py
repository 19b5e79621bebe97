"""Tiny transformers configs, one per architecture that the project promises to handle.

``TINY["bert-qa"]`` is a :class:`TinyModel`; ``build()`` gives the model and a batch on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers
from torch import Tensor, nn

from ipu_pipeline.capture.from_config import from_config

HIDDEN, HEADS, LAYERS, VOCAB = 32, 4, 4, 99
_ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 2 * HIDDEN,
    "max_position_embeddings": 64,
}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_BART_LIKE = {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "encoder_layers": LAYERS // 2,
    "decoder_layers": LAYERS // 2,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 2 * HIDDEN,
    "decoder_ffn_dim": 2 * HIDDEN,
}
_BART_NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
_GPT2_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_LLAMA_LIKE = {**_ENCODER, "num_key_value_heads": 2, "pad_token_id": 0}


@dataclass(frozen=True)
class TinyModel:
    """A small config and the task it is trained for.

    Attributes:
        make: Config class.
        task: Task name.
        options: Arguments of the config class.
        no_dropout: Arguments that switch every dropout off.
    """

    make: Callable[..., transformers.PretrainedConfig]
    task: str
    options: dict[str, Any]
    no_dropout: dict[str, Any]

    def config(self, *, dropout: bool = False, **changes: Any) -> transformers.PretrainedConfig:
        """Return the config, without dropout unless it is asked for."""
        return self.make(**{**self.options, **({} if dropout else self.no_dropout), **changes})

    def build(
        self,
        *,
        batch_size: int = 2,
        seq_length: int = 16,
        device: str = "cpu",
        seed: int = 0,
        dropout: bool = False,
    ) -> tuple[nn.Module, dict[str, Tensor]]:
        """Return the model in training mode and a batch with labels."""
        return from_config(
            self.config(dropout=dropout),
            self.task,
            batch_size=batch_size,
            seq_length=seq_length,
            device=device,
            seed=seed,
        )

    def batch(
        self, *, batch_size: int = 2, seq_length: int = 16, seed: int = 0
    ) -> dict[str, Tensor]:
        """Return the batch that ``build`` gives; of equal arguments the model is built once."""
        key = f"{self} {batch_size} {seq_length} {seed}"
        if key not in _BATCHES:
            sizes = {"batch_size": batch_size, "seq_length": seq_length}
            _BATCHES[key] = self.build(**sizes, seed=seed)[1]
        return {name: tensor.clone() for name, tensor in _BATCHES[key].items()}


_BATCHES: dict[str, dict[str, Tensor]] = {}

TINY: dict[str, TinyModel] = {
    "bert-qa": TinyModel(transformers.BertConfig, "question-answering", _ENCODER, _NO_DROPOUT),
    "bert-mlm": TinyModel(transformers.BertConfig, "masked-lm", _ENCODER, _NO_DROPOUT),
    "lxmert-qa": TinyModel(
        transformers.LxmertConfig,
        "visual-question-answering",
        {
            **{key: value for key, value in _ENCODER.items() if key != "num_hidden_layers"},
            "num_qa_labels": 7,
            "l_layers": 2,
            "x_layers": 2,
            "r_layers": 2,
            "visual_feat_dim": 24,
            "task_matched": False,
            "task_mask_lm": False,
            "task_obj_predict": False,
        },
        _NO_DROPOUT,
    ),
    "gpt2-lm": TinyModel(
        transformers.GPT2Config,
        "causal-lm",
        {
            "vocab_size": VOCAB,
            "n_embd": HIDDEN,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        _GPT2_NO_DROPOUT,
    ),
    "t5": TinyModel(
        transformers.T5Config,
        "seq2seq-lm",
        {
            "vocab_size": VOCAB,
            "d_model": HIDDEN,
            "d_kv": HIDDEN // HEADS,
            "d_ff": 2 * HIDDEN,
            "num_layers": LAYERS // 2,
            "num_heads": HEADS,
            "decoder_start_token_id": 0,
        },
        {"dropout_rate": 0.0},
    ),
    "bart": TinyModel(
        transformers.BartConfig,
        "seq2seq-lm",
        {**_BART_LIKE, "max_position_embeddings": 64},
        _BART_NO_DROPOUT,
    ),
    "vit": TinyModel(
        transformers.ViTConfig,
        "image-classification",
        {
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "intermediate_size": 2 * HIDDEN,
            "image_size": 16,
            "patch_size": 4,
            "num_labels": 5,
        },
        _NO_DROPOUT,
    ),
    "roberta": TinyModel(
        transformers.RobertaConfig, "sequence-classification", _ENCODER, _NO_DROPOUT
    ),
    "deberta-v2": TinyModel(
        transformers.DebertaV2Config,
        "sequence-classification",
        {
            **_ENCODER,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
        },
        {**_NO_DROPOUT, "pooler_dropout": 0.0},
    ),
    "llama": TinyModel(transformers.LlamaConfig, "causal-lm", _LLAMA_LIKE, {}),
    "mixtral": TinyModel(
        transformers.MixtralConfig,
        "causal-lm",
        {**_LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2},
        {},
    ),
    "whisper": TinyModel(
        transformers.WhisperConfig,
        "speech-seq2seq",
        {
            **_BART_LIKE,
            "num_mel_bins": 8,
            "max_source_positions": 20,
            "max_target_positions": 40,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 3,
        },
        _BART_NO_DROPOUT,
    ),
    "convnext": TinyModel(
        transformers.ConvNextConfig,
        "image-classification",
        {
            "hidden_sizes": [8, 16, 16, 32],
            "depths": [1, 1, 2, 1],
            "num_stages": 4,
            "image_size": 32,
            "num_labels": 5,
        },
        {},
    ),
}
