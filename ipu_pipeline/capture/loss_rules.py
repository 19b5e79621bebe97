"""How the terms of a loss add up over samples, measured on two microbatches and on each one.

Names do not tell: a sum that is divided by a number is a mean where that number is the size of the
batch, a product of two vectors is a sum, and a load-balancing loss is neither.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ipu_pipeline.capture.batch_axes import as_exact_as, is_weighted_sum
from ipu_pipeline.capture.captured import capture
from ipu_pipeline.capture.check import SEED
from ipu_pipeline.capture.coarsen import LOSS
from ipu_pipeline.capture.leaves import choose_leaves
from ipu_pipeline.capture.loss_terms import LossTerms, Term, factor_name, factored, loss_terms
from ipu_pipeline.capture.patches import preserved_state
from ipu_pipeline.capture.python_state import same_random_numbers, seed_torch
from ipu_pipeline.capture.state import PutBack
from ipu_pipeline.ir.plan import Granularity

# Over samples, a term is a mean over what it counts or over samples, a sum, or none of these.
Rule = Literal["counted", "mean", "sum", "none"]


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
    found = []
    for part in parts:  # each from the same state: a pass may change buffers
        with (
            same_random_numbers(),
            preserved_state(model),
            PutBack(model),
            leaves_in_evaluation(model, granularity),
        ):
            found.append(_measured(model, part, granularity))
    if any([term.node for term in terms.varying] != list(names) for terms, _, _ in found):
        return None
    rows = [
        [(as_exact_as(model, value), count) for value, count in zip(values, counts, strict=True)]
        for _, values, counts in found
    ]
    size = sum(float(value.nan_to_num().abs()) for value in found[0][1])
    terms = found[0][0].varying
    return tuple(
        _rule(term, by_samples, LOSS_NOISE * size, *row)
        for term, *row in zip(terms, *rows, strict=True)
    )


_Row = tuple[Tensor, float | None]
# A term of a loss is at most as exact as the whole of it.
LOSS_NOISE = 0.05


def _rule(
    term: Term, by_samples: Sequence[float], floor: float, both: _Row, first: _Row, second: _Row
) -> Rule:
    tried: dict[Rule, Sequence[float]] = {"mean": by_samples, "sum": (1.0, 1.0)}
    a, b = first[1], second[1]
    if a is not None and b is not None:
        counts = [a * by_samples[0], b * by_samples[1]] if term.averaged else [a, b]
        counted = term.weights(counts)
        if not counted:  # these samples do not tell
            return "counted"
        tried = {"counted": counted, **tried}
    for rule, weights in tried.items():
        if is_weighted_sum(both[0], weights, (first[0], second[0]), floor):
            return rule
    return "none"


def _measured(
    model: nn.Module, part: Mapping[str, Any], granularity: Granularity
) -> tuple[LossTerms, list[Tensor], list[float | None]]:
    """Capture one part; return its terms, their values, and what they divide by."""
    with torch.enable_grad():
        captured = factored(capture(model, part, granularity=granularity, self_check=False))
    terms = loss_terms(captured)
    seed_torch(SEED)
    if not terms.factored:  # one weight serves them all
        values = [captured.run(part)[LOSS].detach()] * len(terms.varying)
        return terms, values, terms.divisors(part)
    # The loss is linear in the factors: its derivatives are what the terms give to it.
    factors = {
        factor_name(i): torch.ones((), requires_grad=True) for i in range(len(terms.varying))
    }
    with torch.enable_grad():
        loss = captured.run({**part, **factors})[LOSS]
        values = list(torch.autograd.grad(loss, list(factors.values())))
    return terms, values, terms.divisors(part)


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
