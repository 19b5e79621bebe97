"""Token ids, masks, and what layout models read next to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tools.coverage.tiny_draft import LENGTH, ROWS, Draft

CHOICES = 2
FIRST_ORDINARY, LAST_ORDINARY = 10, 90  # below and above are special tokens of tiny configs


def text(draft: Draft, length: int = LENGTH) -> dict[str, Any]:
    """Return ids (B, L), their mask, and every other input per token that the model takes."""
    vocab = draft.text_config.to_dict().get("vocab_size") or LAST_ORDINARY
    ids = draft.integers(FIRST_ORDINARY, min(LAST_ORDINARY, vocab), ROWS, length)
    mask = torch.ones_like(ids)
    if draft.padded:
        mask[1, -3:] = 0
    pad = draft.value("pad_token_id", default=0)
    eos = draft.value("eos_token_id")
    if draft.config.is_encoder_decoder and isinstance(eos, int):
        ids[torch.arange(ROWS), mask.sum(dim=-1) - 1] = eos  # some models pool the last eos
    if draft.task in ("question-answering", "multiple-choice"):
        separator = draft.value("sep_token_id", default=FIRST_ORDINARY)
        ids[:, [5, 6, length - 5]] = separator  # after the question, and after the text
    batch: dict[str, Any] = {"input_ids": ids.masked_fill(mask == 0, pad if pad >= 0 else 0)}
    if draft.accepts("attention_mask"):
        batch["attention_mask"] = mask
    for name, build in _PER_TOKEN.items():
        if draft.accepts(name):
            batch[name] = build(draft, length)
    return batch


def with_choices(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give every input an axis of choices: (B, N, L)."""
    return {name: torch.stack([value, value.flip(0)], dim=1) for name, value in batch.items()}


def _boxes(draft: Draft, length: int) -> Tensor:
    """Boxes (B, L, 4) as left, top, right, bottom, from 0 to 100, or as parts of the page."""
    corner = draft.integers(0, 50, ROWS, length, 2)
    boxes = torch.cat([corner, corner + draft.integers(1, 49, ROWS, length, 2)], dim=-1)
    if hasattr(draft.config, "bbox_scale") or hasattr(draft.config, "max_bbox_length"):
        return boxes / 100
    return boxes


def _paths(draft: Draft, length: int) -> Tensor:
    return draft.integers(0, 10, ROWS, length, draft.config.max_depth)


def _sentence_types(draft: Draft, length: int) -> Tensor:
    sizes = draft.value("type_vocab_sizes")
    if sizes:
        return torch.stack([draft.integers(0, 2, ROWS, length) for _ in sizes], dim=-1)
    types = torch.zeros(ROWS, length, dtype=torch.long)
    if (draft.value("type_vocab_size", default=1) or 1) > 1 and "causal" not in draft.task:
        types[:, length // 2 :] = 1
    return types


_PER_TOKEN: Mapping[str, Callable[[Draft, int], Tensor]] = {
    "token_type_ids": _sentence_types,
    "bbox": _boxes,
    "xpath_tags_seq": _paths,
    "xpath_subs_seq": _paths,
    "qformer_input_ids": lambda draft, length: draft.integers(10, 90, ROWS, length),
    "qformer_attention_mask": lambda _, length: torch.ones(ROWS, length, dtype=torch.long),
    "input_shape_ids": lambda draft, length: draft.integers(0, 20, ROWS, length),
    "input_pronunciation_ids": lambda draft, length: draft.integers(0, 20, ROWS, length),
}
