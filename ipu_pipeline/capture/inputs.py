"""What a batch may hold: tensors by name, and plain values that are the same for every sample."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ipu_pipeline.capture.values import tensors_in
from ipu_pipeline.errors import CaptureError

NUM_ITEMS = "num_items_in_batch"


def ready_batch(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the batch with numpy arrays as tensors.

    The number of its items becomes a tensor, too: another number is not another capture.

    Raises:
        CaptureError: The batch is no mapping, or an input can be neither cut nor compared; it is
            named.
    """
    if not isinstance(batch, Mapping):
        raise CaptureError(
            f"the example batch is a {type(batch).__name__}; pass a dict of the model's keyword "
            "arguments, such as {'input_ids': ..., 'labels': ...}"
        )
    if not batch:
        raise CaptureError("the example batch is empty; pass the model's keyword arguments")
    return {name: _ready(name, value) for name, value in batch.items()}


def _ready(name: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biufc":
            raise CaptureError(
                f"{name!r} of the batch is a numpy array of {value.dtype}; stages take arrays of "
                "numbers, which become tensors: encode it as numbers, or leave it out of the batch"
            )
        return torch.from_numpy(np.ascontiguousarray(value))
    if name == NUM_ITEMS and isinstance(value, int | float):
        return torch.tensor(value)
    arrays = (member for member in tree_leaves(value) if isinstance(member, np.ndarray))
    if [*tensors_in(value), *arrays]:
        raise CaptureError(
            f"{name!r} of the batch is a {type(value).__name__} that holds tensors; stages "
            "take tensors by name only: pass them one by one, or wrap the model in a module "
            "that builds the structure"
        )
    try:
        described(value)
    except TypeError as error:
        raise CaptureError(
            f"{name!r} of the batch is, or holds, a {type(value).__name__} that cannot be compared "
            "from batch to batch; pass its values one by one as tensors, numbers, texts, lists or "
            "dicts"
        ) from error
    return value


def described(value: Any) -> Hashable:
    """Return, hashable, what a capture depends on: shape and dtype of a tensor, or the value.

    Raises:
        TypeError: It cannot be hashed.
    """
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.requires_grad, value.device
    if isinstance(value, list | tuple):
        return type(value), tuple(described(item) for item in value)
    if isinstance(value, Mapping):
        return type(value), tuple((key, described(item)) for key, item in value.items())
    hash(value)
    return type(value), value
