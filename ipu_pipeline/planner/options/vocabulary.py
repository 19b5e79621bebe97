"""A vocabulary spread over stages: which projection, loss and lookups, and which rows where.

Every stage with rows computes its part of the logits from the last hidden states, and its part of
the softmax; the parts are combined once a microbatch. The logits are never whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from math import isfinite
from numbers import Real
from typing import Any, Literal

from ipu_pipeline.errors import PlanError
from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.plan import Plan, VocabularyRows
from ipu_pipeline.planner.options.tables import FusedHead, fused_heads, table_of

Shares = Literal["even"] | Sequence[float]


def spread_head(graph: BlockGraph) -> FusedHead:
    """Return the projection with its loss that can be spread: the one with the most rows.

    Raises:
        PlanError: There is none, or the graph is one for inference.
    """
    if not graph.training:
        raise PlanError(
            "the plan is for inference, where no loss is computed: plan without vocabulary"
        )
    found = fused_heads(graph, [block.name for block in graph.blocks], in_parts=True)
    if not found:
        raise PlanError(
            f"{graph.model_class} has no output projection whose logits only a cross entropy "
            "(and a logsumexp) reads (between them: changes of shape, a bias, factors and a cap), "
            "so that its vocabulary cannot be spread over stages: plan without vocabulary"
        )
    return max(found, key=lambda head: head.table.rows)


def can_spread(graph: BlockGraph) -> bool:
    """Whether the vocabulary of ``graph`` can be spread."""
    try:
        spread_head(graph)
    except PlanError:
        return False
    return True


def lookups(graph: BlockGraph, head: FusedHead) -> dict[str, str]:
    """Return the parameter of every block that looks up in the head's table, or one as long."""
    found = {block.name: table_of(graph, block) for block in graph.blocks}
    return {
        name: table.parameter
        for name, table in found.items()
        if table is not None and table.use == "lookup" and table.rows == head.table.rows
    }


def vocabulary_rows(graph: BlockGraph, num_stages: int, shares: Shares) -> VocabularyRows:
    """Return the rows of every stage.

    Args:
        graph: The model.
        num_stages: Pipeline depth.
        shares: ``"even"``, or the share of every stage; 0: it holds no row.

    Raises:
        PlanError: The model has no such head, or fewer rows than stages with a share.
        ValueError: The shares are not one number for every stage, from 0 on.
    """
    weights = [1.0] * num_stages if shares == "even" else _weights(shares, num_stages)
    size = spread_head(graph).table.rows
    total, sums = sum(weights), list(accumulate(weights, initial=0.0))
    bounds = [round(size * part / total) for part in sums]
    rows = tuple(
        (stage, bounds[stage], bounds[stage + 1])
        for stage in range(num_stages)
        if weights[stage] > 0
    )
    if any(first >= end for _, first, end in rows):
        raise PlanError(
            f"{size} rows of the vocabulary cannot be shared as {shares} over {num_stages} stages: "
            "one would hold none; give fewer stages a share"
        )
    return VocabularyRows(rows)


def known_shares(asked: Any) -> Literal["auto", "even"] | tuple[float, ...] | None:
    """Return what a caller asks for, if it is a word that is known, or at least one number.

    Raises:
        ValueError: It is neither.
    """
    if asked is None or (isinstance(asked, str) and asked in ("auto", "even")):
        return asked  # type: ignore[return-value]
    numbers = tuple(asked) if isinstance(asked, Iterable) and not isinstance(asked, str) else ()
    if not numbers or not all(isinstance(number, Real) for number in numbers):
        raise ValueError(
            f"vocabulary is {asked!r}; give 'auto', 'even', or one share for each stage, from 0 on "
            "and not all 0, such as [1, 1, 2]"
        )
    return tuple(map(float, numbers))


def _weights(shares: str | Sequence[float], num_stages: int) -> list[float]:
    numbers = [] if isinstance(shares, str) else list(shares)
    known = all(isinstance(n, int | float) and isfinite(n) and n >= 0 for n in numbers)
    if not known or len(numbers) != num_stages or not sum(numbers) > 0:
        raise ValueError(
            f"vocabulary is {shares!r}; give 'even', or one share for each of the {num_stages} "
            "stages, from 0 on and not all 0, such as [1, 1, 2]"
        )
    return [float(number) / max(numbers) for number in numbers]


def check_vocabulary(plan: Plan) -> None:
    """Refuse a plan whose spread vocabulary does not fit its model.

    Raises:
        PlanError: The model has no head that can be spread, or another number of rows; or the
            last stage does not have it and the loss, or a block with one of its tables is
            serialized.
    """
    if plan.vocabulary is None:
        return
    head = spread_head(plan.graph)
    if head.table.rows != plan.vocabulary.size:
        raise PlanError(
            f"the plan spreads {plan.vocabulary.size} rows of the vocabulary, and "
            f"{head.table.parameter!r} has {head.table.rows}; spread these"
        )
    apart = [n for n in (head.head.name, head.loss.name) if n not in plan.stages[-1].blocks]
    if apart:
        raise PlanError(
            f"the vocabulary is spread over stages, and block {apart[0]!r} is not in the last one, "
            f"which computes the softmax of {head.head.name!r} with the loss; put both there, or "
            "plan without vocabulary"
        )
    names = {head.head.name, *lookups(plan.graph, head)}
    sliced = [
        name
        for stage in plan.stages
        for name in {**stage.serialize, **stage.table_slices}
        if name in names
    ]
    if sliced:
        raise PlanError(
            f"block {sliced[0]!r} is serialized and its table is spread over stages; use one of "
            "the two: plan without vocabulary, or without serializing that block"
        )
