"""Several samples in one row, so that encoders compute on tokens and not on padding.

A row holds samples one behind the other. Each attends to itself alone (a block-diagonal mask), its
positions begin at 0, and it keeps labels and predictions of its own, so that losses and logits are
those of the samples alone. Pads are in no loss: transformers' question answering counts the pads of
a window among the places where an answer may begin, here an answer begins inside of its window.

Rows are filled by best fit, longest sample first, as in TRL's ``pack_dataset`` ("bfd"), which joins
columns of tokens only and forgets which sample a row's tokens are of; transformers'
``DataCollatorWithFlattening`` makes one row of a batch, of any length, for causal models.

Axes: ``N`` samples, ``R`` rows, ``S`` samples of a row (at most), ``L`` tokens.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ipu_pipeline.capture.example_batch import IGNORED_LABEL
from ipu_pipeline.train.data import Collator

STARTS = "segment_starts"
SPANS = ("start_positions", "end_positions")


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Return which samples share a row: the longest first, each where it leaves the least room.

    Args:
        lengths: Tokens of every sample, at most ``room``.
        room: Tokens of a row.

    Source:
        Johnson, Near-optimal bin packing algorithms, 1973: best fit decreasing.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # tokens left, row; in order
    for sample in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        place = bisect_left(free, (lengths[sample], 0))
        if place == len(free):
            rows.append([])
            left, row = room, len(rows) - 1
        else:
            left, row = free.pop(place)
        rows[row].append(sample)
        insort(free, (left - lengths[sample], row))
    return rows


class PackedDataset(Dataset[list[Any]]):
    """Rows of samples: an item is the list of the samples that share a row.

    Args:
        data: Samples with an ``attention_mask``.
        length: Tokens of a row, at least those of the longest sample.

    Attributes:
        rows: Which samples are in a row.
        num_segments: Samples of the row with the most.
    """

    def __init__(self, data: Any, length: int) -> None:
        self.data = data
        masks = (torch.as_tensor(data[n]["attention_mask"]) for n in range(len(data)))
        lengths = [int(mask.sum()) for mask in masks]
        self.rows = best_fit(lengths, length)
        self.num_segments = max(map(len, self.rows))

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def __getitem__(self, row: int) -> list[Any]:
        """Return the samples of a row."""
        return [self.data[sample] for sample in self.rows[row]]

    def in_order(self, values: Tensor) -> Tensor:
        """Return values of all samples, row after row, in the order of the samples."""
        order = torch.tensor([sample for row in self.rows for sample in row])
        return values[order.argsort()]


class PackingCollator:
    """Makes rows of ``length`` tokens of lists of samples.

    ``attention_mask`` becomes the number of a token's sample in its row, from 1 on, and 0 for pads.

    Args:
        collate: Makes a padded batch of samples.
        length: Tokens of a row.
        num_segments: Samples of a row, at most.
        pad_id: The token behind the last sample.
    """

    def __init__(self, collate: Collator, length: int, num_segments: int, pad_id: int = 0) -> None:
        self.collate = collate
        self.length = length
        self.num_segments = num_segments
        self._fills = {"labels": IGNORED_LABEL, "input_ids": pad_id}

    def __call__(self, rows: list[list[Any]]) -> dict[str, Tensor]:
        """Return a batch of rows."""
        batch = self.collate([sample for row in rows for sample in row])
        mask_NL = batch["attention_mask"].bool()
        length_N = mask_NL.sum(dim=1)
        row_N = torch.tensor([n for n, row in enumerate(rows) for _ in row])
        segment_N = torch.tensor([n for row in rows for n in range(len(row))])
        behind_N = length_N.cumsum(0)
        first_of_row = segment_N == 0
        before_N = (behind_N - length_N)[first_of_row][row_N]  # tokens of earlier rows
        start_N = behind_N - length_N - before_N
        # of every token that is not padding: its position in its sample, and its place in the rows
        position = (mask_NL.cumsum(dim=1) - 1)[mask_NL]
        place = (row_N * self.length + start_N).repeat_interleave(length_N) + position

        def of_tokens(values: Tensor, fill: int = 0) -> Tensor:
            made = values.new_full((len(rows) * self.length,), fill)
            return made.index_copy(0, place, values).view(len(rows), self.length)

        def of_samples(values: Tensor, fill: int = IGNORED_LABEL) -> Tensor:
            made = values.new_full((len(rows), self.num_segments), fill)
            made[row_N, segment_N] = values
            return made

        found = {
            "attention_mask": of_tokens((segment_N + 1).repeat_interleave(length_N)),
            "position_ids": of_tokens(position),
            STARTS: of_samples(start_N, 0),
        }
        shift_N = start_N - mask_NL.int().argmax(dim=1)
        for name, values in batch.items():
            if values.shape == mask_NL.shape and name not in found:
                found[name] = of_tokens(values[mask_NL], self._fills.get(name, 0))
            elif values.ndim == 1:
                found[name] = of_samples(values + shift_N if name in SPANS else values)
        return found


def unpacked(
    outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return outputs and batch of the samples, row after row, in the place of those of the rows.

    What tokens have is padded on the right: labels by -100, logits by their lowest number.
    """
    segment_RL, size = batch["attention_mask"], batch[STARTS].shape[1]
    length_RS = (segment_RL[:, :, None] == torch.arange(1, size + 1)).sum(dim=1)
    there_RS = length_RS > 0
    inside_NL = torch.arange(int(length_RS.max())) < length_RS[there_RS][:, None]

    def split(values: Tensor) -> Tensor:
        if values.shape[:2] == there_RS.shape:
            return values[there_RS]
        if values.shape[:2] != segment_RL.shape:
            return values
        real = values.is_floating_point()
        fill = torch.finfo(values.dtype).min if real else IGNORED_LABEL
        made = values.new_full((*inside_NL.shape, *values.shape[2:]), fill)
        made[inside_NL] = values[segment_RL > 0]
        return made

    return {n: split(v) for n, v in outputs.items()}, {n: split(v) for n, v in batch.items()}
