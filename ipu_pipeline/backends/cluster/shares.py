"""What each replica reads of a batch: every process is given all of it, or its replica's share.

With shares a process cuts, captures and holds its own microbatches only. Replicas tell each other
what those count (samples, labels), so that losses weigh as in one batch; random numbers are keyed
by the position in it. What one process does with all microbatches in Python cannot be shared out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import msgspec

from ipu_pipeline.backends.cluster.groups import Groups
from ipu_pipeline.backends.cluster.layout import Layout
from ipu_pipeline.backends.cluster.ranks.consistency import together
from ipu_pipeline.backends.cluster.ranks.rendezvous import gather_over
from ipu_pipeline.capture.batch_axes import BatchAxes
from ipu_pipeline.capture.inputs import described
from ipu_pipeline.capture.python_state import Generators
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.stages.batch import BatchCutter, CutBatch, Microbatch, part_size, split_batch
from ipu_pipeline.stages.captures import StageCache
from ipu_pipeline.stages.loss_check import LossCheck
from ipu_pipeline.stages.loss_shares import Counted, LossShares
from ipu_pipeline.stages.stage import Stage

T = TypeVar("T")


def dealt(parts: Sequence[T], layout: Layout) -> list[T]:
    """Return the parts of this process's replica: neighbours, as evenly as possible.

    The last replica gets the last part, which may be short, and never more than the others. A
    replica gets none when there are fewer parts than replicas.
    """
    first, end = (
        -(-len(parts) * index // layout.num_replicas)
        for index in (layout.replica, layout.replica + 1)
    )
    return list(parts[first:end])


class BatchShares:
    """Cuts and weighs the training batches of one executable.

    Args:
        plan: How many microbatches a replica runs.
        groups: Of its processes.
        cutter: Cuts what this process is given.
        cache: Has the stages of microbatches.
        losses: Weighs them.
        batches: ``"whole"`` or ``"share"``.

    Attributes:
        apart: Whether every replica is given its own share.
    """

    def __init__(
        self,
        plan: Plan,
        groups: Groups,
        cutter: BatchCutter,
        cache: StageCache,
        losses: LossShares,
        batches: str,
    ) -> None:
        self._plan = plan
        self._groups = groups
        self._cutter = cutter
        self._cache = cache
        self._losses = losses
        self._check = LossCheck(losses)
        self.apart = batches == "share" and groups.layout.num_replicas > 1
        self._probed: set[str] = set()
        self._draws = False
        self._keeps: bool | None = None

    def of(self, num_samples: int) -> slice:
        """Return which samples of a batch this process is given in a training step."""
        if not self.apart:
            return slice(num_samples)
        plan, layout = self._plan, self._groups.layout
        number = plan.num_microbatches * layout.num_replicas
        step = part_size(num_samples, number, plan.micro_batch_size)
        starts = dealt(range(0, num_samples, step or 1), layout)
        if not starts:
            return slice(num_samples, num_samples)
        return slice(starts[0], min(starts[-1] + step, num_samples))

    def cut(self, batch: Mapping[str, Any]) -> CutBatch:
        """Return what this process is given as microbatches; a replica may have none.

        Raises:
            LoweringError: The batch cannot be cut.
        """
        if self.apart and not batch:
            return CutBatch({}, (), BatchAxes({}))
        copies = 1 if self.apart else self._groups.layout.num_replicas
        number = self._plan.num_microbatches * copies
        return self._cutter.training(
            batch, number, self._plan.micro_batch_size, alone=not self.apart
        )

    def numbered(self, parts: Sequence[Microbatch], first: int) -> list[Microbatch]:
        """Number microbatches that were cut elsewhere; those of replicas alternate."""
        layout = self._groups.layout
        copies, own = (layout.num_replicas, layout.replica) if self.apart else (1, 0)
        return [replace(p, index=first + copies * n + own) for n, p in enumerate(parts)]

    @contextmanager
    def noting_draws(self) -> Iterator[None]:
        """Note whether the code between the blocks draws from generators of Python."""
        if not self.apart:
            yield
            return
        generators = Generators(self._losses.model.modules())
        before = generators.states()
        yield
        self._draws = bool(generators.drawn(before, generators.states()))

    def weighted(
        self,
        cut: CutBatch,
        parts: Sequence[Microbatch],
        stages: Sequence[Sequence[Stage]],
        *,
        training: bool,
    ) -> list[Microbatch]:
        """Return microbatches with the weights that make their losses that of the batch.

        Raises:
            LoweringError: There are none; the same on every process.
        """
        terms = [own[-1].loss_terms for own in stages]
        losses, layout = self._losses, self._groups.layout
        if not (self.apart and training):
            self._check.check(cut, parts, terms, training=training)
            return losses.weighted(cut, parts, terms, training=training)

        def count() -> list[Counted]:
            probe = self._checked(cut, parts, terms)
            return losses.count(probe, parts, terms, training=True, alone=False)

        told = together(self, count, "replica")
        if not any(told):
            raise LoweringError(
                "the share of every replica is empty; pass at least one sample of the batch to one "
                "of them"
            )
        every = [msgspec.convert(one, Counted) for of_replica in told for one in of_replica]
        first = sum(map(len, told[: layout.replica]))
        found = losses.weighted(cut, parts, terms, training=True, every=every, first=first)
        return [replace(part, index=first + n) for n, part in enumerate(found)]

    def own(self, parts: Sequence[T]) -> list[T]:
        """Return those of this replica."""
        return list(parts) if self.apart else dealt(parts, self._groups.layout)

    def total(self, numbers: Sequence[float]) -> list[float]:
        """Return the sums of what each replica has, if it has a share only."""
        groups = self._groups
        return groups.sum_numbers(numbers, groups.replicas) if self.apart else list(numbers)

    def gather(self, value: Any, kind: Any = Any) -> list[Any]:
        """Return the plain data of all replicas; every process calls this."""
        groups = self._groups
        return groups.waiter.run(lambda: gather_over(groups.replicas, value, kind, groups.device))

    def check_parts(self, parts: Sequence[Microbatch]) -> None:
        """Refuse microbatches of a share that Python would not compute as one process does.

        Raises:
            LoweringError: The model draws or keeps values in Python; the same on every process.
        """
        if self.apart:
            together(self, lambda: self._check_python(parts), "replica")

    def _check_python(self, parts: Sequence[Microbatch], *, reads: bool = False) -> None:
        if self._keeps is None and parts:
            self._keeps = self._losses.keeps_values(parts[0].inputs)
        if reads or self._draws or self._keeps:
            raise LoweringError(
                f"{type(self._losses.model).__name__} draws from generators of Python or numpy, or "
                "keeps or reads values in Python whenever it runs, and a replica would do so for "
                "its share of the batch only; give every process the whole batch (batches='whole')"
            )

    def _checked(
        self, cut: CutBatch, parts: Sequence[Microbatch], terms: Sequence[Any]
    ) -> CutBatch:
        """Refuse what is not the same in shares; return the share in at least two parts."""
        if not self._probed and (not parts or sum(p.num_samples for p in parts) < 2):
            raise LoweringError(
                "the share of the first batch has fewer than two samples, on which could be seen "
                "how the model's losses add up; begin with a full batch, use larger microbatches, "
                "or give every process the whole batch (batches='whole')"
            )
        if not parts:
            return cut
        self._check_python(cut.parts, reads=not self._probed and terms[0].reads_values)
        probe, ready, known = cut, list(parts), list(terms)
        if len(parts) == 1 and parts[0].num_samples > 1:
            probe = replace(cut, parts=split_batch(cut.batch, 2, 1, cut.found.axes))
        shape = str(described(cut.parts[0].inputs))
        if shape not in self._probed:
            if probe is not cut:
                # Known programs at other sizes name other terms than those of the share itself.
                ready, known = replace(self._cache, self_check=False).foreseen(probe.parts)
            if self._check.check(probe, ready, known, training=True):
                self._probed.add(shape)
        return probe
