"""The terms of a loss, and what each counts in a microbatch: labels, a number of items, or samples.

A mean over labels, or a quotient with a divisor that is computed from the inputs alone, tells how
much each microbatch counts in the loss of the whole batch. ``loss_walk`` finds them; terms that
count differently get factors of their own, and ``loss_rules`` measures which.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from ipu_pipeline.capture.programs import Program

IGNORED = -100
# Kinds of terms that are means.
AVERAGED = frozenset({"labels", "selected", "mean"})
MEANS_OVER_LABELS = (functional.cross_entropy, functional.nll_loss)
TermKind = Literal["labels", "selected", "quotient", "sum", "number", "mean", "opaque", "constant"]


@dataclass(frozen=True)
class Term:
    """One term of a loss.

    Attributes:
        kind: A mean over ``labels`` or over ``selected`` elements; a ``quotient`` with a tensor; a
            ``sum``; a sum that is divided by a ``number``, perhaps that of the samples; any other
            ``mean``; what is none of them (``opaque``); what depends on no sample (``constant``).
        value: Name of the labels, of what is or does the selection, or of the number that a divisor
            counts.
        weight: Name of the weights of the classes, if there are any.
        ignored: Labels of this value do not count; the name of a host value if it is one.
        node: Name of the term.
        divisor: Name of the divisor where it is computed from ``value``, as one with a least value;
            of an opaque term, of a number that it is divided by or multiplied with, and that is
            computed from several samples in another way.
        dtype: Type of ``value``, where it is a tensor.
        averaged: Whether a mean is divided by a mean.
        reads: Numbers of the blocks whose results it is computed from.
    """

    kind: TermKind
    value: str = ""
    weight: str = ""
    ignored: int | str = IGNORED
    node: str = ""
    divisor: str = ""
    dtype: str = ""
    averaged: bool = False
    reads: frozenset[int] = frozenset()


@dataclass(frozen=True)
class LossTerms:
    """The terms of a loss, and the program that computes what they divide by.

    ``constants`` are weights of classes that the model holds, by name; ``factored``: every term
    but a constant is multiplied by an input of its own, called :func:`factor_name`; ``path``: the
    nodes between the terms and the loss; ``functions``: those that compute it, by name;
    ``reads_values``: Python reads values that blocks compute; ``divisors_of``: what computes a
    divisor from what it counts, by name.
    """

    terms: tuple[Term, ...] = ()
    program: Program | None = None
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    factored: bool = False
    path: frozenset[str] = frozenset()
    functions: tuple[str, ...] = ()
    reads_values: bool = False
    divisors_of: Mapping[str, Program] = field(default_factory=dict)

    def counts(self, inputs: Mapping[str, Any]) -> list[float | None]:
        """Return what each varying term counts in a microbatch's inputs, if it is known."""
        values: dict[str, Any] = {}
        if self.program is not None:
            values = {**self.constants, **{name: inputs[name] for name in self.program.inputs}}
            with torch.no_grad():
                self.program.run(values)
        return [_count(term, values) if term.value else None for term in self.varying]

    def quotients(self, inputs: Mapping[str, Any]) -> list[tuple[Term, float]]:
        """Return the terms with a divisor, and what each counts in a microbatch, if it is known."""
        if all(term.kind != "quotient" for term in self.varying):
            return []  # nothing is computed
        pairs = zip(self.varying, self.counts(inputs), strict=True)
        return [
            (term, count) for term, count in pairs if term.kind == "quotient" and count is not None
        ]

    def is_doubtful(self, quotients: Sequence[tuple[Term, float]]) -> bool:
        """Whether a microbatch may count in another way than others: what it counts does not tell.

        Python may have raised a divisor that it counts, as ``max(count, 1)`` does; what is divided
        by 0 need not be 0.
        """
        return any(
            self._divisor(term, count) <= 0 if term.dtype else count in (0, 1)
            for term, count in quotients
        )

    @property
    def unproven(self) -> bool:
        """Whether a term is made with a number that several samples give, not as a count."""
        return any(term.kind == "opaque" and term.divisor for term in self.varying)

    def weights(
        self, term: Term, counts: Sequence[float], by_samples: Sequence[float]
    ) -> list[float]:
        """Return what a term of each microbatch weighs in that of all; nothing if none counts.

        What is summed over samples, the dividend, adds up, and so does the count ``n``. The divisor
        ``d(n)`` need not, as one that is at least 1: a microbatch weighs ``d(n_i) / d(sum of n)``.

        Args:
            term: One of the varying ones.
            counts: What it counts in each microbatch.
            by_samples: Share of each microbatch in the samples.
        """
        shares = by_samples if term.averaged else [1.0] * len(counts)
        whole = self._divisor(term, sum(n * s for n, s in zip(counts, shares, strict=True)))
        own = [s * self._divisor(term, n) for n, s in zip(counts, shares, strict=True)]
        return [one / whole for one in own] if whole else []

    def _divisor(self, term: Term, count: float) -> float:
        program = self.divisors_of.get(term.divisor)
        if program is None:
            return count
        if term.dtype:
            given: Any = torch.tensor(count, dtype=getattr(torch, term.dtype))
        else:
            given = int(count) if float(count).is_integer() else count
        with torch.no_grad():
            return float(program(given)[0])

    @property
    def varying(self) -> tuple[Term, ...]:
        """Those that depend on samples."""
        return tuple(term for term in self.terms if term.kind != "constant")

    @property
    def alike(self) -> bool:
        """Whether one weight of a microbatch serves all terms, whatever the samples are."""
        groups = {_group(term) for term in self.varying}
        if len(self.varying) < len(self.terms) and not groups <= {"mean"}:
            averaged = all(term.kind in AVERAGED for term in self.varying)
            return averaged and len(groups) == 1
        return len(groups) < 2

    @property
    def inputs(self) -> tuple[str, ...]:
        """Inputs of the model that the divisors are computed from."""
        return () if self.program is None else self.program.inputs


def _group(term: Term) -> Hashable:
    """Return the same for terms of which microbatches are weighed alike."""
    if term.kind in ("mean", "sum"):
        return term.kind
    counted = term.value, term.weight, term.ignored, term.divisor
    return counted if term.value else term.node


def _count(term: Term, values: Mapping[str, Any]) -> float:
    value = values[term.value]
    if term.kind == "quotient":
        return float(value)
    if term.kind == "selected":
        return float(value.sum() if value.dtype is torch.bool else value.numel())
    ignored = values[term.ignored] if isinstance(term.ignored, str) else term.ignored
    return float(labels_counted(value, values.get(term.weight), ignored))


def labels_counted(target: Tensor, weight: Tensor | None, ignored: int) -> Tensor:
    """Return what a mean over labels divides by: labels that count, each by its class's weight."""
    counts = target != ignored
    return counts.sum() if weight is None else weight[target[counts]].sum()


def label_arguments(
    function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Any, Any, Any] | None:
    """Return target, class weights and ignored index of a mean over labels, else ``None``."""
    if function not in MEANS_OVER_LABELS:
        return None
    given = _signature(function).bind(*args, **kwargs).arguments
    averaged = given.get("reduction", "mean") == "mean" and given.get("size_average") is not False
    if not averaged or given.get("reduce") is False:
        return None
    return given["target"], given.get("weight"), given.get("ignore_index", IGNORED)


@cache
def _signature(function: Any) -> inspect.Signature:
    return inspect.signature(function)


def factor_name(index: int | str) -> str:
    """Return the name of the input that multiplies the ``index``-th varying term."""
    return f"loss_factor_{index}"
