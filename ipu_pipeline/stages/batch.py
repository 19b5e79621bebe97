"""Cut a batch into microbatches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from torch import Tensor

from ipu_pipeline.errors import LoweringError


@dataclass(frozen=True)
class Microbatch:
    """One microbatch.

    Attributes:
        index: Position in the batch; random numbers are keyed by it.
        inputs: Model inputs by name.
        num_samples: Size of axis 0.
        share: Weight of its loss: its part of the batch's samples, or what the caller says.
    """

    index: int
    inputs: Mapping[str, Any]
    num_samples: int
    share: float


def batch_size(batch: Mapping[str, Any]) -> int:
    """Return the common size of axis 0.

    Raises:
        LoweringError: No tensor has an axis 0, or the sizes differ.
    """
    sizes = {n: v.shape[0] for n, v in batch.items() if isinstance(v, Tensor) and v.ndim > 0}
    if not sizes:
        raise LoweringError("the batch holds no tensor with a batch axis; pass input tensors")
    if len(set(sizes.values())) > 1:
        shown = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise LoweringError(f"axis 0 of the batch's tensors must be equal, got {shown}")
    size = next(iter(sizes.values()))
    if size == 0:
        raise LoweringError("the batch is empty: axis 0 has size 0")
    return size


def split_batch(
    batch: Mapping[str, Any], num_microbatches: int, micro_batch_size: int = 1
) -> list[Microbatch]:
    """Cut axis 0 into at most ``num_microbatches`` parts.

    A short batch gives fewer microbatches of ``micro_batch_size``, the last perhaps shorter: a
    new shape costs a new capture. Tensors without axes and other values are passed whole to
    every microbatch. The loss of the batch is the mean over its microbatches, weighted by their
    sizes.
    """
    size = batch_size(batch)
    step = max(ceil(size / num_microbatches), min(micro_batch_size, size))
    parts = []
    for index, start in enumerate(range(0, size, step)):
        inputs = {
            name: value[start : start + step]
            if isinstance(value, Tensor) and value.ndim > 0
            else value
            for name, value in batch.items()
        }
        samples = min(step, size - start)
        parts.append(Microbatch(index, inputs, samples, samples / size))
    return parts


def cut_batches(
    parts: Sequence[Mapping[str, Any]], weights: Sequence[float], first: int = 0
) -> list[Microbatch]:
    """Return microbatches that somebody else has cut; ``weights`` are those of their losses.

    ``first`` is the position of the first one in its batch.

    Raises:
        LoweringError: There is none, or not one weight for each.
    """
    if not parts or len(parts) != len(weights):
        raise LoweringError(
            f"{len(parts)} microbatches with {len(weights)} weights cannot be run; pass at least "
            "one microbatch, and one weight for each"
        )
    cut = []
    for index, (part, weight) in enumerate(zip(parts, weights, strict=True), start=first):
        sizes = (v.shape[0] for v in part.values() if isinstance(v, Tensor) and v.ndim > 0)
        cut.append(Microbatch(index, part, next(sizes, 1), weight))
    return cut
