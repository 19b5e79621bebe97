"""Cut a batch into microbatches, so that what they compute is what the batch computes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, isclose
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
    two_samples,
)
from ipu_pipeline.capture.coarsen import LOSS
from ipu_pipeline.capture.inputs import ready_batch
from ipu_pipeline.capture.loss_rules import Rule, term_rules
from ipu_pipeline.capture.loss_terms import AVERAGED, LossTerms, factor_name
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.ir.plan import Granularity
from ipu_pipeline.stages.training import in_evaluation

LossWeights = str | Sequence[float] | Callable[[Mapping[str, Any]], Any] | None
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


def _size(name: str, value: Any, axis: int | None) -> int:
    if not sized(value) or axis is None or (isinstance(value, Tensor) and axis >= value.ndim):
        shown = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise LoweringError(
            f"batch_axes says that axis {axis} of {name!r} holds the samples, but the input is "
            f"{shown}; use None for an input that every microbatch gets whole"
        )
    return size_of(value, axis)


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
    step = max(ceil(size / num_microbatches), min(micro_batch_size, size))
    parts = []
    for index, start in enumerate(range(0, size, step)):
        inputs = dict(batch) if step >= size else part_of(batch, axes, start, start + step)
        samples = min(step, size - start)
        parts.append(Microbatch(index, inputs, samples, samples / size))
    return parts


def cut_batches(
    parts: Sequence[Mapping[str, Any]], weights: Sequence[float], first: int = 0
) -> list[Microbatch]:
    """Return microbatches that somebody else has cut; ``weights`` are those of their losses.

    ``first`` is the position of the first one in its batch.

    Raises:
        LoweringError: There is none, or not one weight for each.
    """
    if not parts or len(parts) != len(weights):
        raise LoweringError(
            f"{len(parts)} microbatches with {len(weights)} weights cannot be run; pass at least "
            "one microbatch, and one weight for each"
        )
    cut = []
    ready = map(ready_batch, parts)
    for index, (part, weight) in enumerate(zip(ready, weights, strict=True), start=first):
        sizes = (v.shape[0] for v in part.values() if isinstance(v, Tensor) and v.ndim > 0)
        cut.append(Microbatch(index, part, next(sizes, 1), weight))
    return cut


# Why the code of a model is to run once for an evaluation batch, as in plain torch.
KEEPS = "its code keeps something, or draws random numbers, whenever it runs"
READS = "the code between its blocks reads values of tensors in Python"


class BatchCutter:
    """Cuts the batches of one executable.

    Args:
        model: Run on two samples to see which axes hold samples, once for every set of inputs.
        given: Axes that the user knows.
        loss_weights: As in :class:`~ipu_pipeline.stages.executable.ExecutionOptions`.
        granularity: Of the plan.
    """

    def __init__(
        self,
        model: nn.Module,
        given: Axes,
        loss_weights: LossWeights,
        granularity: Granularity = "layer",
    ) -> None:
        self._model = model
        self._granularity = granularity
        self._given = dict(given)
        self._loss_weights = loss_weights
        self._found: dict[object, BatchAxes] = {}
        self._said: set[str] = set()
        self._measured: dict[tuple[str, ...], tuple[Rule, ...] | None] = {}
        self._batch: Mapping[str, Any] = {}
        self._found_axes = BatchAxes({})

    def training(
        self, batch: Mapping[str, Any], num_microbatches: int, micro_batch_size: int
    ) -> list[Microbatch]:
        """Return the microbatches of a training batch, weighted by samples.

        Raises:
            LoweringError: The batch cannot be cut.
        """
        ready = ready_batch(batch)
        plain = self._plain(ready)
        if plain is not None:
            cut = split_batch(ready, num_microbatches, micro_batch_size, plain)
            if len(cut) == 1:
                return cut
        found = self._axes(ready)
        if found.problem:
            raise LoweringError(
                f"the batch cannot be cut into microbatches: {found.problem}; plan with "
                "microbatches=1, say with plan(batch_axes=...) which axis of an input holds the "
                "samples, or cut it yourself (forward_backward_parts, PipelineTrainer)"
            )
        return split_batch(ready, num_microbatches, micro_batch_size, found.axes)

    def evaluation(
        self, batch: Mapping[str, Any], num_microbatches: int
    ) -> tuple[list[Microbatch], Axes]:
        """Return the microbatches of an evaluation batch, and the axes that join their outputs.

        What mixes samples (a contrastive loss, a load-balancing loss) is not cut.
        """
        ready = ready_batch(batch)
        plain = self._plain(ready)
        if plain is not None and batch_size(ready, plain) == 1:
            return split_batch(ready, 1, 1, plain), {}
        found = self._axes(ready)
        asked = self._loss_weights is not None and found.mixed == (LOSS,)
        reason = found.problem
        if found.mixed and not asked:
            reason = reason or f"{', '.join(found.mixed)} of a batch is not that of its samples"
        if reason or found.leaves_traces:
            return self.whole(ready, reason or KEEPS), found.outputs
        return split_batch(ready, num_microbatches, 1, found.axes), found.outputs

    def whole(self, batch: Mapping[str, Any], reason: str) -> list[Microbatch]:
        """Return an evaluation batch as one microbatch, and say why."""
        self._say(
            "evaluation batches of %s run in one microbatch: %s", type(self._model).__name__, reason
        )
        ready = ready_batch(batch)
        return [Microbatch(0, ready, _rows(ready), 1.0)]

    def weighted(
        self, parts: Sequence[Microbatch], terms: Sequence[LossTerms], *, training: bool
    ) -> list[Microbatch]:
        """Return the microbatches with the weights that make their losses that of the batch.

        Args:
            parts: Weighted by samples.
            terms: What the loss of each of them is made of.
            training: A list of weights is for training steps.

        Raises:
            LoweringError: There is no such weight, or not one for each microbatch.
        """
        if len(parts) == 1 and self._loss_weights is None:
            return list(parts)
        shares = self._given_shares(parts, training=training)
        # A small mean beside a large sum is not seen in their total: terms are measured apart.
        single = not terms[0].factored or len(terms[0].varying) < 2
        if shares is None and single and self._found_axes.adds_up:
            shares = [1.0] * len(parts)
        if shares is None:
            columns = self._columns(parts, terms)
            if terms[0].factored:
                rules = self._rules(terms[0])
                if rules is not None:
                    return _with_factors(parts, self._by_rule(parts, columns, rules))
            shares = self._shares(parts, terms, [column for column in columns if column])
        return [replace(part, share=share) for part, share in zip(parts, shares, strict=True)]

    def _given_shares(self, parts: Sequence[Microbatch], *, training: bool) -> list[float] | None:
        wish = self._loss_weights
        if callable(wish):
            return _parts_of_one([float(wish(part.inputs)) for part in parts])
        if wish == "samples":
            return [part.share for part in parts]
        if wish is None or not training:
            return None
        weights = [float(weight) for weight in wish]
        if len(weights) != len(parts):
            raise LoweringError(
                f"loss_weights has {len(weights)} weights, the batch {len(parts)} microbatches; "
                "pass one for each, or a function that returns the weight of a microbatch's inputs"
            )
        return weights

    def _columns(
        self, parts: Sequence[Microbatch], terms: Sequence[LossTerms]
    ) -> list[list[float] | None]:
        """Return the weights of the microbatches, for each varying term; ``None`` if unknown."""
        divisors = [one.divisors(p.inputs) for one, p in zip(terms, parts, strict=True)]
        constant = not any(self._is_cut(name, parts) for name in terms[0].inputs)
        by_samples = [part.share for part in parts]
        # A divisor that every microbatch gets whole is that of the batch; labels that the model
        # makes itself (a contrastive loss) are counted for each microbatch.
        whole = [1.0] * len(parts)
        columns: list[list[float] | None] = []
        for term, column in zip(terms[0].varying, zip(*divisors, strict=True), strict=True):
            counts = [count for count in column if count is not None]
            if term.averaged:
                pairs = zip(counts, by_samples, strict=bool(counts))
                counts = [count * share for count, share in pairs]
            found = term.weights(counts) or by_samples
            if constant:
                summed = term.kind == "quotient" and not term.averaged
                found = whole if summed else by_samples
            columns.append(found if counts else None)
        return columns

    def _rules(self, terms: LossTerms) -> tuple[Rule, ...] | None:
        """Return how each term adds up over samples, measured once."""
        names = tuple(term.node for term in terms.varying)
        if names not in self._measured:
            self._measured[names] = self._measure(names)
        return self._measured[names]

    def _measure(self, names: tuple[str, ...]) -> tuple[Rule, ...] | None:
        for uneven in (True, False):  # other values may be none that the model takes
            with contextlib.suppress(Exception):
                parts = two_samples(self._batch, self._found_axes.axes, uneven=uneven)
                return term_rules(self._model, parts, names, self._granularity)
        return None

    def _by_rule(
        self,
        parts: Sequence[Microbatch],
        columns: Sequence[list[float] | None],
        rules: Sequence[Rule],
    ) -> list[list[float]]:
        """Return the weights of every term: by what it counts, or as measured."""
        if "none" in rules:
            self._say_mixed()
        plain = {"sum": [1.0] * len(parts)}
        by_samples = [part.share for part in parts]
        return [
            column if column and rule in ("counted", "none") else plain.get(rule, by_samples)
            for column, rule in zip(columns, rules, strict=True)
        ]

    def _shares(
        self,
        parts: Sequence[Microbatch],
        terms: Sequence[LossTerms],
        columns: Sequence[list[float]],
    ) -> list[float]:
        found = self._found_axes
        by_samples = [part.share for part in parts]
        alike = all(one.alike for one in terms)
        # Means over other labels weigh alike while the microbatches have as many of each.
        even = all(term.kind in AVERAGED for term in terms[0].varying) and all(
            all(map(isclose, column, by_samples)) for column in columns
        )
        if not (alike or even) and (LOSS in found.mixed or found.counts):
            raise self._needs_weights("adds terms that count in different ways: sums, or means "
                                      "over different numbers of labels")  # fmt: skip
        if found.counts and not columns:
            raise self._needs_weights("is a mean over labels that a block of its own counts")
        if alike and LOSS in found.mixed and {t.kind for t in terms[0].varying} == {"sum"}:
            return [1.0] * len(parts)  # the samples alone do not tell: random numbers
        counted = alike and len(columns) > 0
        if LOSS in found.mixed and not (
            counted and set(self._rules(terms[0]) or ()) == {"counted"}
        ):
            self._say_mixed()
        if counted:
            return list(columns[0])
        return by_samples

    def _needs_weights(self, what: str) -> LoweringError:
        return LoweringError(
            f"the loss of {type(self._model).__name__} {what}, so that no weights of the "
            "microbatches' losses are known that give the loss of the batch; plan with "
            "microbatches=1, compute the loss in forward itself, or choose weights: compile("
            "loss_weights='samples'), a list, or a function of a microbatch's inputs"
        )

    def _say_mixed(self) -> None:
        self._say(
            "the loss of a batch of %s is not a mean over its samples or labels: it is trained "
            "microbatch by microbatch, and depends on their size; if it is a mean over something "
            "that Python counts, pass compile(loss_weights=) a function that counts it",
            type(self._model).__name__,
        )

    def _is_cut(self, name: str, parts: Sequence[Microbatch]) -> bool:
        value = parts[0].inputs[name]
        return sized(value) and any(part.inputs[name] is not value for part in parts[1:])

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
        self._batch, self._found_axes = batch, self._found[key]
        return self._found_axes

    def _say(self, text: str, *values: Any) -> None:
        if text not in self._said:
            self._said.add(text)
            logger.warning(text, *values)


def _with_factors(
    parts: Sequence[Microbatch], columns: Sequence[Sequence[float]]
) -> list[Microbatch]:
    """Give every term of the loss its own weight, beside that of the samples."""
    ready = []
    for part, weights in zip(parts, zip(*columns, strict=True), strict=True):
        factors = {
            factor_name(index): torch.tensor(weight / part.share)
            for index, weight in enumerate(weights)
        }
        ready.append(replace(part, inputs={**part.inputs, **factors}))
    return ready


def _rows(batch: Mapping[str, Any]) -> int:
    """Return the size of axis 0 of the first tensor, 1 without tensors."""
    return next((v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.ndim), 1)


def _parts_of_one(counts: Sequence[float]) -> list[float]:
    """Return each count's part of their sum; nothing if that is 0."""
    total = sum(counts)
    return [count / total for count in counts] if total else []
