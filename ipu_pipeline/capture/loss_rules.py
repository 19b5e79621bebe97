"""How the terms of a loss add up over samples, measured on two microbatches and on each one.

Names do not tell: a sum that is divided by a number is a mean where that number is the size of the
batch, a product of two vectors is a sum, and a load-balancing loss is neither.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ipu_pipeline.capture.captured import CapturedModel, capture
from ipu_pipeline.capture.check import SEED
from ipu_pipeline.capture.coarsen import LOSS
from ipu_pipeline.capture.compare import as_exact_as, is_weighted_sum
from ipu_pipeline.capture.inputs import described
from ipu_pipeline.capture.leaves import choose_leaves
from ipu_pipeline.capture.loss_terms import AVERAGED, LossTerms, Term, factor_name
from ipu_pipeline.capture.loss_walk import factored, loss_terms, with_counted
from ipu_pipeline.capture.patches import preserved_state
from ipu_pipeline.capture.python_state import same_random_numbers, seed_torch
from ipu_pipeline.capture.state import PutBack
from ipu_pipeline.ir.plan import Granularity

# Over samples, a term is a mean over what it counts or over samples, a sum, or none of these.
Rule = Literal["counted", "mean", "sum", "none"]
# What the kind of a term tells; a sum that is divided by a number may be either.
_RULE_OF_KIND: Mapping[str, Rule] = {
    "labels": "counted",
    "selected": "counted",
    "mean": "mean",
    "sum": "sum",
}
logger = logging.getLogger(__name__)


def term_rules(
    model: nn.Module,
    parts: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    granularity: Granularity,
    by_samples: Sequence[float] = (0.5, 0.5),
) -> tuple[Rule, ...] | None:
    """Return how each varying term adds up; ``None`` if the terms of the parts are others.

    Args:
        model: The whole model; parts without glue run in evaluation mode. Its state is put back.
        parts: Inputs of two microbatches, of the first and of the second one.
        names: Names of the terms.
        granularity: That of the plan.
        by_samples: What each of the two is of their samples.
    """
    found = _measured_alike(model, parts, names, granularity)
    if found is None:
        return None
    rows = [
        [(as_exact_as(model, value), count) for value, count in zip(values, counts, strict=True)]
        for _, values, counts in found
    ]
    size = sum(float(value.nan_to_num().abs()) for value in found[0][1])
    terms = found[0][0]
    return tuple(
        _rule(terms, term, by_samples, LOSS_NOISE * size, *row)
        for term, *row in zip(terms.varying, *rows, strict=True)
    )


def rules_in_order(
    model: nn.Module,
    parts: Sequence[Mapping[str, Any]],
    terms: LossTerms,
    granularity: Granularity,
    *,
    cuts: bool,
) -> tuple[Rule, ...] | None:
    """Return how the terms add up where what a sample gives depends on those before it.

    Two microbatches give something else together then. One microbatch with every sample twice
    tells: its statistics stay what they are, so that a sum is twice as large, and a mean the same.
    What is neither counts as its kind says. What mixes samples is a mean over microbatches, as in
    plain torch with accumulation.

    Args:
        model: As for :func:`term_rules`, also the granularity.
        parts: Inputs of a microbatch, and of the same with every sample twice.
        terms: What its loss is made of.
        granularity: That of the plan.
        cuts: Whether microbatches have divisors of their own.

    Returns:
        A rule by term, ``none`` where nothing tells; ``None`` if those of more samples are others.
    """
    varying, by_kind = terms.varying, dict(_RULE_OF_KIND)
    if cuts:
        by_kind["quotient"] = "counted"
    if not terms.factored and all(term.kind in AVERAGED for term in varying):
        return tuple(by_kind[term.kind] for term in varying)
    try:
        names = [term.node for term in varying]
        found = _measured_alike(model, parts, names, granularity)
    except Exception as error:  # whatever a model does with more samples
        logger.info("the terms of the loss cannot be measured: %s", error)
        return tuple(by_kind.get(term.kind, "none") for term in varying)
    if found is None:
        return None
    by_kind["opaque"] = "mean"
    size = LOSS_NOISE * sum(float(value.nan_to_num().abs()) for value in found[0][1])
    rules: list[Rule] = []
    for term, one, count, both, counts in zip(varying, *found[0][1:], *found[1][1:], strict=True):
        values = [as_exact_as(model, value) for value in (both, one)]
        same, added = (
            is_weighted_sum(values[0], [factor], values[1:], size) for factor in (1.0, 2.0)
        )
        doubled = count is not None and counts == (count if term.averaged else 2 * count)
        if same == added:  # neither, or 0, which is both
            rules.append(by_kind.get(term.kind, "none"))
        elif added:  # a count that is the same for more samples may be another for others
            rules.append("none" if cuts and term.kind == "quotient" else "sum")
        else:
            rules.append("counted" if doubled else "mean")
    return tuple(rules)


def _measured_alike(
    model: nn.Module,
    parts: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    granularity: Granularity,
) -> list[tuple[LossTerms, list[Tensor], list[float | None]]] | None:
    """Measure parts, each from the same state; ``None`` if their terms are others."""
    found = []
    known: dict[Hashable, CapturedModel] = {}
    for part in parts:  # a pass may change buffers
        with (
            same_random_numbers(),
            preserved_state(model),
            PutBack(model),
            leaves_in_evaluation(model, granularity),
            torch.enable_grad(),
        ):
            key = described(part)
            captured = known.get(key) or factored(
                with_counted(capture(model, part, granularity=granularity, self_check=False))
            )
            glue = captured.glue
            if not glue.unsteady and not any(call.reads_values for call in glue.calls):
                known[key] = captured  # of the same shapes and state: the same program
            found.append(_measured(captured, part))
    alike = all([term.node for term in terms.varying] == list(names) for terms, _, _ in found)
    return found if alike else None


_Row = tuple[Tensor, float | None]
# A term of a loss is at most as exact as the whole of it.
LOSS_NOISE = 0.05


def _rule(
    terms: LossTerms, term: Term, by_samples: Sequence[float], floor: float,
    both: _Row, first: _Row, second: _Row,
) -> Rule:  # fmt: skip
    tried: dict[Rule, Sequence[float]] = {"mean": by_samples, "sum": (1.0, 1.0)}
    a, b = first[1], second[1]
    if a is not None and b is not None:
        counted = terms.weights(term, [a, b], by_samples)
        if not counted:  # these samples do not tell
            return "counted"
        tried = {"counted": counted, **tried}
    for rule, weights in tried.items():
        if is_weighted_sum(both[0], weights, (first[0], second[0]), floor):
            return rule
    return "none"


def _measured(
    captured: CapturedModel, part: Mapping[str, Any]
) -> tuple[LossTerms, list[Tensor], list[float | None]]:
    """Return the terms of one part, their values, and what they count."""
    terms = loss_terms(captured)
    counts = terms.counts({**captured.glue.hosts, **part})
    seed_torch(SEED)
    if not terms.factored:  # one weight serves them all
        values = [captured.run(part)[LOSS].detach()] * len(terms.varying)
        return terms, values, counts
    # The loss is linear in the factors: its derivatives are what the terms give to it.
    factors = {
        factor_name(i): torch.ones((), requires_grad=True) for i in range(len(terms.varying))
    }
    loss = captured.run({**part, **factors})[LOSS]
    values = list(torch.autograd.grad(loss, list(factors.values())))
    return terms, values, counts


@contextlib.contextmanager
def leaves_in_evaluation(model: nn.Module, granularity: Granularity) -> Iterator[None]:
    """Switch off dropout inside blocks; what the glue does in training is still done."""
    glue = choose_leaves(model, granularity).glue
    leaves = [m for m in model.modules() if id(m) not in glue]
    modes = [(module, module.training) for module in leaves]
    for module in leaves:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
