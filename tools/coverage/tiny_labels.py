"""Labels by task and by what the forward takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ipu_pipeline.capture.example_batch import IGNORED_LABEL
from tools.coverage.tiny_draft import REGIONS, ROWS, Draft
from tools.coverage.tiny_text import FIRST_ORDINARY, LAST_ORDINARY

Labels = dict[str, Any]


def labels(draft: Draft) -> Labels:
    """Return the labels for the inputs of ``draft.batch``."""
    build = _BY_TASK.get(draft.task, _tokens)
    found = build(draft)
    return {name: value for name, value in found.items() if draft.accepts(name)}


def _tokens(draft: Draft) -> Labels:
    """Ids (B, L): the text itself, or for sound and images a text of its own."""
    ids = draft.batch.get("input_ids")
    if ids is None or draft.config.is_encoder_decoder:
        last = min(LAST_ORDINARY, draft.value("vocab_size", default=LAST_ORDINARY))
        ids = draft.integers(FIRST_ORDINARY, last, ROWS, 8)
        return {"labels": ids, "decoder_input_ids": ids.roll(1, dims=-1)}
    mask = draft.batch.get("attention_mask", torch.ones_like(ids))
    ordinary = (mask == 1) & (ids >= FIRST_ORDINARY) & (ids < LAST_ORDINARY)
    return {"labels": ids.masked_fill(~ordinary, IGNORED_LABEL)}


def _classes(draft: Draft) -> Labels:
    """One class per sample (B,)."""
    return {"labels": draft.integers(0, draft.config.num_labels, ROWS)}


def _target_values(draft: Draft) -> Labels:
    if draft.task == "time-series-classification":
        count = getattr(draft.config, "num_targets", draft.config.num_labels)
        return {"target_values": draft.integers(0, count, ROWS)}
    return {"target_values": draft.normal(ROWS, draft.config.num_targets)}


def _future(draft: Draft) -> Labels:
    length = draft.value("prediction_length", "horizon_length", default=8)
    past = draft.batch["past_values"]
    return {"future_values": draft.normal(ROWS, length, *past.shape[2:])}


def _token_classes(draft: Draft) -> Labels:
    shape = draft.batch["input_ids"].shape
    return {"labels": draft.integers(0, draft.config.num_labels, *shape)}


def _span(draft: Draft) -> Labels:
    start = draft.integers(0, 8, ROWS)
    found: Labels = {"start_positions": start, "end_positions": start + 2}
    if not draft.accepts("start_positions"):
        count = draft.value("num_qa_labels", "num_labels")
        found["labels"] = draft.integers(0, count, ROWS)
    return found


def _answers(draft: Draft) -> Labels:
    if draft.accepts("decoder_input_ids"):
        return _tokens(draft)
    return {"labels": draft.uniform(ROWS, draft.config.num_labels)}


def _choice(draft: Draft) -> Labels:
    return {"labels": draft.integers(0, 2, ROWS)}


def _sentence(draft: Draft) -> Labels:
    found = draft.integers(0, 2, ROWS)
    return {"labels": found, "next_sentence_label": found}


def _pretraining(draft: Draft) -> Labels:
    found = _tokens(draft) if "input_ids" in draft.batch else {}
    if "visual_embeds" in draft.batch:  # one label for each of them, too
        ids = found["labels"]
        found["labels"] = torch.cat([ids, torch.full((ROWS, REGIONS), IGNORED_LABEL)], dim=1)
    if "Electra" in type(draft.model).__name__:
        found = {"labels": draft.integers(0, 2, *draft.batch["input_ids"].shape)}
    if draft.accepts("bool_masked_pos") and "pixel_values" in draft.batch:
        found["bool_masked_pos"] = _masked_patches(draft)["bool_masked_pos"]
    if draft.accepts("sampled_negative_indices"):
        found.update(_masked_frames(draft))
    if draft.accepts("question_positions"):
        found = {**_question(draft), **_span(draft)}
        found.update({name: found[name][:, None] for name in ("start_positions", "end_positions")})
    found["labels_input_ids"] = found.get("labels")
    for name in ("next_sentence_label", "sentence_order_label", "matched_label", "ans"):
        found[name] = draft.integers(0, 2, ROWS)
    return found


def _masked_frames(draft: Draft) -> Labels:
    """Which frames are hidden (B, T), and frames that they are told from (B, T, N)."""
    model: Any = draft.model
    frames = int(model._get_feat_extract_output_lengths(draft.batch["input_values"].shape[-1]))
    masked = torch.zeros(ROWS, frames, dtype=torch.bool)
    masked[:, ::2] = True
    others = draft.integers(0, ROWS * frames, ROWS, frames, draft.config.num_negatives)
    return {"mask_time_indices": masked, "sampled_negative_indices": others}


def _question(draft: Draft) -> Labels:
    """Ids with a token that asks, and where it is (B, 1)."""
    ids = draft.batch["input_ids"].clone()
    ids[:, 3] = draft.config.question_token_id
    return {"input_ids": ids, "question_positions": torch.full((ROWS, 1), 3)}


def _short_text(draft: Draft) -> Labels:
    """Ids (B, 3) without blanks, for losses over alignments; a decoder starts with a blank."""
    ids = draft.integers(FIRST_ORDINARY, draft.value("vocab_size", default=32) - 2, ROWS, 3)
    blank = draft.value("blank_token_id", default=0)
    return {"labels": ids, "decoder_input_ids": torch.nn.functional.pad(ids, (1, 0), value=blank)}


def _pixel_classes(draft: Draft) -> Labels:
    height, width = draft.batch["pixel_values"].shape[-2:]
    return {"labels": draft.integers(0, draft.config.num_labels, ROWS, height, width)}


def _like_output(draft: Draft) -> Labels:
    """Numbers of the shape of what the model predicts."""
    output = _output(draft)
    return {"labels": draft.uniform(*output.shape)}


def _frame_classes(draft: Draft) -> Labels:
    output = _output(draft)
    kinds = draft.integers(0, output.shape[-1], *output.shape[:-1])
    return {"labels": torch.nn.functional.one_hot(kinds, output.shape[-1]).float()}


def _output(draft: Draft) -> Tensor:
    with torch.no_grad():
        found = draft.model(**draft.batch)
    names = ("predicted_depth", "reconstruction", "logits", "prediction_logits")
    return next(getattr(found, name) for name in names if getattr(found, name, None) is not None)


def _masked_patches(draft: Draft) -> Labels:
    """Which patches are hidden (B, N)."""
    config = draft.vision_config
    patch = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[0]
    height, width = draft.batch["pixel_values"].shape[-2:]
    count = (height // patch) * (width // patch)
    if draft.batch["pixel_values"].ndim == 5:  # a video
        count *= draft.batch["pixel_values"].shape[1] // draft.value("tubelet_size", default=1)
    masked = torch.zeros(ROWS, count, dtype=torch.bool)
    masked[:, ::2] = True
    return {"bool_masked_pos": masked}


def _spectrogram(draft: Draft) -> Labels:
    return {"labels": draft.normal(ROWS, 8, draft.value("num_mel_bins", default=16))}


_BY_TASK: Mapping[str, Callable[[Draft], Labels]] = {
    "sequence-classification": _classes,
    "image-classification": _classes,
    "audio-classification": _classes,
    "audio-xvector": _classes,
    "video-classification": _classes,
    "decision": _classes,
    "token-classification": _token_classes,
    "question-answering": _span,
    "document-question-answering": _span,
    "visual-question-answering": _answers,
    "multiple-choice": _choice,
    "next-sentence-prediction": _sentence,
    "pretraining": _pretraining,
    "ctc": _short_text,
    "rnnt": _short_text,
    "tdt": _short_text,
    "semantic-segmentation": _pixel_classes,
    "depth-estimation": _like_output,
    "image-to-image": _like_output,
    "audio-frame-classification": _frame_classes,
    "masked-image-modeling": _masked_patches,
    "zero-shot-image-classification": lambda _: {"return_loss": True},
    "time-series-classification": _target_values,
    "time-series-regression": _target_values,
    "time-series-prediction": _future,
    "text-to-spectrogram": _spectrogram,
}
