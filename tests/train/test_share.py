"""A replica's share of the batches that a data loader asks for."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
from torch.utils.data import DataLoader, IterableDataset

from ipu_pipeline.train.share import ShareOfData, mark_of, marking


class Numbers:
    """Notes what is read."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        self.read.append(index)
        return index


class Together(Numbers):
    def __getitems__(self, indices: list[int]) -> list[int]:
        return [self[index] for index in indices]


@pytest.mark.parametrize("kind", [Numbers, Together])
@pytest.mark.parametrize("size", [8, 9, 10, 11])
def test_shares_are_read_once_and_what_is_left_over_by_one(kind: Any, size: int) -> None:
    """Batches of 4 samples for 2 replicas; of a short one a replica may have nothing."""
    found: list[list[list[int]]] = []
    marks: list[list[tuple[int, bool]]] = []
    for replica in range(2):
        share = ShareOfData(kind(size), replica, 2, 2)
        loader = DataLoader(
            share, batch_size=4, collate_fn=marking(lambda samples: {"numbers": list(samples)})
        )
        assert len(share) == size
        batches = list(loader)
        assert len(batches) == -(-size // 4)
        marks.append([mark_of(batch) for batch in batches])
        pairs = zip(batches, marks[-1], strict=True)
        found.append([[] if others else batch["numbers"] for batch, (_, others) in pairs])
        assert all(set(batch) == {"numbers"} for batch in batches)  # the mark is taken off
        if size == 8:
            assert share.data.read == list(chain.from_iterable(found[-1]))
    digests = [[digest for digest, _ in own] for own in marks]
    assert digests[0] == digests[1]  # both were asked for the same
    assert len({*digests[0]}) == len(batches)
    joined = [first + second for first, second in zip(*found, strict=True)]
    assert list(chain.from_iterable(joined)) == list(range(size))
    assert all(len(own) <= 2 for replica in found for own in replica)


def test_data_without_indices_are_refused() -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Any:
            return iter(range(3))

    with pytest.raises(ValueError, match="Stream is read in one order, so that every process"):
        ShareOfData(Stream(), 0, 2, 2)
