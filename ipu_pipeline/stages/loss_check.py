"""The check of what microbatches' losses weigh: their sum is the loss of all their samples.

Plain torch computes both, once for every shape of batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ipu_pipeline.capture.batch_axes import (
    PlainRun,
    part_of,
    plain_runs,
    two_parts,
)
from ipu_pipeline.capture.coarsen import LOSS
from ipu_pipeline.capture.compare import as_exact_as, is_weighted_sum, same_value
from ipu_pipeline.capture.inputs import described
from ipu_pipeline.capture.loss_rules import Rule, leaves_in_evaluation
from ipu_pipeline.capture.loss_terms import LossTerms, factor_name
from ipu_pipeline.ir.limits import count_of
from ipu_pipeline.stages.batch import CutBatch, Microbatch
from ipu_pipeline.stages.loss_shares import LossShares
from ipu_pipeline.stages.training import in_evaluation

# The check runs microbatches at once whose results take so many bytes, but two at least.
CHECKED_BYTES = 1 << 28
# A loss of numbers of about 1 may be as small as its rounding errors.
ROUNDED = 0.02
# What most losses use that mix samples; asked only where runs cannot be compared.
MIXING = frozenset(
    {"sort", "argsort", "topk", "median", "kthvalue", "quantile", "std", "var", "max", "min",
     "amax", "amin", "logsumexp", "norm", "corrcoef", "cov", "cdist", "matmul", "mm", "rmatmul",
     "einsum"}
)  # fmt: skip
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Compared:
    """What Python counted in the batches that were compared.

    It may have raised a divisor to a least value, or lowered it to a largest one, beyond what it
    had counted in these: by term the smallest count of a microbatch, and the largest of a batch.
    """

    least: tuple[float, ...]
    most: tuple[float, ...]

    @classmethod
    def of(cls, counts: Sequence[Sequence[float]], before: _Compared | None) -> _Compared:
        """Return the smallest counts and the largest sums, also of those before."""
        columns = list(zip(*counts, strict=False))
        least, most = tuple(map(min, columns)), tuple(map(sum, columns))
        if before is None:
            return cls(least, most)
        return cls(tuple(map(min, least, before.least)), tuple(map(max, most, before.most)))

    def holds(self, counts: Sequence[Sequence[float]]) -> bool:
        """Whether a batch's counts are between those compared."""
        return _Compared.of(counts, self) == self


class LossCheck:
    """Compares the weighted losses of microbatches with the loss of all their samples.

    Args:
        shares: Weighs them; the model's state is put back.
    """

    def __init__(self, shares: LossShares) -> None:
        self.shares = shares
        self.model = shares.model
        self._checked: dict[object, _Compared] = {}

    def check(
        self,
        cut: CutBatch,
        parts: Sequence[Microbatch],
        terms: Sequence[LossTerms],
        *,
        training: bool,
    ) -> bool:
        """Compare the loss of the first microbatches with that of all their samples.

        Once for all batches of the same shapes in which the same host values vary, and once where
        microbatches have different programs; always where what a microbatch counts does not tell
        how it counts; again where Python counts fewer in a microbatch than it has before, or more.

        Args:
            cut: The batch.
            parts: Its microbatches, with host values if those are known.
            terms: What the losses of its microbatches are made of.
            training: Whether this is a step of training.

        Returns:
            Whether that is known now; of losses that are not finite (no labels) nothing is.

        Raises:
            MixedSamplesError: They differ.
        """
        wish = self.shares.wish
        given = wish == "samples" or callable(wish) or (training and wish)
        pairs = list(zip(parts, terms, strict=True))
        known = all(part.inputs.keys() >= set(one.inputs) for part, one in pairs)
        if given or len(parts) == 1 or not known or not terms[0].terms:
            return True
        programs = len(set(map(id, terms)))
        key = training, described(cut.parts[0].inputs), _varying(cut, parts), programs > 1
        quotients = [one.quotients(part.inputs) for part, one in pairs]
        doubtful = [n for n, one in enumerate(terms) if one.is_doubtful(quotients[n])]
        unproven = any(one.unproven for one in terms)
        # A number of Python has no dtype.
        counts = [[count for term, count in own if not term.dtype] for own in quotients]
        before = self._checked.get(key)
        alike = before is not None and before.holds(counts)
        if alike and any(counts):  # a divisor that is the same everywhere may be a least value
            alike = self.shares.is_counted(terms)
        if alike and not (doubtful or unproven):
            return True
        weighted = self.shares.weighted(cut, parts, terms, training=False)
        least = max(doubtful, default=0) + 1
        if before is not None or unproven:
            least = len(parts)
        if not self.shares.is_ordered(cut, terms[0]):
            together = factor_name(0) not in weighted[0].inputs  # else they are measured apart
            if doubtful and not together:
                raise self.shares.mixed(
                    "a microbatch counts nothing of what a term is divided by, or Python may have "
                    "raised it to 1 (max(count, 1)), which torch's clamp(min=1) lets be seen",
                    terms[0],
                )
            if together and not self._compare(cut, parts, terms, least):
                return False
        self._checked[key] = _Compared.of(counts, before)
        return True

    def _compare(
        self, cut: CutBatch, parts: Sequence[Microbatch], terms: Sequence[LossTerms], least: int
    ) -> bool:
        leaves = leaves_in_evaluation(self.model, self.shares.granularity)
        for mode in (leaves, in_evaluation(self.model)):
            with mode, plain_runs(self.model) as run:
                first = run(cut.parts[0].inputs)
                if LOSS not in first.tensors:
                    return True
                if not first.draws:
                    return self._compare_losses(cut, parts, terms, first, run, least)
        known = all(term.kind != "opaque" for term in terms[0].varying)
        if LOSS in cut.found.mixed and not (known and MIXING.isdisjoint(terms[0].functions)):
            raise self.shares.mixed(
                "it draws random numbers in evaluation, too, so that it cannot be compared",
                terms[0],
            )
        return True

    def _compare_losses(
        self,
        cut: CutBatch,
        parts: Sequence[Microbatch],
        terms: Sequence[LossTerms],
        first: PlainRun,
        run: Callable[..., PlainRun],
        least: int,
    ) -> bool:
        """Find the weights that fit, if the loss is finite.

        ``first`` is its first microbatch, ``least`` how many have to be looked at.
        """
        bytes_of_one = max(1, sum(v.nbytes for v in first.tensors.values()))
        number = max(2, least, CHECKED_BYTES // bytes_of_one)
        own = cut.parts[:number]
        samples = sum(part.num_samples for part in own)
        parts = parts[:number]

        def loss(inputs: Mapping[str, Any]) -> Tensor:
            return as_exact_as(self.model, run(inputs).tensors[LOSS])

        own_loss = as_exact_as(self.model, first.tensors[LOSS])
        losses = [own_loss, *(loss(part.inputs) for part in own[1:])]
        try:
            whole = loss(part_of(cut.batch, cut.found.axes, 0, samples))
        except Exception as error:  # whatever a model does with more samples
            logger.info("plain torch cannot run %d samples at once: %s", samples, error)
            return True
        if not whole.isfinite():
            return False
        counted = self.shares.count(cut, parts, terms[:number], training=False)
        tried = self.shares.candidates(cut, counted, terms[:number])
        for rule, shares in tried.items():
            if not is_weighted_sum(whole, shares, losses, ROUNDED):
                continue
            if rule != "counted" and LOSS in cut.found.mixed and not _fits(cut, rule, loss):
                raise self.shares.mixed(
                    "it is where they have as many labels each, and not where one has fewer",
                    terms[0],
                )
            self.shares.note_fitting(terms, rule)
            return True
        pairs = zip(next(iter(tried.values())), losses, strict=True)
        summed = sum(share * float(loss) for share, loss in pairs if share)
        raise self.shares.mixed(
            f"of {count_of(samples, 'sample')} at once it is {float(whole):.6g}, and {summed:.6g} "
            f"as the weighted sum of the losses of {count_of(len(parts), 'microbatch')}",
            terms[0],
        )


def _fits(cut: CutBatch, rule: Rule, loss: Callable[[Mapping[str, Any]], Tensor]) -> bool:
    """Whether a rule also fits two microbatches of which one has fewer labels."""
    first, second = (part.num_samples for part in cut.parts[:2])
    shares = [1.0, 1.0] if rule == "sum" else [n / (first + second) for n in (first, second)]

    def fits(parts: Sequence[Mapping[str, Any]]) -> bool:
        whole, *each = map(loss, parts)
        return is_weighted_sum(whole, shares, each, ROUNDED)

    return two_parts(cut.batch, cut.found.axes, first, fits)


def _varying(cut: CutBatch, parts: Sequence[Microbatch]) -> frozenset[str]:
    """Return the names of the host values that are not the same in all microbatches."""
    names = {name for part in parts for name in part.inputs.keys() - cut.batch.keys()}
    values = {name: [part.inputs.get(name) for part in parts] for name in names}
    return frozenset(
        n for n, found in values.items() if not all(same_value(v, found[0]) for v in found)
    )
