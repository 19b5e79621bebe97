"""DataLoader: combined batches, what it refuses, the asynchronous modes in this process."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import IterableDataset, TensorDataset

from ipu_pipeline_emulator.dataloader import AsynchronousDataAccessor
from tests.tools.emulator.toys import batch, mlp


def dataset(size=20):
    return TensorDataset(*batch(size))


def options_for(poptorch):
    options = poptorch.Options().deviceIterations(2).replicationFactor(2)
    options.Training.gradientAccumulation(2)
    return options


def test_a_batch_feeds_one_call(poptorch) -> None:
    options = options_for(poptorch)
    loader = poptorch.DataLoader(options, dataset(), batch_size=1)
    assert loader.combinedBatchSize == 8
    assert len(loader) == 2
    assert loader.options is options
    executor = poptorch.trainingModel(mlp(), options)
    for x, target in loader:
        assert x.shape[0] == 8
        executor(x, target)


def test_last_batch_is_dropped_unless_kept(poptorch) -> None:
    loader = poptorch.DataLoader(options_for(poptorch), dataset(), drop_last=False)
    assert [len(x) for x, _ in loader] == [8, 8, 4]


def test_input_groups_need_fewer_samples(poptorch) -> None:
    options = poptorch.Options().replicationFactor(4)
    options.inputReplicaGrouping(2, poptorch.CommGroupType.Consecutive)
    assert poptorch.DataLoader(options, dataset(), batch_size=3).combinedBatchSize == 6


def test_batches_of_the_dataset(poptorch) -> None:
    batches = [torch.ones(8, 2), torch.zeros(8, 2)]
    loader = poptorch.DataLoader(options_for(poptorch), batches, batch_size=None)
    assert loader.combinedBatchSize is None
    assert [int(x[0, 0]) for x in loader] == [1, 0]


def test_batch_sampler(poptorch) -> None:
    sampler = [[0, 1], [2, 3]]
    loader = poptorch.DataLoader(poptorch.Options(), dataset(), batch_sampler=sampler)
    assert [len(x) for x, _ in loader] == [2, 2]
    options = poptorch.Options()
    options.Distributed.configureProcessId(0, 2)
    with pytest.raises(poptorch.Error, match="exclusive with auto_distributed_partitioning=True"):
        poptorch.DataLoader(options, dataset(), batch_sampler=sampler)


@pytest.mark.parametrize("mode", ["Async", "AsyncRebatched"])
def test_asynchronous_modes_give_the_same_batches(poptorch, mode) -> None:
    chosen = poptorch.DataLoaderMode[mode]
    plain = poptorch.DataLoader(options_for(poptorch), dataset())
    loader = poptorch.DataLoader(
        options_for(poptorch), dataset(), mode=chosen, async_options={"buffer_size": 2}
    )
    for _ in range(2):
        pairs = zip(plain, loader)
        assert all(torch.equal(a[0], b[0]) for a, b in pairs)
    loader.terminate()
    with pytest.raises(AssertionError, match="AsynchronousDataAccessor was terminated"):
        next(iter(loader))
    plain.terminate()


def test_processes_share_the_dataset(poptorch) -> None:
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(4))

    def options():
        made = poptorch.Options()
        made.Distributed.configureProcessId(1, 2)
        return made

    loader = poptorch.DataLoader(options(), list(range(4)))
    assert [int(x) for x in loader] == [1, 3]
    with pytest.raises(AssertionError, match="IterableDataset cannot be partitioned"):
        poptorch.DataLoader(options(), Stream())
    poptorch.DataLoader(options(), Stream(), auto_distributed_partitioning=False)
    with pytest.raises(AssertionError, match=r"needs Options.randomSeed first"):
        poptorch.DataLoader(options(), list(range(4)), shuffle=True)
    poptorch.DataLoader(options().randomSeed(1), list(range(4)), shuffle=True)


def test_types(poptorch) -> None:
    with pytest.raises(AssertionError, match=r"Unexpected type .*options"):
        poptorch.DataLoader(None, dataset())
    with pytest.raises(AssertionError, match=r"Unexpected type .*mode"):
        poptorch.DataLoader(poptorch.Options(), dataset(), mode="async")
    with pytest.raises(AssertionError, match=r"needs DataLoaderMode.AsyncRebatched"):
        poptorch.DataLoader(poptorch.Options(), dataset(), rebatched_worker_size=2)
    with pytest.raises(AssertionError, match=r"Unexpected type .*sharing_strategy"):
        AsynchronousDataAccessor([1], sharing_strategy="fork")
    with pytest.raises(AssertionError, match="buffer_size must be above 0, got 0"):
        AsynchronousDataAccessor([1], buffer_size=0)
    assert len(AsynchronousDataAccessor([1])) == 1
