"""The blocks of a plan with the prices at which they run, not their plain ones.

A plan holds every block's plain price and every stage's own prediction. What a stage differs from
the sum of its plain (or recomputed) blocks by is due to its serialized blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ipu_pipeline.ir.plan import Plan, PlannedBlock, PlannedStage
from ipu_pipeline.planner.options.cost_models import device_speeds
from ipu_pipeline.planner.schedules.load import block_bytes


def as_run(plan: Plan) -> Plan:
    """Return ``plan`` with serialized prices on its serialized blocks.

    A stage without a predicted stash, or of a plan edited by hand, keeps the plain prices.
    """
    prices = {block.name: block for block in plan.blocks}
    speeds = device_speeds(plan.machine)
    for stage in plan.stages:
        if stage.serialize and stage.stash_bytes is not None and not plan.edited:
            prices.update(_as_run(plan, stage, prices, speeds[stage.device]))
    return replace(plan, blocks=tuple(prices[block.name] for block in plan.blocks))


def _as_run(
    plan: Plan, stage: PlannedStage, prices: Mapping[str, PlannedBlock], speed: float
) -> dict[str, PlannedBlock]:
    blocks = [prices[name] for name in stage.blocks]
    again = set(stage.recompute)
    forward_s = sum(b.forward_s for b in blocks)
    backward_s = sum(b.backward_s + (b.forward_s if b.name in again else 0.0) for b in blocks)
    sliced = [prices[name] for name in stage.serialize]
    _, plain_stash, _ = block_bytes(plan, stage)
    saved = plain_stash - (stage.stash_bytes or 0)
    return {
        block.name: replace(
            block,
            forward_s=block.forward_s + share * (stage.forward_s * speed - forward_s),
            backward_s=max(0.0, block.backward_s + share * (stage.backward_s * speed - backward_s)),
            stash_bytes=max(0, round(block.stash_bytes - part * saved)),
        )
        for block, share, part in zip(
            sliced,
            _shares([b.forward_s + b.backward_s for b in sliced]),
            _shares([b.stash_bytes for b in sliced]),
            strict=True,
        )
    }


def _shares(values: Sequence[float]) -> list[float]:
    total = sum(values)
    return [value / total if total else 1 / len(values) for value in values]
