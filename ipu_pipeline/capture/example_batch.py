"""A batch that a model accepts for a task, labels included.

Which inputs there are is read from the model's ``forward``; their sizes from its config. Values
are seeded, stay in valid ranges, and every second sequence is padded (its mask is 0 at the end).

Axes: B batch, L sequence, N choices, C channels, H height, W width, R regions, T frames.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ipu_pipeline.errors import CaptureError
from ipu_pipeline.ir.limits import check_count, check_elements

IGNORED_LABEL = -100
MASKED_SHARE = 0.15  # Devlin et al., BERT, NAACL 2019, section 3.1
NUM_CHOICES = 2
SENTENCE_ORDER_LABEL = "sentence_order_label"  # ALBERT's; the other one is BERT's
PAIR_LABELS = ("next_sentence_label", SENTENCE_ORDER_LABEL)
NUM_REGIONS = 36  # image regions of the published LXMERT features
_SPECIAL_IDS = (
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "sep_token_id",
    "cls_token_id",
    "mask_token_id",
    "decoder_start_token_id",
)


@dataclass(frozen=True)
class BatchSize:
    """Samples and tokens of a batch.

    Raises:
        ValueError: A size is below 1 sample or 4 tokens, or above the limits.
    """

    batch_size: int = 1
    seq_length: int = 128

    def __post_init__(self) -> None:
        check_count("batch_size", self.batch_size, "micro_batch")
        check_count("seq_length", self.seq_length, least=4)
        check_elements(self.batch_size, self.seq_length)


@dataclass(frozen=True)
class _Draft:
    """What the builders share: the model, the sizes, and one generator."""

    model: nn.Module
    size: BatchSize
    generator: torch.Generator

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def text_config(self) -> Any:
        return self.config.get_text_config(decoder=self.config.is_encoder_decoder or None)

    def accepts(self, name: str) -> bool:
        return name in inspect.signature(self.model.forward).parameters

    def integers(self, low: int, high: int, shape: tuple[int, ...]) -> Tensor:
        check_elements(*shape)
        return torch.randint(low, max(high, low + 1), shape, generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        check_elements(*shape)
        return torch.randn(shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        check_elements(*shape)
        return torch.rand(shape, generator=self.generator)

    def mask(self) -> Tensor:
        """Return the (B, L) mask, 0 for padding; with several rows, even ones have none."""
        rows, length = self.size.batch_size, self.size.seq_length
        padded = length - max(1, length // 4)
        valid = [length if rows > 1 and row % 2 == 0 else padded for row in range(rows)]
        return (torch.arange(length) < torch.tensor(valid)[:, None]).long()


def example_batch(
    model: nn.Module, task: str, size: BatchSize, *, device: str = "cpu", seed: int = 0
) -> dict[str, Tensor]:
    """Return keyword arguments for ``model.forward`` that give a loss.

    Args:
        model: A transformers model for ``task``.
        task: Name of the task, see ``from_config.TASKS``.
        size: Samples and tokens.
        device: ``meta`` for shapes only.
        seed: Seed of every value.

    Raises:
        CaptureError: Unknown task, or the model takes inputs that no builder makes.
        ValueError: The sequence is longer than the model's positions.
    """
    if task not in _BUILDERS:
        raise CaptureError(f"no example batch for task {task!r}; known: {', '.join(_BUILDERS)}")
    draft = _Draft(model, size, torch.Generator().manual_seed(seed))
    shifts = hasattr(model, "_shift_right") or draft.config.model_type == "encoder-decoder"
    if shifts and draft.accepts("decoder_input_ids") and _start_id(draft) is None:
        raise CaptureError(
            f"the config of this {draft.config.model_type} model has no decoder_start_token_id, "
            "with which the decoder's input begins; set config.decoder_start_token_id (of T5 it is "
            "pad_token_id, 0)"
        )
    batch = _BUILDERS[task](draft)
    return {name: value.to(device) for name, value in batch.items()}


# ---------------------------------------------------------------- inputs


def _text_inputs(draft: _Draft) -> dict[str, Tensor]:
    """Token ids, mask and (where the model has them) token types, each (B, L)."""
    _check_length(draft)
    mask = draft.mask()
    pad = _pad_id(draft)
    if pad is None and _pools_last_token(draft):
        raise CaptureError(
            f"{type(draft.model).__name__} finds the last token by pad_token_id, and its config "
            "has none; set config.pad_token_id"
        )
    tokens = _token_ids(draft, mask)
    inputs = {"input_ids": tokens, "attention_mask": mask}
    if draft.accepts("token_type_ids") and getattr(draft.config, "type_vocab_size", 0) > 1:
        second = torch.arange(draft.size.seq_length) >= draft.size.seq_length // 2
        inputs["token_type_ids"] = second.long() * mask
    return inputs


def _token_ids(draft: _Draft, mask: Tensor) -> Tensor:
    """Draw ordinary ids; pad where the mask is 0; end rows of encoder-decoders with eos."""
    vocab = draft.text_config.vocab_size
    held = [getattr(draft.config, name, None) for name in _SPECIAL_IDS]
    named = {index for one in held for index in (one if isinstance(one, list) else [one])}
    special = sorted(int(one) for one in named if isinstance(one, int) and 0 <= one < vocab)
    tokens = draft.integers(0, max(vocab - len(special), 1), tuple(mask.shape))
    for index in special if len(special) < vocab else ():  # the n-th of the ordinary ones
        tokens = tokens + (tokens >= index)
    eos = getattr(draft.config, "eos_token_id", None)
    if draft.config.is_encoder_decoder and isinstance(eos, int) and 0 <= eos < vocab:
        tokens[torch.arange(len(mask)), mask.sum(dim=-1) - 1] = eos
    return tokens.masked_fill(mask == 0, _pad_id(draft) or 0)


def _pad_id(draft: _Draft) -> int | None:
    pad = getattr(draft.text_config, "pad_token_id", None)
    return pad if isinstance(pad, int) and 0 <= pad < draft.text_config.vocab_size else None


def _pools_last_token(draft: _Draft) -> bool:
    decoder_only = not draft.config.is_encoder_decoder
    name = type(draft.model).__name__
    return decoder_only and "ForSequenceClassification" in name and draft.accepts("past_key_values")


def _check_length(draft: _Draft) -> None:
    speech = getattr(draft.text_config, "max_target_positions", None)
    limit = getattr(draft.text_config, "max_position_embeddings", speech)
    offset = _position_offset(draft.model)
    if isinstance(limit, int) and limit >= 0 and draft.size.seq_length > limit - offset:
        raise ValueError(
            f"seq_length {draft.size.seq_length} is longer than the {limit - offset} positions of "
            f"this {draft.config.model_type} model; use at most {limit - offset}"
        )


def _position_offset(model: nn.Module) -> int:
    """Positions that RoBERTa-like models keep for padding: they count from padding_idx + 1."""
    for name, module in model.named_modules():
        if name.endswith("embeddings.position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


def _image_inputs(draft: _Draft) -> dict[str, Tensor]:
    """Pixels (B, C, H, W) of the size that the config says."""
    config = getattr(draft.config, "vision_config", None) or draft.config
    height_width = getattr(config, "image_size", 224)
    if isinstance(height_width, int):
        height_width = (height_width, height_width)
    channels = getattr(config, "num_channels", 3)
    return {"pixel_values": draft.normal(draft.size.batch_size, channels, *height_width)}


def _audio_inputs(draft: _Draft) -> dict[str, Tensor]:
    """A spectrogram (B, C, T) or (B, T, C), or a waveform (B, samples)."""
    rows, config = draft.size.batch_size, draft.config
    if draft.accepts("input_values"):  # the convolutions make about seq_length frames of it
        samples = prod(getattr(config, "conv_stride", (1,))) * (draft.size.seq_length + 1)
        return {"input_values": draft.normal(rows, samples)}
    if hasattr(config, "num_mel_bins"):
        frames = 2 * config.max_source_positions  # the encoder's convolution halves them
        return {"input_features": draft.normal(rows, config.num_mel_bins, frames)}
    if hasattr(config, "input_feat_per_channel"):
        features = config.input_feat_per_channel * config.input_channels
        return {"input_features": draft.normal(rows, 4 * draft.size.seq_length, features)}
    raise CaptureError(
        f"cannot tell the audio input of {type(draft.model).__name__}: its config has neither "
        "num_mel_bins nor input_feat_per_channel; pass your own example batch"
    )


# ---------------------------------------------------------------- labels


def _question_answering(draft: _Draft) -> dict[str, Tensor]:
    if not draft.accepts("start_positions"):
        return _visual_question_answering(draft)
    inputs = _text_inputs(draft)
    lengths = inputs["attention_mask"].sum(dim=-1)
    start = (draft.uniform(len(lengths)) * (lengths - 1)).long()
    return {**inputs, "start_positions": start, "end_positions": start + 1}


def _masked_lm(draft: _Draft) -> dict[str, Tensor]:
    inputs = _text_inputs(draft)
    chosen = draft.uniform(*inputs["input_ids"].shape) < MASKED_SHARE
    chosen[:, 1] = True  # no row without a loss
    chosen &= inputs["attention_mask"] == 1
    labels = inputs["input_ids"].masked_fill(~chosen, IGNORED_LABEL)
    mask_id = getattr(draft.config, "mask_token_id", None)
    hidden = mask_id if isinstance(mask_id, int) else min(3, draft.text_config.vocab_size - 1)
    tokens = inputs["input_ids"].masked_fill(chosen, hidden)
    return {**inputs, "input_ids": tokens, "labels": labels}


def _pretraining(draft: _Draft) -> dict[str, Tensor]:
    """Masked tokens, and whether two segments follow each other."""
    label = pair_label(draft.model)
    if label is None:
        raise CaptureError(
            f"{type(draft.model).__name__} learns nothing about pairs of sentences (its forward "
            f"has none of {', '.join(PAIR_LABELS)}); use another task that it has, or plan it in "
            "Python with a batch of your own"
        )
    return {**_masked_lm(draft), label: draft.integers(0, 2, (draft.size.batch_size,))}


def pair_label(model: nn.Module | type[nn.Module]) -> str | None:
    """Return what ``model`` calls its label of a pair of sentences; ``None`` if it has none."""
    accepted = inspect.signature(model.forward).parameters
    return next((name for name in PAIR_LABELS if name in accepted), None)


def _causal_lm(draft: _Draft) -> dict[str, Tensor]:
    inputs = _text_inputs(draft)
    inputs.pop("token_type_ids", None)
    return {**inputs, "labels": _token_labels(inputs["input_ids"], inputs["attention_mask"])}


def _token_labels(tokens: Tensor, mask: Tensor) -> Tensor:
    return tokens.masked_fill(mask == 0, IGNORED_LABEL)


def _seq2seq_lm(draft: _Draft) -> dict[str, Tensor]:
    inputs = _text_inputs(draft)
    target = _token_ids(draft, inputs["attention_mask"])
    batch = {**inputs, "labels": _token_labels(target, inputs["attention_mask"])}
    start = _start_id(draft)
    if start is not None:
        first = torch.full_like(target[:, :1], start)
        batch["decoder_input_ids"] = torch.cat([first, target[:, :-1]], dim=1)
    return batch


def _start_id(draft: _Draft) -> int | None:
    """Return the id with which the input of a decoder begins, if the config says one."""
    configs = (draft.text_config, draft.config)
    ids = (getattr(config, "decoder_start_token_id", None) for config in configs)
    return next((one for one in ids if isinstance(one, int)), None)


def _classification(
    inputs: Callable[[_Draft], dict[str, Tensor]],
) -> Callable[[_Draft], dict[str, Tensor]]:
    return lambda draft: {**inputs(draft), "labels": _class_labels(draft)}


def _class_labels(draft: _Draft) -> Tensor:
    """One class per sample (B,); a number per sample where there is a single output."""
    if draft.config.num_labels == 1:
        return draft.normal(draft.size.batch_size)
    return draft.integers(0, draft.config.num_labels, (draft.size.batch_size,))


def _token_classification(draft: _Draft) -> dict[str, Tensor]:
    inputs = _text_inputs(draft)
    labels = draft.integers(0, draft.config.num_labels, tuple(inputs["input_ids"].shape))
    return {**inputs, "labels": _token_labels(labels, inputs["attention_mask"])}


def _multiple_choice(draft: _Draft) -> dict[str, Tensor]:
    """Every input gets an axis of N choices: (B, N, L)."""
    rows, length = draft.size.batch_size, draft.size.seq_length
    wide = _Draft(draft.model, BatchSize(rows * NUM_CHOICES, length), draft.generator)
    inputs = {
        name: value.view(rows, NUM_CHOICES, length) for name, value in _text_inputs(wide).items()
    }
    return {**inputs, "labels": draft.integers(0, NUM_CHOICES, (rows,))}


def _visual_question_answering(draft: _Draft) -> dict[str, Tensor]:
    inputs = _text_inputs(draft)
    rows, config = draft.size.batch_size, draft.config
    if draft.accepts("visual_feats"):
        features = draft.normal(rows, NUM_REGIONS, config.visual_feat_dim)
        positions = draft.uniform(rows, NUM_REGIONS, config.visual_pos_dim)
        labels = draft.integers(0, config.num_qa_labels, (rows,))
        return {**inputs, "visual_feats": features, "visual_pos": positions, "labels": labels}
    if not draft.accepts("pixel_values"):
        raise CaptureError(
            f"{type(draft.model).__name__} takes neither visual_feats nor pixel_values; pass your "
            "own example batch"
        )
    answers = draft.uniform(rows, config.num_labels)
    return {**inputs, **_image_inputs(draft), "labels": answers}


def _speech_seq2seq(draft: _Draft) -> dict[str, Tensor]:
    _check_length(draft)
    mask = draft.mask()
    labels = _token_labels(_token_ids(draft, mask), mask)
    return {**_audio_inputs(draft), "labels": labels}


def _ctc(draft: _Draft) -> dict[str, Tensor]:
    num_labels = max(1, draft.size.seq_length // 4)  # CTC needs fewer labels than frames
    labels = draft.integers(1, draft.config.vocab_size, (draft.size.batch_size, num_labels))
    return {**_audio_inputs(draft), "labels": labels}


_BUILDERS: Mapping[str, Callable[[_Draft], dict[str, Tensor]]] = {
    "question-answering": _question_answering,
    "masked-lm": _masked_lm,
    "pretraining": _pretraining,
    "causal-lm": _causal_lm,
    "seq2seq-lm": _seq2seq_lm,
    "sequence-classification": _classification(_text_inputs),
    "token-classification": _token_classification,
    "multiple-choice": _multiple_choice,
    "image-classification": _classification(_image_inputs),
    "visual-question-answering": _visual_question_answering,
    "speech-seq2seq": _speech_seq2seq,
    "ctc": _ctc,
    "audio-classification": _classification(_audio_inputs),
}
