"""The models that predicted stage times are judged on: a step takes 0.3 to 2 s on one core."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from torch import Tensor, nn

from ipu_pipeline.capture.from_config import from_config


@dataclass(frozen=True)
class StageModel:
    """A config and the microbatch that it is trained with; dropout is as published.

    Attributes:
        make: Config class.
        task: Task name.
        options: Arguments of the config class.
        micro_batch: Samples of a microbatch.
        seq_length: Tokens of a sample.
    """

    make: type[transformers.PretrainedConfig]
    task: str
    options: Mapping[str, Any]
    micro_batch: int
    seq_length: int

    def build(self) -> tuple[nn.Module, dict[str, Tensor]]:
        """Return the model in training mode and one microbatch."""
        return from_config(
            self.make(**self.options),
            self.task,
            batch_size=self.micro_batch,
            seq_length=self.seq_length,
            device="cpu",
        )


# Class, task, sizes, micro batch and sequence length.
MODELS: dict[str, StageModel] = {
    "bert": StageModel(transformers.BertConfig, "question-answering",
        {"vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6,
         "intermediate_size": 1536},
        micro_batch=2, seq_length=384),
    "bert-wide": StageModel(transformers.BertConfig, "masked-lm",
        {"vocab_size": 8192, "hidden_size": 768, "num_hidden_layers": 4, "num_attention_heads": 12,
         "intermediate_size": 3072},
        micro_batch=2, seq_length=128),
    "gpt2": StageModel(transformers.GPT2Config, "causal-lm",
        {"vocab_size": 16384, "n_embd": 512, "n_layer": 6, "n_head": 8, "bos_token_id": 1,
         "eos_token_id": 2, "pad_token_id": 0},
        micro_batch=2, seq_length=128),
    "t5": StageModel(transformers.T5Config, "seq2seq-lm",
        {"vocab_size": 8192, "d_model": 384, "d_kv": 64, "d_ff": 1024, "num_layers": 4,
         "num_heads": 6, "decoder_start_token_id": 0},
        micro_batch=4, seq_length=128),
    "vit": StageModel(transformers.ViTConfig, "image-classification",
        {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6,
         "intermediate_size": 1536, "image_size": 224, "num_labels": 100},
        micro_batch=4, seq_length=4),
    "llama": StageModel(transformers.LlamaConfig, "causal-lm",
        {"vocab_size": 16000, "hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8,
         "num_key_value_heads": 4, "intermediate_size": 1408, "pad_token_id": 0},
        micro_batch=2, seq_length=256),
    "lxmert": StageModel(transformers.LxmertConfig, "visual-question-answering",
        {"vocab_size": 30522, "hidden_size": 384, "num_attention_heads": 6,
         "intermediate_size": 1536, "num_qa_labels": 100, "l_layers": 4, "x_layers": 2,
         "r_layers": 2, "task_matched": False, "task_mask_lm": False, "task_obj_predict": False},
        micro_batch=4, seq_length=64),
}  # fmt: skip
