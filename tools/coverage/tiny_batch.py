"""Small batches with labels for any model class, from its task and the names its forward takes.

Nothing is known about single models. Where an input has several usual forms (an image as pixels,
as tiles, as packed patches), :func:`candidates` yields one batch after the other, and the first
that the model trains on is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tools.coverage.reasons import Progress
from tools.coverage.tiny_draft import Draft
from tools.coverage.tiny_labels import labels
from tools.coverage.tiny_media import forms, kinds_of_tokens, mark_tokens, masks
from tools.coverage.tiny_text import text, with_choices

_TEXT_TASKS = frozenset({
    "causal-lm", "masked-lm", "sequence-classification", "token-classification",
    "multiple-choice", "question-answering", "next-sentence-prediction", "seq-to-seq-causal-lm",
    "table-question-answering", "decision", "pretraining",
})  # fmt: skip


def candidates(
    model: nn.Module,
    task: str,
    seed: int = 0,
    progress: Progress | None = None,
    failures: list[tuple[int, BaseException]] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield batches of two samples, the most telling first; a failing builder is passed over.

    Args:
        model: The model.
        task: Its task, see :mod:`tools.coverage.classes`.
        seed: Of all that is drawn.
        progress: Counts how far the model gets in builders that run it.
        failures: Takes how far each failing builder got, and its error.
    """
    progress = progress or Progress()
    for padded in (True, False):
        draft = Draft(model, task, torch.Generator().manual_seed(seed), padded)
        for inputs in _inputs(draft):
            try:
                with progress.counting():
                    batch = _complete(draft, inputs)
            except Exception as error:  # a form that does not suit the model at all
                if failures is not None:
                    failures.append((progress.calls, error))
                continue
            yield batch


def _inputs(draft: Draft) -> Iterator[dict[str, Any]]:
    reads_text = draft.accepts("input_ids")
    if draft.accepts("inputs"):  # of any kind
        reads_text = draft.task in _TEXT_TASKS
    if reads_text and draft.task in _TEXT_TASKS:
        yield text(draft)
    for media in forms(draft):
        yield {**(text(draft) if reads_text else {}), **media}
        if not reads_text:
            for axis in (-1, 1):
                yield {**media, **masks(draft, media, axis)}
        if reads_text and draft.config.is_encoder_decoder:
            yield media
    if reads_text and draft.task not in _TEXT_TASKS:
        yield text(draft)
    if reads_text:
        only_ids = text(draft)
        yield {"input_ids": only_ids["input_ids"]}


def _complete(draft: Draft, inputs: dict[str, Any]) -> dict[str, Any]:
    if "input_ids" in inputs:
        ids = mark_tokens(draft, inputs)
        extra = ids.shape[1] - inputs["input_ids"].shape[1]
        inputs = {name: _longer(name, value, extra) for name, value in inputs.items()}
        inputs["input_ids"] = ids
        if draft.accepts("mm_token_type_ids"):
            inputs["mm_token_type_ids"] = kinds_of_tokens(draft, ids)
    if draft.task == "multiple-choice":
        inputs = with_choices(inputs)
    drafted = draft.plus(**inputs)
    return {**inputs, **labels(drafted)}


def _longer(name: str, value: Any, extra: int) -> Any:
    """Lengthen what goes with the ids by the tokens that stand for media."""
    if name not in ("attention_mask", "token_type_ids") or not extra:
        return value
    return torch.cat([value[:, :1].expand(-1, extra), value], dim=1)
