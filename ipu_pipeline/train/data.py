"""Batches in an order that depends on the seed and the epoch only, from any position on.

A batch is a pure function of (data, seed, epoch, step): the permutation is drawn from (seed,
epoch), and random numbers used while reading and collating it (token masking, augmentation) are
keyed by (seed, epoch, step). Workers, restarts and the number of stages change nothing.

The last batch of an epoch may be short. An executable with ``batch_divisor = 1`` gets it whole;
others split a batch evenly over microbatches and replicas: the largest part that divides is kept,
and the few samples left over sit this epoch out (another random few the next; the log says so).

Where processes are given shares of a batch (``batches="share"``), each reads its own samples only.
"""

from __future__ import annotations

import inspect
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from transformers import (
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    SequenceFeatureExtractor,
    default_data_collator,
)
from transformers.trainer_utils import RemoveColumnsCollator

from ipu_pipeline.ir.limits import count_of
from ipu_pipeline.train.arguments import TrainingArguments

logger = logging.getLogger(__name__)

Batch = dict[str, Tensor]
Collator = Callable[[list[Any]], Mapping[str, Any]]


@contextmanager
def keyed_randomness(*key: int) -> Iterator[None]:
    """Seed torch (CPU), numpy and ``random`` by ``key`` (0 or more each); put them back after."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
    python_state = random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002  (the global state that others draw from)
    with torch.random.fork_rng(devices=[]):
        try:
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            random.seed(seed)
            yield
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002
            random.setstate(python_state)


class _BatchKey(list[int]):
    """Sample indices of one batch, with the key of its random numbers."""

    def __init__(self, indices: Sequence[int], key: tuple[int, ...]) -> None:
        super().__init__(indices)
        self.key = key


class EpochBatches(Sampler[list[int]]):
    """Index batches of one epoch at a time, from any step on: set ``position`` and iterate.

    Args:
        num_samples: Size of the data.
        batch_size: Samples per batch, a multiple of ``divisor``.
        divisor: Every batch size is a multiple of this.
        seed: Root of the permutations.
        shuffle: Permute the samples; otherwise keep their order.
        drop_last: Leave out a last batch smaller than ``batch_size``.
        share_of: Says which samples of a batch of some size this process reads.

    Raises:
        ValueError: Not even one batch can be made.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        divisor: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        share_of: Callable[[int], slice] = slice,
    ) -> None:
        if batch_size < 1 or batch_size % divisor:
            raise ValueError(f"batch_size {batch_size} must be a multiple of {divisor}, above 0")
        rest = num_samples % batch_size
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.num_used = num_samples - (rest if drop_last else rest % divisor)
        self.seed = seed
        self.shuffle = shuffle
        self.position = (0, 0)  # epoch, step
        self._share_of = share_of
        if self.num_used == 0:
            least = batch_size if drop_last else divisor
            raise ValueError(
                f"the data holds {count_of(num_samples, 'sample')}, one batch needs at least "
                f"{least}; lower the batch size, gradient_accumulation_steps or replicas, or add "
                "data"
            )

    def describe(self) -> dict[str, int]:
        """Return what has to be the same for a number of steps to mean the same batch."""
        return {
            "num_samples": self.num_samples,
            "samples_per_epoch": self.num_used,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }

    def __len__(self) -> int:
        return -(-self.num_used // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, first = self.position
        order: Sequence[int] = range(self.num_samples)
        if self.shuffle:  # as transformers' Trainer does it (accelerate's seedable sampler)
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(self.num_samples, generator=generator).tolist()
        for step in range(first, len(self)):
            stop = min((step + 1) * self.batch_size, self.num_used)
            batch = order[step * self.batch_size : stop]
            share = self._share_of(len(batch))
            own = (share.start,) if share.start else ()  # a share draws its own numbers
            yield _BatchKey(batch[share], (self.seed, epoch, step, *own))


class _KeyedReader(Dataset[Batch]):
    """Reads and collates one whole batch at a time under random numbers keyed by position."""

    def __init__(self, dataset: Dataset[Any], collate_fn: Collator) -> None:
        self.dataset = dataset
        self.collate_fn = collate_fn

    def __getitems__(self, batch: _BatchKey) -> Batch:
        if not batch:  # of a short batch, this process may have no share
            return {}
        with keyed_randomness(*batch.key):
            if hasattr(self.dataset, "__getitems__"):
                samples = self.dataset.__getitems__(list(batch))
            else:
                samples = [self.dataset[index] for index in batch]
            return dict(self.collate_fn(samples))


def _unchanged(batch: Any) -> Any:
    return batch


class BatchLoader:
    """Iterates batches of ``dataset`` through a torch ``DataLoader`` (workers included).

    Args:
        dataset: Has ``len`` and reads a sample by its index.
        sampler: Which samples, in which order.
        collate_fn: Makes a mapping of tensors from a list of samples.
        num_workers: Processes that prepare batches.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: EpochBatches,
        collate_fn: Collator,
        num_workers: int = 0,
    ) -> None:
        self.sampler = sampler
        self._loader: DataLoader[Batch] = DataLoader(
            _KeyedReader(dataset, collate_fn),
            batch_sampler=sampler,
            collate_fn=_unchanged,
            num_workers=num_workers,
            # Without its own generator it would draw from the global one at every epoch.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self.sampler)

    def batches(self, epoch: int = 0, step: int = 0) -> Iterator[Batch]:
        """Return the rest of an epoch's batches, from ``step`` on."""
        self.sampler.position = (epoch, step)
        return iter(self._loader)


def train_batches(
    dataset: Dataset[Any],
    arguments: TrainingArguments,
    collate_fn: Collator,
    *,
    divisor: int | None = None,
    share_of: Callable[[int], slice] = slice,
) -> BatchLoader:
    """Return the shuffled training batches; axis 0 is micro batch x microbatches x replicas.

    Args:
        dataset: Samples by index.
        arguments: Batch sizes, seeds, workers and ``dataloader_drop_last`` are read.
        collate_fn: Makes a batch of samples.
        divisor: The size of a short batch is a multiple of this; ``None`` for microbatches x
            replicas.
        share_of: Says which samples of a batch of some size this process reads.

    Raises:
        ValueError: The data cannot be indexed, or not even one batch can be made.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError(
            f"{type(dataset).__name__} cannot be indexed, so its order could not be repeated on "
            "resume; give a data set with __len__ and __getitem__ (list(dataset) is one)"
        )
    divisor = arguments.samples_divisor if divisor is None else divisor
    sampler = EpochBatches(
        len(dataset),
        arguments.global_batch_size,
        divisor=divisor,
        seed=arguments.seed if arguments.data_seed is None else arguments.data_seed,
        drop_last=arguments.dataloader_drop_last,
        share_of=share_of,
    )
    if left_out := sampler.num_samples - sampler.num_used:
        reason = f"has to be a multiple of {divisor}"
        if arguments.dataloader_drop_last:
            reason = "is dropped, as dataloader_drop_last asks"
        logger.warning(
            "%d of %d samples are left out of each epoch (another random choice every time): the "
            "last batch %s",
            left_out,
            sampler.num_samples,
            reason,
        )
    return BatchLoader(dataset, sampler, collate_fn, arguments.dataloader_num_workers)


def build_collator(
    model: torch.nn.Module,
    arguments: TrainingArguments,
    collate_fn: Collator | None = None,
    tokenizer: Any = None,
) -> Collator:
    """Return the collator that transformers' Trainer would use.

    Args:
        model: Its ``forward`` names the columns that are kept.
        arguments: ``remove_unused_columns`` is read.
        collate_fn: The caller's own; ``None`` pads with ``tokenizer`` or stacks without it.
        tokenizer: Tokenizer or feature extractor.
    """
    if collate_fn is None:
        pads = isinstance(tokenizer, PreTrainedTokenizerBase | SequenceFeatureExtractor)
        collate_fn = DataCollatorWithPadding(tokenizer) if pads else default_data_collator
    if not arguments.remove_unused_columns:
        return collate_fn
    columns = [*inspect.signature(model.forward).parameters, "label", "label_ids"]
    return RemoveColumnsCollator(collate_fn, columns, logger, type(model).__name__)
