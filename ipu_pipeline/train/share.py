"""The samples of its replica, for a data loader that asks for whole batches of several replicas.

The loader of transformers' loop has the same sampler in every process; what it asks the data for
is read by share. So steps, epochs and what is skipped on resume are those of one process. Of a
short batch a replica may have nothing: it reads the first part again, marked, and leaves it out.
The mark also says which samples were asked for: replicas compare that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from ipu_pipeline.stages.batch import part_size

MARK = "ipu_pipeline_share"


class _Share(list[Any]):
    """Samples of a share, with its mark.

    That is twice a digest of the whole batch's indices, and 1 more if the share is another's.
    """

    def __init__(self, samples: list[Any], indices: Sequence[int], *, others: bool) -> None:
        super().__init__(samples)
        text = " ".join(map(str, indices)).encode()
        self.mark = 2 * int.from_bytes(blake2b(text, digest_size=6).digest(), "big") + others


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
        return _Share(found, indices, others=not own)


def marking(collate: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """Return a collator that marks shares of batches."""
    return _Marking(collate)


class _Marking:  # no closure: workers that are spawned are given it
    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list[Any]) -> Any:
        batch = self.collate(samples)
        if isinstance(samples, _Share):
            batch[MARK] = torch.tensor(samples.mark)
        return batch


def mark_of(batch: dict[str, Any | Tensor]) -> tuple[int, bool]:
    """Return a digest of the whole batch, and whether the share is another replica's.

    The mark is taken off; of what is not read by share there is none.
    """
    digest, others = divmod(int(batch.pop(MARK, 0)), 2)
    return digest, bool(others)
