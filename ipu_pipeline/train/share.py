"""The samples of its replica, for a data loader that asks for whole batches of several replicas.

The loader of transformers' loop has the same sampler in every process; what it asks the data for
is read by share. So steps, epochs and what is skipped on resume are those of one process. Of a
short batch a replica may have nothing: it reads the first part again, marked, and leaves it out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from ipu_pipeline.stages.batch import part_size

# Marks a batch that is another replica's.
OTHERS = "ipu_pipeline_share_of_another_replica"


class _Others(list[Any]):
    """Samples of another replica."""


class ShareOfData(Dataset[Any]):
    """A data set of which this process reads its replica's share of every batch.

    Args:
        data: Samples by index.
        replica: Of this process.
        replicas: How many share a batch.
        size: Samples of a full share.

    Raises:
        ValueError: The data have no indices.
    """

    def __init__(self, data: Any, replica: int, replicas: int, size: int) -> None:
        if isinstance(data, IterableDataset) or not hasattr(data, "__getitem__"):
            raise ValueError(
                f"{type(data).__name__} is read in one order, so that every process reads all of "
                "it; leave batches='share' out, or give a data set with __getitem__"
            )
        self.data, self.replica, self.replicas, self.size = data, replica, replicas, size

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Return the share of a batch, or, marked, that of the first replica."""
        step = part_size(len(indices), self.replicas, self.size)
        own = indices[self.replica * step : (self.replica + 1) * step]
        wanted = own or indices[:step]
        read = getattr(self.data, "__getitems__", None)
        found = read(list(wanted)) if read else [self.data[index] for index in wanted]
        return found if own else _Others(found)


def marking(collate: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """Return a collator that marks batches of another replica."""
    return _Marking(collate)


class _Marking:  # no closure: workers that are spawned are given it
    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list[Any]) -> Any:
        batch = self.collate(samples)
        if isinstance(samples, _Others):
            batch[OTHERS] = torch.ones(())
        return batch


def is_others(batch: dict[str, Any | Tensor]) -> bool:
    """Whether a batch is another replica's; its mark is taken off."""
    return batch.pop(OTHERS, None) is not None
