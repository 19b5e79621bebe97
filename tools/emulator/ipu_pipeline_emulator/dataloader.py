"""``DataLoader``: batches of the size that one call of a model takes."""

from __future__ import annotations

import itertools
from typing import Any, Iterator

import torch.utils.data
from torch.utils.data import DistributedSampler, IterableDataset

from .enums import DataLoaderMode, SharingStrategy
from .errors import createPoptorchError
from .options import Options
from .options_base import require, require_type
from .structure import Counts


class DataLoader(torch.utils.data.DataLoader):  # type: ignore[type-arg]
    """A torch loader whose batch is micro-batch x iterations x accumulation x replicas.

    Args:
        options: Frozen by this.
        dataset: The samples.
        batch_size: Samples in one micro-batch; ``None`` for a dataset of batches.
        shuffle: Draw in random order.
        num_workers: Processes that load.
        drop_last: Leave out an incomplete batch; True unlike torch's.
        persistent_workers: Keep the processes; on by default when there are any.
        auto_distributed_partitioning: Give every host process its own part.
        mode: The asynchronous modes load in this process in the stand-in.
        async_options: Arguments of AsynchronousDataAccessor.
        rebatched_worker_size: Batch size of a worker in AsyncRebatched.
        batch_sampler: Excludes batch_size and shuffle.
        **kwargs: Arguments of torch's loader.
    """

    def __init__(
        self,
        options: Options,
        dataset: Any,
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        num_workers: int = 0,
        drop_last: bool = True,
        persistent_workers: bool | None = None,
        auto_distributed_partitioning: bool = True,
        mode: DataLoaderMode = DataLoaderMode.Sync,
        async_options: dict[str, Any] | None = None,
        rebatched_worker_size: int | None = None,
        batch_sampler: Any = None,
        **kwargs: Any,
    ) -> None:
        require_type(options, Options, "options")
        require_type(mode, DataLoaderMode, "mode")
        _check_rebatched(mode, rebatched_worker_size)
        options._freeze()
        counts = Counts.of(options)
        self._options = options
        self._mode = mode
        self._combined: int | None = None
        workers: dict[str, Any] = {
            "num_workers": num_workers,
            "persistent_workers": num_workers > 0
            if persistent_workers is None
            else persistent_workers,
        }
        if batch_sampler is not None:
            if batch_size != 1 or shuffle:
                raise createPoptorchError(
                    "batch_sampler is mutually exclusive with batch_size and shuffle"
                )
            if options.Distributed.numProcesses > 1 and auto_distributed_partitioning:
                raise createPoptorchError(
                    "batch_sampler is mutually exclusive with auto_distributed_partitioning=True"
                )
            if hasattr(batch_sampler, "batch_size"):
                self._combined = batch_sampler.batch_size * counts.divisor
            joined = _JoinedBatches(batch_sampler, counts.divisor, drop_last)
            super().__init__(dataset, batch_sampler=joined, **workers, **kwargs)
        else:
            if batch_size is not None:
                self._combined = batch_size * counts.divisor
                kwargs["drop_last"] = drop_last
            if options.Distributed.numProcesses > 1 and auto_distributed_partitioning:
                kwargs["sampler"] = self._part(options, dataset, bool(shuffle), drop_last)
                shuffle = None
            super().__init__(
                dataset, batch_size=self._combined, shuffle=shuffle, **workers, **kwargs
            )
        accessor = dict(async_options or {})
        self._accessor = (
            None if mode is DataLoaderMode.Sync else AsynchronousDataAccessor(self, **accessor)
        )

    @staticmethod
    def _part(options: Options, dataset: Any, shuffle: bool, drop_last: bool) -> Any:
        require(
            not isinstance(dataset, IterableDataset),
            "An IterableDataset cannot be partitioned over processes: pass "
            "auto_distributed_partitioning=False",
        )
        require(
            not shuffle or "random_seed" in options._values,
            "shuffle with several processes needs Options.randomSeed first",
        )
        return DistributedSampler(
            dataset,
            num_replicas=options.Distributed.numProcesses,
            rank=options.Distributed.processId,
            shuffle=shuffle,
            seed=options._values.get("random_seed", 0),
            drop_last=drop_last,
        )

    @property
    def options(self) -> Options:
        """The frozen options."""
        return self._options

    @property
    def combinedBatchSize(self) -> int | None:
        """Samples in the batch of one call; ``None`` when ``batch_size`` is."""
        return self._combined

    def terminate(self) -> None:
        """Stop the asynchronous worker."""
        if self._accessor is not None:
            self._accessor.terminate()

    def __iter__(self) -> Any:
        if self._accessor is not None and not self._accessor.is_iterating:
            return iter(self._accessor)
        return super().__iter__()


class _JoinedBatches:
    """Joins the batches of a sampler to those of one call.

    Args:
        batches: A sampler of batches.
        count: Batches in one call.
        drop_last: Leave out an incomplete call.
    """

    def __init__(self, batches: Any, count: int, drop_last: bool) -> None:
        self._batches = batches
        self._count = count
        self._drop_last = drop_last

    def __len__(self) -> int:
        extra = 0 if self._drop_last else self._count - 1
        return (len(self._batches) + extra) // self._count

    def __iter__(self) -> Iterator[list[Any]]:
        batches = iter(self._batches)
        while True:
            joined = list(itertools.islice(batches, self._count))
            if not joined or (self._drop_last and len(joined) < self._count):
                return
            yield [index for batch in joined for index in batch]


class AsynchronousDataAccessor:
    """Iterates a dataset; in the stand-in this happens in the calling process.

    Args:
        dataset: Anything that can be iterated.
        buffer_size: Batches that the worker of the real one keeps ready.
        miss_sleep_time_in_ms: Pause of the real one when nothing is ready.
        load_indefinitely: Start over at the end.
        early_preload: Load before the first iteration.
        sharing_strategy: How the real one shares tensors.
        rebatched_size: Size of joined batches.
    """

    def __init__(
        self,
        dataset: Any,
        buffer_size: int = 3,
        miss_sleep_time_in_ms: float = 0.1,
        load_indefinitely: bool = True,
        early_preload: bool = False,
        sharing_strategy: SharingStrategy = SharingStrategy.ForkServer,
        rebatched_size: int | None = None,
    ) -> None:
        require_type(sharing_strategy, SharingStrategy, "sharing_strategy")
        require(buffer_size > 0, f"buffer_size must be above 0, got {buffer_size}")
        del miss_sleep_time_in_ms, load_indefinitely, early_preload, rebatched_size
        self._dataset = dataset
        self._terminated = False
        self.is_iterating = False

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[Any]:
        require(not self._terminated, "The AsynchronousDataAccessor was terminated")
        self.is_iterating = True
        try:
            inner = iter(self._dataset)
        finally:
            self.is_iterating = False
        yield from inner

    def terminate(self) -> None:
        """Stop; it cannot be iterated again."""
        self._terminated = True


def _check_rebatched(mode: DataLoaderMode, size: int | None) -> None:
    require(
        size is None or mode is DataLoaderMode.AsyncRebatched,
        "rebatched_worker_size needs DataLoaderMode.AsyncRebatched",
    )
