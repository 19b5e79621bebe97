"""Which blocks run their forward pass again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ipu_pipeline.errors import LoweringError
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.ir.select import select_all, unmatched


def recomputed_blocks(wish: str | Sequence[str] | None, plan: Plan) -> frozenset[str]:
    """Return the names of the blocks to recompute.

    Args:
        wish: ``None`` for the plan's choice, ``"all"``, ``"none"``, or names of blocks, prefixes
            of such names (``encoder.layer.3`` stands for all blocks inside of it) and patterns
            with ``*``, ``?`` and ``[...]``.
        plan: The plan.

    Raises:
        LoweringError: An entry fits no block.
    """
    names = [name for stage in plan.stages for name in stage.blocks]
    if wish is None:
        return frozenset(name for stage in plan.stages for name in stage.recompute)
    if isinstance(wish, str):
        return frozenset(names if wish == "all" else ())
    unknown = unmatched(wish, names)
    if unknown:
        raise LoweringError(
            f"recompute names {', '.join(map(repr, unknown))}, which is no block, prefix or "
            f"pattern of one; the blocks are {_shown(names)}"
        )
    return frozenset(select_all(wish, names))


def _shown(names: Iterable[str], limit: int = 40) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
