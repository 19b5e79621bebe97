"""What the losses of microbatches weigh in the loss of their batch, so that it is plain torch's.

Weights come from what the loss divides by (``capture/loss_terms.py``), or from a measurement of
its terms (``capture/loss_rules.py``). Whatever they come from, they are checked
(``loss_check.py``). Where no weights give that, the batch is refused, unless the caller says what
they weigh.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, isclose
from typing import Any

import torch
from torch import nn

from ipu_pipeline.capture.batch_axes import (
    doubled,
    plain_runs,
    sized,
    two_parts,
)
from ipu_pipeline.capture.coarsen import LOSS
from ipu_pipeline.capture.compare import same_value
from ipu_pipeline.capture.inputs import described
from ipu_pipeline.capture.loss_rules import (
    Rule,
    leaves_in_evaluation,
    rules_in_order,
    term_rules,
)
from ipu_pipeline.capture.loss_terms import AVERAGED, LossTerms, factor_name
from ipu_pipeline.errors import CaptureError, LoweringError
from ipu_pipeline.ir.limits import count_of
from ipu_pipeline.ir.plan import Granularity
from ipu_pipeline.stages.batch import CutBatch, Microbatch

LossWeights = str | Sequence[float] | Callable[[Mapping[str, Any]], Any] | None
# What a term is that no weights are known for; by whether microbatches run one after another.
_UNKNOWN = {
    False: "of two microbatches is not a sum or mean of what it is for each one",
    True: "depends on values that Python reads, or on what microbatches before it leave behind, "
    "and nothing tells whether it is a sum or a mean",
}
logger = logging.getLogger(__name__)


class MixedSamplesError(LoweringError):
    """No weights of the microbatches' losses give the loss of the batch.

    Args:
        problem: What was found.
        remedy: How else the loss of the batch is computed.
    """

    def __init__(
        self,
        problem: str,
        remedy: str = "plan with schedule='gpipe', with which the local target computes it once "
        "for all of them, or with microbatches=1",
    ) -> None:
        super().__init__(
            f"{problem}, so that no weights of the microbatches' losses are known that give the "
            f"loss of the batch; {remedy}; or choose weights: compile(loss_weights='samples') "
            "trains on the mean of the microbatches' losses, as gradient accumulation does, and a "
            "function of a microbatch's inputs says how much it counts (of labels, say, that "
            "Python counts)"
        )
        self.problem = problem


@dataclass(frozen=True)
class Counted:
    """What a microbatch counts in a batch, in numbers that processes can tell each other.

    Attributes:
        num_samples: Its samples.
        wish: What the caller's function says.
        counts: What each varying term of its loss counts, ``None``: not known.
        constant: Whether that is computed from inputs that every microbatch gets whole.
        rules: How the terms were measured to add up, or what fitted their sum.
    """

    num_samples: int
    wish: float = 0.0
    counts: tuple[float | None, ...] = ()
    constant: bool = False
    rules: tuple[str, ...] = ()


@dataclass(eq=False)
class LossShares:
    """Weighs the microbatches of one executable.

    Args:
        model: The whole model; its state is put back.
        wish: As in :class:`~ipu_pipeline.stages.executable.ExecutionOptions`.
        granularity: Of the plan.
    """

    model: nn.Module
    wish: LossWeights
    granularity: Granularity = "layer"
    _measured: dict[tuple[str, ...], tuple[Rule, ...] | None] = field(default_factory=dict)
    _fitting: dict[tuple[str, ...], Rule] = field(default_factory=dict)
    _ordered: dict[object, bool] = field(default_factory=dict)

    def is_ordered(self, cut: CutBatch, terms: LossTerms) -> bool:
        """Whether microbatches run one after another: the model keeps something or reads values.

        Their losses are then those of plain torch for one microbatch after another.
        """
        return terms.reads_values or self.keeps_values(cut.parts[0].inputs)

    def keeps_values(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the model keeps something in Python, so that it gives other values each time."""
        key = described(inputs)
        if key not in self._ordered:
            evaluation = leaves_in_evaluation(self.model, self.granularity)
            try:
                with evaluation, plain_runs(self.model) as run:
                    once, twice = (run(inputs, watched=n == 0) for n in range(2))
                same = all(same_value(v, twice.tensors[n]) for n, v in once.tensors.items())
                self._ordered[key] = once.changes or not (once.draws or same)
            except Exception as error:  # such as a hook that wants gradients
                logger.info("plain torch does not run without gradients: %s", error)
                self._ordered[key] = True
        return self._ordered[key]

    def count(
        self,
        cut: CutBatch,
        parts: Sequence[Microbatch],
        terms: Sequence[LossTerms],
        *,
        training: bool,
        alone: bool = True,
    ) -> list[Counted]:
        """Return what each microbatch counts.

        Args:
            cut: The batch.
            parts: Its microbatches, perhaps with host values.
            terms: What the loss of each of them is made of.
            training: A list of weights is for training steps.
            alone: These are all microbatches; else other processes have more.

        Raises:
            MixedSamplesError: No weights of the microbatches' losses give that of the batch.
        """
        wish = self.wish
        if callable(wish):
            return [Counted(part.num_samples, float(wish(part.inputs))) for part in parts]
        plain = [Counted(part.num_samples) for part in parts]
        single = len(parts) == 1 and alone and wish is None
        if not parts or single or wish == "samples" or (wish and training):
            return plain
        if any(set(one.inputs) - p.inputs.keys() for one, p in zip(terms, parts, strict=True)):
            raise self.mixed("Python counts what it is divided by, after it has read what "
                              "blocks compute", terms[0])  # fmt: skip
        constant = not any(_is_cut(name, cut, parts, alone=alone) for name in terms[0].inputs)
        rules = self._rules(cut, terms[0]) or (self._fitting.get(_names(terms)) or "",)
        return [
            replace(one, counts=tuple(own.counts(p.inputs)), constant=constant, rules=rules)
            for one, own, p in zip(plain, terms, parts, strict=True)
        ]

    def weighted(
        self,
        cut: CutBatch,
        parts: Sequence[Microbatch],
        terms: Sequence[LossTerms],
        *,
        training: bool,
        every: Sequence[Counted] = (),
        first: int = 0,
    ) -> list[Microbatch]:
        """Return microbatches with the weights that make their losses that of all of them.

        Args:
            cut: The batch.
            parts: Its microbatches, perhaps with host values.
            terms: What the loss of each of them is made of.
            training: A list of weights is for training steps.
            every: What all microbatches count, where other processes have more.
            first: Number of the first of ``parts`` among them.

        Raises:
            MixedSamplesError: There is no such weight.
            LoweringError: There are not as many weights as microbatches.
        """
        every = every or self.count(cut, parts, terms, training=training)
        if not parts or (len(every) == 1 and self.wish is None):
            return list(parts)
        own = slice(first, first + len(parts))
        shares = self._given(every, training=training)
        if shares is None:
            fitting = _agreed_rule(every)
            columns = _columns(every, terms[0])
            rules = self._rules(cut, terms[0])
            if rules and not self.is_ordered(cut, terms[0]):
                self._check_numbers(terms[0], rules)
            weights = rules and _by_rule(every, columns, rules)
            if weights and terms[0].factored:
                samples = _by_samples(every)
                parts = [replace(p, share=samples[first + n]) for n, p in enumerate(parts)]
                return _with_factors(parts, [column[own] for column in weights])
            if weights and cut.found.counts and None in columns:
                raise self.mixed("it is a mean over labels that a block of its own counts",
                                  terms[0])  # fmt: skip
            found = {} if weights else self.candidates(cut, every, terms)
            fit = (s for rule, s in found.items() if fitting in (None, rule))
            shares = weights[0] if weights else next(fit, None)
            if shares is None:
                raise self.mixed("what it is divided by is known for some microbatches only",
                                  terms[0])  # fmt: skip
        return [replace(part, share=s) for part, s in zip(parts, shares[own], strict=True)]

    def _check_numbers(self, terms: LossTerms, rules: Sequence[Rule]) -> None:
        """Refuse a number of Python's that did not count where its term was measured apart.

        It may be the least value of a count, which others are above.
        """
        for term, rule in zip(terms.varying, rules, strict=True):
            if term.kind == "quotient" and not term.dtype and rule != "counted":
                raise self.mixed(
                    f"its term {term.node!r} is divided by a number of Python's that did not count "
                    "where it was measured, and may do so for other samples (max(count, 8)), which "
                    "torch's clamp(min=8) lets be seen",
                    terms,
                )

    def _given(self, every: Sequence[Counted], *, training: bool) -> list[float] | None:
        wish = self.wish
        if callable(wish):
            counts = [one.wish for one in every]
            if not 0 < abs(sum(counts)) < inf:
                raise LoweringError(
                    f"loss_weights returned {counts[:8]} for the microbatches of a batch, which "
                    "are no parts of a whole; return numbers with a finite sum other than 0, or "
                    "leave out a batch in which nothing counts"
                )
            return _parts_of_one(counts)
        if wish == "samples":
            return _by_samples(every)
        if wish is None or not training:
            return None
        weights = [float(weight) for weight in wish]
        if len(weights) != len(every):
            raise LoweringError(
                f"loss_weights has {count_of(len(weights), 'weight')}, the batch "
                f"{count_of(len(every), 'microbatch')}; pass one for each, or a function that "
                "returns the weight of a microbatch's inputs"
            )
        return weights

    def _rules(self, cut: CutBatch, terms: LossTerms) -> tuple[Rule, ...] | None:
        """Return how each term adds up over samples, measured once on two microbatches.

        ``None``: One weight serves them all, and is compared.

        Raises:
            MixedSamplesError: A term is no sum or mean of its microbatches.
        """
        names = _names([terms])
        if names not in self._measured:
            rules: tuple[Rule, ...] | None = None
            if in_order := self.is_ordered(cut, terms):
                part = cut.parts[0].inputs
                pair = part, doubled(part, cut.found.axes)
                cuts = any(_is_cut(name, cut, cut.parts) for name in terms.inputs)
                rules = rules_in_order(self.model, pair, terms, self.granularity, cuts=cuts)
                rules = rules or (_rule_of_whole(cut),) * len(names)
            elif terms.factored:
                rules = self._measure(cut, names)
            self._measured[names] = rules and self._of_microbatches(rules, terms, in_order=in_order)
        return self._measured[names]

    def _of_microbatches(
        self, rules: tuple[Rule, ...], terms: LossTerms, *, in_order: bool
    ) -> tuple[Rule, ...]:
        """Return the rules with side losses that mix samples as means over microbatches.

        A side loss is a term over results of other blocks than the terms that do not mix samples:
        load balancing over the routers of all layers, say, which is trained so everywhere.
        ``in_order``: That is what plain torch gives for microbatches one after another.

        Raises:
            MixedSamplesError: Another term is no sum or mean of its microbatches.
        """
        pairs = list(zip(terms.varying, rules, strict=True))
        read = frozenset[int]().union(*(term.reads for term, rule in pairs if rule != "none"))
        mixing = [term for term, rule in pairs if rule == "none"]
        for term in mixing:
            known = term.kind == "opaque" or (not in_order and term.kind != "quotient")
            if not known or len(mixing) == len(pairs) or term.reads <= read:
                raise self.mixed(f"its term {term.node!r} {_UNKNOWN[in_order]}", terms)
        if not terms.factored and len(set(rules)) > 1:
            raise self.mixed(f"its terms {', '.join(_names([terms]))} count in different ways",
                              terms)  # fmt: skip
        if mixing and not in_order:
            logger.warning(
                "the side loss %s of %s mixes samples, as load balancing does: it is the mean over "
                "the microbatches of a step, as under gradient accumulation",
                ", ".join(term.node for term in mixing), type(self.model).__name__,
            )  # fmt: skip
        return tuple("mean" if rule == "none" else rule for rule in rules)

    def _measure(self, cut: CutBatch, names: tuple[str, ...]) -> tuple[Rule, ...] | None:
        first, second = (part.num_samples for part in cut.parts[:2])
        shares = first / (first + second), second / (first + second)

        def measure(parts: Sequence[Mapping[str, Any]]) -> tuple[Rule, ...] | None:
            return term_rules(self.model, parts, names, self.granularity, shares)

        try:
            return two_parts(cut.batch, cut.found.axes, first, measure)
        except CaptureError as error:
            logger.debug("the terms of the loss cannot be measured apart: %s", error)
            return None

    def candidates(
        self, cut: CutBatch, every: Sequence[Counted], terms: Sequence[LossTerms]
    ) -> dict[Rule, list[float]]:
        """Return weights of the microbatches that may fit, the likeliest first."""
        found = cut.found
        by_samples = _by_samples(every)
        columns = [column for column in _columns(every, terms[0]) if column]
        alike = all(one.alike for one in terms)
        # Means over other labels weigh alike while the microbatches have as many of each.
        even = all(term.kind in AVERAGED for term in terms[0].varying) and all(
            all(map(isclose, column, by_samples)) for column in columns
        )
        if not (alike or even) and (LOSS in found.mixed or found.counts):
            raise self.mixed("it adds terms that count in different ways: sums, or means over "
                              "different numbers of labels", terms[0])  # fmt: skip
        if found.counts and not columns:
            raise self.mixed("it is a mean over labels that a block of its own counts", terms[0])
        ordered: dict[Rule, list[float]] = {"mean": by_samples, "sum": [1.0] * len(every)}
        # A small mean beside a large sum is not seen in their total: terms are measured apart.
        single = not terms[0].factored or len(terms[0].varying) < 2
        if single and found.adds_up:
            ordered = {"sum": ordered["sum"]}
            # Two samples may be too few to see what is counted: both have the least divisor.
            quotients = {term.kind for term in terms[0].varying} == {"quotient"}
            return {"counted": list(columns[0]), **ordered} if quotients and columns else ordered
        if {term.kind for term in terms[0].varying} == {"sum"}:
            ordered = {"sum": ordered["sum"], **ordered}
        return {"counted": list(columns[0]), **ordered} if alike and columns else ordered

    def mixed(self, why: str, terms: LossTerms) -> MixedSamplesError:
        """Return the error that no weights give the loss, whose terms these are."""
        return MixedSamplesError(
            f"the loss of {type(self.model).__name__} ({', '.join(terms.functions)}) is not that "
            f"of its microbatches: {why}"
        )

    def is_counted(self, terms: Sequence[LossTerms]) -> bool:
        """Whether weights by what is counted were found to fit, or none were looked for."""
        return self._fitting.get(_names(terms), "counted") == "counted"

    def note_fitting(self, terms: Sequence[LossTerms], rule: Rule) -> None:
        """Note by which rule weights were found that fit the sum of the terms."""
        self._fitting[_names(terms)] = rule


def _rule_of_whole(cut: CutBatch) -> Rule:
    """Return how the loss adds up over two samples, if its terms depend on how many there are."""
    found = cut.found
    known = found.has_loss and LOSS not in found.mixed and not found.counts
    return "none" if not known else "sum" if found.adds_up else "mean"


def _names(terms: Sequence[LossTerms]) -> tuple[str, ...]:
    return tuple(term.node for term in terms[0].varying)


def _columns(every: Sequence[Counted], terms: LossTerms) -> list[list[float] | None]:
    """Return the weights of the microbatches, for each varying term; ``None`` if unknown."""
    by_samples = _by_samples(every)
    # A divisor that every microbatch gets whole is that of the batch; labels that the model
    # makes itself (a contrastive loss) are counted for each microbatch.
    whole = [1.0] * len(every)
    columns: list[list[float] | None] = []
    by_term = zip(*(one.counts for one in every), strict=True)
    for term, column in zip(terms.varying, by_term, strict=True):
        counts = [count for count in column if count is not None]
        known = len(counts) == len(every)
        found = (terms.weights(term, counts, by_samples) if known else []) or by_samples
        if all(one.constant for one in every):
            summed = term.kind == "quotient" and not term.averaged
            found = whole if summed else by_samples
        columns.append(found if known else None)
    return columns


def _agreed_rule(every: Sequence[Counted]) -> str | None:
    """Return what fitted the sum of the terms, if that was measured.

    Raises:
        MixedSamplesError: It has more terms in some microbatches than in others.
        LoweringError: It was measured differently on the shares of several processes.
    """
    numbers = sorted({len(one.counts) for one in every})
    if len(numbers) > 1:
        raise MixedSamplesError(
            f"the loss of a microbatch has {numbers[0]} terms here and {numbers[-1]} there, as if "
            "it had one for each sample",
            "use batches that fill every microbatch (dataloader_drop_last=True)",
        )
    found = {one.rules for one in every} - {("",), ()}
    if len(found) > 1:
        raise LoweringError(
            f"how the loss adds up over samples was measured as {sorted(found)} on the shares of "
            "the replicas; say it with loss_weights='samples' or a function, or give every process "
            "the whole batch (batches='whole')"
        )
    return next(iter(found))[0] if found else None


def _by_samples(every: Sequence[Counted]) -> list[float]:
    return _parts_of_one([one.num_samples for one in every])


def _is_cut(name: str, cut: CutBatch, parts: Sequence[Microbatch], *, alone: bool = True) -> bool:
    if name not in cut.batch:
        return True  # a number that Python may have counted in each microbatch
    if not alone:
        return cut.found.axes.get(name) is not None
    value = parts[0].inputs[name]
    return sized(value) and any(part.inputs[name] is not value for part in parts[1:])


def _by_rule(
    every: Sequence[Counted], columns: Sequence[list[float] | None], rules: Sequence[Rule]
) -> list[list[float]]:
    """Return the weights of every term: by what it counts, or as measured."""
    by_samples = _by_samples(every)
    plain = {"sum": [1.0] * len(every)}
    return [
        column if column and rule == "counted" else plain.get(rule, by_samples)
        for column, rule in zip(columns, rules, strict=True)
    ]


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


def _parts_of_one(counts: Sequence[float]) -> list[float]:
    """Return each count's part of their sum; nothing if that is 0."""
    total = sum(counts)
    return [count / total for count in counts] if total else []
