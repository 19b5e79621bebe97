"""An id that is in no row of a table, or a label that is no class, in words.

torch says neither which table it is nor which id. Both are in the frames of the error, so nothing
is looked at until there is one.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from ipu_pipeline.ops.embedding import embedding_serialized

# Arguments of what looks ids up, by its code: ids and table; labels and one number per class.
_LOOKUPS = {
    functional.embedding.__code__: ("input", "weight"),
    embedding_serialized.__code__: ("ids", "weight_VH"),
}
_LOSSES = {functional.cross_entropy.__code__, functional.nll_loss.__code__}


@contextlib.contextmanager
def naming_ids(module: nn.Module, kind: type[Exception] | None = None) -> Iterator[None]:
    """Let torch's error of an id outside of a table, or of a label that is no class, name both.

    Args:
        module: Has the tables.
        kind: What is raised in the place of torch's ``IndexError``, which is its cause; ``None``:
            the same error, in words.
    """
    try:
        yield
    except IndexError as error:
        reason = _reason(error, module)
        if not reason:
            raise
        error.args = (reason,)
        if kind is None:
            raise
        raise kind(reason) from error


def _reason(error: IndexError, module: nn.Module) -> str:
    """Return what is wrong; nothing if it is something else."""
    for frame, _ in reversed([*traceback.walk_tb(error.__traceback__)]):
        if names := _LOOKUPS.get(frame.f_code):
            ids, table = (frame.f_locals[name] for name in names)
            return _of_lookup(ids, table, module)
        if frame.f_code in _LOSSES:
            return _of_loss(frame)
    return ""


def _of_lookup(ids: Tensor, table: Tensor, module: nn.Module) -> str:
    wrong = _outside(ids, len(table))
    if wrong is None:
        return ""
    named = dict(module.named_parameters(remove_duplicate=False))
    name = next((n for n, p in named.items() if p is table), "a table of the model")
    return (
        f"{name} has {len(table)} rows, and id {wrong} (of a tensor {tuple(ids.shape)}) is none of "
        f"them, which are 0 to {len(table) - 1}; give the tokenizer that belongs to the model, "
        "sequences no longer than its table of positions, or enlarge the table "
        "(resize_token_embeddings)"
    )


def _of_loss(frame: FrameType) -> str:
    given: Mapping[str, Any] = frame.f_locals
    scores, labels, ignored = given["input"], given["target"], given["ignore_index"]
    classes = scores.shape[min(1, scores.ndim - 1)]
    wrong = _outside(labels[labels != ignored], classes)
    if wrong is None:
        return ""
    return (
        f"the loss is given label {wrong} and has {classes} classes, 0 to {classes - 1} ({ignored} "
        "is left out); give such labels, or a model with more classes (num_labels, or a larger "
        "vocabulary)"
    )


def _outside(ids: Tensor, size: int) -> int | None:
    wrong = ids[(ids < 0) | (ids >= size)]
    return int(wrong[0]) if wrong.numel() else None
