"""Cut a batch into microbatches, so that what they compute is what the batch computes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from ipu_pipeline.capture.batch_axes import (
    Axes,
    BatchAxes,
    find_axes,
    part_of,
    size_of,
    sized,
    sized_like_samples,
)
from ipu_pipeline.capture.coarsen import LOSS
from ipu_pipeline.capture.inputs import ready_batch
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.ir.limits import count_of
from ipu_pipeline.stages.devices import device_of, on_device
from ipu_pipeline.stages.training import in_evaluation

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Microbatch:
    """One microbatch.

    Attributes:
        index: Position in the batch; random numbers are keyed by it.
        inputs: Model inputs by name.
        num_samples: Its samples.
        share: Weight of its loss: its part of the batch's samples or labels, or what the caller
            says.
    """

    index: int
    inputs: Mapping[str, Any]
    num_samples: int
    share: float


def with_plain_axes(batch: Mapping[str, Any], given: Axes) -> dict[str, int | None]:
    """Return axis 0 for every tensor, unless ``given`` says more."""
    return {
        name: given.get(name, 0) for name, value in batch.items()
        if name in given or (isinstance(value, Tensor) and value.ndim > 0)
    }  # fmt: skip


def batch_size(batch: Mapping[str, Any], axes: Axes | None = None) -> int:
    """Return the number of samples: the common size of the axes.

    Raises:
        LoweringError: No tensor has an axis of samples, an axis is not there, or sizes differ.
    """
    axes = with_plain_axes(batch, {}) if axes is None else axes
    sizes = {n: _size(n, v, axes[n]) for n, v in batch.items() if axes.get(n) is not None}
    if not sizes:
        raise LoweringError("the batch holds no tensor with a batch axis; pass input tensors")
    several = {name: size for name, size in sizes.items() if size != 1}
    if len(set(several.values())) > 1:
        shown = ", ".join(f"{n} {size} (axis {axes[n]})" for n, size in several.items())
        raise LoweringError(
            f"the inputs of the batch hold different numbers of samples: {shown}; say which axis "
            "of an input holds the samples, or None for an input without: plan(batch_axes="
            "{'position_ids': 1, 'class_weights': None})"
        )
    size = next(iter(several.values()), 1)
    if size == 0:
        raise LoweringError(f"the batch is empty: axis {axes[next(iter(sizes))]} has size 0")
    return size


def batch_text(batch: Mapping[str, Any]) -> str:
    """Return the shapes and types of a batch as text; never fails."""
    return ", ".join(
        f"{name} {'x'.join(map(str, value.shape))} {str(value.dtype).removeprefix('torch.')}"
        if isinstance(value, Tensor)
        else f"{name} {value!r}"
        if isinstance(value, bool | int | float | str | None)
        else f"{name} {type(value).__name__}"
        for name, value in batch.items()
    )


def _size(name: str, value: Any, axis: int | None) -> int:
    if not sized(value) or axis is None or (isinstance(value, Tensor) and axis >= value.ndim):
        shown = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise LoweringError(
            f"batch_axes says that axis {axis} of {name!r} holds the samples, but the input is "
            f"{shown}; use None for an input that every microbatch gets whole"
        )
    return size_of(value, axis)


def part_size(size: int, num_microbatches: int, micro_batch_size: int) -> int:
    """Return the samples of a microbatch of a batch of ``size``; the last one may have fewer."""
    return max(ceil(size / num_microbatches), min(micro_batch_size, size))


def split_batch(
    batch: Mapping[str, Any],
    num_microbatches: int,
    micro_batch_size: int = 1,
    axes: Axes | None = None,
) -> list[Microbatch]:
    """Cut a batch into at most ``num_microbatches`` parts along its axes of samples.

    A short batch gives fewer microbatches of ``micro_batch_size``, the last perhaps shorter: a
    new shape costs a new capture. Inputs without an axis of samples are passed whole to every
    microbatch.
    """
    axes = with_plain_axes(batch, {}) if axes is None else axes
    size = batch_size(batch, axes)
    step = part_size(size, num_microbatches, micro_batch_size)
    parts = []
    for index, start in enumerate(range(0, size, step)):
        inputs = dict(batch) if step >= size else part_of(batch, axes, start, start + step)
        samples = min(step, size - start)
        parts.append(Microbatch(index, inputs, samples, samples / size))
    return parts


def cut_batches(
    parts: Sequence[Mapping[str, Any]],
    weights: Sequence[float],
    device: torch.device,
    first: int = 0,
) -> list[Microbatch]:
    """Return microbatches that somebody else has cut; ``weights`` are those of their losses.

    They are moved to ``device``; ``first`` is the position of the first one in its batch.

    Raises:
        LoweringError: There is none, or not one weight for each.
    """
    if not parts or len(parts) != len(weights):
        raise LoweringError(
            f"{count_of(len(parts), 'microbatch')} with {count_of(len(weights), 'weight')} cannot "
            "be run; pass at least one microbatch, and one weight for each"
        )
    cut = []
    ready = (on_device(ready_batch(part), device) for part in parts)
    for index, (part, weight) in enumerate(zip(ready, weights, strict=True), start=first):
        sizes = (v.shape[0] for v in part.values() if isinstance(v, Tensor) and v.ndim > 0)
        cut.append(Microbatch(index, part, next(sizes, 1), weight))
    return cut


# Why the code of a model is to run once for an evaluation batch, as in plain torch.
KEEPS = "its code keeps something, or draws random numbers, whenever it runs"
READS = "the code between its blocks reads values of tensors in Python"


@dataclass(frozen=True)
class CutBatch:
    """A batch and its microbatches.

    Attributes:
        batch: The model's inputs by name.
        parts: Its microbatches, weighted by samples.
        found: How its inputs and the model's results hold samples.
    """

    batch: Mapping[str, Any]
    parts: Sequence[Microbatch]
    found: BatchAxes


class BatchCutter:
    """Cuts the batches of one executable.

    Args:
        model: Run on two samples to see which axes hold samples, once for every set of inputs.
        given: Axes that the user knows.
        weighs_losses: Whether the caller says what the microbatches' losses weigh.
    """

    def __init__(self, model: nn.Module, given: Axes, *, weighs_losses: bool = False) -> None:
        self._model = model
        self._given = dict(given)
        self._weighs_losses = weighs_losses
        self._found: dict[object, BatchAxes] = {}
        self._said: set[str] = set()

    def training(
        self,
        batch: Mapping[str, Any],
        num_microbatches: int,
        micro_batch_size: int,
        *,
        alone: bool = True,
    ) -> CutBatch:
        """Return a training batch and its microbatches.

        Args:
            batch: The model's inputs by name.
            num_microbatches: The most that there may be.
            micro_batch_size: Samples of a full one.
            alone: This is all of the batch, else the share of a replica.

        Raises:
            LoweringError: The batch cannot be cut.
        """
        ready = on_device(ready_batch(batch), device_of(self._model))
        plain = self._plain(ready)
        if plain is not None and alone:
            cut = split_batch(ready, num_microbatches, micro_batch_size, plain)
            if len(cut) == 1:
                return CutBatch(ready, cut, BatchAxes(plain))
        found = self._axes(ready)
        if found.problem:
            raise LoweringError(
                f"the batch cannot be cut into microbatches: {found.problem}; plan with "
                "microbatches=1, say with plan(batch_axes=...) which axis of an input holds the "
                "samples, or cut it yourself (forward_backward_parts, PipelineTrainer)"
            )
        cut = split_batch(ready, num_microbatches, micro_batch_size, found.axes)
        return CutBatch(ready, cut, found)

    def evaluation(self, batch: Mapping[str, Any], num_microbatches: int) -> CutBatch:
        """Return an evaluation batch and its microbatches.

        What mixes samples (a contrastive loss, a load-balancing loss) is not cut.
        """
        ready = on_device(ready_batch(batch), device_of(self._model))
        plain = self._plain(ready)
        if plain is not None and batch_size(ready, plain) == 1:
            return CutBatch(ready, split_batch(ready, 1, 1, plain), BatchAxes(plain))
        found = self._axes(ready)
        asked = self._weighs_losses and found.mixed == (LOSS,)
        reason = found.problem
        if found.mixed and not asked:
            reason = reason or f"{', '.join(found.mixed)} of a batch is not that of its samples"
        if reason or found.leaves_traces:
            return self.whole(ready, found, reason or KEEPS)
        return CutBatch(ready, split_batch(ready, num_microbatches, 1, found.axes), found)

    def whole(self, batch: Mapping[str, Any], found: BatchAxes, reason: str) -> CutBatch:
        """Return an evaluation batch as one microbatch, and say why."""
        self._say(
            "evaluation batches of %s run in one microbatch: %s", type(self._model).__name__, reason
        )
        return CutBatch(batch, [Microbatch(0, batch, _rows(batch), 1.0)], found)

    def _plain(self, batch: Mapping[str, Any]) -> Axes | None:
        """Return axis 0 of every tensor, if the sizes are equal."""
        axes = with_plain_axes(batch, self._given)
        for name in self._given.keys() & batch.keys():
            if axes[name] is not None:
                _size(name, batch[name], axes[name])
        try:
            batch_size(batch, axes)
        except LoweringError:
            return None
        return axes

    def _axes(self, batch: Mapping[str, Any]) -> BatchAxes:
        key = sized_like_samples(batch)
        if key not in self._found:
            with in_evaluation(self._model):
                self._found[key] = find_axes(self._model, batch, self._given)
        return self._found[key]

    def _say(self, text: str, *values: Any) -> None:
        if text not in self._said:
            self._said.add(text)
            logger.warning(text, *values)


def _rows(batch: Mapping[str, Any]) -> int:
    """Return the size of axis 0 of the first tensor, 1 without tensors."""
    return next((v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.ndim), 1)
