"""A tiny model compiled for the stand-in, and the same model trained by the local target."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import ipu_pipeline as ipp
from ipu_pipeline.backends.ipu.config import IPUConfig
from ipu_pipeline.backends.ipu.executable import PopTorchExecutable
from ipu_pipeline.ir.plan import Plan
from tests.tiny_models import HIDDEN, TINY, VOCAB, TinyModel

Batch = dict[str, Tensor]
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]

_SPEECH = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 2 * HIDDEN,
    "conv_dim": (8, 8),
    "conv_stride": (4, 2),
    "conv_kernel": (8, 4),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    # SpecAugment draws its mask with numpy on the host, which no device program can do.
    "apply_spec_augment": False,
    "num_labels": 5,
}
_SPEECH_NO_DROPOUT = {
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
    "layerdrop": 0.0,
}
_ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 2 * HIDDEN,
    "max_position_embeddings": 64,
}
_GPT = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": 4, "n_head": 4, "n_positions": 64}
_BART = {**TINY["bart"].options, "max_position_embeddings": 64}
_BART_NO_DROPOUT = TINY["bart"].no_dropout
MORE = {
    "distilbert": TinyModel(
        transformers.DistilBertConfig,
        "question-answering",
        {
            "vocab_size": VOCAB,
            "dim": HIDDEN,
            "n_layers": 4,
            "n_heads": 4,
            "hidden_dim": 2 * HIDDEN,
            "max_position_embeddings": 64,
        },
        {"dropout": 0.0, "attention_dropout": 0.0, "qa_dropout": 0.0},
    ),
    "hubert": TinyModel(
        transformers.HubertConfig, "audio-classification", _SPEECH, _SPEECH_NO_DROPOUT
    ),
    "wav2vec2": TinyModel(
        transformers.Wav2Vec2Config, "audio-classification", _SPEECH, _SPEECH_NO_DROPOUT
    ),
    # The sum over labels, its default, diverges at the learning rate of the others.
    "wav2vec2-ctc": TinyModel(
        transformers.Wav2Vec2Config,
        "ctc",
        {**_SPEECH, "ctc_loss_reduction": "mean"},
        _SPEECH_NO_DROPOUT,
    ),
    "gptj": TinyModel(
        transformers.GPTJConfig,
        "causal-lm",
        {**_GPT, "rotary_dim": 4},
        {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "gpt-neox": TinyModel(transformers.GPTNeoXConfig, "causal-lm", _ENCODER, {}),
    "bloom": TinyModel(
        transformers.BloomConfig,
        "causal-lm",
        {"vocab_size": VOCAB, "hidden_size": HIDDEN, "n_layer": 4, "n_head": 4},
        {},
    ),
    "opt": TinyModel(
        transformers.OPTConfig,
        "causal-lm",
        {
            **{name: value for name, value in _ENCODER.items() if name != "intermediate_size"},
            "ffn_dim": 2 * HIDDEN,
            "word_embed_proj_dim": HIDDEN,
        },
        {"dropout": 0.0},
    ),
    "mpnet": TinyModel(
        transformers.MPNetConfig,
        "masked-lm",
        _ENCODER,
        {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    ),
    "mbart": TinyModel(transformers.MBartConfig, "seq2seq-lm", _BART, _BART_NO_DROPOUT),
    "pegasus": TinyModel(transformers.PegasusConfig, "seq2seq-lm", _BART, _BART_NO_DROPOUT),
}
# Without it, the loss looks for the labels that count by nonzero, which no device program has.
_NAMED_PROBLEM = {"problem_type": "single_label_classification"}
_DEBERTA = replace(TINY["deberta-v2"], options={**TINY["deberta-v2"].options, **_NAMED_PROBLEM})
ALL = {**TINY, **MORE, "deberta-v2": _DEBERTA}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Return plain SGD."""
    return torch.optim.SGD(model.parameters(), lr=0.05)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW whose eps keeps rounding noise of zero gradients from becoming steps."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3, weight_decay=0.01)


_PLANS: dict[str, Plan] = {}


@dataclass
class Case:
    """A tiny model, its plan for IPUs, and batches.

    Attributes:
        name: Of the tiny model.
        model: Without dropout.
        example: One microbatch.
        config: The IPU configuration.
        changes: Of the model's configuration.
        plan: For pod16.
    """

    name: str
    model: nn.Module
    example: Batch
    config: IPUConfig
    changes: dict[str, Any] = field(default_factory=dict)
    plan: Plan = field(init=False)

    def __post_init__(self) -> None:
        options = {"machine": "pod16", "config": self.config, "replicas": self.config.replicas()}
        self.plan = self._planned(self.model, options)

    def _planned(self, model: nn.Module, options: dict[str, Any]) -> Plan:
        """Plan once for all cases of the same model and options."""
        key = repr((self.name, self.changes, options))
        if key not in _PLANS:
            _PLANS[key] = ipp.plan(model, self.example, **options)
        return _PLANS[key]

    @property
    def copies(self) -> int:
        """Microbatches of one call of the device."""
        return self.plan.num_microbatches * self.plan.replicas * self.config.device_iterations

    def batch(self, seed: int = 1, copies: int | None = None) -> Batch:
        """Return ``copies`` microbatches whose samples differ."""
        count = 2 * (copies or self.copies)
        return _tiny(self.name, self.changes).batch(batch_size=count, seed=seed)

    def compile(self, make: MakeOptimizer | None = sgd, **options: Any) -> PopTorchExecutable:
        """Compile the model for the stand-in, which must be installed."""
        executable = ipp.compile(
            self.model,
            self.plan,
            target="poptorch",
            optimizer=make(self.model) if make else None,
            ipu_config=self.config,
            **options,
        )
        assert isinstance(executable, PopTorchExecutable)
        return executable

    def local(self, make: MakeOptimizer | None = sgd, **options: Any) -> Any:
        """Compile a copy of the model for the local target, on one stage."""
        model = copy.deepcopy(self.model)
        copies = self.plan.num_microbatches * self.plan.replicas
        plan = self._planned(model, {"num_stages": 1, "microbatches": copies})
        optimizer = make(model) if make else None
        # The device takes the mean of its microbatches' means.
        options = {"loss_weights": "samples", **options}
        return ipp.compile(model, plan, optimizer=optimizer, self_check=False, **options)


def case(
    name: str = "bert-qa",
    *,
    layers: tuple[int, ...] = (2, 2),
    changes: dict[str, Any] | None = None,
    **config: Any,
) -> Case:
    """Build a tiny model and plan it for IPUs."""
    settings: dict[str, Any] = {"gradient_accumulation_steps": 4, "output_mode": "all", **config}
    model, example = _tiny(name, changes or {}).build()
    return Case(name, model, example, IPUConfig(layers_per_ipu=layers, **settings), changes or {})


def _tiny(name: str, changes: dict[str, Any]) -> TinyModel:
    return replace(ALL[name], options={**ALL[name].options, **changes})


def sessions_of(device: PopTorchExecutable) -> Any:
    """Return the programs of a worker that runs in a thread of this process."""
    return device._worker._process.server.sessions  # type: ignore[attr-defined]


def assert_same_weights(left: nn.Module, right: nn.Module, tolerance: float = 1e-6) -> None:
    """Compare state dicts entry by entry: absolutely, and relatively above 1."""
    ours, theirs = left.state_dict(), right.state_dict()
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        torch.testing.assert_close(
            value.detach().as_subclass(Tensor),
            theirs[name].detach(),
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, n=name: f"{n}: {text}",
        )
