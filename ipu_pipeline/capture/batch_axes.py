"""Which axis of every input holds the samples: the model is run on two samples, and one by one.

Sizes alone do not tell: 8 shared negatives in a batch of 8, (3, batch, length) position ids in a
batch of 3, a table of 4 class weights in a batch of 4. What counts is that the results of two
samples are those of each; where no choice of axes gives that, the results mix samples.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ipu_pipeline.capture.check import SEED
from ipu_pipeline.capture.coarsen import LOSS
from ipu_pipeline.capture.compare import close_enough, compared, is_weighted_sum
from ipu_pipeline.capture.loss_terms import IGNORED, label_arguments, labels_counted
from ipu_pipeline.capture.patches import not_compiled, preserved_state
from ipu_pipeline.capture.python_state import (
    Generators,
    PythonState,
    same_random_numbers,
    seed_torch,
)
from ipu_pipeline.capture.state import PutBack
from ipu_pipeline.capture.values import named_tensors
from ipu_pipeline.errors import first_line

Axes = Mapping[str, int | None]
T = TypeVar("T")
logger = logging.getLogger(__name__)

# Choices of axes that are tried before the first that runs at all is taken.
MAX_CHOICES = 24
# transformers' own inputs of which the axis of samples is known.
_BATCH_FIRST = frozenset({"input_ids", "attention_mask", "token_type_ids"})


@dataclass(frozen=True)
class BatchAxes:
    """How the inputs and results of a model hold samples.

    Attributes:
        axes: Axis by input; ``None``: every microbatch gets the input whole.
        outputs: Axis by output, on which microbatches are joined; ``None``: it is the same for
            every microbatch.
        mixed: Results of two samples that are not those of each one.
        adds_up: The loss of two samples is the sum, not a mean, of each one's.
        counts: It is their mean, each by its labels that count.
        has_loss: Whether there is a loss among the results.
        depends: Whether that is another for another part of the batch.
        problem: Why the batch cannot be cut; empty if it can.
        leaves_traces: Whether a run changes what the model keeps, or draws random numbers.
    """

    axes: Axes
    outputs: Axes = field(default_factory=dict)
    mixed: tuple[str, ...] = ()
    adds_up: bool = False
    counts: bool = False
    has_loss: bool = False
    depends: bool = False
    problem: str = ""
    leaves_traces: bool = False


def sized(value: Any) -> bool:
    """Whether ``value`` may have one entry per sample."""
    if isinstance(value, Tensor):
        return value.ndim > 0
    return isinstance(value, list | tuple) and len(value) > 0


def size_of(value: Any, axis: int) -> int:
    """Return the size of ``axis``, of a list or tuple its length."""
    return value.shape[axis] if isinstance(value, Tensor) else len(value)


def taken(value: Any, axis: int | None, start: int, stop: int) -> Any:
    """Return samples ``start`` to ``stop``; the whole value without axis, or with one of size 1.

    Torch broadcasts an axis of size 1 over the samples, and a list of one entry is none for each.
    """
    if axis is None or size_of(value, axis) == 1:
        return value
    if isinstance(value, Tensor):
        return value.narrow(axis, start, min(stop, value.shape[axis]) - start)
    return value[start:stop]


def part_of(batch: Mapping[str, Any], axes: Axes, start: int, stop: int) -> dict[str, Any]:
    """Return some samples of a batch."""
    return {name: taken(value, axes.get(name), start, stop) for name, value in batch.items()}


def doubled(part: Mapping[str, Any], axes: Axes) -> dict[str, Any]:
    """Return a microbatch in which every sample is there twice."""
    found = dict(part)
    for name, axis in axes.items():
        value = found.get(name)
        if axis is not None and sized(value) and size_of(value, axis) > 1:
            if isinstance(value, Tensor):
                found[name] = torch.cat([value, value], axis)
            else:
                found[name] = [*value, *value]  # type: ignore[misc]
    return found


def find_axes(model: nn.Module, batch: Mapping[str, Any], given: Axes) -> BatchAxes:
    """Find the axes of samples of a batch of at least two.

    The model runs in the mode that it is in, without gradients; its state is put back.

    Args:
        model: The whole model.
        batch: Its keyword arguments.
        given: Axes that the user knows.
    """
    found: BatchAxes | None = None
    problem, uncut = "", False
    if next(_choices(batch, given), None) is None:
        return BatchAxes(
            {name: given.get(name, 0) for name, value in batch.items() if sized(value)}
        )
    with torch.no_grad():
        for axes in itertools.islice(_choices(batch, given), MAX_CHOICES):
            try:
                tried = _tried(model, batch, axes)
            except Exception as error:  # whatever a model does with samples that do not fit
                problem = problem or f"{type(error).__name__}: {first_line(error)}"
                continue
            if problem and _cuts_nothing(tried):
                uncut = True
                continue
            first, found = found is None and not problem, found or tried
            # Axes that are less plain have to explain the loss; without one, the plain ones do.
            if not tried.mixed and (first or tried.depends or problem):
                return tried
            if first and (not tried.has_loss or (tried.outputs and tried.mixed == (LOSS,))):
                return tried
    return found or _undecided(batch, given, problem, uncut=uncut)


def _cuts_nothing(tried: BatchAxes) -> bool:
    """Whether every part of a batch gives the same, but for a loss that explains nothing."""
    axes = tried.outputs.values()
    return LOSS in tried.mixed and len(axes) > 0 and all(axis is None for axis in axes)


def sized_like_samples(batch: Mapping[str, Any]) -> object:
    """Return, hashable, which axes of a batch are as long as most first axes."""
    shapes = {name: _shape(value) for name, value in batch.items()}
    votes = Counter(v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.ndim)
    size = votes.most_common(1)[0][0] if votes else 0
    return tuple((name, tuple(n == size for n in shape)) for name, shape in shapes.items())


def _shape(value: Any) -> tuple[int, ...]:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return (len(value),) if sized(value) else ()


def _undecided(batch: Mapping[str, Any], given: Axes, problem: str, *, uncut: bool) -> BatchAxes:
    """Take the plain choice of a model that no choice runs, where every input has such an axis.

    ``uncut``: one ran whose parts all hold all samples, as where an input counts rows of the batch.
    """
    axes = next(_choices(batch, given))
    whole = [n for n, v in batch.items() if sized(v) and axes.get(n) is None and n not in given]
    if uncut and not whole:
        return BatchAxes(axes, problem=f"some of its samples make the model fail ({problem})")
    if not whole or not problem:
        return BatchAxes(axes, mixed=(LOSS,))
    name = next((n for n in whole if isinstance(batch[n], Tensor)), whole[0])
    shape = tuple(batch[name].shape) if isinstance(batch[name], Tensor) else len(batch[name])
    return BatchAxes(axes, problem=f"input {name!r} of size {shape}, given whole with two of the "
                     f"samples, makes the model fail ({problem})")  # fmt: skip


def _choices(batch: Mapping[str, Any], given: Axes) -> Iterator[dict[str, int | None]]:
    """Yield possible axes, those that differ least from axis 0 of every input first."""
    entries = {name: value for name, value in batch.items() if sized(value)}
    votes = Counter(
        size_of(value, given.get(name) or 0)
        for name, value in entries.items()
        if isinstance(value, Tensor) and given.get(name, 0) is not None
    )
    votes.pop(1, None)
    most = max(votes.values(), default=0)
    for size in [size for size, count in votes.items() if count == most]:
        options = [_options(name, value, size, given) for name, value in entries.items()]
        ranks = itertools.product(*(range(len(option)) for option in options))
        for rank in sorted(itertools.islice(ranks, 4096), key=sum):
            chosen = [option[r] for option, r in zip(options, rank, strict=True)]
            axes = dict(zip(entries, chosen, strict=True))
            if any(axis is not None and isinstance(batch[n], Tensor) for n, axis in axes.items()):
                yield axes


def _options(name: str, value: Any, size: int, given: Axes) -> Sequence[int | None]:
    if name in given:
        return [given[name]]
    if not isinstance(value, Tensor):  # as plain Python values are, if the model lets them
        return [None, 0] if len(value) == size else [None]
    fitting = [axis for axis, length in enumerate(value.shape) if length == size]
    if name in _BATCH_FIRST and 0 in fitting:
        return [0]
    return [*fitting, None]


def _tried(model: nn.Module, batch: Mapping[str, Any], axes: Axes) -> BatchAxes:
    """Compare the results of two samples with those of each."""
    with plain_runs(model) as run:
        results = two_parts(
            batch, axes, 1, lambda parts: [run(p, watched=n == 0) for n, p in enumerate(parts)]
        )
    both, *each = (one.tensors for one in results)
    outputs: dict[str, int | None] = {}
    weights = _weights(results) if LOSS in both else (0.5, 0.5)
    mixed = [] if weights else [LOSS]
    for name, value in both.items():
        if name == LOSS:
            continue
        axis = _joining_axis(value, [one.get(name) for one in each])
        if axis is False:
            mixed.append(name)
        else:
            outputs[name] = axis
    return BatchAxes(
        dict(axes),
        outputs,
        tuple(mixed),
        adds_up=weights == (1.0, 1.0),
        counts=weights not in (None, (1.0, 1.0), (0.5, 0.5)),
        has_loss=LOSS in both,
        depends=LOSS in both and any(not torch.equal(one[LOSS], both[LOSS]) for one in each),
        leaves_traces=results[0].changes or results[0].draws,
    )


def two_parts(
    batch: Mapping[str, Any], axes: Axes, size: int, measure: Callable[[list[dict[str, Any]]], T]
) -> T:
    """Measure the first two parts of a batch together, and each one.

    The second one has other numbers of labels and of entries of masks than the first, but some, if
    the model takes such values.

    Args:
        batch: Keyword arguments of the model.
        axes: Axes of samples.
        size: Samples of a part.
        measure: Given the inputs of both parts, of the first and of the second one.
    """
    both = part_of(batch, axes, 0, 2 * size)

    def each(inputs: dict[str, Any]) -> list[dict[str, Any]]:
        return [inputs, *(part_of(inputs, axes, n * size, (n + 1) * size) for n in range(2))]

    try:
        return measure(each(_uneven(both, axes, size)))
    except Exception as error:
        logger.debug("measured with its own labels and masks: %s", error)
        return measure(each(both))


def _uneven(both: Mapping[str, Any], axes: Axes, size: int) -> dict[str, Any]:
    """Return two parts with other data: the second one counts differently."""
    changed = dict(both)
    for name, value in both.items():
        if axes.get(name) != 0 or not isinstance(value, Tensor) or value.ndim != 2:
            continue
        if value.device.type != "cpu":  # a label that a kernel does not know ends the process
            continue
        is_labels = "label" in name and value.dtype == torch.long and value.shape[1] > 2
        if is_labels or (name.endswith("mask") and value.shape[1] >= 4):
            changed[name] = value.clone()
            _count_differently(changed[name], size, IGNORED if is_labels else 0)
    return changed


def _count_differently(value: Tensor, size: int, ignored: int) -> None:
    """Change rows so that another number of entries counts from row ``size`` on than before it.

    Fewer of row ``size`` count then; where none would in a part, all of its first row do.
    """
    some = 0 if ignored else 1
    if not (value[:size] != ignored).any():
        value[0] = some
    own = (value[size] != ignored).nonzero().flatten()
    rest, before = (int((part != ignored).sum()) for part in (value[size:], value[:size]))
    fewer = max(1, len(own) // 2) if ignored else len(own) // 4
    if len(own) - fewer > 1 and rest - fewer == before:
        fewer += 1
    if rest - fewer in (before, 0) or len(own) < 2:
        value[size] = value[size, own[0]] if len(own) else some
    else:
        value[size, own[:fewer] if ignored else own[len(own) - fewer :]] = ignored


class PlainRun(NamedTuple):
    """What one run of the model gives.

    Attributes:
        tensors: Its results by name.
        counts: What each mean over labels divided by.
        draws: Whether it draws random numbers.
        changes: Whether it changes what the model keeps, if that was asked for.
    """

    tensors: dict[str, Tensor]
    counts: list[float]
    draws: bool
    changes: bool = False


@contextlib.contextmanager
def plain_runs(model: nn.Module) -> Iterator[Callable[..., PlainRun]]:
    """Return a function that runs the model without gradients on some inputs.

    Every run begins in the same state and with the same random numbers; both are put back.
    ``run(part, watched=True)`` says what it leaves behind as well.
    """
    generators = Generators(model.modules())
    with (
        same_random_numbers(),
        torch.no_grad(),
        not_compiled(model),
        preserved_state(model) as restore,
        PutBack(model) as changed,
    ):

        def run(part: Mapping[str, Any], *, watched: bool = False) -> PlainRun:
            seed_torch(SEED)
            random.seed(SEED)
            np.random.seed(SEED)  # noqa: NPY002
            counting, changes = _Counting(), False
            is_changed = _watched(model) if watched else None
            seed, states = torch.get_rng_state(), generators.states()
            own = {n: v.clone() if isinstance(v, Tensor) else v for n, v in part.items()}
            try:
                with counting:
                    output = model(**own)
                draws = not torch.equal(seed, torch.get_rng_state()) or bool(
                    generators.drawn(states, generators.states())
                )
                if is_changed is not None and is_changed():
                    is_changed = _watched(model)  # what is set once, on the first run, is none
                    model(**part)
                    changes = is_changed()
            finally:
                changed.put_back()
                restore()
            tensors = {name: compared(value) for name, value in named_tensors(output)}
            return PlainRun(tensors, counting.counts, draws, changes)

        yield run


def _watched(model: nn.Module) -> Callable[[], bool]:
    """Return a function that says whether buffers or Python's values have changed since."""
    python = PythonState(model.modules())
    buffers = [(name, buffer, buffer._version) for name, buffer in model.named_buffers()]
    attributes = [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor)]
    versions = [value._version for value in attributes]

    def is_changed() -> bool:
        now = dict(model.named_buffers())
        return (
            any(now.get(n) is not b or b._version != version for n, b, version in buffers)
            or any(v._version != version for v, version in zip(attributes, versions, strict=True))
            or python.changed()
        )

    return is_changed


def _joining_axis(both: Tensor, each: Sequence[Tensor | None]) -> Any:
    """Return the axis on which ``each`` joined are ``both``; ``False`` if there is none."""
    first, second = each
    if first is None or second is None:
        return False
    if close_enough(both, first) and close_enough(both, second):
        return None
    axes = range(both.ndim if both.ndim == first.ndim == second.ndim else 0)
    fitting = (axis for axis in axes if _fit(axis, both, first, second))
    joined = (axis for axis in fitting if close_enough(both, torch.cat([first, second], axis)))
    return next(joined, False)


def _fit(axis: int, both: Tensor, first: Tensor, second: Tensor) -> bool:
    shapes = [list(tensor.shape) for tensor in (both, first, second)]
    sizes = [shape.pop(axis) for shape in shapes]
    return shapes[0] == shapes[1] == shapes[2] and sizes[0] == sizes[1] + sizes[2]


def _weights(results: Sequence[PlainRun]) -> tuple[float, float] | None:
    """Return the weights with which two losses are that of both samples, if there are any."""
    both, *each = results
    losses = [one.tensors.get(LOSS) for one in each]
    counts = [one.counts for one in each]
    rules = [(0.5, 0.5), (1.0, 1.0)]
    if all(len(found) == len(both.counts) for found in counts):
        pairs = zip(*counts, strict=True)
        rules += [(a / (a + b), b / (a + b)) for a, b in pairs if a + b]
    return next((w for w in rules if is_weighted_sum(both.tensors[LOSS], w, losses)), None)


class _Counting(TorchFunctionMode):
    """Notes what every mean over labels divides by."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[float] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        found = label_arguments(func, args, kwargs)
        if found is not None and not found[0].is_floating_point():
            self.counts.append(float(labels_counted(*found)))
        return func(*args, **kwargs)
