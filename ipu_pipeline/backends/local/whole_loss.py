"""The loss of a whole batch, computed once on what the stages give for all its microbatches.

For losses that microbatches cannot give (contrastive ones, load balancing, dice), where the
schedule runs every forward pass before the first backward pass (``gpipe``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ipu_pipeline.backends.local.step import Step
from ipu_pipeline.capture.batch_axes import plain_runs
from ipu_pipeline.capture.captured import CapturedModel
from ipu_pipeline.capture.coarsen import LOSS
from ipu_pipeline.capture.compare import as_exact_as, is_weighted_sum
from ipu_pipeline.stages.batch import CutBatch, Microbatch
from ipu_pipeline.stages.captures import StageCache
from ipu_pipeline.stages.loss_shares import MixedSamplesError
from ipu_pipeline.stages.stage import Stage
from ipu_pipeline.stages.variants import Prepared

NO_AXIS = -1


@dataclass(frozen=True)
class WholeLoss:
    """The loss block at the size of the batch.

    Attributes:
        stage: A stage of its own.
        inputs: The batch, with host values.
        axes: On which axis values of the microbatches are joined, by name.
        expected: What plain torch gives, if it is to be compared.
        error: Why microbatches cannot give it; raised if this cannot either.
    """

    stage: Stage
    inputs: Mapping[str, Any]
    axes: Mapping[str, int]
    expected: Tensor | None
    error: MixedSamplesError


class WholeLossStep(Step):
    """A step whose last stage computes the loss of the batch before its first backward pass."""

    whole: WholeLoss

    def _backward(self, stage: Stage, microbatch: int) -> None:
        if stage.index == len(self.stages[0]) - 1 and not self.results[0]:
            self._compute_loss(stage.index + 1)
        super()._backward(stage, microbatch)

    def _compute_loss(self, index: int) -> None:
        whole, parts = self.whole, range(len(self.microbatches))
        received, sizes = {}, {}
        for name in whole.stage.receives:
            values = [self._values[part, name] for part in parts]
            axis, needed = whole.axes[name], any(value.requires_grad for value in values)
            values = [value.detach() for value in values]
            sizes[name] = [value.shape[axis] for value in values]
            received[name] = torch.cat(values, axis)
            received[name].requires_grad_(needed)
        key = (self.options.seed, self.global_step, 0)
        _, results = whole.stage.forward(0, whole.inputs, received, key, alone=True)
        loss = results[LOSS]
        if whole.expected is not None and not is_weighted_sum(whole.expected, [1.0], [loss], 0.02):
            raise whole.error
        found, shared = whole.stage.backward(0, {}, self.loss_scaling)
        for name, gradient in found.items():
            pieces = gradient.split(sizes[name], whole.axes[name])
            for part, piece in enumerate(pieces):
                self._gradients[part, name][index] = piece
        for parameter, gradient in shared:
            self._shared[-1][parameter].add(gradient)
        self.results = [{LOSS: loss} for _ in parts]


def whole_loss(
    cache: StageCache, cut: CutBatch, error: MixedSamplesError, *, compared: bool
) -> tuple[list[tuple[Stage, ...]], list[Microbatch], WholeLoss]:
    """Return the stages without the loss, the microbatches, and the loss of them all.

    ``compared``: with plain torch, which is done once.

    Raises:
        MixedSamplesError: The loss cannot be computed so: ``error``.
    """
    batch = Microbatch(0, cut.batch, sum(part.num_samples for part in cut.parts), 1.0)
    if cache.at_size(batch) is None:  # numbers that depend on sizes become inputs before
        raise error
    found = [one for group in cache.groups(cut.parts) for one in _plain(group, error)]
    captures = [one.attempt.variants.found[0].captured for one in found]
    at_size = cache.at_size(batch)
    if at_size is None:
        raise error
    captured, hosts = at_size
    if captured.changing:  # once for the batch, or once for every microbatch?
        raise error
    if any(one.glue.hosts.keys() != captured.glue.hosts.keys() for one in captures):
        raise error
    stages, last, axes = _apart(cache, captures, captured, error)
    expected = _expected(cache, cut, captures, last, error) if compared else None
    own = WholeLoss(last, {**cut.batch, **hosts}, axes, expected, error)
    return stages, [one.microbatch for one in found], own


def _plain(group: Sequence[Prepared], error: MixedSamplesError) -> Sequence[Prepared]:
    for one in group:
        if one.run is not None:
            one.run.close()
            raise error
    return group


def _expected(
    cache: StageCache,
    cut: CutBatch,
    captures: Sequence[CapturedModel],
    last: Stage,
    error: MixedSamplesError,
) -> Tensor | None:
    """Return what plain torch gives; ``None`` if it draws and the first axis is surely samples."""
    with plain_runs(cache.model) as run:
        plain = run(cut.batch)
    if not plain.draws:
        return as_exact_as(cache.model, plain.tensors[LOSS])
    for capture, part in zip(captures, cut.parts, strict=True):
        if any(capture.specs[name].shape[:1] != (part.num_samples,) for name in last.receives):
            raise error
    return None


def _apart(
    cache: StageCache,
    captures: Sequence[CapturedModel],
    captured: CapturedModel,
    error: MixedSamplesError,
) -> tuple[list[tuple[Stage, ...]], Stage, dict[str, int]]:
    """Return the stages of every microbatch, that of the loss, and how values are joined for it.

    The loss takes the block before it along, whose last code may compute scores of pairs, and more
    of them until it gets values of samples.
    """
    most = cache.last_blocks(captured)
    for number in range(min(2, most) if captured.programs[-1].name == LOSS else 1, most + 1):
        last = cache.with_blocks_apart(captured, number)[-1]
        axes: dict[str, int] = {}
        for name in last.receives:
            shapes = [one.specs[name].shape for one in captures]
            whole = captured.specs[name].shape
            axes[name] = joining_axis(shapes, whole)
        if NO_AXIS not in axes.values():
            stages = [cache.with_blocks_apart(one, number)[:-1] for one in captures]
            return stages, last, axes
    raise error


def joining_axis(shapes: Sequence[tuple[int, ...]], whole: tuple[int, ...]) -> int:
    """Return the axis on which values of microbatches are as long as that of the batch.

    :data:`NO_AXIS`: there is none.
    """
    for axis, size in enumerate(whole):
        others = {(*shape[:axis], *shape[axis + 1 :]) for shape in (*shapes, whole)}
        if len(others) == 1 and size == sum(shape[axis] for shape in shapes):
            return axis
    return NO_AXIS
