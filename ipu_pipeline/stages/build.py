"""From a captured model and a plan to stages: which blocks each has, what it receives and sends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from ipu_pipeline.capture.captured import CapturedModel
from ipu_pipeline.capture.loss_walk import loss_terms
from ipu_pipeline.capture.programs import Program
from ipu_pipeline.capture.values import TensorMeta
from ipu_pipeline.errors import PlanError
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.stages.stage import Stage
from ipu_pipeline.stages.tables import RowShard, Table, fused_projections


def place_blocks(captured: CapturedModel, plan: Plan) -> list[list[str]]:
    """Return the block names of every stage.

    Blocks that the plan does not name (evaluation without labels has other glue) go to the
    latest stage that computes something for them.

    Raises:
        PlanError: A block needs what a later stage computes.
    """
    stage_of: dict[str, int] = {}
    producer = {value: p.name for p in captured.programs for value in p.outputs}
    for program in captured.programs:
        names = [producer[name] for name in program.inputs if name in producer]
        earliest = max((stage_of[name] for name in names), default=0)
        stage_of[program.name] = plan.stage_of.get(program.name, earliest)
        if stage_of[program.name] < earliest:
            later = next(name for name in names if stage_of[name] == earliest)
            raise PlanError(
                f"block {program.name!r} of stage {stage_of[program.name]} needs what block "
                f"{later!r} of stage {earliest} computes: the code between the blocks of "
                f"{type(captured.model).__name__} calls them in another order than when the plan "
                "was made; keep one order, or plan one stage"
            )
    return [
        [name for name, stage in stage_of.items() if stage == index]
        for index in range(plan.num_stages)
    ]


def build_stages(
    captured: CapturedModel,
    blocks: Sequence[Sequence[str]],
    recompute: Iterable[str] = (),
    tables: Mapping[str, Table] | None = None,
    row_shards: Mapping[int, Sequence[RowShard]] | None = None,
) -> tuple[Stage, ...]:
    """Build the stages of a split: ``blocks`` are the block names of each stage."""
    tables, row_shards = tables or {}, row_shards or {}
    stage_of = {name: index for index, names in enumerate(blocks) for name in names}
    producer = {v: stage_of[p.name] for p in captured.programs for v in p.outputs}
    programs = [
        tuple(p for p in captured.programs if stage_of[p.name] == index)
        for index in range(len(blocks))
    ]
    terms = loss_terms(captured)
    parameters = [_parameters(own, row_shards.get(i, ())) for i, own in enumerate(programs)]
    users = Counter(parameter for found in parameters for parameter in found)
    stages = []
    for index, own in enumerate(programs):
        results = {n: v for n, v in captured.results.items() if producer.get(v, 0) == index}
        held = tuple(row_shards.get(index, ()))
        received = [n for p in own for n in p.inputs if producer.get(n, index) != index]
        sends = [
            name
            for program in captured.programs
            for name in program.inputs
            if producer.get(name) == index and stage_of[program.name] != index
        ]
        received += [shard.received for shard in held if shard.received]
        shards = [shard.sent for shard in held if shard.sent]
        live = frozenset(p.name for p in own if _runs_live(p))
        stages.append(
            Stage(
                index=index,
                programs=own,
                prelude=captured.prelude(own, [*results.values(), *(s.ids for s in held)]),
                receives=tuple(dict.fromkeys(received)),
                sends=tuple(dict.fromkeys([*sends, *shards])),
                recompute=frozenset(recompute) - live,
                live=bool(live),
                in_order=captured.in_order,
                late_values=captured.glue.late_values,
                thread_bound=bool(captured.thread_locals),
                shared=tuple(p for p in parameters[index] if users[p] > 1 and p.requires_grad),
                results=results,
                order=tuple(captured.results),
                tables={p.name: tables[p.name] for p in own if p.name in tables},
                row_shards=held,
                specs=_specs(captured, (*sends, *results.values()), held),
                loss_terms=terms,
                fused=fused_projections(own, captured.programs, captured.results.values(), tables),
            )
        )
    return tuple(stages)


def at_sizes(stages: Sequence[Stage], captured: CapturedModel) -> tuple[Stage, ...]:
    """Return the same stages for other sizes: those of ``captured``."""
    return tuple(
        replace(
            stage,
            specs=_specs(captured, (*stage.sends, *stage.results.values()), stage.row_shards),
        )
        for stage in stages
    )


def _runs_live(program: Program) -> bool:
    return any(getattr(module, "runs_live", False) for module in program.module.modules())


def _parameters(programs: Sequence[Program], row_shards: Sequence[RowShard]) -> list[nn.Parameter]:
    found = dict.fromkeys(p for program in programs for p in program.module.parameters())
    return list(found | dict.fromkeys(shard.table.parameter for shard in row_shards))


def _specs(
    captured: CapturedModel, names: Iterable[str], row_shards: Sequence[RowShard]
) -> dict[str, TensorMeta]:
    found = {name: captured.specs[name] for name in names if name in captured.specs}
    for shard in row_shards:
        table = shard.table.parameter
        shape = (*captured.specs[shard.ids].shape, table.shape[1])
        dtype = str(table.dtype).removeprefix("torch.")
        if shard.sent:
            found[shard.sent] = TensorMeta(shape, dtype, table.requires_grad)
    return found
