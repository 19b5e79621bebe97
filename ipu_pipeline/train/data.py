"""Batches in an order that depends on the seed and the epoch only, from any position on.

A batch is a pure function of (data, seed, epoch, step): the permutation is drawn from (seed,
epoch), and random numbers used while reading and collating it (token masking, augmentation) are
keyed by (seed, epoch, step). Workers, restarts and the number of stages change nothing.

The last batch of an epoch may be short. A target that takes any size (its executable has
``batch_divisor = 1``) gets it whole. Others split a batch evenly over microbatches and replicas:
the batch keeps the largest part that divides, the few samples left over (fewer than microbatches
x replicas) sit this epoch out, another random few the next, and the log says so.
``dataloader_drop_last`` leaves the whole short batch out, for targets with fixed shapes.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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

from ipu_pipeline.train.arguments import TrainingArguments
from ipu_pipeline.train.rng import keyed_randomness

logger = logging.getLogger(__name__)

Batch = dict[str, Tensor]
Collator = Callable[[list[Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class DataPosition:
    """Where training is in its data: the next batch is number ``step`` of ``epoch``."""

    epoch: int = 0
    step: int = 0


START = DataPosition()


class BatchKey(list[int]):
    """Sample indices of one batch, with the key of its random numbers."""

    def __init__(self, indices: Sequence[int], key: tuple[int, ...]) -> None:
        super().__init__(indices)
        self.key = key


class EpochBatches(Sampler[list[int]]):
    """Index batches of one epoch at a time, from any step on.

    Args:
        num_samples: Size of the data.
        batch_size: Samples per batch, a multiple of ``divisor``.
        divisor: Every batch size is a multiple of this.
        seed: Root of the permutations.
        shuffle: Permute the samples; otherwise keep their order.
        drop_last: Leave out a last batch smaller than ``batch_size``.

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
    ) -> None:
        if batch_size < 1 or batch_size % divisor:
            raise ValueError(f"batch_size {batch_size} must be a multiple of {divisor}, above 0")
        rest = num_samples % batch_size
        kept = 0 if drop_last else rest - rest % divisor
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.num_used = num_samples - rest + kept
        self.seed = seed
        self.shuffle = shuffle
        self.position = DataPosition()
        if self.num_used == 0:
            least = batch_size if drop_last else divisor
            raise ValueError(
                f"the data holds {num_samples} samples, one batch needs at least {least}; lower "
                "the batch size, gradient_accumulation_steps or replicas, or add data"
            )

    @property
    def num_left_out(self) -> int:
        """Samples that sit an epoch out."""
        return self.num_samples - self.num_used

    def __len__(self) -> int:
        return -(-self.num_used // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, first = self.position.epoch, self.position.step
        order = range(self.num_samples) if not self.shuffle else self._permutation(epoch)
        for step in range(first, len(self)):
            stop = min((step + 1) * self.batch_size, self.num_used)
            yield BatchKey(order[step * self.batch_size : stop], (self.seed, epoch, step))

    def _permutation(self, epoch: int) -> list[int]:
        # The order that transformers' Trainer gives the same seed (accelerate's seedable sampler).
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return torch.randperm(self.num_samples, generator=generator).tolist()


class _KeyedReader(Dataset[Batch]):
    """Reads and collates one whole batch at a time under random numbers keyed by position."""

    def __init__(self, dataset: Dataset[Any], collate_fn: Collator) -> None:
        self.dataset = dataset
        self.collate_fn = collate_fn

    def __getitems__(self, batch: BatchKey) -> Batch:
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

    Raises:
        ValueError: The data cannot be indexed.
    """

    def __init__(
        self, dataset: Dataset[Any], sampler: EpochBatches, collate_fn: Collator, num_workers: int
    ) -> None:
        self.sampler = sampler
        self.dataloader: DataLoader[Batch] = DataLoader(
            _KeyedReader(dataset, collate_fn),
            batch_sampler=sampler,
            collate_fn=_unchanged,
            num_workers=num_workers,
            # Without its own generator it would draw from the global one at every epoch.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self.sampler)

    def batches(self, position: DataPosition = START) -> Iterator[Batch]:
        """Return the rest of an epoch's batches, from ``position`` on."""
        self.sampler.position = position
        return iter(self.dataloader)


def train_batches(
    dataset: Dataset[Any],
    arguments: TrainingArguments,
    collate_fn: Collator,
    *,
    divisor: int | None = None,
) -> BatchLoader:
    """Return the shuffled training batches; axis 0 is micro batch x microbatches x replicas.

    Args:
        dataset: Samples by index.
        arguments: Batch sizes, seeds, workers and ``dataloader_drop_last`` are read.
        collate_fn: Makes a batch of samples.
        divisor: The size of a short batch is a multiple of this; ``None`` for microbatches x
            replicas.
    """
    divisor = arguments.samples_divisor if divisor is None else divisor
    sampler = EpochBatches(
        _length(dataset),
        arguments.global_batch_size,
        divisor=divisor,
        seed=arguments.seed if arguments.data_seed is None else arguments.data_seed,
        drop_last=arguments.dataloader_drop_last,
    )
    if sampler.num_left_out:
        logger.warning(
            "%d of %d samples are left out of each epoch (another random choice every time): the "
            "last batch %s",
            sampler.num_left_out,
            sampler.num_samples,
            "is dropped, as dataloader_drop_last asks"
            if arguments.dataloader_drop_last
            else f"has to divide into {divisor} microbatches",
        )
    return BatchLoader(dataset, sampler, collate_fn, arguments.dataloader_num_workers)


def eval_batches(
    dataset: Dataset[Any], arguments: TrainingArguments, collate_fn: Collator
) -> BatchLoader:
    """Return the evaluation batches in order, every sample once; the last may have any size."""
    size = arguments.per_device_eval_batch_size * arguments.samples_divisor
    sampler = EpochBatches(_length(dataset), size, seed=arguments.seed, shuffle=False)
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
        pads = isinstance(tokenizer, (PreTrainedTokenizerBase, SequenceFeatureExtractor))
        collate_fn = DataCollatorWithPadding(tokenizer) if pads else default_data_collator
    if not arguments.remove_unused_columns:
        return collate_fn
    columns = [*inspect.signature(model.forward).parameters, "label", "label_ids"]
    return RemoveColumnsCollator(collate_fn, columns, logger, type(model).__name__)


def _length(dataset: Dataset[Any]) -> int:
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError(
            f"{type(dataset).__name__} cannot be indexed, so its order could not be repeated on "
            "resume; give a data set with __len__ and __getitem__ (list(dataset) is one)"
        )
    return len(dataset)
