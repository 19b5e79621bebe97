"""Many tensors in few messages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# The copy that a message costs stays small beside the weights, its latency beside its transfer.
BUCKET_BYTES = 64 << 20


def buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the tensors in groups of one type, in a fixed order, each group a message long."""
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_type.setdefault(tensor.dtype, []).append(tensor)
    for members in by_type.values():
        bucket: list[Tensor] = []
        num_bytes = 0
        for tensor in members:
            if bucket and num_bytes + tensor.nbytes > BUCKET_BYTES:
                yield bucket
                bucket, num_bytes = [], 0
            bucket.append(tensor)
            num_bytes += tensor.nbytes
        yield bucket


def joined(bucket: Sequence[Tensor]) -> Tensor:
    """Return the elements of all tensors; those of a single contiguous one are not copied."""
    if len(bucket) == 1:
        return bucket[0].reshape(-1)
    return torch.cat([tensor.reshape(-1) for tensor in bucket])


def spread(message: Tensor, bucket: Sequence[Tensor]) -> None:
    """Write what came back for :func:`joined` tensors into them."""
    parts = message.split([tensor.numel() for tensor in bucket])
    for tensor, part in zip(bucket, parts, strict=True):
        if tensor.data_ptr() != part.data_ptr():
            tensor.copy_(part.view_as(tensor))


def exchange(tensors: Iterable[Tensor], message: Callable[[Tensor], Any]) -> None:
    """Send all tensors through ``message``, which changes its argument in place."""
    for bucket in buckets(tensors):
        whole = joined(bucket)
        message(whole)
        spread(whole, bucket)
